"""x shown in the parameters of a group and y put away: by the compiled kernels where they can, else by torch."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, kernels, pages, precision, sharding

if TYPE_CHECKING:
    from types import ModuleType

    from hf_schedulefree.optim.kernels.residual_cpu import ParkedResidual

# How y is kept while the parameters hold x: as a copy, or as one byte per parameter (see `kernels.residual_cpu`).
Park = Literal["copy", "residual"]
PARKS: tuple[Park, ...] = ("copy", "residual")

# Elements that one residual is for, unless a tensor is larger.
_PARKED_AT_ONCE = 2**24

# A parameter and its state.
Started = tuple[Tensor, dict[str, Tensor]]

_Columns = tuple[list[Tensor], ...]


class Residuals:
    """The way back to y for the parameters, by group, whose y is parked as a residual."""

    def __init__(self) -> None:
        # By id of the group: DeepSpeed shows one at a time. The groups are kept, so that no other one gets that id.
        self._of_group: dict[int, list[ParkedResidual]] = {}
        self._groups: dict[int, Mapping[str, Any]] = {}
        self._reserves: dict[int, pages.Reserve] = {}
        # What was used at the last switch, to be used again; they hold no tensors.
        self._ended: dict[int, list[ParkedResidual]] = {}

    def park(self, group: Mapping[str, Any], started: Sequence[Started], beta: float) -> None:
        """Show x in all parameters of a group that can do with a residual; an interrupted switch is completed.

        Raises:
            RuntimeError: the switch was interrupted, and parameters have other data since that it cannot go on with.
        """
        if id(group) not in self._of_group:  # made before any parameter is touched
            self._groups[id(group)] = group
            ended = self._ended.pop(id(group), [])
            self._of_group[id(group)] = _residuals(started, beta, self._memory(group), ended)
        elif not all(residual.fits() for residual in self._of_group[id(group)]):
            raise RuntimeError(
                "A switch between train and eval mode was interrupted, and parameters or their state were replaced by "
                "others of another size or kind before it was completed. Call train(): the optimizer starts anew "
                "from the weights that the model holds."
            )
        for residual in self._of_group[id(group)]:
            residual.park()

    def params(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The parameters of a group that are parked here."""
        return [p for residual in self._of_group.get(id(group), ()) for p in residual.params]

    def all_params(self) -> list[Tensor]:
        """Those of all groups, also of such as the optimizer does not show any more."""
        return [p for residual in self._all() for p in residual.params]

    def intact(self) -> bool:
        """Whether all parameters that are parked here hold x."""
        return all(residual.intact() for residual in self._all())

    def restore(self) -> bool:
        """Bring back y in all of them; if one does not hold x any more, nothing changes, and it returns False."""
        if all(residual.restore() for residual in self._all()):
            return True
        for residual in self._all():
            if residual.fits():
                residual.park()
        return False

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(residual.nbytes for residual in self._all())

    def become_copies(self, states: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Park y as copies in the state from here on, where others can read it; x stays shown."""
        for residuals in self._of_group.values():
            while residuals:  # one by one, so that there is never more than a copy
                for p, y in zip(residuals[-1].params, residuals[-1].y(), strict=True):
                    if "z" in states.get(p, ()):  # else somebody has removed its state
                        states[p]["y"] = y
                residuals.pop()

    def forget(self, group: Mapping[str, Any]) -> None:
        """After a switch back."""
        parked = self._of_group.pop(id(group), [])
        self._groups.pop(id(group), None)
        if not parked:
            return
        memory = list(itertools.chain.from_iterable(residual.end() for residual in parked))
        if id(group) in self._reserves:
            self._reserves[id(group)].put_back(memory)
        self._ended[id(group)] = parked

    def forget_replaced(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """After a switch back: forget groups in whose place others have their parameters; not those that are hidden."""
        if not self._of_group:
            return
        shown = {id(p) for group in groups for p in group["params"]}
        for key, residuals in list(self._of_group.items()):
            if any(id(p) in shown for residual in residuals for p in residual.params):
                self._of_group.pop(key)
                self._groups.pop(key, None)

    def clear(self) -> None:
        """Forget all groups."""
        self._of_group.clear()
        self._groups.clear()
        self._reserves.clear()
        self._ended.clear()

    def _memory(self, group: Mapping[str, Any]) -> pages.Take:
        """What gives memory: where the gradients were freed, theirs, to be left to them again; else its own pages."""
        if all(p.grad is None for p in group["params"]):
            self._reserves.pop(id(group), None)
            return pages.new_bytes
        return self._reserves.setdefault(id(group), pages.Reserve()).take

    def _all(self) -> "Iterator[ParkedResidual]":
        return itertools.chain(*self._of_group.values())


def _residuals(
    started: Sequence[Started], beta: float, take: pages.Take, ended: "Sequence[ParkedResidual]"
) -> "list[ParkedResidual]":
    """What y is parked in where it can be a residual; `ended` are those of the last time, which are used up."""
    if kernels.switch_kernel() is None:
        return []
    from hf_schedulefree.optim.kernels.residual_cpu import DTYPES, ParkedResidual

    # Low bits of float32 parameters are from when they were in half precision: a copy, as the state is converted first.
    rows = [(p, state["z"]) for p, state in started if "y" not in state and precision.Y_LOW not in state]
    if not rows:
        return []
    if len(rows) == sum(residual.count for residual in ended):
        rest = iter(rows)
        if all(residual.begin_again(*_next_columns(rest, residual.count), beta, take) for residual in ended):
            return list(ended)
    if kernels.all_plain_and_alike(rows):
        by_kind = {(rows[0][0].device.type, rows[0][0].dtype): rows}
    else:
        if any(sharding.is_sharded(p) for p, _ in rows):
            return []  # all processes must agree before they go back
        by_kind = {}
        for p, z in rows:
            if kernels.dense((p, z, None, z)) is not None:
                by_kind.setdefault((p.device.type, p.dtype), []).append((p, z))
    parts = (part for dtype in DTYPES for part in _parts(by_kind.get(("cpu", dtype), ())))
    return [ParkedResidual(*_next_columns(iter(part), len(part)), beta, take) for part in parts]


def _next_columns(rows: Iterator[tuple[Tensor, Tensor]], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the z of the next rows."""
    params, z = zip(*itertools.islice(rows, count), strict=True)
    return list(params), list(z)


def _parts(rows: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    part: list[tuple[Tensor, Tensor]] = []
    elements = 0
    for row in rows:
        part.append(row)
        elements += row[0].numel()
        if elements >= _PARKED_AT_ONCE:
            yield part
            part, elements = [], 0
    if part:
        yield part


def show_x(started: Iterable[Started], beta: float, *, one_pass: bool = True) -> None:
    """Write x into the parameters, from the copy of y in their state. Both ways give the same bits.

    Args:
        started: parameters and their states.
        beta: the interpolation factor between z (0) and x (1).
        one_pass: whether the one-pass kernel may be used.
    """
    kernel, buckets, others = _divide(started, one_pass)
    for p, y, z, *y_low in buckets:
        kernel.show_x_(p, y, z, beta, *y_low)
    for p, state in others:
        sharding.local(p).copy_(precision.rounded_x(state, beta))


def holds_x(started: Iterable[Started], beta: float, *, one_pass: bool = True) -> bool:
    """Whether the parameters hold exactly x; of a `DTensor`, this process's shard. Arguments as for `show_x`."""
    kernel, buckets, others = _divide(started, one_pass)
    return all(kernel.holds_x(p, y, z, beta, *y_low) for p, y, z, *y_low in buckets) and all(
        p.shape == state["z"].shape and averaging.same_bits(sharding.local(p), precision.rounded_x(state, beta))
        for p, state in others
    )


def _divide(started: Iterable[Started], one_pass: bool) -> "tuple[ModuleType | None, list[_Columns], list[Started]]":
    """The kernel, what it can take (p, y, z, beta and y_low are its arguments), and all others."""
    started = list(started)
    kernel = kernels.switch_kernel() if one_pass and started else None
    if kernel is None:
        return None, [], started
    buckets: dict[object, list[list[Tensor]]] = {}
    others: list[Started] = []
    for p, state in started:
        tensors = compilable(p, state)
        if tensors is None:
            others.append((p, state))
        else:
            buckets.setdefault(tuple(t.dtype for t in tensors), []).append(tensors)
    return kernel, [tuple(map(list, zip(*rows, strict=True))) for rows in buckets.values()], others


def compilable(p: Tensor, state: Mapping[str, Tensor]) -> list[Tensor] | None:
    """p, y, z and, where there is one, y_low as the kernel takes them; None if it cannot."""
    tensors = [p, state["y"], state["z"], *([state[precision.Y_LOW]] if precision.Y_LOW in state else [])]
    if len({getattr(t, "placements", None) for t in tensors}) > 1:
        return None
    tensors = [sharding.local(t) for t in tensors]
    p, y, z = tensors[:3]
    alike = all(type(t) in kernels.PLAIN_TENSORS and t.is_contiguous() and t.device == p.device for t in tensors)
    # The kernel goes as far as p does, which somebody may have given other data.
    alike = alike and all(t.numel() == p.numel() for t in tensors) and kernels.are_in_memory(tensors)
    if not alike or p.device.type != "cpu" or p.dtype not in kernels.ONE_PASS_DTYPES or y.dtype != p.dtype:
        return None
    if tensors[3:] and (p.dtype != torch.bfloat16 or tensors[3].dtype != torch.int16):
        return None
    if z.dtype == p.dtype or (z.dtype == torch.float32 and p.dtype == torch.bfloat16):
        return tensors
    return None
