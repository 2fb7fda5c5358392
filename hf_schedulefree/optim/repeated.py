"""The step over the tensors of the step before: what was found out about them is not asked again.

A model's hundreds of tensors stay where they are from step to step, but for the gradients. To look at each of them
takes longer than all arithmetic of a small model's step; to see that they are the same ones takes a part of that. On
CPU other threads make the step of the first tensors meanwhile.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_schedulefree.optim import kernels, precision
from hf_schedulefree.optim.kernels import Implementation, torch_ops
from hf_schedulefree.optim.kernels.numbers import DenseRow, Kernel, ReadyStep, StepNumbers
from hf_schedulefree.optim.precision import Y_LOW, RandomKey

try:
    from torch._C._dynamo.guards import TensorGuards

    TensorGuards(torch.empty(0), dynamic_dims_sizes=None, dynamic_dims_strides=None).check(torch.empty(0))
except (ImportError, AttributeError, TypeError, RuntimeError):  # it is not public: absent, or another one
    TensorGuards = None

_gradient, _dtype = attrgetter("grad"), attrgetter("dtype")

# So many parameters are looked at before other threads may step them: few at first, as those wait for them, and then
# enough for the calls that it takes.
_FIRST, _AT_ONCE = 6, 20

# A group's states are found by their order if all states are at most so many times as many.
_MANY = 8

States = Mapping[Tensor, dict[str, Any]]


class Choices(NamedTuple):
    """How a group is stepped, besides the numbers of a step."""

    implementation: Implementation | None
    state_precision: str | None
    rounding_seed: int
    capturable: bool
    first: int  # parameters in earlier groups


class Kinds:
    """What some tensors are: type, dtype, device, sizes and strides; of contiguous ones, which numbers they hold.

    torch.compile asks the same before each call of what it has compiled, and has a function for it that takes a quarter
    of the time.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._guards = TensorGuards and TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._known = [] if self._guards else [list(map(fact, tensors)) for fact in _FACTS]

    def are_those_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are such tensors, too; none of them twice."""
        if self._guards:
            return self._guards.check(*tensors)
        return all(list(map(fact, tensors)) == known for fact, known in zip(_FACTS, self._known, strict=True))


_FACTS = (type, _dtype, Tensor.get_device, Tensor.numel, Tensor.is_contiguous, kernels.is_in_memory)


class Made(NamedTuple):
    """What has come of a step.

    Args:
        stepped: the parameters that it was made for.
        interruption: what was raised when it was made for some.
    """

    stepped: Sequence[Tensor] = ()
    interruption: BaseException | None = None


class _Part(NamedTuple):
    """Some of the parameters with a gradient, and their tensors as they were."""

    y: list[Tensor]
    # Where their states lie among all, unless these are few of them: to look each of them up takes longer, as torch
    # computes hashes in Python.
    places: Callable[[Sequence[Any]], Sequence[Any]] | None
    kinds: Kinds  # of the parameters, of each of their states, of the gradients
    addresses: list[int]  # but for those of the gradients


class RepeatedStep:
    """The step of a group whose tensors are all plain and alike, as one call; `of` makes it.

    Keeps no tensor alive but the parameters: others may move the state elsewhere between two steps.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: States,
        columns: dict[str, list[Tensor]],
        choices: Choices,
        kernel: Kernel | None,
        step: ReadyStep | None,
    ):
        self._choices, self._kernel, self._step = choices, kernel, step
        self._params, self._y = list(params), columns["y"]
        self.count = len(self._y)  # of the parameters that it is made for
        self._resting = [p for p in params if p.grad is None]
        self._dtype, self._device = self._y[0].dtype, self._y[0].device
        self._uncounted: StepNumbers | None = None  # of a step that was begun
        keys = [key for key, some in columns.items() if some and key not in ("y", "grad")]
        self._values = list(map(itemgetter, keys))
        order = {id(p): place for place, p in enumerate(states)} if len(states) <= _MANY * self.count else None
        firsts = [0, *(range(_FIRST, self.count, _AT_ONCE) if step is not None and step.overlaps else ())]
        self._parts = []
        for place in map(slice, firsts, [*firsts[1:], self.count]):
            own = self._y[place]
            kept = list(chain.from_iterable(columns[key][place] for key in ("y", *keys)))
            kinds, addresses = Kinds(kept + columns["grad"][place]), list(map(Tensor.data_ptr, kept))
            places = None if order is None else _items([order[id(p)] for p in own])
            self._parts.append(_Part(own, places, kinds, addresses))

    @classmethod
    def of(cls, params: Sequence[Tensor], states: States, choices: Choices, *, compiled: bool) -> "RepeatedStep | None":
        """The step of such a group; None for all others, which are looked at anew at each step.

        Args:
            params: of the group, after a first step.
            states: of the optimizer.
            choices: of the group.
            compiled: whether numba may be used.
        """
        columns = _columns(params, states) if choices.implementation in (None, "fused") else None
        if columns is None:
            return None
        y, z, v, y_low, grads = columns.values()
        dtype, device, index = y[0].dtype, y[0].device, y[0].get_device()
        storage = precision.storage_for(dtype, choices.state_precision)
        dtypes = (dtype, storage.z, storage.moments) if storage else (dtype, dtype, dtype)
        if (
            not all(kernels.are_alike(some, kind, index) for some, kind in zip((y, z, v), dtypes, strict=True))
            or not kernels.are_alike(grads, dtype, index)
            or not kernels.are_alike(y_low, torch.int16, index)
            or bool(y_low) != bool(storage and storage.low_bits)
            or not all(list(map(Tensor.numel, some)) == list(map(Tensor.numel, y)) for some in columns.values() if some)
            or any(p.numel() >= 2**32 for p in y)
        ):
            return None
        kernel = kernels.kernel_for(device, dtype) if compiled or device.type != "cpu" else None
        if kernel is None:
            by_torch = dtype in kernels.FUSED_DTYPES and not choices.capturable
            return cls(params, states, columns, choices, None, None) if by_torch else None
        nothing = [None] * len(y)
        keys = nothing
        if storage:
            positions = (i for i, p in enumerate(params, start=choices.first) if p.grad is not None)
            keys = [RandomKey(choices.rounding_seed, position) for position in positions]
        rows = map(DenseRow, y, y_low or nothing, z, v or nothing, [0] * len(y), keys)
        return cls(params, states, columns, choices, kernel, kernel(list(rows)))

    def __call__(self, params: Sequence[Tensor], states: States, choices: Choices, numbers: StepNumbers) -> Made:
        """Make the step in place, for the first parameters for which it is the one, as the group is now.

        It is if the parameters are the same objects, and all tensors of the kinds and in the places they were: but for
        the gradients, which may be in others. Those that it was made for before, though it was not `counted` as the
        others could not be stepped, are not stepped again.
        """
        if self._uncounted is not None and self._uncounted.k == numbers.on(self._device).k:
            stepped = self._y[: self._step.stepped(self._uncounted)]
            if stepped:
                return Made(stepped)
        self._uncounted = None
        if choices != self._choices or not _are_same(params, self._params) or any(map(_has_gradient, self._resting)):
            return Made()
        if self._step is None:
            found = next(self._looked_at(states), None)  # all are one part
            if found is None:
                return Made()
            gradients, kept = found
            _, z, *v = (kept[first : first + self.count] for first in range(0, len(kept), self.count))
            torch_ops.fused_(self._y, z, v[0] if v else [], gradients, numbers.on(self._device))
            return Made(self._y)
        if kernels.kernel_for(self._device, self._dtype) is not self._kernel:
            return Made()
        numbers, interruption = numbers.on(self._device), None
        self._uncounted = numbers if numbers.are_plain else None
        held: list[tuple[list[Tensor], list[Tensor]]] = []  # others may let go of them while threads work on them
        looks = map(held.append, self._looked_at(states))
        try:
            self._step((list(map(Tensor.data_ptr, held[-1][0])) for _ in looks), numbers)
        except BaseException as error:
            interruption = error
        stepped = self._y[: self._step.stepped(numbers)]
        if interruption is not None and not stepped:
            raise interruption
        return Made(stepped, interruption)

    @property
    def is_made(self) -> bool:
        """Whether it was made for all parameters, and is not yet `counted`."""
        return self._uncounted is not None and self._step.stepped(self._uncounted) == self.count

    def counted(self) -> None:
        """The step that was made has become one of the group's finished ones."""
        self._uncounted = None

    def _looked_at(self, states: States) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Part by part, the gradients and the other tensors; until one is not as it was."""
        params, all_states = list(states), list(states.values())
        for y, places, kinds, addresses in self._parts:
            try:
                if places is None:
                    own = list(map(states.get, y))
                elif _are_same(places(params), y):
                    own = places(all_states)
                else:
                    return
                kept = list(chain(y, *(map(value, own) for value in self._values)))
            except (IndexError, KeyError, TypeError):  # fewer states; a state without this; no state
                return
            gradients = list(map(_gradient, y))
            if not kinds.are_those_of(kept + gradients) or list(map(Tensor.data_ptr, kept)) != addresses:
                return
            yield gradients, kept


def _columns(params: Sequence[Tensor], states: States) -> dict[str, list[Tensor]] | None:
    """By their keys, the tensors of the parameters that have a gradient; None if there are none, or a state lacks one.

    The second moment and the low bits are empty where there are none.
    """
    y = [p for p in params if p.grad is not None]
    if not y or not all("z" in states.get(p, ()) for p in y):
        return None
    own = [states[p] for p in y]
    try:
        kept = {key: [state[key] for state in own] if key in own[0] else [] for key in ("z", "exp_avg_sq", Y_LOW)}
    except KeyError:
        return None
    return {"y": y, **kept, "grad": list(map(_gradient, y))}


def _items(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the items at some places out of a sequence; they may also lie beyond its end."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def _are_same(objects: Sequence[object], others: Sequence[object]) -> bool:
    return len(objects) == len(others) and all(map(is_, objects, others))


def _has_gradient(p: Tensor) -> bool:
    return p.grad is not None
