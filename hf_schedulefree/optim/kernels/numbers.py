"""The plain numbers of one step, and what a compiled kernel is given."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging
from hf_schedulefree.optim.averaging import Scalar
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
        k: finished steps.
    """

    lr: Scalar
    beta: float
    c: Scalar
    weight_decay: float
    direction: Direction
    k: Scalar = 0

    @property
    def direction_factor(self) -> Scalar:
        """The factor of the direction in y_{t+1}."""
        return averaging.direction_factor(self.lr, self.beta, self.c)

    @property
    def are_plain(self) -> bool:
        """Whether all are Python's numbers; if not, those that change from step to step are tensors."""
        return not isinstance(self.k, Tensor)

    def on(self, device: torch.device) -> "StepNumbers":
        """These numbers for tensors on a device: for a CPU, plain ones."""
        if self.are_plain:
            return self
        convert = _plain if device.type == "cpu" else lambda value: _moved(value, device)
        direction = Direction(*map(convert, self.direction))
        return StepNumbers(*map(convert, self._replace(direction=None)))._replace(direction=direction)


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) else value


def _moved(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


class DenseRow(NamedTuple):
    """One parameter as a compiled kernel takes it: contiguous tensors of one shape, None where there is none.

    Args:
        y: the parameter.
        y_low: 16 more bits of it.
        z: as it is kept.
        v: as it is kept.
        first: the global index of the first element; the others follow.
        key: of the random numbers; None: what is kept in half precision is rounded to nearest.
    """

    y: Tensor
    y_low: Tensor | None
    z: Tensor
    v: Tensor | None
    first: int = 0
    key: RandomKey | None = None


class ReadyStep(Protocol):
    """A step that is ready to be made again and again, in place, over the tensors that it was made for.

    It keeps no tensor but the parameters.

    Attributes:
        overlaps: whether it would be made for the first tensors while the next gradients are asked for.
    """

    overlaps: bool

    def __call__(self, batches: Iterable[Sequence[int]], numbers: StepNumbers) -> None:
        """Make it.

        Args:
            batches: the addresses of the gradients (contiguous, of their dtype, device and sizes) of the first tensors,
                of the next ones ..., always in the same batches. If they end early, it is made for those, or for none.
            numbers: of the step.
        """

    def stepped(self, numbers: StepNumbers) -> int:
        """For how many tensors, from the first, the step with these numbers (the same object) was made.

        That is of interest where it was interrupted.
        """


# A compiled kernel: makes such a step for rows of one device whose tensors have the same dtypes.
Kernel = Callable[[Sequence[DenseRow]], ReadyStep]
