"""Schedule-free RAdam."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_schedulefree.optim import averaging, directions, pages
from hf_schedulefree.optim.averaging import Scalar
from hf_schedulefree.optim.base import ScheduleFreeOptimizer
from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.kernels import Implementation
from hf_schedulefree.optim.precision import StatePrecision
from hf_schedulefree.optim.switching import Park

# Below this length of the approximated moving average its variance cannot be rectified (Liu et al. 2020, section 4.2).
_SHORTEST_AVERAGE = 4.0


def rectification(k: Scalar, beta2: float) -> Scalar:
    """RAdam's factor on the learning rate after `k` finished steps; 0.0 while v has seen too few of them.

    Source: Liu et al. 2020, https://arxiv.org/abs/1908.03265, algorithm 2:

        rho_inf = 2 / (1 - beta2) - 1
        rho_t   = rho_inf - 2 t beta2^t / (1 - beta2^t)                               t = k + 1
        factor  = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))   where rho_t > 4
    """
    t = k + 1
    longest = 2 / (1 - beta2) - 1
    if longest <= _SHORTEST_AVERAGE:
        return 0.0 * t
    length = averaging.at_least(longest - 2 * t * beta2**t / (1 - beta2**t), _SHORTEST_AVERAGE)
    return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5


class RAdamScheduleFree(ScheduleFreeOptimizer):
    """Schedule-free RAdam, with the semantics of `schedulefree` 1.4.1: AdamW whose warm-up is RAdam's rectification.

    The direction is that of `AdamWScheduleFree`. In the first steps (4 for beta2 = 0.999), before the rectification is
    defined, the weights rest and only v is collected, or (`silent_sgd_phase=False`) the direction is g.

    Args:
        params: parameters or parameter groups; a group may override every option below.
        lr: peak learning rate, >= 0.
        betas: (beta1, beta2), beta1 in (0, 1), beta2 in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay, taken at y, >= 0.
        r: power of the polynomial weighting in the average, >= 0.
        weight_lr_power: a step's weight in the average is (largest learning rate so far)^weight_lr_power, >= 0.
        foreach: see `ScheduleFreeOptimizer`.
        silent_sgd_phase: whether the weights rest until the rectification is defined.
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
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        silent_sgd_phase: bool = True,
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
            "r": r,
            "weight_lr_power": weight_lr_power,
            "silent_sgd_phase": silent_sgd_phase,
            "state_precision": state_precision,
            "rounding_seed": rounding_seed,
            "capturable": capturable,
        }
        super().__init__(params, options, implementation=implementation, park=park, foreach=foreach)

    def _beta(self, group: dict[str, Any]) -> float:
        return group["betas"][0]

    def _lr_factor(self, group: dict[str, Any]) -> Scalar:
        factor = rectification(group["k"], group["betas"][1])
        return factor if group["silent_sgd_phase"] else factor + (factor == 0)

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"exp_avg_sq": pages.zeros_like(p)}

    def _direction(self, group: dict[str, Any]) -> Direction:
        beta2 = group["betas"][1]
        rectified = rectification(group["k"], beta2) > 0
        return directions.adaptive(beta2, group["eps"], group["k"], normalizes=rectified)
