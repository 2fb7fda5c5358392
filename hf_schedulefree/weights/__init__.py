"""Which weights the model shows: x for readers, y for gradients, and the exact way between the two.

Each kind of `WeightSwitch` knows one kind of optimizer or engine; `switch_for` finds the one that fits. Everything that
needs x goes through `averaged_weights`.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from hf_schedulefree.optim import ScheduleFreeOptimizer
from hf_schedulefree.weights.foreign import foreign_switch
from hf_schedulefree.weights.switch import WeightSwitch

__all__ = ["WeightSwitch", "averaged_weights", "switch_for", "training_weights", "unwrap_optimizer"]


def unwrap_optimizer(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def switch_for(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> WeightSwitch | None:
    """The switch for a schedule-free optimizer, however wrapped; None for any other optimizer (or none)."""
    optimizer = unwrap_optimizer(optimizer)
    if isinstance(optimizer, ScheduleFreeOptimizer):
        return WeightSwitch(optimizer)
    return foreign_switch(optimizer)


@contextlib.contextmanager
def averaged_weights(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Show the averaged weights x in `model` for the length of a `with` block.

    Outside, the mode and every bit are as they were before. Blocks may be nested; with an optimizer that is not
    schedule-free, or that shows x already, nothing happens.

    Args:
        model: the model, as wrapped for training (DDP, ...).
        optimizer: its optimizer, as wrapped for training.
    """
    with _shown(switch_for(model, optimizer), "eval"):
        yield


@contextlib.contextmanager
def training_weights(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """The opposite of `averaged_weights`: show y, at which gradients are taken, for the length of a `with` block."""
    with _shown(switch_for(model, optimizer), "train"):
        yield


@contextlib.contextmanager
def _shown(switch: WeightSwitch | None, mode: Literal["train", "eval"]) -> Iterator[None]:
    if switch is None or switch.mode == mode:
        yield
        return
    there, back = (switch.show_x, switch.show_y) if mode == "eval" else (switch.show_y, switch.show_x)
    try:
        there()
        yield
    finally:
        back()
