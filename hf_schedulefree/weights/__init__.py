"""Which weights the model shows: x for readers, y for gradients, and the exact way between the two.

    switch.py    `WeightSwitch`, for the optimizers of this package, and what an engine adds to it
    foreign.py   the same for those of other packages
    engines.py   DDP, FSDP2 and DeepSpeed: all differences between the ways to spread a model over processes
    gathering.py whole tensors of models that are spread over processes, one at a time while a file is written
    casts.py     a model that was cast for an evaluation comes back with its bits
    loading.py   DeepSpeed's files are read as data
    checks.py    what cannot be right is refused before training starts

`switch_for` finds what fits. Everything that needs x goes through `averaged_weights`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn

from hf_schedulefree.optim import ScheduleFreeOptimizer
from hf_schedulefree.weights.casts import casts_undone
from hf_schedulefree.weights.checks import compiled_in_place, refuse_unsupported
from hf_schedulefree.weights.engines import (
    Engine,
    engine_for,
    files_to_resume_from,
    optimizer_saves_allowed,
    resumes_on,
    to_be_wrapped,
    unwrap_optimizer,
)
from hf_schedulefree.weights.foreign import foreign_switch
from hf_schedulefree.weights.loading import numbered_cpu_known, only_data_loaded
from hf_schedulefree.weights.switch import EngineSwitch, WeightSwitch

__all__ = [
    "Engine",
    "WeightSwitch",
    "averaged_weights",
    "casts_undone",
    "compiled_in_place",
    "engine_for",
    "files_to_resume_from",
    "numbered_cpu_known",
    "only_data_loaded",
    "optimizer_saves_allowed",
    "refuse_unsupported",
    "resumes_on",
    "shown",
    "switch_for",
    "there_and_back",
    "to_be_wrapped",
    "training_weights",
    "unwrap_optimizer",
]


def switch_for(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> WeightSwitch | None:
    """The switch for a schedule-free optimizer, however wrapped; None for any other optimizer (or none)."""
    engine = engine_for(model, optimizer)
    if isinstance(engine.inner_optimizer, ScheduleFreeOptimizer):
        switch = WeightSwitch(engine.inner_optimizer)
    else:
        switch = foreign_switch(engine.inner_optimizer)
    return switch if switch is None or type(engine) is Engine else EngineSwitch(switch, engine)


@contextlib.contextmanager
def averaged_weights(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Show the averaged weights x in `model` for the length of a `with` block.

    Outside, the mode and every bit are as they were before. Blocks may be nested; with an optimizer that is not
    schedule-free, or that shows x already, nothing happens.

    Args:
        model: the model, as wrapped for training (DDP, ...).
        optimizer: its optimizer, as wrapped for training.
    """
    with shown(switch_for(model, optimizer), "eval"):
        yield


@contextlib.contextmanager
def training_weights(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """The opposite of `averaged_weights`: show y, at which gradients are taken, for the length of a `with` block."""
    with shown(switch_for(model, optimizer), "train"):
        yield


def shown(switch: WeightSwitch | None, mode: Literal["train", "eval"]) -> contextlib.AbstractContextManager[None]:
    """Show x ("eval") or y ("train") for the length of a `with` block."""
    if switch is None or switch.mode == mode:
        return contextlib.nullcontext()
    if mode == "eval":
        return there_and_back(switch.show_x, switch.show_y, switch.shows_y_alone)
    return there_and_back(switch.show_y, switch.show_x, switch.shows_x_alone)


@contextlib.contextmanager
def there_and_back(there: Callable[[], None], back: Callable[[], None], back_alone: bool) -> Iterator[None]:
    """`there` on entry, `back` on exit; after an exception only if one process can go back alone."""
    try:
        there()
        yield
    except BaseException:
        if back_alone:
            back()
        raise
    back()
