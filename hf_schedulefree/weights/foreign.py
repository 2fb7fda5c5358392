"""The same promise for schedule-free optimizers of other packages: schedulefree, pytorch_optimizer, prodigy-plus, ...

They switch between x and y by arithmetic on the weights, which does not come back to the same bits, and their state
does not say what y was. `ForeignSwitch` leaves the way to x to them and keeps a copy of y for the way back.
"""

import copy
import logging
import weakref
from typing import Any, Literal

import torch
from torch import Tensor

from hf_schedulefree.weights.switch import WeightSwitch

logger = logging.getLogger(__name__)

_switches: "weakref.WeakKeyDictionary[Any, ForeignSwitch]" = weakref.WeakKeyDictionary()

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def foreign_switch(optimizer: Any) -> "ForeignSwitch | None":
    """The switch of a schedule-free optimizer that is not ours, always the same one; None for any other optimizer.

    Schedule-free is what has `train()`, `eval()` and a `train_mode`, in its groups or (wrapper classes) in itself.
    """
    if optimizer is None or not (
        callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    ):
        return None
    if not _train_modes(optimizer):
        return None
    if optimizer not in _switches:
        _switches[optimizer] = ForeignSwitch(optimizer)
    return _switches[optimizer]


def _train_modes(optimizer: Any) -> list[bool]:
    groups = [group for group in optimizer.param_groups if group.get("use_schedulefree", True)]
    in_groups = [group["train_mode"] for group in groups if "train_mode" in group]
    return in_groups or ([optimizer.train_mode] if hasattr(optimizer, "train_mode") and groups else [])


class ForeignSwitch(WeightSwitch):
    """Switches an optimizer that has `train()` and `eval()` of its own, exactly in both directions.

    Args:
        optimizer: e.g. `schedulefree.AdamWScheduleFree`, `schedulefree.ScheduleFreeWrapper`. It is referenced weakly.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = weakref.ref(optimizer)
        self._y: list[Tensor] | None = None  # while x is shown, of the parameters in _parked
        self._parked: list[Tensor] = []
        self._between = False  # a switch was interrupted, or is going on
        self._x_marks: list[int] = []
        self._fresh_groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    @property
    def optimizer(self) -> Any:
        return self._optimizer()

    @property
    def mode(self) -> Literal["train", "eval"]:
        return "train" if any(_train_modes(self.optimizer)) else "eval"

    @property
    def settled(self) -> bool:
        return not self._between

    @property
    def schedulable(self) -> torch.optim.Optimizer:
        # A wrapper that is no torch optimizer itself shares its groups with the one inside.
        return self.optimizer if isinstance(self.optimizer, torch.optim.Optimizer) else self.optimizer.base

    def _parameters(self) -> list[Tensor]:
        """What the optimizer may move: also what was frozen after some steps, which has state and is switched."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p for p in params if p.requires_grad or self.optimizer.state.get(p)]

    @torch.no_grad()
    def show_x(self) -> None:
        if self.mode == "eval" and not self._between:
            return
        torch.clear_autocast_cache()  # see `Modes.eval`
        if self._between:
            self._return_to_y()
        else:
            self._parked = self._parameters()
            self._y = [p.detach().clone(memory_format=torch.preserve_format) for p in self._parked]
            self._between = True
        self.optimizer.eval()
        self._x_marks = _marks(self._parked)
        self._between = False

    @torch.no_grad()
    def show_y(self) -> None:
        if self.mode == "eval" or self._between:
            if self.weights_replaced():
                logger.warning("The weights were replaced while x was shown: the optimizer starts anew from them.")
                self.restart()
            torch.clear_autocast_cache()
            self._between = self._y is not None
            self._return_to_y()
        self._forget()

    def _return_to_y(self) -> None:
        """Whatever was interrupted: the optimizer's own way back sets its modes, and the copy says what y is."""
        self.optimizer.train()
        for p, y in zip(self._parked, self._y or (), strict=True):
            p.copy_(y)

    def _forget(self) -> None:
        self._y, self._parked, self._x_marks, self._between = None, [], [], False

    def weights_replaced(self) -> bool:
        return self.mode == "eval" and self.settled and self._y is not None and _marks(self._parked) != self._x_marks

    def restart(self) -> None:
        # Wrapper classes keep state of their own, beside that of the optimizer inside.
        for owner in (
            self.optimizer,
            getattr(self.optimizer, "base", None),
            getattr(self.optimizer, "optimizer", None),
        ):
            if owner is not None and hasattr(owner, "state"):
                owner.state.clear()
        for group, fresh in zip(self.optimizer.param_groups, self._fresh_groups, strict=True):
            keep = {key: group[key] for key in ("params", "lr", "initial_lr", "train_mode") if key in group}
            group.clear()
            group.update(copy.deepcopy(fresh), **keep)
        self._forget()

    def extra_state(self) -> dict[str, Any]:
        if self._y is None:
            return {}
        # torch loads an optimizer's floating state in the dtype of its parameter, whatever it was saved in.
        dtypes = [
            {key: str(value.dtype).removeprefix("torch.") for key, value in self._state_of(p) if value.dtype != p.dtype}
            for p in self._parked
        ]
        return {"y": self._y, "dtypes": dtypes}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self._forget()
        if self.mode == "eval" and "y" in state:
            self._parked = self._parameters()
            self._y = [y.to(p) for p, y in zip(self._parked, state["y"], strict=True)]
            self._x_marks = _marks(self._parked)
            for p, dtypes in zip(self._parked, state["dtypes"], strict=True):
                for key, value in self._state_of(p):
                    if key in dtypes:
                        self.optimizer.state[p][key] = value.to(getattr(torch, dtypes[key]))

    def _state_of(self, p: Tensor) -> list[tuple[str, Tensor]]:
        return [(key, value) for key, value in self.optimizer.state.get(p, {}).items() if isinstance(value, Tensor)]


def _marks(tensors: list[Tensor]) -> list[int]:
    """Two sums over the bits of each tensor, to notice that it was changed."""
    marks = []
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
        marks += [bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)]
    return [int(mark) for mark in marks]
