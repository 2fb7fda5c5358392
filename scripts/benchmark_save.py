"""Time and memory of writing x, against save_pretrained and a plain save_file; and of a checkpoint against AdamW's.

    python scripts/benchmark_save.py --sizes 25M 124M 537M --output_dir runs/benchmark

A GPT-2-like model in float32 in the middle of a run: it shows y. Contenders: `save_file` of the raw parameters,
`save_pretrained` of the model as it stands (y), schedulefree's optimizer toggled around it (eval, save_pretrained,
train), and ours, with x written straight from y and z (as the Trainer saves), and with a switch around it. All are
interleaved in one process; each begins when the disk is idle, and none waits for it. "extra MiB" is by how much the
peak of the process's memory rises during the save. "one pass" is a copy of all parameters.

The second table has checkpoints as the Trainer writes them: the stock Trainer's with torch's AdamW, which does not wait
for the disk, and ours, which is also hashed and synced. Prints both as Markdown.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import schedulefree
import torch
from benchmark_step import environment, seconds, table
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging

from hf_schedulefree import ScheduleFreeTrainer
from hf_schedulefree.checkpoint.record import file_checksum
from hf_schedulefree.checkpoint.writing import CLOSING
from hf_schedulefree.optim import AdamWScheduleFree
from hf_schedulefree.streamed_save import save_averaged
from hf_schedulefree.weights import averaged_weights

CPU = torch.device("cpu")
MODELS = {
    "1M": {"n_embd": 64, "n_layer": 8, "n_head": 2, "vocab_size": 8000},
    "25M": {"n_embd": 384, "n_layer": 8, "n_head": 6, "vocab_size": 28000},
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "537M": {"n_embd": 1408, "n_layer": 20, "n_head": 22},
}
TOGGLED = "schedulefree: eval, save_pretrained, train"
RAW = "save_file, raw parameters"


def gpt2(size: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**MODELS[size]))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 0.01
        optimizer.step()
    optimizer.zero_grad()


def trained(size: str, optimizer_class: type[torch.optim.Optimizer]) -> tuple[GPT2LMHeadModel, torch.optim.Optimizer]:
    """A model in the middle of a run, without what a save of its weights does not need."""
    model = gpt2(size)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    optimizer.train()
    step(model, optimizer)
    for state in optimizer.state.values():
        del state["exp_avg_sq"]
    return model, optimizer


def contenders(size: str, folder: Path) -> dict[str, Callable[[], None]]:
    model, ours = trained(size, AdamWScheduleFree)
    theirs_model, theirs = trained(size, schedulefree.AdamWScheduleFree)
    raw = {name: p.detach() for name, p in model.named_parameters()}
    copy = {shape: torch.empty(shape) for shape in {p.shape for p in raw.values()}}

    def one_pass() -> None:
        for p in raw.values():
            copy[p.shape].copy_(p)

    def toggled() -> None:
        theirs.eval()
        theirs_model.save_pretrained(folder / "toggled")
        theirs.train()

    def at_x() -> None:
        with averaged_weights(model, ours):
            model.save_pretrained(folder / "at_x")

    return {
        "one pass over the parameters": one_pass,
        RAW: lambda: save_file(raw, folder / "raw.safetensors"),
        "save_pretrained, as it stands (y)": lambda: model.save_pretrained(folder / "plain"),
        TOGGLED: toggled,
        "ours: streamed": lambda: save_averaged(model, ours, folder / "ours"),
        "ours: switch, save_pretrained, back": at_x,
    }


def be_idle() -> None:
    """Wait for what earlier saves left to the system, and to the thread that closes the file that was replaced."""
    for thread in threading.enumerate():
        if thread.name == CLOSING:
            thread.join()
    os.sync()


def extra_memory(action: Callable[[], None]) -> str:
    """By how many MiB the peak of this process's memory rises during a call; empty where Linux does not tell it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        action()
        return f"{(_peak() - before) / 1024:.1f}"
    except OSError:
        return ""


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def measure(size: str, repeats: int, root: Path | None) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        actions = contenders(size, folder)
        times: dict[str, list[float]] = {contender: [] for contender in actions}
        memory: dict[str, str] = {}
        for repeat in range(repeats + 1):
            for contender, action in actions.items():
                be_idle()
                if not repeat:  # a warm-up
                    action()
                    memory[contender] = extra_memory(action)
                else:
                    times[contender].append(seconds(action, CPU))
        hashing = min(seconds(lambda: file_checksum(folder / "ours" / "model.safetensors"), CPU) for _ in range(3))
    rows = []
    for contender, values in times.items():
        row = {"parameters": size, "what": contender, "ms": f"{statistics.median(values) * 1e3:.0f}"}
        for title, other in (("toggle + save_pretrained", TOGGLED), ("save_file", RAW)):
            ratios = sorted(b / a for a, b in zip(values, times[other], strict=True))
            row[f"x {title} (min to max)"] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        row["extra MiB"] = memory[contender]
        row["hashing, ms"] = f"{hashing * 1e3:.0f}" if contender == "ours: streamed" else ""
        rows.append(row)
    return rows


def checkpoint_row(size: str, what: str, trainer: Trainer, repeats: int, prepare: Callable[[], Any]) -> dict[str, str]:
    """Time and size of a checkpoint of a Trainer that is at its first step."""
    times = []
    for repeat in range(repeats + 1):
        prepare()
        folder = Path(trainer.args.output_dir)
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        spent = seconds(lambda: trainer._save_checkpoint(trainer.model, None), CPU)
        if repeat:
            times.append(spent)
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    syncing = seconds(os.sync, CPU)
    shutil.rmtree(folder)
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "parameters": size,
        "checkpoint": what,
        "ms (min to max)": f"{statistics.median(times) * 1e3:.0f} ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})",
        "until on disk, ms": f"{(times[-1] + syncing) * 1e3:.0f}",
        "MB": f"{stored / 1e6:.0f}",
        "bytes per parameter": f"{stored / count:.2f}",
    }


def measure_checkpoints(size: str, repeats: int, root: Path | None) -> list[dict[str, str]]:
    rows = []
    with tempfile.TemporaryDirectory(dir=root) as name:
        options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "output_dir": f"{name}/run"}
        for what, trainer_class, optim in (
            ("stock Trainer, AdamW", Trainer, "adamw_torch"),
            ("ours, AdamWScheduleFree", ScheduleFreeTrainer, "adamw_schedulefree"),
        ):
            trainer = trainer_class(model=gpt2(size), args=TrainingArguments(optim=optim, **options))
            trainer.create_optimizer_and_scheduler(10)
            show_y = getattr(trainer.optimizer, "train", lambda: None)
            show_y()
            step(trainer.model, trainer.optimizer)
            rows.append(checkpoint_row(size, what, trainer, repeats, show_y))
            del trainer, show_y
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=["25M", "124M"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for temporary files)")
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    saves, checkpoints = [], []
    for size in args.sizes:
        saves += measure(size, args.repeats, args.folder)
        print(f"{table(saves)}\n", flush=True)
    for size in args.sizes:
        checkpoints += measure_checkpoints(size, min(args.repeats, 3), args.folder)
        print(f"{table(checkpoints)}\n", flush=True)
    report = f"{environment(CPU)}\n\n{table(saves)}\n\n{table(checkpoints)}\n"
    print(report)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "save.md").write_text(report)


if __name__ == "__main__":
    main()
