"""Every reader of the model sees x, every gradient y: the table of docs/readers.md, and a mutant for each override.

A reader is checked by weights that it really saw or wrote, against x in float64 from y and z, noted at each step where
nobody has switched anything. `test_each_override_is_needed` removes each override and watches a check fail.
"""

import itertools
import logging
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schedulefree
import torch
import transformers.trainer
from tiny import (
    close_to,
    everything,
    inner,
    make_trainer,
    parameters,
    same_bits,
    saved,
    tiny_llama,
    token_data,
    train,
    x_in_float64,
)
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_schedulefree import BatchNormRecalibrationCallback, ScheduleFreeMixin, ScheduleFreeTrainer

EVENTS_AT_X = ["on_evaluate", "on_predict", "on_save", "on_train_end"]
EVENTS_AT_Y = [
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_epoch_end",
]


class Truth:
    """y and x (float64) after each step, noted inside the optimizer's step, and judgement of weights by them."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.y: dict[int, dict[str, Tensor]] = {0: parameters(trainer.model)}
        self.x: dict[int, dict[str, Tensor]] = {}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        step = optimizer.step

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            count = len(self.y)
            self.y[count], self.x[count] = parameters(self.trainer.model), x_in_float64(self.trainer)
            return result

        optimizer.step = noted

    def name(self, weights: dict[str, Tensor], step: int | None = None) -> str:
        """ "x" or "y" of that step (default: of the last one), or "neither"."""
        step = len(self.y) - 1 if step is None else step
        if step == 0:
            return "y" if same_bits(weights, self.y[0]) else "neither"
        if all(torch.equal(weights[name], value) for name, value in self.y[step].items() if name in weights):
            return "y"
        return "x" if close_to(weights, self.x[step]) else "neither"


class Watch(TrainerCallback):
    """Notes which weights the model shows at each event, and runs `actions` at the end of their steps."""

    def __init__(self, actions: dict[int, Any] | None = None):
        self.truth: Truth | None = None
        self.seen: dict[str, set[str]] = {}
        self.actions = actions or {}

    def note(self, what: str, model: nn.Module) -> None:
        self.seen.setdefault(what, set()).add(self.truth.name(parameters(model)))


def _event(event: str) -> Any:
    def handle(self, args, state, control, model=None, **kwargs):
        if event == "on_train_begin":
            self.truth.watch(inner(self.truth.trainer.optimizer))
        self.note(event, model)
        if event == "on_step_end" and state.global_step in self.actions:
            self.actions[state.global_step](self.truth.trainer)
            self.note("after an action", model)

    return handle


for _name in EVENTS_AT_X + EVENTS_AT_Y:
    setattr(Watch, _name, _event(_name))


def watched(trainer_class: type[Trainer], output_dir: Path, actions=None, **options: Any) -> tuple[Trainer, Watch]:
    watch = Watch(actions)
    trainer_options = options.pop("trainer_options", {})
    callbacks = [watch, *trainer_options.pop("callbacks", [])]
    trainer = make_trainer(
        output_dir, trainer_class=trainer_class, trainer_options={**trainer_options, "callbacks": callbacks}, **options
    )
    watch.truth = Truth(trainer)
    return trainer, watch


# Checks: each takes a Trainer class and a folder. The same function is run on mutants.


def check_evaluate(trainer_class, tmp_path):
    seen = set()
    trainer, watch = watched(trainer_class, tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="no")
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: None if module.training else seen.add(watch.truth.name(parameters(module)))
    )
    trainer.train()
    assert seen == {"x"}
    assert watch.seen["on_evaluate"] == {"x"} and watch.seen["on_step_begin"] == {"y"}
    trainer.evaluate()
    assert seen == {"x"}


def check_predict(trainer_class, tmp_path):
    seen = set()
    data = token_data()[:8]
    trainer, watch = watched(trainer_class, tmp_path, actions={4: lambda trainer: trainer.predict(data)})
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: None if module.training else seen.add(watch.truth.name(parameters(module)))
    )
    trainer.train()
    assert seen == {"x"} and watch.seen["on_predict"] == {"x"}
    assert watch.seen["after an action"] == {"y"}


def check_step_checkpoint(trainer_class, tmp_path):
    trainer, watch = watched(trainer_class, tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        assert watch.truth.name(saved(folder), step) == "x"
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        assert [group["train_mode"] for group in state["param_groups"]] == [False, False]
    assert watch.seen["on_save"] == {"x"} and watch.seen["on_step_begin"] == {"y"}


def check_save_model(trainer_class, tmp_path):
    trainer, watch = watched(trainer_class, tmp_path, actions={4: lambda trainer: trainer.save_model(tmp_path / "mid")})
    trainer.train()
    trainer.save_model(tmp_path / "end")
    assert watch.truth.name(saved(tmp_path / "mid"), 4) == "x" and watch.truth.name(saved(tmp_path / "end")) == "x"
    assert watch.seen["after an action"] == {"y"}


def check_ray_checkpoint(trainer_class, tmp_path):
    trainer, watch = watched(trainer_class, tmp_path, actions={4: lambda tr: tr._tune_save_checkpoint(str(tmp_path))})
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    assert watch.truth.name(saved(folder), 4) == "x"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert [group["train_mode"] for group in state["param_groups"]] == [False, False]
    assert watch.seen["after an action"] == {"y"}


def check_push(trainer_class, tmp_path):
    uploaded = []

    class Hub:
        def upload_folder(self, folder_path, **kwargs):
            uploaded.append(watch.truth.name(saved(folder_path)))

    def push(trainer):
        trainer.hub_model_id = "user/model"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.trainer, "hf_api", Hub)
            trainer.push_to_hub()

    trainer, watch = watched(trainer_class, tmp_path, actions={4: push})
    card = trainer.create_model_card
    trainer.create_model_card = lambda **kwargs: (watch.note("model card", trainer.model), card(**kwargs))
    trainer.train()
    push(trainer)
    assert uploaded == ["x", "x"] and watch.seen["after an action"] == {"y"}
    assert watch.seen["model card"] == {"x"}


def check_best_model(trainer_class, tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer, _ = watched(
        trainer_class,
        tmp_path,
        trainer_options={"callbacks": [stopping]},
        learning_rate=1.0,
        max_steps=30,
        load_best_model_at_end=True,
        **often,
    )
    trainer.train()
    assert trainer.state.global_step < 30
    file = saved(trainer.state.best_model_checkpoint)
    best = {name: value for name, value in parameters(trainer.model).items() if name in file}
    assert same_bits(best, file)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    trainer.save_model(tmp_path / "best")
    assert same_bits(saved(tmp_path / "best"), file)
    with trainer.training_weights():
        assert same_bits({name: parameters(trainer.model)[name] for name in file}, file)
    assert all(group["k"] == 0 for group in trainer.optimizer.param_groups)


def check_hyperparameter_search(trainer_class, tmp_path):
    pytest.importorskip("optuna")
    trainer, _ = watched(
        trainer_class,
        tmp_path,
        trainer_options={"model_init": lambda: tiny_llama()},
        eval_strategy="steps",
        eval_steps=5,
    )
    at_x = []

    class Remember(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            at_x.append(close_to(parameters(model), x_in_float64(trainer)))

        on_train_end = on_evaluate

    trainer.remove_callback(Watch)
    trainer.add_callback(Remember())
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 5e-3, 2e-2)},
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    assert at_x == [True] * 6  # two evaluations and the end, of two trials
    options = {"trainer_options": {"model_init": lambda: tiny_llama()}, **best.hyperparameters}
    again = train(tmp_path, trainer_class=trainer_class, **options)
    assert best.objective == pytest.approx(again.evaluate()["eval_loss"], rel=1e-6)


def check_auto_find_batch_size(trainer_class, tmp_path):
    failures = iter([False, False, True])

    def runs_out_of_memory_once(trainer):
        if next(failures, False):
            raise RuntimeError("CUDA out of memory.")

    actions = dict.fromkeys(range(1, 11), runs_out_of_memory_once)
    trainer, watch = watched(trainer_class, tmp_path, actions=actions, auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size < 4
    assert watch.truth.name(parameters(trainer.model)) == "x"
    assert watch.seen["on_step_begin"] == {"y"} and watch.seen["on_train_end"] == {"x"}


def check_sigterm(trainer_class, tmp_path):
    def terminate(trainer):
        (callback,) = [cb for cb in trainer.callback_handler.callbacks if hasattr(cb, "jit_manager")]
        callback.jit_manager.kill_wait = 0
        os.kill(os.getpid(), signal.SIGTERM)
        while not callback.jit_manager.is_checkpoint_requested:
            pass

    former = signal.getsignal(signal.SIGTERM)
    try:
        trainer, watch = watched(trainer_class, tmp_path, actions={4: terminate}, enable_jit_checkpoint=True)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, former)
    (folder,) = tmp_path.glob("checkpoint-*")
    assert watch.truth.name(saved(folder), int(folder.name.split("-")[1])) == "x"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert [group["train_mode"] for group in state["param_groups"]] == [False, False]
    resumed = train(tmp_path, trainer_class=trainer_class, resume=folder)
    assert same_bits(everything(resumed), everything(train(tmp_path / "whole", trainer_class=trainer_class)))


def check_events(trainer_class, tmp_path):
    trainer, watch = watched(
        trainer_class,
        tmp_path,
        actions={3: lambda trainer: trainer.predict(token_data()[:4])},
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
        num_train_epochs=2,
        max_steps=-1,
    )
    trainer.train()
    assert {event: watch.seen[event] for event in EVENTS_AT_Y} == {event: {"y"} for event in EVENTS_AT_Y}
    assert {event: watch.seen[event] for event in EVENTS_AT_X} == {event: {"x"} for event in EVENTS_AT_X}


def check_end_of_training(trainer_class, tmp_path):
    trainer, watch = watched(trainer_class, tmp_path)
    trainer.train()
    assert watch.truth.name(parameters(trainer.model)) == "x"

    def interrupt(trainer):
        raise KeyboardInterrupt

    trainer, watch = watched(trainer_class, tmp_path, actions={6: interrupt})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert watch.truth.name(parameters(trainer.model)) == "x"


def check_averaged_weights_in_a_callback(trainer_class, tmp_path):
    seen = []

    class Sampler(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, averaged_weights=None, **kwargs):
            if state.global_step > 1:  # after the first step, x = y = z
                with averaged_weights():
                    seen.append(watch.truth.name(parameters(model)))
                    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
                seen.append(watch.truth.name(parameters(model)))

        on_log = on_substep_end = on_optimizer_step = on_step_end = on_step_begin

    trainer, watch = watched(trainer_class, tmp_path, trainer_options={"callbacks": [Sampler()]})
    trainer.train()
    assert seen and set(seen[::2]) == {"x"} and set(seen[1::2]) == {"y"}
    assert same_bits(everything(trainer), everything(train(tmp_path / "without", trainer_class=trainer_class)))


def check_nothing_perturbs(trainer_class, tmp_path):
    """With dropout: a reader that draws a random number, or comes back to other bits, changes what follows."""
    readers = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    runs = [
        train(tmp_path / name, trainer_class=trainer_class, model=tiny_llama(attention_dropout=0.3), **options)
        for name, options in (("alone", {}), ("read", readers))
    ]
    trainer = make_trainer(
        tmp_path / "predict",
        trainer_class=trainer_class,
        model=tiny_llama(attention_dropout=0.3),
        trainer_options={"callbacks": [watch := Watch({3: lambda trainer: trainer.predict(token_data()[:8])})]},
    )
    watch.truth = Truth(trainer)
    trainer.train()
    assert same_bits(everything(runs[0]), everything(runs[1])) and same_bits(everything(runs[0]), everything(trainer))


def check_resume_of_a_foreign_optimizer(trainer_class, tmp_path):
    def run(folder, resume=None):
        model = tiny_llama()
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
        options = {"trainer_options": {"optimizers": (optimizer, None)}, "save_strategy": "steps", "save_steps": 3}
        return train(folder, resume=resume, trainer_class=trainer_class, model=model, **options)

    whole = run(tmp_path)
    resumed = run(tmp_path, resume=tmp_path / "checkpoint-3")
    assert same_bits(parameters(whole.model), parameters(resumed.model))


class Normalized(nn.Module):
    """A classifier with BatchNorm; tied to no library."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, inputs, labels=None):
        logits = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    inputs = 3 + 2 * torch.randn(count, 4, generator=generator)
    return [{"inputs": row, "labels": (row.sum() > 12).long()} for row in inputs]


