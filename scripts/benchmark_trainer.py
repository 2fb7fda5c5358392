"""Time and memory of a whole training process: this package's Trainer against the stock one, run in turns.

    python scripts/benchmark_trainer.py --sizes 0.1M 1M --steps 40 --repeats 10 --output_dir runs/benchmark

Each run is a process of its own that imports everything, trains a small GPT-2-like model on random tokens, evaluates
and saves (--plain: neither). "stock" is `transformers.Trainer` with optim="schedule_free_adamw" (schedulefree's
optimizer, whose saves hold y). --imports says whether the script of the run names this package before torch and
transformers, as sorted imports do, or after them. Prints a Markdown table: medians, and of the ratios within a turn the
median and the quartiles.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = {
    "0.1M": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 2000, "n_positions": 128},
    "1M": {"n_embd": 64, "n_layer": 8, "n_head": 2, "vocab_size": 8000, "n_positions": 128},
    "5M": {"n_embd": 192, "n_layer": 6, "n_head": 4, "vocab_size": 12000, "n_positions": 128},
    "25M": {"n_embd": 384, "n_layer": 8, "n_head": 6, "vocab_size": 28000, "n_positions": 128},
}


def train(kind: str, size: str, steps: int, plain: bool, imports: str) -> None:
    """The run that is measured, in its own process."""
    if kind == "ours" and imports == "first":
        import hf_schedulefree  # noqa: F401
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    trainer_class, optim = Trainer, "schedule_free_adamw"
    if kind == "ours":
        from hf_schedulefree import ScheduleFreeTrainer

        trainer_class, optim = ScheduleFreeTrainer, "adamw_schedulefree"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**MODELS[size]))
    ids = torch.randint(0, MODELS[size]["vocab_size"], (64, 64))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim=optim,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=4,
            eval_strategy="no" if plain else "steps",
            eval_steps=steps // 2,
            save_strategy="no" if plain else "steps",
            save_steps=steps // 2,
            logging_steps=steps // 2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8]).train()


def measured(*run: Any) -> dict[str, float]:
    # As in an installed package, modules are not compiled in each process.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(run)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the run {run} failed")
    spent = time.perf_counter() - start
    return {"wall, s": spent, "CPU, s": usage.ru_utime + usage.ru_stime, "peak, MiB": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="neither evaluate nor save")
    parser.add_argument("--imports", choices=("first", "last"), default="last")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train(*json.loads(args.child))
    lines = ["| parameters | | stock | ours | ours / stock (quartiles) |", "|---|---|---|---|---|"]
    for size in args.sizes:
        turns = []
        for turn in range(args.repeats + 1):
            order = ("stock", "ours") if turn % 2 else ("ours", "stock")
            turns.append({kind: measured(kind, size, args.steps, args.plain, args.imports) for kind in order})
        turns = turns[1:]  # the first one fills caches
        for figure in turns[0]["ours"]:
            stock, ours = ([turn[kind][figure] for turn in turns] for kind in ("stock", "ours"))
            ratios = [b / a for a, b in zip(stock, ours, strict=True)]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            lines.append(
                f"| {size} | {figure} | {statistics.median(stock):.2f} | {statistics.median(ours):.2f} | "
                f"{statistics.median(ratios):.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f}) |"
            )
    report = "\n".join(lines) + "\n"
    print(report)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "trainer.md").write_text(report)


if __name__ == "__main__":
    main()
