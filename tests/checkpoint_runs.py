"""Tiny Trainer runs whose checkpoints the tests examine."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_schedulefree import ScheduleFreeTrainer


def tiny_model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A language model of 7,800 parameters; its weights follow from `seed`."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        **config,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def tiny_data(examples: int = 64) -> list[dict[str, torch.Tensor]]:
    """Random tokens, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 64, (8,), generator=generator) for _ in range(examples)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def tiny_trainer(
    output_dir: str | Path, *, model: Any = None, trainer_class: type[Trainer] = ScheduleFreeTrainer, **arguments: Any
) -> Trainer:
    """A Trainer that takes 6 steps and saves every second one; `more` are further arguments of the Trainer."""
    more = arguments.pop("more", {})
    defaults = {
        "optim": "adamw_schedulefree",
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 2,
    }
    return trainer_class(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments}),
        train_dataset=tiny_data(),
        **more,
    )


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the model's weights as they are now."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
