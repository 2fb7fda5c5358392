"""Readers and resumes that few runs have: each sees x, and none changes the training."""

from typing import Any

import pytest
import schedulefree
import torch
from test_readers import normalized
from tiny import everything, make_trainer, parameters, same_bits, tiny_llama, token_data, train
from transformers import Trainer, TrainerCallback

from hf_schedulefree import BatchNormRecalibrationCallback


def foreign(model: torch.nn.Module) -> dict[str, Any]:
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    return {"model": model, "trainer_options": {"optimizers": (optimizer, None)}}


def options_of(kind: str) -> dict[str, Any]:
    """Options of `make_trainer`, with dropout: a reader that draws a random number changes what follows."""
    model = tiny_llama(attention_dropout=0.3)
    return foreign(model) if kind == "foreign" else {"model": model}


class At(TrainerCallback):
    """Calls `act` once, at an event of the step `step`."""

    def __init__(self, event: str, step: int, act: Any):
        self.step, self.act, self.done = step, act, False
        setattr(self, event, self.run)

    def run(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.done:
            self.done = True
            self.act(kwargs["model"])


@pytest.mark.parametrize("first_batch", [True, False])
def test_a_resume_that_runs_out_of_memory_starts_from_the_checkpoint_again(first_batch, tmp_path):
    def out_of_memory(model):
        raise RuntimeError("CUDA out of memory.")

    train(tmp_path, save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    resumed = []
    for folder, step in (("smaller", None), ("found", 4 if first_batch else 6)):
        callbacks = [] if step is None else [At("on_step_begin", step, out_of_memory)]
        size = {"per_device_train_batch_size": 3} if step is None else {"auto_find_batch_size": True}
        trainer = make_trainer(
            tmp_path / folder, trainer_options={"callbacks": callbacks}, ignore_data_skip=True, **size
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        resumed.append(trainer)
    smaller, found = resumed
    assert found._train_batch_size == smaller._train_batch_size < 4
    assert same_bits(everything(found), everything(smaller))


@pytest.mark.parametrize("kind", ["ours", "foreign"])
@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_a_layer_that_is_frozen_in_a_run(kind, event, tmp_path):
    runs = []
    for eval_steps in (4, 1):
        callback = At(event, 4, lambda model: model.model.embed_tokens.weight.requires_grad_(False))
        options = options_of(kind)
        options.setdefault("trainer_options", {})["callbacks"] = [callback]
        runs.append(train(tmp_path, eval_strategy="steps", eval_steps=eval_steps, **options))
    with runs[0].training_weights(), runs[1].training_weights():
        assert same_bits(everything(runs[0]), everything(runs[1]))
    assert all(group["k"] == 10 for group in runs[1].optimizer.param_groups)


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_inside_autocast_each_reader_sees_its_weights(kind, tmp_path):
    trainer = train(tmp_path, **options_of(kind))
    trainer.model.eval()
    batch = {name: value[None] for name, value in token_data()[0].items()}

    def loss() -> float:
        return trainer.model(**batch).loss.item()

    with torch.autocast("cpu", torch.bfloat16):
        at_x = loss()
    with trainer.training_weights(), torch.autocast("cpu", torch.bfloat16):
        at_y = loss()
    with torch.autocast("cpu", torch.bfloat16):
        with trainer.training_weights():
            assert loss() == at_y
        assert loss() == at_x != at_y
        with trainer.training_weights():
            assert loss() == at_y


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_an_evaluation_loop_that_is_called_directly(kind, tmp_path):
    def look(model):
        trainer.evaluation_loop(trainer.get_eval_dataloader(), "a loop")
        seen.append(parameters(model))

    alone = train(tmp_path, **options_of(kind))
    seen: list[Any] = []
    options = options_of(kind)
    options.setdefault("trainer_options", {})["callbacks"] = [At("on_step_end", 4, look)]
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert same_bits(everything(alone), everything(trainer))
    four = train(tmp_path, max_steps=4, **options_of(kind))
    with four.training_weights():
        assert same_bits(seen[0], parameters(four.model))


def test_what_an_earlier_run_has_parked_is_not_put_into_a_resumed_one(tmp_path):
    """Checkpoints of the stock Trainer at x tell nothing of the y of a foreign optimizer, nor of BatchNorm."""
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    train(tmp_path / "stock", trainer_class=Trainer, **foreign(tiny_llama()), **often)
    resumed = [make_trainer(tmp_path / name, **foreign(tiny_llama())) for name in ("new", "used")]
    resumed[1].train()
    for trainer in resumed:
        trainer.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-4"))
    assert same_bits(everything(resumed[0]), everything(resumed[1]))

    def classifier(name):
        return normalized(tmp_path / name, callbacks=[BatchNormRecalibrationCallback(num_batches=8)])

    normalized(tmp_path / "bare", save_strategy="steps", save_steps=5)
    resumed = [
        normalized(
            tmp_path / "new",
            resume=tmp_path / "bare" / "checkpoint-5",
            callbacks=[BatchNormRecalibrationCallback(num_batches=8)],
        ),
        classifier("used"),
    ]
    resumed[1].train(resume_from_checkpoint=str(tmp_path / "bare" / "checkpoint-5"))
    with resumed[0].training_weights(), resumed[1].training_weights():
        assert same_bits(parameters(resumed[0].model), parameters(resumed[1].model))


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_other_weights_that_are_evaluated_for_a_while(kind, tmp_path):
    """An average of one's own, say. `on_log`, which is called inside the evaluation, is meant to see y."""

    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, averaged_weights=None, **kwargs):
            with averaged_weights(), torch.no_grad():
                x = parameters(model)
                for p in model.parameters():
                    p.mul_(0.5)
                losses.append(trainer.evaluate()["eval_loss"])
                model.load_state_dict(x)

        def on_log(self, args, state, control, **kwargs):
            pass

    losses: list[float] = []
    alone = train(tmp_path, **options_of(kind))
    options = options_of(kind)
    options.setdefault("trainer_options", {})["callbacks"] = [Evaluates()]
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert same_bits(everything(alone), everything(trainer))
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(0.5)
    assert losses[-1] == trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("there", ["show_x", "show_y"])
def test_a_foreign_switch_that_is_interrupted_is_completed(there, at, tmp_path, monkeypatch):
    """The optimizer of another package is stopped in the middle of its arithmetic, as by Ctrl-C."""
    trainer = train(tmp_path, **foreign(tiny_llama()))
    x = parameters(trainer.model)
    with trainer.training_weights():
        y = parameters(trainer.model)
    switch = trainer._switch
    if there == "show_x":
        switch.show_y()
    lerp, calls = torch.Tensor.lerp_, iter(range(1, at))

    def interrupted(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return lerp(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "lerp_", interrupted)
        getattr(switch, there)()
    assert not switch.settled and not switch.weights_replaced()
    switch.show_x()
    assert same_bits(parameters(trainer.model), x)
    switch.show_y()
    assert same_bits(parameters(trainer.model), y)
