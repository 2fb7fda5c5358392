"""Ready callbacks: generated text at x in mid-training, and BatchNorm statistics that belong to x."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_schedulefree.rng import generators_restored

if TYPE_CHECKING:
    from hf_schedulefree.trainer import ScheduleFreeMixin

logger = logging.get_logger(__name__)


class SampleGenerationCallback(TrainerCallback):
    """Logs text that the model generates at x, in the middle of training, without changing the training.

    The samples are kept in `samples` as (step, prompt, generated text), too. It needs a Trainer with
    `ScheduleFreeMixin` in front and the tokenizer as its `processing_class`.

    Args:
        prompts: texts to continue.
        every_n_steps: sample after every n-th optimizer step (default 100), >= 1.
        max_new_tokens: length of a sample in tokens (default 40).
        generate_kwargs: further arguments of `model.generate`, e.g. do_sample=True, temperature=0.8.

    Raises:
        ValueError: no prompt, or every_n_steps < 1.
    """

    def __init__(
        self, prompts: Sequence[str], every_n_steps: int = 100, max_new_tokens: int = 40, **generate_kwargs: Any
    ):
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts={prompts!r}: expected a list with at least one text")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} is out of range; expected a whole number >= 1")
        self.prompts = list(prompts)
        self.every_n_steps = every_n_steps
        self.generate_kwargs = {"max_new_tokens": max_new_tokens, **generate_kwargs}
        self.samples: list[tuple[int, str, str]] = []

    def on_step_end(
        self, args, state, control, model=None, processing_class=None, averaged_weights=None, **kwargs
    ) -> None:
        if state.global_step % self.every_n_steps:
            return
        if averaged_weights is None:
            raise RuntimeError("SampleGenerationCallback works with a Trainer that has ScheduleFreeMixin in front")
        if processing_class is None:
            raise ValueError("SampleGenerationCallback needs the tokenizer: pass processing_class to the Trainer")
        # Every rank generates (an engine that shards the weights needs them all); the main one logs.
        with averaged_weights(), _in_mode(model, train=False), torch.no_grad():
            for prompt in self.prompts:
                inputs = processing_class(prompt, return_tensors="pt").to(args.device)
                inputs.pop("token_type_ids", None)
                tokens = model.generate(**inputs, **self.generate_kwargs)[0, inputs["input_ids"].shape[1] :]
                text = processing_class.decode(tokens, skip_special_tokens=True)
                self.samples.append((state.global_step, prompt, text))
                if state.is_world_process_zero:
                    # A user who asks for samples wants to see them; transformers hides info by default.
                    logger.warning(f"step {state.global_step}, sample at x: {prompt!r} -> {text!r}")


class BatchNormRecalibrationCallback(TrainerCallback):
    """Gives a model with BatchNorm the running statistics of x whenever x is shown.

    The running statistics that training collects belong to y. Before x is read (evaluate, save, ...), `num_batches`
    batches of training data go through the model at x, in train mode with gradients off, and the statistics become the
    plain average over these batches. Afterwards the statistics of the training are back, bit for bit. This happens at
    most once per optimizer step. It needs a Trainer with `ScheduleFreeMixin` in front.

    Args:
        num_batches: batches of the training data to average over (default 50), >= 1.

    Raises:
        ValueError: num_batches < 1.
    """

    def __init__(self, num_batches: int = 50):
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches!r} is out of range; expected a whole number >= 1")
        self.num_batches = num_batches
        self._of_y: list[Tensor] | None = None  # while x is shown
        self._of_x: list[Tensor] | None = None  # at the step below
        self._step: int | None = None

    def show_x(self, trainer: "ScheduleFreeMixin") -> None:
        """Called by the Trainer when it has switched the model to x."""
        self._of_y = batch_norm_statistics(trainer.model)
        if self._of_x is None or self._step != trainer.state.global_step:
            self._recalibrate(trainer)
            self._of_x, self._step = batch_norm_statistics(trainer.model), trainer.state.global_step
        set_batch_norm_statistics(trainer.model, self._of_x)

    def show_y(self, trainer: "ScheduleFreeMixin") -> None:
        """Called by the Trainer when it has switched the model back to y."""
        if self._of_y is not None:
            set_batch_norm_statistics(trainer.model, self._of_y)
            self._of_y = None

    def start(self) -> None:
        """Called by the Trainer before the first step of a run: its steps are counted from the beginning again."""
        self._of_x = self._step = None

    def keep_loaded(self, trainer: "ScheduleFreeMixin") -> None:
        """Called by the Trainer when other weights, with statistics of their own, were loaded into the model."""
        self._of_y = None
        self._of_x, self._step = batch_norm_statistics(trainer.model), trainer.state.global_step

    def extra_state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint written at x needs besides, so that training resumes with its own statistics."""
        return {} if self._of_y is None else {"batch_norm": self._of_y}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `extra_state` returned."""
        self._of_y = state.get("batch_norm")

    def _recalibrate(self, trainer: "ScheduleFreeMixin") -> None:
        layers = batch_norm_layers(trainer.model)
        momenta = [layer.momentum for layer in layers]
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a plain average
            with (
                generators_restored(),
                _in_mode(trainer.model, train=True),
                torch.no_grad(),
                _first_batches(trainer.get_train_dataloader(), self.num_batches) as batches,
            ):
                for inputs in batches:
                    with trainer.compute_loss_context_manager():
                        trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum


def batch_norm_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that keep running statistics over batches."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """Copies of the running statistics of all BatchNorm layers, in a fixed order."""
    return [buffer.detach().clone() for layer in batch_norm_layers(model) for buffer in layer.buffers()]


@torch.no_grad()
def set_batch_norm_statistics(model: nn.Module, statistics: Sequence[Tensor]) -> None:
    """Put back what `batch_norm_statistics` returned."""
    buffers = [buffer for layer in batch_norm_layers(model) for buffer in layer.buffers()]
    for buffer, value in zip(buffers, statistics, strict=True):
        buffer.copy_(value)


@contextlib.contextmanager
def _in_mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Put a module into train or eval mode, and every submodule back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _first_batches(dataloader: Any, count: int) -> Iterator[Iterator[Any]]:
    """Iterate over the first batches of the first epoch, and sign accelerate's DataLoader off afterwards."""
    if hasattr(dataloader, "iteration"):
        dataloader.iteration = 0
    try:
        yield itertools.islice(dataloader, count)
    finally:
        if hasattr(dataloader, "end"):  # accelerate signs off by itself only if it was read to its end
            dataloader.end()
