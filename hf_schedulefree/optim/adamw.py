"""Schedule-free AdamW."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_schedulefree.optim import directions, pages
from hf_schedulefree.optim.base import ScheduleFreeOptimizer
from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.kernels import Implementation
from hf_schedulefree.optim.precision import StatePrecision
from hf_schedulefree.optim.switching import Park


class AdamWScheduleFree(ScheduleFreeOptimizer):
    """Schedule-free AdamW (https://arxiv.org/abs/2405.15682, algorithm 1), with the semantics of `schedulefree` 1.4.1.

    The direction is d = g / (sqrt(v / (1 - beta2^(k+1))) + eps) + weight_decay * y, where v is the running average of
    g^2 (`exp_avg_sq` in the state); beta1 interpolates between z and x and takes the place of momentum.

    Args:
        params: parameters or parameter groups; a group may override every option below.
        lr: peak learning rate, >= 0. Good values are 1 to 10 times those of AdamW with a schedule.
        betas: (beta1, beta2), beta1 in (0, 1), beta2 in [0, 1). Long runs may want beta1 = 0.95 or 0.98.
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay, taken at y, >= 0.
        warmup_steps: steps of linear warm-up, a whole number >= 0. There is no other schedule.
        r: power of the polynomial weighting in the average, >= 0.
        weight_lr_power: a step's weight in the average is (largest learning rate so far)^weight_lr_power, >= 0.
        implementation: see `ScheduleFreeOptimizer`.
        park: see `ScheduleFreeOptimizer`.
        foreach: see `ScheduleFreeOptimizer`.
        state_precision: see `ScheduleFreeOptimizer`.
        rounding_seed: see `ScheduleFreeOptimizer`.
        capturable: whether `step` may be captured in a CUDA graph, see `ScheduleFreeOptimizer`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> optimizer = AdamWScheduleFree(model.parameters(), lr=2.5e-3, warmup_steps=100)
        >>> optimizer.train()
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.eval()  # the model holds x: evaluate and save it
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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
            "betas": betas,
            "eps": eps,
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
        return group["betas"][0]

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"exp_avg_sq": pages.zeros_like(p)}

    def _direction(self, group: dict[str, Any]) -> Direction:
        return directions.adaptive(group["betas"][1], group["eps"], group["k"])
