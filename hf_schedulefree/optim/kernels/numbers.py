"""The plain numbers of one step, and what a kernel for half precision is given for each parameter."""

from typing import NamedTuple

from torch import Tensor

from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.precision import RandomKey


class StepNumbers(NamedTuple):
    """What all parameters of a group share at one step.

    Args:
        lr: the step's learning rate.
        beta: the interpolation factor between z (0) and x (1).
        c: the weight of z_{t+1} in x_{t+1}.
        weight_decay: taken at y.
        direction: the base optimizer's numbers.
    """

    lr: float
    beta: float
    c: float
    weight_decay: float
    direction: Direction

    @property
    def y_factor(self) -> float:
        """The factor of the direction in y_{t+1} = (1 - c) y_t + c z_t + lr (beta (1 - c) - 1) d_t."""
        return self.lr * (self.beta * (1 - self.c) - 1)


class DenseHalfRow(NamedTuple):
    """One half-precision parameter: tensors that are contiguous and of one shape, None where there is none.

    Args:
        y: the parameter.
        y_low: 16 more bits of it.
        z: as it is kept.
        v: as it is kept.
        grad: of the parameter's dtype.
        first: the global index of the first element; the others follow.
        key: of the random numbers.
    """

    y: Tensor
    y_low: Tensor | None
    z: Tensor
    v: Tensor | None
    grad: Tensor
    first: int
    key: RandomKey
