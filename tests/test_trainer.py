"""The Trainer on an ordinary user's way: train, evaluate, save; warm-up and rate; and a drop-in otherwise."""

import logging
import shutil

import pytest
import schedulefree
import torch
from tiny import (
    arguments,
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
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback

from hf_schedulefree import ScheduleFreeMixin, ScheduleFreeTrainer
from hf_schedulefree.optim import AdamWScheduleFree


def test_every_way_to_a_file_leads_to_x(tmp_path):
    trainer = train(tmp_path, save_strategy="steps", save_steps=4)
    trainer.save_model(tmp_path / "after_train")
    trainer.evaluate()
    trainer.save_model(tmp_path / "after_evaluate")
    exact = x_in_float64(trainer)
    for folder in ("checkpoint-10", "after_train", "after_evaluate"):
        assert close_to(saved(tmp_path / folder), exact)
    with trainer.training_weights():
        assert not close_to(parameters(trainer.model), exact)  # or the run would prove nothing

    class StopAtFour(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    stopped = train(tmp_path / "stopped", trainer_options={"callbacks": [StopAtFour()]})
    assert close_to(saved(tmp_path / "checkpoint-4"), x_in_float64(stopped))


def test_the_saved_folder_scores_the_loss_of_x(tmp_path):
    trainer = train(tmp_path)
    at_x = trainer.evaluate()["eval_loss"]
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same_bits(parameters(loaded), parameters(trainer.model))
    assert make_trainer(tmp_path, model=loaded).evaluate()["eval_loss"] == at_x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_at_x_after_an_exception(error, tmp_path):
    class Raises(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise error("in the middle")

    trainer = make_trainer(tmp_path, trainer_options={"callbacks": [Raises()]})
    with pytest.raises(error):
        trainer.train()
    assert inner(trainer.optimizer).mode == "eval"
    assert close_to(parameters(trainer.model), x_in_float64(trainer))
    assert same_bits(parameters(trainer.model), parameters(train(tmp_path, max_steps=6).model))


def test_averaged_weights_come_back_to_the_same_bits(tmp_path):
    trainer = train(tmp_path)
    with trainer.training_weights():
        y = parameters(trainer.model)
        with trainer.averaged_weights():
            x = parameters(trainer.model)
            assert close_to(x, x_in_float64(trainer)) and not same_bits(x, y)
            with trainer.averaged_weights():
                assert same_bits(parameters(trainer.model), x)
            assert same_bits(parameters(trainer.model), x)
        assert same_bits(parameters(trainer.model), y)
    assert same_bits(parameters(trainer.model), x)
    with pytest.raises(ZeroDivisionError), trainer.training_weights(), trainer.averaged_weights():
        raise ZeroDivisionError
    assert same_bits(parameters(trainer.model), x)


# Warm-up and learning rate


def ramp(peak: float, warmup_steps: int, steps: int) -> list[float]:
    return [peak * min(1.0, (k + 1) / warmup_steps) if warmup_steps else peak for k in range(steps)]


@pytest.mark.parametrize(("warmup_steps", "resolved"), [(0, 0), (4, 4), (0.3, 3), (0.25, 3)])
def test_warmup_happens_once_and_the_logged_rate_is_the_real_one(warmup_steps, resolved, tmp_path):
    trainer = train(tmp_path, warmup_steps=warmup_steps, logging_steps=1)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(ramp(1e-2, resolved, 10), rel=1e-12)
    assert [group["warmup_steps"] for group in trainer.optimizer.param_groups] == [resolved] * 2
    assert (trainer.args.warmup_steps, trainer.args.lr_scheduler_type) == (warmup_steps, "linear")  # as the user wrote

    data = token_data()
    alone = tiny_llama()
    optimizer = schedulefree.AdamWScheduleFree(alone.parameters(), lr=1e-2, warmup_steps=resolved)
    optimizer.train()
    alone.train()
    for batch in trainer.get_train_dataloader():
        del batch
    for batch in batches_of(trainer, data):
        alone(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    for name, value in parameters(alone).items():
        assert torch.allclose(value, trainer.model.state_dict()[name], rtol=1e-4, atol=1e-6), name


def batches_of(trainer: Trainer, data) -> list[dict[str, torch.Tensor]]:
    """The batches of the first ten steps of a run with the default seed."""

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids=None, labels=None):
            self.seen.append({"input_ids": input_ids.clone(), "labels": labels.clone()})
            return {"loss": self.weight.sum()}

    recorder = Recorder()
    train(trainer.args.output_dir, model=recorder, trainer_class=Trainer, optim="adamw_torch")
    return recorder.seen


def test_the_default_scheduler_becomes_constant_with_one_line(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tmp_path, max_steps=4, logging_steps=1)
    lines = [record.message for record in caplog.records if "'linear' is replaced by 'constant'" in record.message]
    assert len(lines) == 1


def test_an_explicit_scheduler_is_honoured_with_a_warning(tmp_path, caplog):
    trainer = train(tmp_path, lr_scheduler_type="cosine", warmup_steps=2, logging_steps=1)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[0] == pytest.approx(5e-3) and logged[1] > logged[5] > logged[9] > 0
    assert any("'cosine' is honoured" in record.message for record in caplog.records)
    caplog.clear()
    train(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=2, max_steps=2)
    assert not any("honoured" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("scheduler", "options", "factor"),
    [
        ("inverse_sqrt", {}, lambda t: (4 / (4 + t)) ** 0.5),
        ("inverse_sqrt", {"timescale": 2}, lambda t: (2 / (2 + t)) ** 0.5),
        (
            "warmup_stable_decay",
            {"num_stable_steps": 3, "num_decay_steps": 3, "decay_type": "linear"},
            lambda t: min(1, (10 - t) / 3),
        ),
        (
            "warmup_stable_decay",
            {"num_stable_steps": 0, "num_decay_steps": 6, "decay_type": "linear"},
            lambda t: min(1, (10 - t) / 6),
        ),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "linear"}, lambda t: min(1, (10 - t) / 3)),
    ],
)
@pytest.mark.parametrize("warmup_steps", [4, 0.4])
def test_a_schedule_lies_where_it_would_with_its_own_warmup(scheduler, options, factor, warmup_steps, tmp_path):
    trainer = train(
        tmp_path, lr_scheduler_type=scheduler, lr_scheduler_kwargs=options, warmup_steps=warmup_steps, logging_steps=1
    )
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([rate * factor(t) for t, rate in enumerate(ramp(1e-2, 4, 10))])
    assert trainer.args.lr_scheduler_kwargs == options


def test_a_scheduler_passed_in_is_honoured(tmp_path):
    model = tiny_llama()
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = train(tmp_path, model=model, trainer_options={"optimizers": (optimizer, scheduler)}, logging_steps=1)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([1e-2 * 0.5**k * min(1.0, (k + 1) / 2) for k in range(10)])


@pytest.mark.parametrize(("own", "given", "used"), [(3, 0, 3), (0, 4, 4), (3, 4, 3)])
def test_warmup_of_an_optimizer_passed_in(own, given, used, tmp_path):
    model = tiny_llama()
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=own)
    trainer = train(
        tmp_path, model=model, trainer_options={"optimizers": (optimizer, None)}, warmup_steps=given, logging_steps=1
    )
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(ramp(1e-2, used, 10))


