"""Time and memory of a whole training process: this package's Trainer against the stock one, run in turns.

    python scripts/benchmark_trainer.py --sizes 1M 25M --output_dir runs/benchmark

Each run is a process of its own that imports everything, trains a small GPT-2-like model on random tokens, evaluates
and saves. "stock" is `transformers.Trainer` with optim="schedule_free_adamw" (schedulefree's optimizer, whose saves
hold y). Prints a Markdown table: medians, and the median of the ratios within a turn.
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

MODELS = {
    "1M": {"n_embd": 64, "n_layer": 8, "n_head": 2, "vocab_size": 8000, "n_positions": 128},
    "25M": {"n_embd": 384, "n_layer": 8, "n_head": 6, "vocab_size": 28000, "n_positions": 128},
}


def train(kind: str, size: str, steps: int) -> None:
    """The run that is measured, in its own process."""
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
            eval_strategy="steps",
            eval_steps=steps // 2,
            save_strategy="steps",
            save_steps=steps // 2,
            logging_steps=steps // 2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8]).train()


def measured(kind: str, size: str, steps: int) -> dict[str, float]:
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps([kind, size, steps])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the run {kind} {size} failed")
    spent = time.perf_counter() - start
    return {"wall, s": spent, "CPU, s": usage.ru_utime + usage.ru_stime, "peak, MiB": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train(*json.loads(args.child))
    lines = ["| parameters | | stock | ours | ours / stock (min to max) |", "|---|---|---|---|---|"]
    for size in args.sizes:
        turns = []
        for turn in range(args.repeats + 1):
            order = ("stock", "ours") if turn % 2 else ("ours", "stock")
            turns.append({kind: measured(kind, size, args.steps) for kind in order})
        turns = turns[1:]  # the first one fills caches
        for figure in turns[0]["ours"]:
            stock, ours = ([turn[kind][figure] for turn in turns] for kind in ("stock", "ours"))
            ratios = sorted(b / a for a, b in zip(stock, ours, strict=True))
            lines.append(
                f"| {size} | {figure} | {statistics.median(stock):.2f} | {statistics.median(ours):.2f} | "
                f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |"
            )
    report = "\n".join(lines) + "\n"
    print(report)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "trainer.md").write_text(report)


if __name__ == "__main__":
    main()
