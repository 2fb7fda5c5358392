#!/usr/bin/env python
"""Image classification with BatchNorm: a small ResNet learns to tell stripes and checks of several kinds apart.

    python scripts/example_vision.py [output_dir]

The running statistics that BatchNorm collects in training belong to y. `BatchNormRecalibrationCallback` gives x its
own, from a few batches of training data, whenever x is evaluated or saved; without it, the weights of one model would
be evaluated with the statistics of another.
"""

import math
import sys
from typing import Any

import torch
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed

from hf_schedulefree import BatchNormRecalibrationCallback, ScheduleFreeTrainer

SIZE = 16
KINDS = 4


def make_model() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=KINDS,
        )
    )


def make_data(count: int, seed: int) -> list[dict[str, Any]]:
    """Noisy images: horizontal stripes, vertical stripes, diagonal stripes, checks; of random phase."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = []
    for i in range(count):
        kind = i % KINDS
        phase, shift = (2 * math.pi * torch.rand(2, generator=generator)).tolist()
        wave = {
            0: torch.sin(rows * 1.3 + phase),
            1: torch.sin(columns * 1.3 + phase),
            2: torch.sin((rows + columns) * 0.9 + phase),
            3: torch.sin(rows * 1.3 + phase) * torch.sin(columns * 1.3 + shift),
        }[kind]
        noise = torch.randn(SIZE, SIZE, generator=generator)
        images.append({"pixel_values": (wave + 0.8 * noise)[None], "labels": kind})
    return images


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def make_trainer(output_dir: str, **arguments: Any) -> ScheduleFreeTrainer:
    defaults = {
        "optim": "adamw_schedulefree",
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "max_steps": 100,
        "per_device_train_batch_size": 32,
        "eval_strategy": "steps",
        "eval_steps": 25,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": "none",
    }
    args = TrainingArguments(output_dir=output_dir, **{**defaults, **arguments})
    set_seed(args.seed)
    return ScheduleFreeTrainer(
        model=make_model(),
        args=args,
        train_dataset=make_data(640, seed=1),
        eval_dataset=make_data(128, seed=2),
        compute_metrics=accuracy,
        callbacks=[BatchNormRecalibrationCallback(num_batches=10)],
    )


def main(output_dir: str = "runs/example_vision", **arguments: Any) -> dict[str, float]:
    trainer = make_trainer(output_dir, **arguments)
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    print({name: round(metrics[name], 4) for name in ("eval_loss", "eval_accuracy")})
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
