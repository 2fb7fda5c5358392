#!/usr/bin/env python
"""Sequence to sequence with generation metrics: a small T5-style model learns to write numbers backwards.

    python scripts/example_seq2seq.py [output_dir]

`predict_with_generate` makes evaluation write its answers token by token: with the averaged weights x, like every other
number that is reported, and like the model that is saved.
"""

import sys
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration, set_seed

from hf_schedulefree import ScheduleFreeSeq2SeqTrainer

PAD, END, FIRST_DIGIT = 0, 1, 2
DIGITS = 4


def make_model() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=FIRST_DIGIT + 10,
            d_model=48,
            d_kv=12,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
        )
    )


def make_data(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Random numbers and their digits backwards, each with the end token."""
    digits = torch.randint(0, 10, (count, DIGITS), generator=torch.Generator().manual_seed(seed)) + FIRST_DIGIT
    end = torch.tensor([END])
    return [{"input_ids": torch.cat([row, end]), "labels": torch.cat([row.flip(0), end])} for row in digits]


def exact_matches(prediction: EvalPrediction) -> dict[str, float]:
    """How many of the generated numbers are right, and how many of their digits."""
    written = prediction.predictions[:, 1 : DIGITS + 1]  # after the decoder's start token
    written = np.pad(written, ((0, 0), (0, DIGITS - written.shape[1])))
    right = written == prediction.label_ids[:, :DIGITS]
    return {"exact_match": float(right.all(axis=1).mean()), "digit_accuracy": float(right.mean())}


def make_trainer(output_dir: str, **arguments: Any) -> ScheduleFreeSeq2SeqTrainer:
    defaults = {
        "optim": "adamw_schedulefree",
        "learning_rate": 1e-2,
        "warmup_steps": 20,
        "max_steps": 400,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "logging_steps": 50,
        "save_strategy": "no",
        "predict_with_generate": True,
        "generation_max_length": DIGITS + 2,
        "report_to": "none",
    }
    args = Seq2SeqTrainingArguments(output_dir=output_dir, **{**defaults, **arguments})
    set_seed(args.seed)
    return ScheduleFreeSeq2SeqTrainer(
        model=make_model(),
        args=args,
        train_dataset=make_data(2000, seed=1),
        eval_dataset=make_data(128, seed=2),
        compute_metrics=exact_matches,
    )


def main(output_dir: str = "runs/example_seq2seq", **arguments: Any) -> dict[str, float]:
    trainer = make_trainer(output_dir, **arguments)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    print({name: round(metrics[name], 4) for name in ("eval_loss", "eval_exact_match", "eval_digit_accuracy")})
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
