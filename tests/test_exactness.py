"""Nothing perturbs, and resume is exact: bit for bit, over all tensors of model and optimizer."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
from prodigyplus import ProdigyPlusScheduleFree
from tiny import close_to, everything, parameters, same_bits, saved, tiny_llama, train, x_in_float64
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_schedulefree.optim import AdamWScheduleFree


class Branching(nn.Module):
    """A language model with a frozen part and a second head that gets its first gradient late, others now and then."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama(attention_dropout=0.1)
        self.late = nn.Linear(64, 64)
        self.calls = 0
        self.model.model.layers[0].self_attn.requires_grad_(False)

    def forward(self, input_ids, labels=None):
        output = self.model(input_ids=input_ids, labels=labels)
        self.calls += self.training
        if self.training and self.calls > 9 and self.calls % 3:
            logits = self.late(output.logits)
            output.loss = output.loss + nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return {"loss": output.loss, "logits": output.logits}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups with options of their own, and one without parameters."""
    everything = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": everything[::3], "lr": 3e-3, "weight_decay": 0.1},
        {"params": everything[1::3], "betas": (0.8, 0.99)},
        {"params": everything[2::3], "warmup_steps": 7},
        {"params": []},
    ]


def dropout_model(**options: Any) -> nn.Module:
    return tiny_llama(attention_dropout=0.2, **options)


def case(model=dropout_model, optimizer=None, **options: Any) -> dict[str, Any]:
    return {"model": model, "optimizer": optimizer, "options": options}


CASES = {
    "float32": case(),
    "bfloat16": case(lambda: dropout_model().to(torch.bfloat16)),
    "accumulation": case(gradient_accumulation_steps=3),
    "groups": case(optimizer=lambda model: AdamWScheduleFree(groups_of(model), lr=1e-2)),
    "frozen and late": case(Branching),
    "tied": case(lambda: dropout_model(tie_word_embeddings=True)),
    "warm-up": case(warmup_steps=0.5, weight_decay=0.1, optim_args="r=1.0"),
    "sgd": case(optim="sgd_schedulefree", learning_rate=0.3),
    "radam": case(optim="radam_schedulefree"),
}

FOREIGN = {
    "schedulefree AdamW": lambda model: schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=3),
    "schedulefree RAdam": lambda model: schedulefree.RAdamScheduleFree(model.parameters(), lr=1e-2),
    "schedulefree SGD": lambda model: schedulefree.SGDScheduleFree(model.parameters(), lr=0.3),
    "schedulefree wrapper": lambda model: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.3)),
    "pytorch_optimizer AdamW": lambda model: pytorch_optimizer.ScheduleFreeAdamW(model.parameters(), lr=1e-2),
    "pytorch_optimizer RAdam": lambda model: pytorch_optimizer.ScheduleFreeRAdam(model.parameters(), lr=1e-2),
    "pytorch_optimizer SGD": lambda model: pytorch_optimizer.ScheduleFreeSGD(model.parameters(), lr=0.3),
    "pytorch_optimizer wrapper": lambda model: pytorch_optimizer.ScheduleFreeWrapper(
        torch.optim.AdamW(model.parameters(), lr=1e-2)
    ),
    "prodigy-plus": lambda model: ProdigyPlusScheduleFree(model.parameters()),
}
BUILTIN = ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"]
CASES |= {name: case(optimizer=make) for name, make in FOREIGN.items()}
CASES |= {name: case(optim=name, warmup_steps=0.2) for name in BUILTIN}


def run(name: str, folder: Path, resume: Path | bool | None = None, **options: Any) -> Trainer:
    chosen = CASES[name]
    model = chosen["model"]()
    optimizer = chosen["optimizer"] and chosen["optimizer"](model)
    trainer_options = {"optimizers": (optimizer, None), **options.pop("trainer_options", {})}
    return train(
        folder, resume=resume, model=model, trainer_options=trainer_options, **{**chosen["options"], **options}
    )


READING = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}


@pytest.mark.parametrize("name", CASES)
def test_evaluating_and_saving_changes_nothing(name, tmp_path):
    alone, read = run(name, tmp_path / "a", max_steps=40), run(name, tmp_path / "b", max_steps=40, **READING)
    assert_equal_everywhere(alone, read)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}])
@pytest.mark.parametrize("name", ["float32", "accumulation", "groups", "frozen and late", "tied"])
def test_evaluating_and_saving_changes_nothing_on_a_gpu(name, precision, tmp_path):
    options = {"use_cpu": False, "max_steps": 40, **precision}
    alone, read = run(name, tmp_path / "a", **options), run(name, tmp_path / "b", **options, **READING)
    assert_equal_everywhere(alone, read)
    resumed = run(name, tmp_path / "c", resume=tmp_path / "b" / "checkpoint-15", **options)
    assert_equal_everywhere(alone, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_evaluating_and_saving_changes_nothing_in_200_steps(name, tmp_path):
    alone, read = run(name, tmp_path / "a", max_steps=200), run(name, tmp_path / "b", max_steps=200, **READING)
    assert_equal_everywhere(alone, read)


def assert_equal_everywhere(one: Trainer, other: Trainer) -> None:
    if isinstance(one.optimizer.state_dict().get("state", {}), dict) and "state" in one.optimizer.state_dict():
        assert same_bits(everything(one), everything(other))
    assert same_bits(parameters(one.model), parameters(other.model))
    with one.training_weights(), other.training_weights():
        assert same_bits(parameters(one.model), parameters(other.model))
    with one.training_weights():
        y = parameters(one.model)
    assert not same_bits(parameters(one.model), y)


# An epoch has 12 batches; 7 is in the middle of one, 12 at its end, 13 just after it.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("frozen and late", "accumulation")])
def test_resume_is_exact(name, tmp_path):
    whole = run(name, tmp_path, max_steps=15, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=7)
    for step in (2, 7, 12, 13):
        resumed = run(name, tmp_path / str(step), resume=tmp_path / f"checkpoint-{step}", max_steps=15)
        assert same_bits(parameters(whole.model), parameters(resumed.model)), step
        assert_equal_everywhere(whole, resumed)


def test_resume_with_accumulation_is_exact(tmp_path):
    options = {"max_steps": 11, "save_strategy": "steps"}
    whole = run("accumulation", tmp_path, save_steps=1, **options)
    for step in (1, 4, 5, 8):
        resumed = run("accumulation", tmp_path / str(step), resume=tmp_path / f"checkpoint-{step}", max_steps=11)
        assert_equal_everywhere(whole, resumed)


def test_a_run_that_was_killed_and_resumed_again_and_again(tmp_path):
    class StopsAt(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise KeyboardInterrupt

    whole = run("float32", tmp_path / "whole", max_steps=20)
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 20}
    for step in (4, 8, 9, 14):
        resume = True if step > 4 else None
        with pytest.raises(KeyboardInterrupt):
            run("float32", tmp_path / "broken", resume=resume, trainer_options={"callbacks": [StopsAt(step)]}, **saving)
    assert_equal_everywhere(whole, run("float32", tmp_path / "broken", resume=True, **saving))


@pytest.mark.parametrize("name", [*FOREIGN, *BUILTIN])
def test_foreign_optimizers_are_saved_at_their_x(name, tmp_path):
    trainer = run(name, tmp_path, max_steps=8)
    with trainer.training_weights():
        y = parameters(trainer.model)
    trainer.save_model(tmp_path / "model")
    file = saved(tmp_path / "model")
    assert same_bits(file, {key: parameters(trainer.model)[key] for key in file})
    assert not same_bits(file, {key: y[key] for key in file})
    if (name.startswith("schedulefree ") and "wrapper" not in name) or name in BUILTIN:
        optimizer = trainer.optimizer.optimizer
        beta = {id(g): g["betas"][0] if "betas" in g else g["momentum"] for g in optimizer.param_groups}
        names = {p: key for key, p in trainer.model.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                before, z = y[names[p]].double(), optimizer.state[p]["z"].double()
                exact = before + (1 - 1 / beta[id(group)]) * (z - before)
                assert close_to({"p": p.detach()}, {"p": exact})


def test_our_x_is_the_papers(tmp_path):
    trainer = run("float32", tmp_path, max_steps=30)
    assert close_to(parameters(trainer.model), x_in_float64(trainer))