# A second train()


def test_a_second_train_goes_on_from_the_same_y(tmp_path):
    trainer = train(tmp_path, max_steps=5)
    with trainer.training_weights():
        y = parameters(trainer.model)
    seen = []

    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append(parameters(model))

    trainer.add_callback(First())
    trainer.train()
    assert same_bits(seen[0], y)
    assert trainer.optimizer.param_groups[0]["k"] == 10


def test_a_second_train_with_a_fresh_optimizer_starts_anew_from_x(tmp_path):
    other = tiny_llama()  # now: it draws from the generators
    trainer = train(tmp_path, max_steps=5)
    other.load_state_dict(parameters(trainer.model))
    trainer.train(fresh_optimizer=True)
    assert same_bits(everything(trainer), everything(train(tmp_path, max_steps=5, model=other)))


def test_weights_loaded_between_two_trainings_are_noticed_and_kept(tmp_path, caplog):
    other = tiny_llama(seed=7)
    trainer = train(tmp_path, max_steps=5)
    trainer.model.load_state_dict(other.state_dict())
    trainer.train()
    assert any("starts anew" in record.message for record in caplog.records)
    assert same_bits(everything(trainer), everything(train(tmp_path, max_steps=5, model=tiny_llama(seed=7))))


def test_the_best_model_is_a_fresh_start(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = train(tmp_path, **best, **often)
    checkpoint = trainer.state.best_model_checkpoint
    assert not checkpoint.endswith("-10")  # the worst x, so that the last one is not the best
    file = saved(checkpoint)
    assert same_bits({name: parameters(trainer.model)[name] for name in file}, file)
    trainer.evaluate()
    trainer.save_model(tmp_path / "best")
    assert same_bits(saved(tmp_path / "best"), file)
    with trainer.training_weights():
        assert same_bits({name: parameters(trainer.model)[name] for name in file}, file)

    from_the_file = AutoModelForCausalLM.from_pretrained(checkpoint)  # the next run overwrites it
    trainer.train()
    fresh = train(tmp_path / "fresh", model=from_the_file, **often, **best)
    assert same_bits(everything(trainer), everything(fresh))


def test_early_stopping_leaves_the_files_weights(tmp_path):
    trainer = make_trainer(
        tmp_path,
        trainer_options={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
        max_steps=40,
        learning_rate=1.0,  # it diverges, so that stopping early has a reason
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step < 40
    loss = trainer.evaluate()["eval_loss"]
    assert loss == trainer.state.best_metric
    file = saved(trainer.state.best_model_checkpoint)
    assert same_bits({name: parameters(trainer.model)[name] for name in file}, file)


class Tidy(TrainerCallback):
    """Somebody makes room on the disk."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            shutil.rmtree(state.best_model_checkpoint)


def test_without_the_best_checkpoint_the_run_keeps_its_own_end(tmp_path, caplog):
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = train(tmp_path / "run", trainer_options={"callbacks": [Tidy()]}, **often, **best)
    assert any("is gone: the model keeps" in record.message for record in caplog.records)
    assert same_bits(everything(trainer), everything(train(tmp_path / "other", **often)))


# With any other optimizer it is the Trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_plain_optimizer_gives_the_run_of_the_stock_trainer(optim, tmp_path):
    options = {
        "optim": optim,
        "model": None,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "warmup_steps": 3,
        "load_best_model_at_end": False,
    }
    runs = [
        train(tmp_path / name, trainer_class=trainer_class, **{**options, "model": tiny_llama(attention_dropout=0.2)})
        for name, trainer_class in (("stock", Trainer), ("ours", ScheduleFreeTrainer))
    ]
    assert same_bits(*[everything(run) for run in runs])
    timing = ("runtime", "per_second")
    histories = [
        [{k: v for k, v in entry.items() if not k.endswith(timing)} for entry in run.state.log_history] for run in runs
    ]
    assert histories[0] == histories[1]


def test_trainer_style_use(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(token_data())

    data = token_data()
    metrics = []

    def compute_metrics(prediction):
        metrics.append(prediction.predictions.shape)
        return {"count": len(prediction.predictions)}

    def loss_of(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].reshape(-1, outputs["logits"].shape[-1])
        return nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))

    trainer = ScheduleFreeTrainer(
        model_init=lambda: tiny_llama(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=5),
        train_dataset=Stream(),
        eval_dataset={"first": data[:4], "second": data[4:8]},
        compute_loss_func=loss_of,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_first_loss", "eval_second_count"} <= names and metrics
    assert close_to(parameters(trainer.model), x_in_float64(trainer))
    assert trainer.predict(data[:4]).metrics["test_count"] == 4
    first = everything(trainer)
    trainer.train()  # model_init makes a new model and a new optimizer
    assert same_bits(everything(trainer), first)


def test_a_mixin_behind_the_trainer_is_refused():
    """There it would change nothing: y in the files, and evaluations that change the training."""
    with pytest.raises(TypeError, match="before the Trainer"):

        class Behind(Trainer, ScheduleFreeMixin):
            pass

    class Host(Trainer):
        pass

    class Between(Host, ScheduleFreeTrainer):
        pass

    assert Between.__mro__.index(ScheduleFreeMixin) < Between.__mro__.index(Trainer)


class SamplesFirst(ScheduleFreeTrainer):
    """Draws random numbers in the model, as far as it has dropout that is on, before the Trainer's own step."""

    def training_step(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            model(**self._prepare_inputs(inputs))
        return super().training_step(model, inputs, *args, **kwargs)


class EvaluatesWithinASum(TrainerCallback):
    trainer = None

    def on_substep_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()


def test_a_step_begins_in_train_mode_whoever_looked_before(tmp_path):
    def run(name, resume=None, evaluates=False, **options):
        model = tiny_llama(attention_dropout=0.5)
        callback = EvaluatesWithinASum()
        trainer = make_trainer(
            tmp_path / name,
            trainer_class=SamplesFirst,
            model=model.eval(),  # as from_pretrained leaves it
            trainer_options={"callbacks": [callback] if evaluates else []},
            max_steps=6,
            gradient_accumulation_steps=2,
            **options,
        )
        callback.trainer = trainer
        trainer.train(resume_from_checkpoint=resume)
        return parameters(trainer.model)

    quiet = run("quiet")
    watched = run("watched", evaluates=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=4)
    assert same_bits(watched, quiet)
    assert same_bits(run("resumed", resume=str(tmp_path / "watched" / "checkpoint-4")), quiet)
