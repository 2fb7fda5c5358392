"""Implementations of the schedule-free step; each is tested against `averaging` in float64.

| implementation | what runs |
|---|---|
| "for-loop" | torch's operations, one tensor at a time |
| "foreach"  | torch's multi-tensor operations |
| "fused"    | one pass over memory: by numba (the extra `fast`) on CPU, by triton on GPU; without, torch's fused Adam |
| None       | "fused"; on CPU without numba for less than a million parameters (COMPILED_FROM) |

"fused" takes the tensors that it can (dense, of one dtype and device); all others are stepped one at a time.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from operator import attrgetter
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from hf_schedulefree.optim import sharding
from hf_schedulefree.optim.kernels import torch_ops
from hf_schedulefree.optim.kernels.numbers import DenseRow, Kernel, StepNumbers

Implementation = Literal["for-loop", "foreach", "fused"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("for-loop", "foreach", "fused")

# y, z, v (None without a second moment) and the gradient of one parameter.
Row = tuple[Tensor, Tensor, Tensor | None, Tensor]

# The temporaries of one multi-tensor call hold at most this many elements (or one tensor, if that is larger).
_CHUNK_ELEMENTS = 2**22

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN, _dtype = frozenset(PLAIN_TENSORS), attrgetter("dtype")
ONE_PASS_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # on CPU
_ONE_PASS_DTYPES = {"cpu": ONE_PASS_DTYPES, "cuda": (*ONE_PASS_DTYPES, torch.float16)}
FUSED_DTYPES = (torch.float32, torch.float64)


# The first process on a machine that needs a kernel compiles it, for some seconds: more than is saved where a step is
# short anyway.
COMPILED_FROM = 1_000_000


def step_(
    rows: Sequence[Row], numbers: StepNumbers, implementation: Implementation | None = None, *, compiled: bool = True
) -> None:
    """One step in place for many parameters, from y_t, z_t, v_t to those of t + 1; gradients keep their values.

    Args:
        rows: the parameters.
        numbers: what they share.
        implementation: see above.
        compiled: whether numba may be used.
    """
    if implementation == "for-loop":
        for row in rows:
            _foreach([row], numbers)
    elif implementation == "foreach":
        _foreach(rows, numbers)
    else:
        _fused(rows, numbers, compiled)


def _foreach(rows: Sequence[Row], numbers: StepNumbers) -> None:
    devices = [rows[0][0].device] if numbers.are_plain else dict.fromkeys(row[0].device for row in rows)
    for device in devices:
        here = rows if len(devices) == 1 else [row for row in rows if row[0].device == device]
        for chunk in _chunks(here):
            torch_ops.foreach_(*_columns(chunk), numbers.on(device))


def _fused(rows: Sequence[Row], numbers: StepNumbers, compiled: bool) -> None:
    buckets: dict[tuple[torch.device, torch.dtype], list[Row]] = {}
    if all_plain_and_alike(rows):
        buckets[rows[0][0].device, rows[0][0].dtype] = list(rows)
    else:
        for row in rows:
            local = dense(row)
            if local is None:
                _foreach([row], numbers)
            else:
                buckets.setdefault((local[0].device, local[0].dtype), []).append(local)
    for (device, dtype), bucket in buckets.items():
        kernel = kernel_for(device, dtype) if compiled or device.type != "cpu" else None
        if kernel is not None:
            ready = kernel([DenseRow(y, None, z, v) for y, z, v, _ in bucket])
            ready([[grad.data_ptr() for *_, grad in bucket]], numbers.on(device))
        elif dtype in FUSED_DTYPES and numbers.on(device).are_plain:
            torch_ops.fused_(*_columns(bucket), numbers.on(device))
        else:
            _foreach(bucket, numbers)


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The compiled one-pass step for parameters of a kind, however their state is kept; None where there is none."""
    return one_pass_kernel(device.type) if dtype in _ONE_PASS_DTYPES.get(device.type, ()) else None


@functools.cache
def one_pass_kernel(device_type: str) -> Kernel | None:
    """The kernel for a kind of device; None where there is none, or what compiles it is not installed."""
    if device_type == "cpu" and importlib.util.find_spec("numba") is not None:
        if importlib.import_module(f"{__name__}.workers").available():
            return importlib.import_module(f"{__name__}.one_pass_cpu").prepare
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"{__name__}.one_pass_cuda")
            return module.prepare if module.runs() else None
    return None


def switch_kernel() -> ModuleType | None:
    """The module with the one-pass switch on CPU; None where numba is not installed."""
    return importlib.import_module(f"{__name__}.switch_cpu") if one_pass_kernel("cpu") is not None else None


def all_plain_and_alike(rows: Sequence[Row]) -> bool:
    """Whether `dense` takes all rows as they are, into one bucket: the usual case, asked without a call per row."""
    columns = [column for column in zip(*rows, strict=True) if column[0] is not None]
    y = columns[0]
    sizes = list(map(Tensor.numel, y))
    return all(
        are_alike(column, y[0].dtype, y[0].get_device()) and list(map(Tensor.numel, column)) == sizes
        for column in columns
    )


def are_alike(tensors: Sequence[Tensor | None], dtype: torch.dtype, device: int) -> bool:
    """Whether all are plain tensors, contiguous and in memory, of one dtype, on one device (as of `get_device`)."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and all(map(Tensor.is_contiguous, tensors))
        and list(map(_dtype, tensors)).count(dtype) == len(tensors)
        and list(map(Tensor.get_device, tensors)).count(device) == len(tensors)
        and are_in_memory(tensors)
    )


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are of types whose numbers lie in their memory, and not of negated views."""
    return _PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


def are_in_memory(tensors: Sequence[Tensor]) -> bool:
    """`is_in_memory` for all of them."""
    usual = all(map(Tensor.data_ptr, tensors)) and not any(map(Tensor.is_neg, tensors))
    return usual or all(map(is_in_memory, tensors))  # the usual case without a call per tensor


def is_in_memory(tensor: Tensor) -> bool:
    """Whether a plain tensor's numbers are what lies at its address: not of a negated view, or zeros without memory."""
    return not tensor.is_neg() and (tensor.data_ptr() != 0 or tensor.numel() == 0)


def dense(row: Row) -> Row | None:
    """The tensors of a row (of `DTensor`s, the local shards) if all are contiguous and alike; else None."""
    y, z, v, grad = row
    if type(y) not in PLAIN_TENSORS:
        placements = getattr(y, "placements", None)
        if placements is None or any(getattr(t, "placements", None) != placements for t in row if t is not None):
            return None
        y, z, grad = sharding.local(y), sharding.local(z), sharding.local(grad)
        v = None if v is None else sharding.local(v)
    dtype, device = y.dtype, y.device
    for t in (y, z, grad) if v is None else (y, z, v, grad):
        if not (type(t) in PLAIN_TENSORS and t.is_contiguous() and t.dtype is dtype and t.device == device):
            return None  # a gradient or a state of another kind
        if t.numel() != y.numel() or not is_in_memory(t):
            return None
    return y, z, v, grad


def _columns(rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    y, z, v, grads = map(list, zip(*rows, strict=True))
    return y, z, ([] if v[0] is None else v), grads


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Split many rows into those of one multi-tensor call."""
    chunk: list[Row] = []
    elements = 0
    for row in rows:
        if chunk and elements + row[0].numel() > _CHUNK_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
        chunk.append(row)
        elements += row[0].numel()
    if chunk:
        yield chunk
