"""Half precision through the Trainer: reading, resuming, exporting; adapters on a half-precision base."""

from pathlib import Path

import pytest
import torch
from tiny import close_to, everything, inner, make_trainer, parameters, same_bits, saved, tiny_llama, train

from hf_schedulefree.checkpoint import export_averaged
from hf_schedulefree.optim import precision

PRECISIONS = ["split", "stochastic", "full"]


def half_model(tmp_path: Path, dtype: torch.dtype = torch.bfloat16):
    """A model as users get it: loaded from a checkpoint in its dtype."""
    tiny_llama().to(dtype).save_pretrained(tmp_path / "start")
    return type(tiny_llama()).from_pretrained(tmp_path / "start", dtype=dtype)


def run(tmp_path: Path, name: str, resume: Path | None = None, **options):
    return train(tmp_path / name, resume=resume, model=half_model(tmp_path), **options)


@pytest.mark.parametrize("state_precision", PRECISIONS)
def test_reading_and_resuming_change_no_bit(state_precision, tmp_path):
    options = {"optim_args": f"state_precision={state_precision}", "max_steps": 8}
    read = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 4}
    plain = run(tmp_path, "plain", **options)
    reader = run(tmp_path, "reader", **options, **read)
    assert same_bits(everything(reader), everything(plain))
    resumed = run(tmp_path, "reader", resume=tmp_path / "reader" / "checkpoint-4", **options, **read)
    assert same_bits(everything(resumed), everything(plain))
    other_seed = run(tmp_path, "other", **options, seed=7, data_seed=42)
    assert inner(other_seed.optimizer).param_groups[0]["rounding_seed"] == 7


@pytest.mark.parametrize("state_precision", [None, *PRECISIONS])
def test_what_is_saved_is_x_rounded_once_and_the_export_has_all_of_it(state_precision, tmp_path):
    options = {} if state_precision is None else {"optim_args": f"state_precision={state_precision}"}
    trainer = run(tmp_path, "run", save_strategy="steps", save_steps=10, **options)
    optimizer = inner(trainer.optimizer)
    names = {p: name for name, p in trainer.model.named_parameters()}
    wide = {
        names[p]: precision.wide_x(state["y"], state, group["betas"][0])
        for group in optimizer.param_groups
        for p in group["params"]
        if (state := optimizer.state[p])
    }
    weights = saved(tmp_path / "run" / "checkpoint-10")
    assert all(torch.equal(weights[name], x.bfloat16()) for name, x in wide.items() if name in weights)
    assert same_bits(
        {name: parameters(trainer.model)[name] for name in wide}, {n: x.bfloat16() for n, x in wide.items()}
    )
    export_averaged(tmp_path / "run" / "checkpoint-10", tmp_path / "wide", dtype=torch.float32)
    exported = saved(tmp_path / "wide")
    assert all(value.dtype == torch.float32 for value in exported.values())
    assert close_to(exported, {name: x.double() for name, x in wide.items()}, ulps=2)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in exported.values())


def test_a_float16_model_trains(tmp_path):
    trainer = make_trainer(tmp_path / "run", model=half_model(tmp_path, torch.float16))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    state = next(iter(inner(trainer.optimizer).state.values()))
    assert (state["z"].dtype, state["exp_avg_sq"].dtype) == (torch.float16, torch.bfloat16)


def test_float32_adapters_on_a_bfloat16_base(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(half_model(tmp_path), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = make_trainer(tmp_path / "run", model=model)
    trainer.train()
    states = inner(trainer.optimizer).state
    assert len(states) == 4
    for p, state in states.items():
        assert p.dtype == state["z"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert "y_low" not in state
