"""Which weights the model shows: x for readers, y for gradients, and the exact way between the two.

`WeightSwitch` knows one kind of optimizer (and, for the engines that keep weights of their own, one kind of engine);
`switch_for` finds the one that fits. Everything that needs x goes through `averaged_weights`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from hf_schedulefree.optim import ScheduleFreeOptimizer


class WeightSwitch:
    """Switches between x and y for the optimizers of `hf_schedulefree.optim`, which do so exactly by themselves."""

    def __init__(self, optimizer: ScheduleFreeOptimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: its counters and options."""
        return self.optimizer.param_groups

    @property
    def mode(self) -> Literal["train", "eval"]:
        """ "train" while the model shows y, "eval" while it shows x."""
        return self.optimizer.mode

    def show_x(self) -> None:
        """Show the averaged weights in the model, keeping what is needed to come back to y bit for bit."""
        self.optimizer.eval()

    def show_y(self) -> None:
        """Show the very y again that `show_x` put away."""
        self.optimizer.train()

    def weights_replaced(self) -> bool:
        """Whether, while x was shown, somebody loaded other weights into the model."""
        return self.optimizer.weights_replaced()

    def restart(self) -> None:
        """Forget the run so far: x = y = z = the weights that the model holds, counters and moments as if new."""
        self.optimizer.restart()


def unwrap_optimizer(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def switch_for(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> WeightSwitch | None:
    """The switch for a schedule-free optimizer, however wrapped; None for any other optimizer (or none)."""
    optimizer = unwrap_optimizer(optimizer)
    return WeightSwitch(optimizer) if isinstance(optimizer, ScheduleFreeOptimizer) else None


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
