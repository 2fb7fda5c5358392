"""The base optimizer's direction d, as plain numbers that every implementation of the step understands."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_schedulefree.optim.averaging import Scalar


class Direction(NamedTuple):
    """d at one step: the gradient g itself, or g / (sqrt(v / correction) + eps) with v the running average of g^2.

    Args:
        beta2: decay of v, or None where there is no v (SGD).
        correction: the bias correction 1 - beta2^(k+1).
        eps: added to the root.
        steps: k + 1, the steps that v has seen after this one.
        normalizes: False while v is only collected and d is g (the first steps of RAdam).
        The last two and `correction` may be 0-dimensional tensors: see `averaging`.
    """

    beta2: float | None = None
    correction: Scalar = 1.0
    eps: float = 0.0
    steps: Scalar = 1
    normalizes: bool | Tensor = False


def adaptive(beta2: float, eps: float, k: Scalar, *, normalizes: bool | Tensor = True) -> Direction:
    """The direction of Adam at the step after `k` finished ones."""
    return Direction(beta2, 1 - beta2 ** (k + 1), eps, k + 1, normalizes)


def compute(direction: Direction, grads: Sequence[Tensor], second_moments: Sequence[Tensor]) -> Sequence[Tensor]:
    """d for a list of gradients; updates v in place and leaves the gradients alone (d may be the list `grads` itself).

    Args:
        direction: the numbers of this step.
        grads: g, any shapes.
        second_moments: v in the shapes of `grads`; empty where `direction.beta2` is None.
    """
    if direction.beta2 is None:
        return grads
    torch._foreach_mul_(second_moments, direction.beta2)
    torch._foreach_addcmul_(second_moments, grads, grads, value=1 - direction.beta2)
    normalizes = direction.normalizes
    if normalizes is False:
        return grads
    denominators = torch._foreach_div(second_moments, direction.correction)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, direction.eps)
    d = torch._foreach_div(grads, denominators)
    return [torch.where(normalizes, a, g) for a, g in zip(d, grads, strict=True)] if normalizes is not True else d
