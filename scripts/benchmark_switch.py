"""Time of showing x and returning to y (`.eval()` and `.train()`), interleaved with schedulefree's, in one process.

    python scripts/benchmark_switch.py --sizes 1M 25M 124M --output_dir runs/benchmark

Prints a Markdown table; with --output_dir it is also written there. "bits changed" counts the elements of y that a
there-and-back changed: schedulefree's two interpolations are not each other's inverse in floating point.
"""

import argparse
import contextlib
import functools
import statistics
from pathlib import Path

import schedulefree
import torch
from benchmark_step import SIZES, environment, seconds, shapes, table, torch_operations_only
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree


def there_and_back(optimizer: torch.optim.Optimizer) -> None:
    optimizer.eval()
    optimizer.train()


def measure(size: str, dtype: torch.dtype, device: torch.device, repeats: int, keep_gradients: bool) -> list[dict]:
    start = [torch.randn(shape, device=device, dtype=dtype) * 0.02 for shape in shapes(size)]
    count = sum(t.numel() for t in start)
    contenders = {
        "schedulefree": schedulefree.AdamWScheduleFree,
        "ours": AdamWScheduleFree,
        "ours, park='copy'": functools.partial(AdamWScheduleFree, park="copy"),
    }
    optimizers = {name: build([nn.Parameter(t.clone()) for t in start]) for name, build in contenders.items()}
    for optimizer in optimizers.values():
        optimizer.train()
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p) * 0.01
        for _ in range(2):
            optimizer.step()
        if not keep_gradients:
            optimizer.zero_grad()  # as the Trainer does before it evaluates
        there_and_back(optimizer)
    optimizers["ours, torch operations"] = optimizers["ours, park='copy'"]
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    changed, parked = {}, {}
    for name, optimizer in optimizers.items():
        params = optimizer.param_groups[0]["params"]
        before = [p.detach().clone() for p in params]
        with torch_operations_only() if "torch" in name else contextlib.nullcontext():
            there_and_back(optimizer)
        changed[name] = sum(int((p != y).sum()) for p, y in zip(params, before, strict=True))
        optimizer.eval()
        parked[name] = getattr(optimizer, "parked_bytes", 0) / count
        optimizer.train()
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            with torch_operations_only() if "torch" in name else contextlib.nullcontext():
                times[name].append(seconds(lambda optimizer=optimizer: there_and_back(optimizer), device))
    rows = []
    for name in optimizers:
        ratios = sorted(a / b for a, b in zip(times["schedulefree"], times[name], strict=True))
        rows.append(
            {
                "parameters": size,
                "dtype": str(dtype).removeprefix("torch."),
                "switch": name,
                "ms, there and back": f"{statistics.median(times[name]) * 1e3:.2f}",
                "x schedulefree (min to max)": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                "bytes per parameter while x is shown": f"{parked[name]:.2f}",
                "elements changed": f"{changed[name]:,} of {count:,}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1M", "25M", "124M"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--keep_gradients", action="store_true", help="do not free them before the switch")
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    dtype, options = getattr(torch, args.dtype), (args.device, args.repeats, args.keep_gradients)
    rows = [row for size in args.sizes for row in measure(size, dtype, *options)]
    report = f"{environment(args.device)}\n\n{table(rows)}\n"
    print(report)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "switch.md").write_text(report)


if __name__ == "__main__":
    main()
