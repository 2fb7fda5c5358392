"""Tiny models, data and runs for the Trainer tests, and weights computed independently of the code under test."""

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_schedulefree import ScheduleFreeTrainer

VOCABULARY = 64


def tiny_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A causal language model of about 3,000 parameters."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 32, **sizes, **options})
    )


def token_data(count: int = 48, length: int = 12) -> list[dict[str, Tensor]]:
    """Sequences with a rule to learn: each token is the one before plus a step of the sequence's own."""
    starts = torch.randint(0, VOCABULARY, (count, 2), generator=torch.Generator().manual_seed(1))
    rows = [(start + torch.arange(length) * (1 + step % 3)) % VOCABULARY for start, step in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(output_dir: Path | str, **options: Any) -> TrainingArguments:
    """Quiet arguments for a short CPU run with a large rate, so that x and y lie well apart."""
    defaults = {
        "output_dir": str(output_dir),
        "optim": "adamw_schedulefree",
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def make_trainer(
    output_dir: Path | str,
    trainer_class: type[Trainer] = ScheduleFreeTrainer,
    model: nn.Module | None = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer over `tiny_llama` and `token_data`; `options` go to the arguments."""
    data = token_data()
    defaults = {"train_dataset": data, "eval_dataset": data[:8]}
    if "model_init" not in (trainer_options or {}):
        defaults["model"] = tiny_llama() if model is None else model
    return trainer_class(args=arguments(output_dir, **options), **{**defaults, **(trainer_options or {})})


def train(output_dir: Path | str, resume: Path | bool | None = None, **options: Any) -> Trainer:
    """Make a Trainer as above and train it."""
    trainer = make_trainer(output_dir, **options)
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return trainer


def inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def saved(folder: Path | str) -> dict[str, Tensor]:
    """The weights in a folder written by `save_pretrained`."""
    return load_file(Path(folder) / "model.safetensors")


def x_in_float64(trainer: Trainer) -> dict[str, Tensor]:
    """x of each trained parameter, in float64 from y and z, whichever of x and y the model shows now."""
    optimizer = inner(trainer.optimizer)
    names = {p: name for name, p in trainer.model.named_parameters()}
    averaged, index = {}, itertools.count()
    states = optimizer.state_dict()["state"]
    for group in optimizer.param_groups:
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        for p in group["params"]:
            state = states.get(next(index), {})
            y = state.get("y", p).detach().double()
            z = state["z"].double() if "z" in state else y
            averaged[names[p]] = y + (1 - 1 / beta) * (z - y)
    return averaged


def close_to(weights: dict[str, Tensor], exact: dict[str, Tensor], ulps: float = 4) -> bool:
    """Whether weights are a rounding of exact float64 values (errors of a few units in the last place)."""
    return all(
        torch.all(
            (weights[name].double() - value).abs() <= ulps * torch.finfo(weights[name].dtype).eps * value.abs().max()
        )
        for name, value in exact.items()
        if name in weights
    ) and any(name in weights for name in exact)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors of the model and of the optimizer's state."""
    optimizer = inner(trainer.optimizer)
    tensors = {f"model.{name}": value for name, value in parameters(trainer.model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": value.clone() for key, value in state.items() if isinstance(value, Tensor)}
    return tensors