def normalized(output_dir, trainer_class=ScheduleFreeTrainer, resume=None, callbacks=(), **options):
    data = rows()
    trainer_options = {"train_dataset": data, "eval_dataset": data[:16], "callbacks": list(callbacks)}
    options = {"max_steps": 12, "learning_rate": 0.1, "trainer_options": trainer_options, **options}
    return train(output_dir, resume=resume, trainer_class=trainer_class, model=Normalized(), **options)


def check_batch_norm(trainer_class, tmp_path):
    def run(name, **options):
        callbacks = [BatchNormRecalibrationCallback(num_batches=8)]
        return normalized(tmp_path / name, trainer_class, callbacks=callbacks, **options)

    alone = run("alone")
    read = run("read", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=5)
    resumed = run("read", resume=tmp_path / "read" / "checkpoint-5")
    assert same_bits(everything(alone), everything(read)) and same_bits(everything(alone), everything(resumed))
    x = parameters(alone.model)
    with alone.training_weights(), read.training_weights(), resumed.training_weights():
        assert same_bits(parameters(alone.model), parameters(read.model))
        assert same_bits(parameters(alone.model), parameters(resumed.model))
        assert not torch.equal(parameters(alone.model)["layers.1.running_mean"], x["layers.1.running_mean"])
    assert same_bits(parameters(alone.model), x)
    assert has_statistics_of_its_own(alone)
    weights = saved(tmp_path / "read" / "checkpoint-10")
    assert not torch.equal(weights["layers.1.running_mean"], torch.zeros(8))
    alone.train()  # a second run, whose last step has the same number
    assert has_statistics_of_its_own(alone)


