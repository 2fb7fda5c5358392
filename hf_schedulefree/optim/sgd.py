"""Schedule-free SGD."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_schedulefree.optim.base import ScheduleFreeOptimizer
from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.kernels import Implementation
from hf_schedulefree.optim.precision import StatePrecision
from hf_schedulefree.optim.switching import Park


class SGDScheduleFree(ScheduleFreeOptimizer):
    """Schedule-free SGD (https://arxiv.org/abs/2405.15682, equations 2 to 4), as in `schedulefree` 1.4.1.

    The direction is d = g + weight_decay * y.

    Args:
        params: parameters or parameter groups; a group may override every option below.
        lr: peak learning rate, >= 0. Good values are often 10 times those of SGD with a schedule, or more.
        momentum: the interpolation factor beta between z (0) and x (1), in (0, 1).
        weight_decay: weight decay, taken at y, >= 0.
        warmup_steps: steps of linear warm-up, a whole number >= 0. There is no other schedule.
        r: power of the polynomial weighting in the average, >= 0.
        weight_lr_power: a step's weight in the average is (largest learning rate so far)^weight_lr_power, >= 0.
        foreach: see `ScheduleFreeOptimizer`.
        implementation: see `ScheduleFreeOptimizer`.
        park: see `ScheduleFreeOptimizer`.
        state_precision: see `ScheduleFreeOptimizer`.
        rounding_seed: see `ScheduleFreeOptimizer`.
        capturable: whether `step` may be captured in a CUDA graph, see `ScheduleFreeOptimizer`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        implementation: Implementation | None = None,
        park: Park | None = None,
        state_precision: StatePrecision | None = None,
        rounding_seed: int = 0,
        capturable: bool = False,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "state_precision": state_precision,
            "rounding_seed": rounding_seed,
            "capturable": capturable,
        }
        super().__init__(params, options, implementation=implementation, park=park, foreach=foreach)

    def _beta(self, group: dict[str, Any]) -> float:
        return group["momentum"]

    def _direction(self, group: dict[str, Any]) -> Direction:
        return Direction()
