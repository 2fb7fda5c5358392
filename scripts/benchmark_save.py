"""Time of writing x, against save_pretrained and a plain save_file, interleaved in one process.

    python scripts/benchmark_save.py --sizes 25M 124M --output_dir runs/benchmark

A GPT-2-like model in float32 whose optimizer shows y. Contenders: `save_file` of the raw parameters, `save_pretrained`
of the model as it stands (y), schedulefree's optimizer toggled around it (eval, save_pretrained, train), and ours,
showing x around it. "one pass" is a copy of all parameters. A checkpoint of the Trainer also hashes and syncs its
files; the last column says how long the hashing of the weights takes. Prints a Markdown table.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import schedulefree
import torch
from benchmark_step import environment, seconds, table
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_schedulefree.checkpoint.record import file_checksum
from hf_schedulefree.optim import AdamWScheduleFree
from hf_schedulefree.weights import averaged_weights

CPU = torch.device("cpu")
MODELS = {
    "1M": {"n_embd": 64, "n_layer": 8, "n_head": 2, "vocab_size": 8000},
    "25M": {"n_embd": 384, "n_layer": 8, "n_head": 6, "vocab_size": 28000},
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "537M": {"n_embd": 1408, "n_layer": 20, "n_head": 22},
}


def trained(size: str, optimizer_class: type[torch.optim.Optimizer]) -> tuple[GPT2LMHeadModel, torch.optim.Optimizer]:
    """A model in the middle of a run: it shows y, the gradients are freed."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**MODELS[size]))
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    optimizer.train()
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 0.01
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def contenders(size: str, folder: Path) -> dict[str, Callable[[], None]]:
    model, ours = trained(size, AdamWScheduleFree)
    theirs_model, theirs = trained(size, schedulefree.AdamWScheduleFree)
    raw = {name: p.detach() for name, p in model.named_parameters()}
    copy = [torch.empty_like(p) for p in raw.values()]

    def one_pass() -> None:
        for target, p in zip(copy, raw.values(), strict=True):
            target.copy_(p)

    def toggled() -> None:
        theirs.eval()
        theirs_model.save_pretrained(folder / "toggled")
        theirs.train()

    def at_x() -> None:
        with averaged_weights(model, ours):
            model.save_pretrained(folder / "ours")

    return {
        "one pass over the parameters": one_pass,
        "save_file, raw parameters": lambda: save_file(raw, folder / "raw.safetensors"),
        "save_pretrained, as it stands (y)": lambda: model.save_pretrained(folder / "plain"),
        "schedulefree: eval, save_pretrained, train": toggled,
        "ours: save_pretrained at x": at_x,
    }


def measure(size: str, repeats: int) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        actions = contenders(size, folder)
        times: dict[str, list[float]] = {contender: [] for contender in actions}
        for repeat in range(repeats + 1):
            for contender, action in actions.items():
                spent = seconds(action, CPU)
                if repeat:  # the first round is a warm-up
                    times[contender].append(spent)
        hashing = min(seconds(lambda: file_checksum(folder / "ours" / "model.safetensors"), CPU) for _ in range(3))
    rows = []
    saves = times["save_pretrained, as it stands (y)"]
    for contender, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, saves, strict=True))
        row = {
            "parameters": size,
            "what": contender,
            "ms": f"{statistics.median(values) * 1e3:.0f}",
            "of save_pretrained (min to max)": f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            "hashing, ms": f"{hashing * 1e3:.0f}" if contender.startswith("ours") else "",
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=["25M", "124M"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measure(size, args.repeats)]
    report = f"{environment(CPU)}\n\n{table(rows)}\n"
    print(report)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "save.md").write_text(report)


if __name__ == "__main__":
    main()