def has_statistics_of_its_own(trainer):
    """Whether the running mean is the plain average over the training batches of what the shown weights give."""
    batches = [batch["inputs"] for batch in itertools.islice(trainer.get_train_dataloader(), 8)]
    hidden = [trainer.model.layers[0](batch).detach().double() for batch in batches]
    mean = torch.stack([batch.mean(0) for batch in hidden]).mean(0)
    return torch.allclose(trainer.model.layers[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)


def check_batch_norm_warning(trainer_class, tmp_path):
    """A model with BatchNorm and without the callback gets one warning per Trainer, which names the callback."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hf_schedulefree").addHandler(handler)
    try:
        trainer = normalized(tmp_path, trainer_class, max_steps=2)
        trainer.train()
        normalized(tmp_path, trainer_class, max_steps=2, callbacks=[BatchNormRecalibrationCallback(num_batches=2)])
    finally:
        logging.getLogger("hf_schedulefree").removeHandler(handler)
    assert sum("BatchNormRecalibrationCallback" in message for message in messages) == 1


def check_rate_and_warmup(trainer_class, tmp_path):
    trainer = train(tmp_path, trainer_class=trainer_class, warmup_steps=0.4, logging_steps=1)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([2.5e-3, 5e-3, 7.5e-3] + [1e-2] * 7)


def check_full_eval(trainer_class, tmp_path):
    """An evaluation in half precision, before or after train(), leaves no rounded weights or buffers behind."""
    options = {"trainer_class": trainer_class, "bf16_full_eval": True}
    trainer = make_trainer(tmp_path, **options)
    trainer.evaluate()
    trainer.train()
    x = parameters(trainer.model)
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.predict(trainer.eval_dataset)
    trainer.save_model(tmp_path / "model")
    assert same_bits(parameters(trainer.model), x) and close_to(saved(tmp_path / "model"), x_in_float64(trainer))
    assert same_bits(dict(trainer.model.named_buffers()), buffers)
    trainer.train()
    once = train(tmp_path, **options)
    assert same_bits(x, parameters(once.model))
    once.train()
    assert same_bits(everything(trainer), everything(once))


def check_evaluate_of_the_host(trainer_class, tmp_path):
    """A Trainer that is extended may read the model in an `evaluate` and a `predict` of its own."""
    seen = []

    class Reads(Trainer):
        def evaluate(self, *args, **kwargs):
            seen.append(watch.truth.name(parameters(self.model)))
            return super().evaluate(*args, **kwargs)

        def predict(self, *args, **kwargs):
            seen.append(watch.truth.name(parameters(self.model)))
            return super().predict(*args, **kwargs)

    class Mine(ScheduleFreeMixin, Reads):
        pass

    actions = {4: lambda trainer: trainer.predict(token_data()[:4]), 6: lambda trainer: trainer.evaluate()}
    trainer, watch = watched(Mine, tmp_path, actions=actions)
    trainer.train()
    assert seen == ["x", "x"]


def check_an_evaluate_of_ones_own(trainer_class, tmp_path):
    """In a class that is derived from the whole, so that it comes first, and that asks none of the others."""
    seen = []

    class Mine(trainer_class):
        def evaluate(self, *args, **kwargs):
            seen.append(watch.truth.name(parameters(self.model)))
            torch.rand(3)
            return {"eval_loss": 1.0}

    quiet, _ = watched(Mine, tmp_path / "quiet", save_strategy="no")
    quiet.train()
    trainer, watch = watched(Mine, tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="no")
    trainer.train()
    assert set(seen) == {"x"} and watch.seen["on_step_begin"] == {"y"}
    assert same_bits(parameters(trainer.model), parameters(quiet.model))


READERS = {
    "full_eval": check_full_eval,
    "evaluate": check_evaluate,
    "predict": check_predict,
    "evaluate and predict of the Trainer that is extended": check_evaluate_of_the_host,
    "evaluate of a Trainer that is derived": check_an_evaluate_of_ones_own,
    "checkpoint": check_step_checkpoint,
    "save_model": check_save_model,
    "Ray Tune's checkpoint": check_ray_checkpoint,
    "push_to_hub": check_push,
    "best model, early stopping": check_best_model,
    "hyperparameter_search": check_hyperparameter_search,
    "auto_find_batch_size": check_auto_find_batch_size,
    "SIGTERM": check_sigterm,
    "callback events": check_events,
    "code after train()": check_end_of_training,
    "averaged_weights() in callbacks": check_averaged_weights_in_a_callback,
    "nothing perturbs": check_nothing_perturbs,
    "BatchNorm": check_batch_norm,
    "BatchNorm without the callback": check_batch_norm_warning,
}


@pytest.mark.parametrize("reader", READERS)
def test_the_right_weights(reader, tmp_path):
    READERS[reader](ScheduleFreeTrainer, tmp_path)


# Each override that concerns the weights, and the check that notices when it is gone.
OVERRIDES = {
    "__init__": check_events,
    "_give_callbacks_their_weights": check_events,
    "train": check_end_of_training,
    "_prepare_for_training": check_batch_norm_warning,
    "_load_best_model": check_best_model,
    "_save_optimizer_and_scheduler": check_batch_norm,
    "_load_optimizer_and_scheduler": check_resume_of_a_foreign_optimizer,
    "_evaluate": check_an_evaluate_of_ones_own,
    "evaluate": check_evaluate_of_the_host,
    "predict": check_evaluate_of_the_host,
    "evaluation_loop": check_full_eval,
    "save_model": check_save_model,
    "_save_checkpoint": check_step_checkpoint,
    "_tune_save_checkpoint": check_ray_checkpoint,
    "push_to_hub": check_push,
    "create_scheduler": check_rate_and_warmup,
    "_get_learning_rate": check_rate_and_warmup,
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_each_override_is_needed(override, tmp_path, monkeypatch):
    check = OVERRIDES[override]
    check(ScheduleFreeTrainer, tmp_path / "whole")
    if override == "_give_callbacks_their_weights":  # called by __init__
        monkeypatch.setattr(ScheduleFreeMixin, override, lambda self: None)
    else:
        owner = next(kind for kind in ScheduleFreeMixin.__mro__ if override in vars(kind))
        monkeypatch.delattr(owner, override)
    with pytest.raises((AssertionError, AttributeError, RuntimeError, OSError, ValueError)):
        check(ScheduleFreeTrainer, tmp_path / "mutant")
