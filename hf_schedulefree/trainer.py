"""`ScheduleFreeMixin` and the Trainers made with it: x to every reader, y to every gradient, one warm-up."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_schedulefree import adapters, hub, registry, sigterm, weights
from hf_schedulefree.callbacks import BatchNormRecalibrationCallback, batch_norm_layers
from hf_schedulefree.checkpoint import describe_weight_files
from hf_schedulefree.checkpoint.files import EXTRA_STATE_FILE, sharded_write_errors
from hf_schedulefree.learning_rate import LearningRateMixin
from hf_schedulefree.progress import progress
from hf_schedulefree.renamed_weights import renamed_weights_loaded
from hf_schedulefree.rng import generators_restored
from hf_schedulefree.saving import CheckpointMixin
from hf_schedulefree.streamed_save import StreamedSaveMixin, listens

logger = logging.get_logger(__name__)

# The callback events that read the model as a result: they see x. During `train()` all others see y.
EVENTS_AT_X = frozenset({"on_evaluate", "on_predict", "on_prediction_step", "on_save", "on_push_begin", "on_train_end"})

# What comes next is a batch that is trained.
EVENTS_BEFORE_GRADIENTS = frozenset({"on_step_begin", "on_substep_end"})


class ScheduleFreeMixin(LearningRateMixin, StreamedSaveMixin, CheckpointMixin):
    """Put in front of any `transformers.Trainer` class: `class MySFTTrainer(ScheduleFreeMixin, SFTTrainer)`.

    With a schedule-free optimizer, the model shows the averaged weights x to everyone who reads it (evaluate, predict,
    every save, push_to_hub, the callbacks in `EVENTS_AT_X`, any code after `train()`) and y while it is trained; no
    reader changes the training by a bit. `warmup_steps` is applied once, by the optimizer, and the default scheduler is
    constant. With any other optimizer the class behaves as the Trainer that it extends.

    Raises:
        TypeError: when a class is defined in which the mixin stands behind the Trainer.
        ValueError: at construction, if `optim_args` are malformed, an optimizer option is out of range, or FSDP or
            DeepSpeed is set up in a way that could not give the averaged weights.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        kinds = cls.__mro__
        if Trainer in kinds[: kinds.index(ScheduleFreeMixin)]:
            raise TypeError(
                f"{cls.__name__}: ScheduleFreeMixin must stand before the Trainer, or it changes nothing: "
                "class MyTrainer(ScheduleFreeMixin, AnyTrainer)"
            )

    def __init__(self, *args: Any, **kwargs: Any):
        self._training = False  # inside train(); `is_in_train` stays True after an exception
        self._train_mode_set = False  # in this train(), for all parts of the model
        self._batch_norm_warned = False
        self._weights_loaded = False  # those of the checkpoint, since it was last asked for its optimizer state
        self._progress: dict[str, float] = {}  # what is logged with the next training loss
        # The arguments have no fixed place: TRL's trainers take a reference model or rewards before them.
        model = args[0] if args else kwargs.get("model")
        arguments = next((value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)), None)
        schedule_free = arguments is not None and registry.spec_for(arguments) is not None
        if arguments is not None and registry.names_schedule_free(arguments):
            original = weights.compiled_in_place(model)
            args = tuple(original if value is model else value for value in args)
            kwargs = {name: original if value is model else value for name, value in kwargs.items()}
            model = original
        with weights.optimizer_saves_allowed(model, arguments if schedule_free else None):
            super().__init__(*args, **kwargs)
        spec = registry.spec_for(self.args)
        if spec is not None:
            spec.kwargs(self.args)
        if spec is not None or self._switch is not None:
            weights.refuse_unsupported(self.accelerator, self.args, self.optimizer, self.model)
        self._give_callbacks_their_weights()

    # Which weights are shown

    @property
    def _switch(self) -> weights.WeightSwitch | None:
        """The switch between x and y; None while there is no optimizer, or a plain one."""
        return weights.switch_for(self.model_wrapped, self.optimizer)

    @property
    def _engine(self) -> weights.Engine:
        """What spreads the model over the processes."""
        return weights.engine_for(self.model_wrapped, self.optimizer)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Show x in `self.model` for the length of a `with` block, e.g. to sample text in a callback.

        Outside, the model and (during training) the random number generators are bit for bit as before. Every callback
        gets this method as the keyword argument `averaged_weights`.
        """
        if self._switch is None:
            yield
            return
        keep_generators = generators_restored() if self._training else contextlib.nullcontext()
        with keep_generators, describe_weight_files(self._weight_metadata()):
            if self._switch.mode == "eval":
                yield
                return
            with weights.there_and_back(self._show_x, self._show_y, self._switch.shows_y_alone):
                yield

    @contextlib.contextmanager
    def training_weights(self) -> Iterator[None]:
        """Show y, at which gradients are taken, for the length of a `with` block, e.g. to compare it with x."""
        if self._switch is None or self._switch.mode == "train":
            yield
            return
        try:
            self._show_y()
            yield
        finally:
            self._show_x()

    def _show_x(self) -> None:
        """Put x into the model, with the BatchNorm statistics that belong to it."""
        if self._switch.mode == "train":
            self._switch.show_x()
            self._last_loaded_step = -1  # TRL's mark that vLLM has this step's weights: it has not, they changed
            for callback in self._batch_norm_callbacks:
                callback.show_x(self)

    def _show_y(self) -> None:
        """Put y back into the model, with the BatchNorm statistics of the training."""
        self._switch.show_y()
        self._last_loaded_step = -1  # as in _show_x
        for callback in self._batch_norm_callbacks:
            callback.show_y(self)

    @property
    def _batch_norm_callbacks(self) -> list[BatchNormRecalibrationCallback]:
        return [cb for cb in self.callback_handler.callbacks if isinstance(cb, BatchNormRecalibrationCallback)]

    def _give_callbacks_their_weights(self) -> None:
        """Around each callback event, show the weights that it is meant to see."""
        call_event = self.callback_handler.call_event

        def call_event_at_its_weights(event: str, *args: Any, **kwargs: Any) -> Any:
            kwargs["averaged_weights"] = self.averaged_weights
            reads = listens(self.callback_handler, event)  # if not, the model can stay as it is
            concerned = reads or event in ("on_save", "on_train_end")
            if not self._training or not concerned or self._switch is None:
                return call_event(event, *args, **kwargs)
            # Where processes switch together, they do so whoever reads: the callback may be the main process's alone.
            joint = not self._switch.shows_y_alone
            reads = reads or joint
            if event in EVENTS_AT_X:
                shown = self.averaged_weights()
            elif joint:
                # Only `on_log` may come at x, from within an evaluation; the call, too, may be one process's alone.
                shown = contextlib.nullcontext()
            elif self._switch.weights_replaced():
                # Somebody evaluates others for a while (on_log): to switch now would be to take them for loaded ones.
                shown = contextlib.nullcontext()
            else:
                shown = self.training_weights()
            if not reads:
                shown = contextlib.nullcontext()
            with shown, hub.token_left_out(self.args):  # a tracker may publish the arguments with the model
                if event == "on_save":
                    return self._call_on_save(lambda: call_event(event, *args, **kwargs))
                return call_event(event, *args, **kwargs)

        def call_event_and_prepare(event: str, *args: Any, **kwargs: Any) -> Any:
            control = call_event_at_its_weights(event, *args, **kwargs)
            if event in EVENTS_BEFORE_GRADIENTS and self._training and self._switch is not None:
                self._set_train_mode()
            return control

        self.callback_handler.call_event = call_event_and_prepare

    def _set_train_mode(self) -> None:
        # The Trainer does so in its training_step. That is too late for a host that samples before it calls that one
        # (TRL's GKD): it would do so without dropout after an evaluation and, with parts of the model, after a resume.
        if not (self._train_mode_set and self.model_wrapped.training):
            self.model_wrapped.train()
            self._train_mode_set = True

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        fresh_optimizer: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.train`; however it ends (also by an exception or Ctrl-C), the model is left at x.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the newest whole one in `output_dir`.
            fresh_optimizer: go on from weights alone, with a new average (x = y = z): those of the checkpoint or,
                without one, those that the model holds.
            args, kwargs: as in `Trainer.train`.

        Raises:
            ValueError: the checkpoint is not whole, is of another optimizer or engine, or has no optimizer state.
        """
        if fresh_optimizer and not resume_from_checkpoint and self._switch is not None:
            self._show_x()
            self._restart()
        if not resume_from_checkpoint and self._switch is not None and self._switch.weights_replaced():
            logger.warning("Other weights were loaded since the last train(): the optimizer starts anew from them.")
            self._restart()
        self._training, self._train_mode_set, self._weights_loaded = True, False, False
        try:
            with weights.only_data_loaded(self.is_deepspeed_enabled):
                output = super().train(resume_from_checkpoint, *args, fresh_optimizer=fresh_optimizer, **kwargs)
            if self._switch is not None:
                self._show_x()
            return output
        except BaseException:
            if self._switch is not None and self._switch.shows_x_alone:
                self._switch.show_x()  # no recalibration: whoever pressed Ctrl-C does not want to wait for it
            raise
        finally:
            self._training = False

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        # The callbacks before the first step see y as well, after a resume and in a second train() too.
        if self._is_schedule_free_run():  # an evaluation before does not change the training
            self.model_wrapped = weights.to_be_wrapped(self.model, self.model_wrapped, self.accelerator)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._switch is not None:
            if batch_norm_layers(self.model) and not self._batch_norm_callbacks and not self._batch_norm_warned:
                self._batch_norm_warned = True
                logger.warning(
                    "The model has BatchNorm layers, whose running statistics are those of y. Give the Trainer a "
                    "hf_schedulefree.BatchNormRecalibrationCallback() to evaluate and save x with its own."
                )
            sigterm.save_between_steps(self.callback_handler)
            self._show_y()
            for callback in self._batch_norm_callbacks:
                callback.start()
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # Under DeepSpeed, the Trainer's own call of optimizer.train() reaches nothing.
        if self._switch is not None and self._switch.mode == "eval":
            self._show_y()
        return super().training_step(*args, **kwargs)

    def _restart(self) -> None:
        self._switch.restart()
        for callback in self._batch_norm_callbacks:
            callback.keep_loaded(self)

    def _load_best_model(self) -> None:
        # The file holds x and nothing else belongs to it any more: the optimizer starts anew from it.
        if self._switch is None:
            return super()._load_best_model()
        checkpoint, load = self.state.best_model_checkpoint, super()._load_best_model
        if not self._of_all(os.path.isdir(checkpoint))[0]:
            # The Trainer would say something about nodes, and go on.
            logger.warning(f"The best checkpoint, {checkpoint}, is gone: the model keeps x of the last step.")
            return None
        self._switch.show_x()

        def load_all() -> None:
            if adapters.has_adapter_folders(self.model, checkpoint):
                self._load_from_checkpoint(checkpoint)  # the Trainer would not find them and go on with other weights
            else:
                with self._loading_model(checkpoint):
                    load()

        self._load_whole_best(load_all)
        self._restart()
        logger.info("The best model is loaded; a later train() starts anew from exactly these weights (x = y = z).")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The way back to y may need more than the optimizer's state_dict; mostly there is nothing to write.
        engine, folder = self._engine, Path(output_dir)
        with sharded_write_errors():
            if self._switch is None or not engine.save_states(folder, self.accelerator, self.args.should_save):
                super()._save_optimizer_and_scheduler(output_dir)
            elif self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        if self._switch is not None and self.args.should_save:
            extra = self._switch.extra_state()
            for callback in self._batch_norm_callbacks:
                extra.update(callback.extra_state())
            if extra:
                torch.save(extra, os.path.join(output_dir, EXTRA_STATE_FILE))

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # Of several adapters the Trainer leaves only the first active, and the optimizer's state would not fit.
        with adapters.active_adapters_kept(self.model), self._loading_model(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)
            adapters.load_default(self.model, checkpoint)
        self._weights_loaded = True

    @contextlib.contextmanager
    def _loading_model(self, checkpoint: str) -> Iterator[None]:
        """Within: the Trainer finds all weights in a checkpoint, by whatever names transformers has saved them."""
        # FSDP and DeepSpeed have files of their own.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or not self._is_schedule_free_run()
        with self._engine.loading_model():
            with contextlib.nullcontext() if sharded else renamed_weights_loaded(self.model, checkpoint):
                yield

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # x, y and z must belong together: an optimizer of another step would move the model away.
        if checkpoint is None or self._switch is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        if not self._weights_loaded and not self.is_deepspeed_enabled:
            # With auto_find_batch_size the Trainer resumes again and loads the optimizer only; the model has moved on.
            self._load_from_checkpoint(checkpoint)
        self._weights_loaded = False
        loads = self._loads_optimizer(checkpoint)
        if loads and self._engine.load_states(Path(checkpoint)):
            schedule = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)
        elif loads:
            if self.args.device.type == "cpu" and self.args.device.index is not None:
                weights.numbered_cpu_known()
            super()._load_optimizer_and_scheduler(checkpoint)
        if self._fresh_optimizer:
            return self._start_fresh_optimizer()
        # Without the file, too: what an earlier run of this Trainer has parked is not of this checkpoint.
        extra_file, extra = os.path.join(checkpoint, EXTRA_STATE_FILE), {}
        if os.path.isfile(extra_file):
            extra = torch.load(extra_file, map_location="cpu", weights_only=True)
        for owner in (self._switch, *self._batch_norm_callbacks):
            owner.load_extra_state(extra)
        if self._switch.weights_replaced():
            raise ValueError(
                f"The weights in {checkpoint} are not those that its optimizer state belongs to (or the model was "
                "built with another dtype than it was trained with). Resume from another checkpoint, or train from "
                "these weights anew by loading them with from_pretrained."
            )

    # Readers

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # The evaluations in train(), also of a class that is derived from this one with an evaluate() of its own.
        with self.averaged_weights():
            return super()._evaluate(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # Metrics and on_evaluate belong to the weights that will be published.
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        # As evaluate.
        with self.averaged_weights():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # It may be called directly, and switches by itself. Outside train(), bf16_full_eval would leave the model
        # rounded, for the next save and the next train().
        cast = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_deepspeed_enabled
        undone = weights.casts_undone(self.model) if cast and self._is_schedule_free_run() else contextlib.nullcontext()
        with self.averaged_weights(), undone:
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # What is saved is what was evaluated, and in every engine a model that loads. An upload that still reads the
        # folder would be torn.
        if output_dir is None:
            self._finish_current_push()
        with self._saving_x(), self._engine.gathering_model(self.accelerator) as gathering:
            if gathering is None:
                return super().save_model(output_dir, _internal_call)
            # The Trainer would first gather or copy the whole model, or write none.
            with gathering.open():
                if self.args.should_save:
                    self._save(output_dir, state_dict=gathering.content)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        # Weights, optimizer state and the mode recorded in it are written in one mode, so they agree on resume.
        with self._saving_x():
            return super()._save_checkpoint(*args, **kwargs)

    def _tune_save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        # Ray Tune's checkpoints: as _save_checkpoint.
        with self._saving_x():
            return super()._tune_save_checkpoint(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        # It saves, writes the card and uploads, all of one model. A Hub that fails does not end a training.
        try:
            with self.averaged_weights():
                return super().push_to_hub(*args, **kwargs)
        except hub.HUB_ERRORS as error:
            if not self._training:
                raise
            hub.report_failure(error)

    # The Hub

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        # Who downloads the weights should know that they are averages, and of what run. The Trainer's part of the card
        # would name the default schedule, linear, which was not used.
        with self._arguments_naming_the_schedule():
            super().create_model_card(*args, **kwargs)
        switch = self._switch
        if switch is not None and self.is_world_process_zero():
            card_file = Path(self.args.output_dir) / "README.md"
            name, group = type(switch.optimizer).__name__, switch.param_groups[0]
            hub.describe_weights(card_file, name, group, constant_rate=self._constant_rate)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # training_args.bin is published with the weights; the Hub token must not be.
        with hub.token_left_out(self.args), self._writing_on_each_node():
            super()._save(*args, **kwargs)

    @contextlib.contextmanager
    def _writing_on_each_node(self) -> Iterator[None]:
        """Within: with `save_on_each_node`, each node writes weights; transformers does in the main process only."""
        of_a_node = self.args.save_on_each_node and self.args.should_save and not self.is_world_process_zero()
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False) if of_a_node else None
        if self._switch is None or not hasattr(model, "should_save_on_this_rank"):
            yield
            return
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        try:
            yield
        finally:
            del model.should_save_on_this_rank

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # It writes training_args.bin once more, leaves card and named adapters out, and nobody looks how uploads end.
        if self._push_deferred() or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.hub_always_push:
            self._finish_current_push()  # the Trainer would overwrite the files that the upload is reading
        earlier = getattr(self.push_in_progress, "jobs", [])
        if all(job.done() for job in earlier):
            self.create_model_card(model_name=Path(self.hub_model_id).name)
        adapters.copy_adapter_folders(self.model, checkpoint_folder, self.args.output_dir)
        with hub.token_left_out(self.args):
            super()._push_from_checkpoint(checkpoint_folder)
        for job in getattr(self.push_in_progress, "jobs", []):
            if job not in earlier:
                job.add_done_callback(hub.report_failed_job)

    # Logging

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Here every process is, as the metrics need; `log` may be called by one of them only.
        if self.control.should_log and self._switch is not None:
            self._progress = progress(self._switch, self.accelerator)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # The averaging weight and the distance between x and y belong to the training loss.
        if "loss" in logs:
            logs.update(self._progress)
            self._progress = {}
        super().log(logs, *args, **kwargs)


class ScheduleFreeTrainer(ScheduleFreeMixin, Trainer):
    """`transformers.Trainer` for schedule-free optimizers; see `ScheduleFreeMixin`."""


class ScheduleFreeSeq2SeqTrainer(ScheduleFreeMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for schedule-free optimizers; see `ScheduleFreeMixin`."""
