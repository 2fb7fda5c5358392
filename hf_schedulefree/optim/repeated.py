"""The step over the tensors of the step before: what was found out about them is not asked again.

A model's hundreds of tensors stay where they are from step to step, but for the gradients. To look at each of them
takes longer than all arithmetic of a small model's step; to see that they are the same ones takes a quarter of that.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_schedulefree.optim import kernels, precision
from hf_schedulefree.optim.kernels import Implementation, torch_ops
from hf_schedulefree.optim.kernels.numbers import DenseRow, Kernel, ReadyStep, StepNumbers
from hf_schedulefree.optim.precision import Y_LOW, RandomKey

_PLAIN = frozenset(kernels.PLAIN_TENSORS)
_gradient, _dtype = attrgetter("grad"), attrgetter("dtype")


class GroupTensors(NamedTuple):
    """The tensors of a group that have a part in a step; `v` and `y_low` are empty where there are none."""

    y: list[Tensor]
    z: list[Tensor]
    v: list[Tensor]
    y_low: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def of(cls, params: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> "GroupTensors | None":
        """Those of the parameters that have a gradient; None if there are none, or the state of one is missing."""
        grads = list(map(_gradient, params))
        y = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        own = list(map(states.get, y))
        try:
            kept = (list(map(itemgetter(key), own)) if key in own[0] else [] for key in ("z", "exp_avg_sq", Y_LOW))
            return cls(y, *kept, [grad for grad in grads if grad is not None])
        except (IndexError, TypeError, KeyError):  # no gradient; no state; a state without this
            return None

    @property
    def kept(self) -> list[Tensor]:
        """Those that are there from step to step."""
        return [*self.y, *self.z, *self.v, *self.y_low]

    @property
    def state_dtypes(self) -> list[torch.dtype]:
        """What the state is kept in."""
        return [some[0].dtype for some in (self.z, self.v, self.y_low) if some]


class Choices(NamedTuple):
    """How a group is stepped, besides the numbers of a step."""

    implementation: Implementation | None
    state_precision: str | None
    rounding_seed: int
    capturable: bool
    first: int  # parameters in earlier groups
    count: int  # parameters in this one


class RepeatedStep:
    """The step of a group whose tensors are all plain and alike, as one call; `of` makes it.

    Keeps no tensor alive but the parameters: others may move the state elsewhere between two steps. A tensor is taken
    for the same one if it is the same object, and at the same address.
    """

    def __init__(self, tensors: GroupTensors, choices: Choices, kernel: Kernel | None, step: ReadyStep | None):
        self._choices, self._kernel, self._step = choices, kernel, step
        self._dtype, self._device = tensors.y[0].dtype, tensors.y[0].device
        self._device_index = tensors.y[0].get_device()
        self._ids = list(map(id, tensors.kept))
        self._state_dtypes = tensors.state_dtypes
        self._addresses = list(map(Tensor.data_ptr, tensors.kept))
        self._sizes = list(map(Tensor.numel, tensors.y))

    @classmethod
    def of(
        cls, tensors: GroupTensors, choices: Choices, params: Sequence[Tensor], *, compiled: bool
    ) -> "RepeatedStep | None":
        """The step of such a group; None for all others, which are looked at anew at each step.

        Args:
            tensors: of the group.
            choices: of the group.
            params: all parameters of the group.
            compiled: whether numba may be used.
        """
        y, z, v, y_low, grads = tensors
        dtype, device, index = y[0].dtype, y[0].device, y[0].get_device()
        storage = precision.storage_for(dtype, choices.state_precision)
        dtypes = (dtype, storage.z, storage.moments) if storage else (dtype, dtype, dtype)
        if (
            choices.implementation not in (None, "fused")
            or not all(_alike(some, kind, index) for some, kind in zip((y, z, v), dtypes, strict=True))
            or not _alike(grads, dtype, index)
            or not _alike(y_low, torch.int16, index)
            or bool(y_low) != bool(storage and storage.low_bits)
            or any(p.numel() >= 2**32 for p in y)
        ):
            return None
        kernel = kernels.kernel_for(device, dtype) if compiled or device.type != "cpu" else None
        if kernel is None:
            by_torch = dtype in kernels.FUSED_DTYPES and not choices.capturable
            return cls(tensors, choices, None, None) if by_torch else None
        nothing = [None] * len(y)
        keys = nothing
        if storage:
            positions = (i for i, p in enumerate(params, start=choices.first) if p.grad is not None)
            keys = [RandomKey(choices.rounding_seed, position) for position in positions]
        rows = map(DenseRow, y, y_low or nothing, z, v or nothing, [0] * len(y), keys)
        return cls(tensors, choices, kernel, kernel(list(rows)))

    def fits(self, tensors: GroupTensors, choices: Choices) -> bool:
        """Whether this is the step for these tensors: the same ones, but for the gradients, in the same places."""
        kept = tensors.kept
        return (
            choices == self._choices
            and list(map(id, kept)) == self._ids
            and list(map(Tensor.data_ptr, kept)) == self._addresses
            and tensors.state_dtypes == self._state_dtypes
            and all(map(Tensor.is_contiguous, tensors.y))
            and list(map(_dtype, tensors.y)).count(self._dtype) == len(tensors.y)
            and _alike(tensors.grads, self._dtype, self._device_index)
            and list(map(Tensor.numel, tensors.grads)) == self._sizes
            and (self._kernel is None or kernels.kernel_for(self._device, self._dtype) is self._kernel)
        )

    def __call__(self, tensors: GroupTensors, numbers: StepNumbers) -> None:
        """One step in place."""
        numbers = numbers.on(self._device)
        if self._step is not None:
            self._step(tensors.grads, numbers)
        else:
            torch_ops.fused_(tensors.y, tensors.z, tensors.v, tensors.grads, numbers)


def _alike(tensors: Sequence[Tensor], dtype: torch.dtype, device: int) -> bool:
    """Whether all are plain and contiguous, of one dtype, on one device (as `Tensor.get_device` has it)."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and all(map(Tensor.is_contiguous, tensors))
        and list(map(_dtype, tensors)).count(dtype) == len(tensors)
        and list(map(Tensor.get_device, tensors)).count(device) == len(tensors)
    )
