"""The schedule-free mathematics, written once; every faster path is tested against this file.

Source: Defazio et al. 2024, "The Road Less Scheduled", https://arxiv.org/abs/2405.15682, equations 2 to 4:

    y_t     = (1 - beta) z_t + beta x_t                 gradients are taken at y
    z_{t+1} = z_t - lr_t d_t                            d: the base optimizer's direction, weight decay at y included
    x_{t+1} = (1 - c_{t+1}) x_t + c_{t+1} z_{t+1}       x is evaluated, saved and published

Only y and z are stored. Eliminating x gives both readings of the pair and one update that never forms x:

    x       = y + (1 - 1/beta) (z - y)
    y       = x + (1 - beta) (z - x)
    y_{t+1} = (1 - c) y_t + c z_t + lr (beta (1 - c) - 1) d_t

`k` counts finished steps, so the first step is taken at k = 0. Scalars (type `Scalar`) are Python floats, or for
optimizers with `capturable=True` 0-dimensional tensors on the device, both in double precision: the same formulas, none
of which looks at a value. Other tensors are in the dtype of the parameter.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor

# Below every sum of weights but zero: a denominator for the case that all weights, so this one, are zero.
_TINY = math.ulp(0.0)


def at_least(value: Scalar, bound: Scalar) -> Scalar:
    """The larger of the two, a tensor if `value` is one."""
    return value.clamp(min=bound) if isinstance(value, Tensor) else max(value, bound)


def at_most(value: Scalar, bound: Scalar) -> Scalar:
    """The smaller of the two, a tensor if `value` is one."""
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)


def warmup_factor(k: Scalar, warmup_steps: int) -> Scalar:
    """Linear warm-up: (k + 1) / warmup_steps for the first `warmup_steps` steps, 1.0 from then on."""
    return at_most((k + 1) / warmup_steps, 1.0) if warmup_steps else 1.0


def averaging_weight(
    k: Scalar, lr_max: Scalar, r: float, weight_lr_power: float, weight_sum: Scalar
) -> tuple[Scalar, Scalar]:
    """The weight c_{k+1} with which z_{k+1} enters the average x_{k+1} (paper, section 3: c = w_{k+1} / sum of all w).

    Args:
        k: finished steps, >= 0.
        lr_max: the largest learning rate used so far, this step included.
        r: power of the polynomial weighting; 0 weighs all steps alike.
        weight_lr_power: power of `lr_max` in the weighting; a warm-up counts less the larger it is.
        weight_sum: the sum of the weights of all earlier steps.

    Returns:
        c in [0, 1], and the new `weight_sum`. c is 0.0 while every weight so far is zero (a learning rate of zero).
    """
    weight = (k + 1) ** r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    return weight / at_least(weight_sum, _TINY), weight_sum


def x_from_y(y: Tensor, z: Tensor, beta: float) -> Tensor:
    """The averaged weights x = y + (1 - 1/beta)(z - y), as a new tensor in the dtype of `y`.

    Subtraction, product and sum are three separate, correctly rounded operations (no fused multiply-add), and half
    precision is computed in float32 and rounded once: x is the same bits on every device, for the same y and z.
    """
    return _extrapolate(y, z, 1 - 1 / beta)


def y_from_x(x: Tensor, z: Tensor, beta: float) -> Tensor:
    """The gradient point y = x + (1 - beta)(z - x), as a new tensor; the inverse of `x_from_y` up to rounding only."""
    return _extrapolate(x, z, 1 - beta)


def _extrapolate(start: Tensor, end: Tensor, weight: float) -> Tensor:
    wide = torch.promote_types(start.dtype, torch.float32)
    start_wide = start.to(wide)
    return end.to(wide).sub(start_wide).mul_(weight).add_(start_wide).to(start.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two floating-point tensors are of one dtype and hold the same bits; a NaN is itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype:
        return False
    whole_numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(whole_numbers), b.view(whole_numbers))


def direction_factor(lr: Scalar, beta: float, c: Scalar) -> Scalar:
    """The factor of d_t in y_{t+1}."""
    return lr * (beta * (1 - c) - 1)


def update_(
    y: Sequence[Tensor], z: Sequence[Tensor], direction: Sequence[Tensor], *, lr: Scalar, beta: float, c: Scalar
) -> None:
    """One schedule-free step in place, over lists of tensors of equal shapes: y_t, z_t become y_{t+1}, z_{t+1}."""
    if isinstance(c, Tensor):
        _add_scaled_(y, torch._foreach_sub(z, y), c)
    else:
        torch._foreach_lerp_(y, z, c)
    _add_scaled_(y, direction, direction_factor(lr, beta, c))
    _add_scaled_(z, direction, -lr)


def _add_scaled_(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Scalar) -> None:
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(others, factor))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)
