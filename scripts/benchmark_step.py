"""Time of one optimizer step, interleaved in one process: ours, schedulefree's, torch's AdamW.

    python scripts/benchmark_step.py --sizes 1M 25M 124M --dtype float32 --output_dir runs/benchmark

Prints a Markdown table (with hardware and versions) and, with --output_dir, also writes it and a picture there. Needs
schedulefree (the extra `test`); the row `fused` is the one-pass kernel where numba is installed (the extra `fast`).
"""

import argparse
import contextlib
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import schedulefree
import torch
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, kernels

# hidden size, layers, vocabulary, positions of GPT-2-like models
SIZES = {
    "1M": (96, 8, 1_024, 128),
    "25M": (384, 12, 10_000, 1_024),
    "124M": (768, 12, 50_257, 1_024),
    "1B": (1_600, 30, 50_257, 1_024),
}
# Bytes that a step has to move: read y, z, v, g and write y, z, v.
TENSORS_MOVED = 7


def shapes(size: str) -> list[tuple[int, ...]]:
    """The parameters of a GPT-2-like model, its embeddings tied."""
    h, layers, vocabulary, positions = SIZES[size]
    block = [(h,), (h,), (h, 3 * h), (3 * h,), (h, h), (h,), (h,), (h,), (h, 4 * h), (4 * h,), (4 * h, h), (h,)]
    return [(vocabulary, h), (positions, h), *block * layers, (h,), (h,)]


@contextlib.contextmanager
def torch_operations_only() -> Iterator[None]:
    """As on a machine without numba."""
    found = kernels.one_pass_kernel
    kernels.one_pass_kernel = lambda device_type: None
    try:
        yield
    finally:
        kernels.one_pass_kernel = found


def contenders(dtype: torch.dtype) -> dict[str, Callable]:
    """Name -> how to build the optimizer. The first one is what the others are compared with."""
    # In half precision, "parameter" does the same work as the others; "split" is the default, and keeps the average.
    plain = {"state_precision": "parameter"} if dtype in (torch.bfloat16, torch.float16) else {}
    rows = {
        "schedulefree, foreach": lambda p: schedulefree.AdamWScheduleFree(p, foreach=True),
        "schedulefree, loop": lambda p: schedulefree.AdamWScheduleFree(p, foreach=False),
        "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "ours, for-loop": lambda p: AdamWScheduleFree(p, implementation="for-loop", **plain),
        "ours, foreach": lambda p: AdamWScheduleFree(p, implementation="foreach", **plain),
        "ours, fused, torch operations": lambda p: AdamWScheduleFree(p, **plain),
    }
    if kernels.one_pass_kernel("cpu") is not None:
        rows["ours, fused, one pass"] = lambda p: AdamWScheduleFree(p, **plain)
    if plain:
        rows["ours, default (split)"] = lambda p: AdamWScheduleFree(p)
    return rows


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


# "cpu" is for a machine that others use at the same time, with one thread: what the process itself was given.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(call: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    synchronize(device)
    start = CLOCKS[clock]()
    call()
    synchronize(device)
    return CLOCKS[clock]() - start


def temporaries(call: Callable[[], object]) -> int:
    """The bytes that torch allocates during a call (on CPU: in all; a step returns them all)."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    return sum(max(0, event.cpu_memory_usage) for event in profiler.events())


def measure(size: str, dtype: torch.dtype, device: torch.device, repeats: int, clock: str = "wall") -> list[dict]:
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes(size)]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    count = sum(p.numel() for p in params)
    steps = {}
    for name, build in contenders(dtype).items():
        optimizer = build(params)
        getattr(optimizer, "train", lambda: None)()

        def step(optimizer=optimizer, torch_only="torch operations" in name):
            with torch_operations_only() if torch_only else contextlib.nullcontext():
                optimizer.step()

        steps[name] = step
        for _ in range(2):  # state, compilation, caches
            step()
    source = torch.ones(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {name: [] for name in [*steps, "copy"]}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, device, clock))
        times["copy"].append(seconds(functools.partial(target.copy_, source), device, clock))
    del source, target
    # A copy moves two tensors; the best of them is the memory limit.
    limit = min(times["copy"]) / 2 * TENSORS_MOVED
    rows = []
    for name, step in steps.items():
        ratios = sorted(a / b for a, b in zip(times["schedulefree, foreach"], times[name], strict=True))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        fused = statistics.median(a / b for a, b in zip(times["torch AdamW, fused"], times[name], strict=True))
        rows.append(
            {
                "parameters": size,
                "dtype": str(dtype).removeprefix("torch."),
                "step": name,
                "ms": f"{statistics.median(times[name]) * 1e3:.2f}",
                "x schedulefree foreach (min to max)": f"{statistics.median(ratios):.2f} ({spread})",
                "x torch fused AdamW": f"{fused:.2f}",
                "of the memory limit": f"{limit / statistics.median(times[name]):.2f}",
                "allocated, MiB": f"{temporaries(step) / 2**20:.1f}" if device.type == "cpu" else "-",
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def environment(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if device.type == "cpu":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import numba

        versions["numba"] = numba.__version__
    return f"{name}, {torch.get_num_threads()} threads; " + ", ".join(f"{k} {v}" for k, v in versions.items())


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row["parameters"] for row in rows))
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3.6), squeeze=False, sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        own = [row for row in rows if row["parameters"] == size]
        axis.barh([row["step"] for row in own], [float(row["ms"]) for row in own])
        axis.set(title=f"{size} parameters, {own[0]['dtype']}", xlabel="ms per step")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1M", "25M", "124M"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    rows = []
    report = ""
    for dtype in args.dtype:
        own = [
            row
            for size in args.sizes
            for row in measure(size, getattr(torch, dtype), args.device, args.repeats, args.clock)
        ]
        rows += own
        if args.output_dir is not None:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            plot(own, args.output_dir / f"step_{dtype}.png")
    report = f"{environment(args.device)}\n\n{table(rows)}\n"
    print(report)
    if args.output_dir is not None:
        (args.output_dir / "step.md").write_text(report)


if __name__ == "__main__":
    main()
