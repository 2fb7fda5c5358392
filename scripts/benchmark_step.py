"""Time of one optimizer step, interleaved in one process: ours, schedulefree's, torch's AdamW.

    python scripts/benchmark_step.py --sizes 1M 25M 124M --dtype float32 --output_dir runs/benchmark
    python scripts/benchmark_step.py --device cuda --sizes 124M 1B --dtype float32 bfloat16 --output_dir runs/benchmark

Prints a Markdown table (with hardware, versions, and the speed of a copy) and, with --output_dir, also writes it and a
picture there. Needs schedulefree (the extra `test`). The rows "one pass" say which kernel ran: numba's (the extra
`fast`) on CPU, Triton's on GPU. All contenders hold their states at the same time: at 1B in float32, some 80 GB; with
--only, those whose names contain one of the given texts, and the two that the others are compared with.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import schedulefree
import torch
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, kernels

# Each contender makes some steps in a row, as in a loop without a model: the caches hold what they can of its tensors.
STEPS_IN_A_TURN = 5

# hidden size, layers, vocabulary, positions of GPT-2-like models
SIZES = {
    "1M": (96, 8, 1_024, 128),
    "25M": (384, 12, 10_000, 1_024),
    "124M": (768, 12, 50_257, 1_024),
    "1B": (1_600, 30, 50_257, 1_024),
}


def tensors_moved(name: str) -> int:
    """By a step that touches each once: it reads y, z, v, g and writes y, z, v; and y_low, where there is one."""
    return 9 if "split" in name else 7


# Parts of names that say how a contender is run.
TORCH_ONLY, GRAPH = "torch operations", "CUDA graph"
COMPARED_WITH = ("schedulefree, foreach", "torch AdamW, fused")


def shapes(size: str) -> list[tuple[int, ...]]:
    """The parameters of a GPT-2-like model, its embeddings tied."""
    h, layers, vocabulary, positions = SIZES[size]
    block = [(h,), (h,), (h, 3 * h), (3 * h,), (h, h), (h,), (h,), (h,), (h, 4 * h), (4 * h,), (4 * h, h), (h,)]
    return [(vocabulary, h), (positions, h), *block * layers, (h,), (h,)]


@contextlib.contextmanager
def torch_operations_only() -> Iterator[None]:
    """As on a machine without numba or triton."""
    found = kernels.one_pass_kernel
    kernels.one_pass_kernel = lambda device_type: None
    try:
        yield
    finally:
        kernels.one_pass_kernel = found


def contenders(dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
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
        f"ours, fused, {TORCH_ONLY}": lambda p: AdamWScheduleFree(p, **plain),
    }
    compiler = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if kernels.one_pass_kernel(device.type) is not None:
        rows[f"ours, fused, one pass ({compiler})"] = lambda p: AdamWScheduleFree(p, **plain)
        if device.type == "cuda":
            rows[f"ours, one pass ({compiler}), {GRAPH}"] = lambda p: AdamWScheduleFree(p, capturable=True, **plain)
    if plain:
        is_compiled = kernels.kernel_for(device, dtype) is not None
        rows[f"ours, default (split), {f'one pass ({compiler})' if is_compiled else TORCH_ONLY}"] = AdamWScheduleFree
        if is_compiled:
            rows[f"ours, default (split), {TORCH_ONLY}"] = AdamWScheduleFree
    return rows


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A step as a CUDA graph, after the ones outside of it that a capture needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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


def temporaries(call: Callable[[], object], device: torch.device) -> int:
    """The bytes that torch allocates during a call: on CPU in all (a step returns them all), on GPU at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    return sum(max(0, event.cpu_memory_usage) for event in profiler.events())


def measure(
    size: str, dtype: torch.dtype, device: torch.device, repeats: int, clock: str = "wall", only: Sequence[str] = ("",)
) -> list[dict]:
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes(size)]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    count = sum(p.numel() for p in params)
    steps = {}
    for name, build in contenders(dtype, device).items():
        if name not in COMPARED_WITH and not any(text in name for text in only):
            continue
        optimizer = build(params)
        getattr(optimizer, "train", lambda: None)()

        def step(optimizer=optimizer, torch_only=TORCH_ONLY in name):
            with torch_operations_only() if torch_only else contextlib.nullcontext():
                optimizer.step()

        for _ in range(2):  # state, compilation, caches
            step()
        steps[name] = captured(step) if GRAPH in name else step
    source = torch.ones(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {name: [] for name in [*steps, "copy"]}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(statistics.median(seconds(step, device, clock) for _ in range(STEPS_IN_A_TURN)))
        times["copy"].append(seconds(functools.partial(target.copy_, source), device, clock))
    del source, target
    # A copy moves two tensors; the best of them is the memory limit.
    per_tensor = min(times["copy"]) / 2
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
                "of the memory limit": f"{per_tensor * tensors_moved(name) / statistics.median(times[name]):.2f}",
                "allocated, MiB": f"{temporaries(step, device) / 2**20:.1f}",
                "copy, GB/s": f"{2 * count * dtype.itemsize / min(times['copy']) / 1e9:.0f}",
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
    for library in ("numba", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
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
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="parts of the names of contenders")
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    rows = []
    report = ""
    for dtype in args.dtype:
        own = [
            row
            for size in args.sizes
            for row in measure(size, getattr(torch, dtype), args.device, args.repeats, args.clock, args.only)
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
