"""`WeightSwitch`: the way between x and y for one kind of optimizer."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from hf_schedulefree.optim import ScheduleFreeOptimizer


class WeightSwitch:
    """Switches between x and y for the optimizers of `hf_schedulefree.optim`, which do so exactly by themselves."""

    # Whether one process can switch to these weights alone. Where it cannot, a switch is not tried after an exception:
    # the other processes may never join, and the run would hang instead of ending with the exception.
    shows_x_alone = True
    shows_y_alone = True

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

    @property
    def settled(self) -> bool:
        """False in the middle of a switch that was interrupted; switching again, either way, completes it."""
        return all(group["train_mode"] is not None for group in self.param_groups)

    @property
    def schedulable(self) -> torch.optim.Optimizer:
        """What a learning-rate scheduler can be made for."""
        return self.optimizer

    @contextlib.contextmanager
    def reaching_parameters(self) -> Iterator[None]:
        """Within: `param_groups` hold all parameters of the optimizer. (ZeRO-3 empties them between steps.)"""
        yield

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

    def extra_state(self) -> dict[str, Any]:
        """What the way back to y needs besides the optimizer's own `state_dict`; tensors and plain values only."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `extra_state` returned, after the optimizer's own state was loaded."""
