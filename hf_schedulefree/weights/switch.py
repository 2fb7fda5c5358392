"""`WeightSwitch`: the way between x and y for one kind of optimizer; `EngineSwitch`: the same in an engine."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed

from hf_schedulefree.optim import ScheduleFreeOptimizer

if TYPE_CHECKING:
    from hf_schedulefree.weights.engines import Engine


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


class EngineSwitch(WeightSwitch):
    """Switches what `switch` knows, in `engine`: reaches all its parameters, and shows them in the module."""

    def __init__(self, switch: WeightSwitch, engine: "Engine"):
        super().__init__(switch.optimizer)
        self.inner = switch
        self.engine = engine
        only_process = not distributed.is_initialized() or distributed.get_world_size() == 1
        self.shows_x_alone = engine.shows_x_alone or only_process
        self.shows_y_alone = engine.shows_y_alone or only_process

    @property
    def mode(self) -> Literal["train", "eval"]:
        return self.inner.mode

    @property
    def settled(self) -> bool:
        return self.inner.settled

    @property
    def schedulable(self) -> torch.optim.Optimizer:
        return self.inner.schedulable

    @contextlib.contextmanager
    def reaching_parameters(self) -> Iterator[None]:
        with self.engine.reaching_parameters():
            yield

    def show_x(self) -> None:
        if self.mode == "eval":
            return
        if self.engine.park is not None:
            self.optimizer.park = self.engine.park
        with self.engine.reaching_parameters():
            self.inner.show_x()
        self.engine.publish()

    def show_y(self) -> None:
        if self.mode == "train" and self.settled:
            return
        with self.engine.reaching_parameters():
            # Where the optimizer cannot see that its parameters are shards, all processes decide here.
            replaced = self.inner.weights_replaced()
            if self.engine.in_any_process(replaced) and not replaced:
                self.inner.restart()
            self.inner.show_y()
        self.engine.publish()

    def weights_replaced(self) -> bool:
        if self.mode == "train":
            return False
        with self.engine.reaching_parameters():
            return self.engine.in_any_process(self.inner.weights_replaced())

    def restart(self) -> None:
        self.inner.restart()

    def extra_state(self) -> dict[str, Any]:
        return self.inner.extra_state()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.inner.load_extra_state(state)
