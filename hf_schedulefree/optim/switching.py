"""x from the parked y and z for all parameters of a group: by the one-pass kernel where it can, else by torch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from hf_schedulefree.optim import averaging, kernels, precision, sharding

if TYPE_CHECKING:
    from types import ModuleType

# A parameter and its state, with y parked in it.
Started = tuple[Tensor, dict[str, Tensor]]

_Columns = tuple[list[Tensor], list[Tensor], list[Tensor]]


def show_x(started: Iterable[Started], beta: float, *, one_pass: bool = True) -> None:
    """Write x into the parameters. Both ways give the same bits.

    Args:
        started: parameters and their states.
        beta: the interpolation factor between z (0) and x (1).
        one_pass: whether the one-pass kernel may be used.
    """
    kernel, buckets, others = _divide(started, one_pass)
    for columns in buckets:
        kernel.show_x_(*columns, beta)
    for p, state in others:
        sharding.local(p).copy_(precision.rounded_x(state, beta))


def holds_x(started: Iterable[Started], beta: float, *, one_pass: bool = True) -> bool:
    """Whether the parameters hold exactly x; of a `DTensor`, this process's shard. Arguments as for `show_x`."""
    kernel, buckets, others = _divide(started, one_pass)
    return all(kernel.holds_x(*columns, beta) for columns in buckets) and all(
        averaging.same_bits(sharding.local(p), precision.rounded_x(state, beta)) for p, state in others
    )


def _divide(started: Iterable[Started], one_pass: bool) -> "tuple[ModuleType | None, list[_Columns], list[Started]]":
    """The kernel, what it can take (by dtype: p, y, z), and all others."""
    started = list(started)
    kernel = kernels.switch_kernel() if one_pass and started else None
    if kernel is None:
        return None, [], started
    buckets: dict[object, list[tuple[Tensor, Tensor, Tensor]]] = {}
    others: list[Started] = []
    for p, state in started:
        row = None
        if precision.Y_LOW not in state and p.device.type == "cpu":
            row = kernels.dense((p, state["y"], None, state["z"]))
        if row is None or row[0].dtype not in kernels.ONE_PASS_DTYPES:
            others.append((p, state))
        else:
            buckets.setdefault(row[0].dtype, []).append((row[0], row[1], row[3]))
    return kernel, [tuple(map(list, zip(*rows, strict=True))) for rows in buckets.values()], others
