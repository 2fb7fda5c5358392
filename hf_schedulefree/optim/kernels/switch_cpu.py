"""x from y and z on CPU in one pass over memory, without temporaries: the bits of `averaging.x_from_y`. Needs numba.

Strict IEEE as in `one_pass_cpu`: subtraction, product and sum are rounded one by one.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from hf_schedulefree.optim.kernels import compiled
from hf_schedulefree.optim.kernels.compiled import (
    bfloat16_to_float32,
    count,
    float32_to_bfloat16,
    joined,
    pointer,
    rows_and_numbers,
    take_rows,
)
from hf_schedulefree.optim.kernels.threads import Work


@njit(inline="always")
def extrapolated(start, end, weight):
    """As `averaging`: x from (y, z) or y from (x, z)."""
    return (end - start) * weight + start


@functools.cache
def _worker(dtype: torch.dtype, compares: bool, low_bits: bool, wide_z: bool) -> Work:
    """The pass that writes x into p, or counts the elements of p that are not x."""
    kept, real = compiled.NUMBA_TYPES[dtype]
    half, kept_z = kept is np.uint16, real if wide_z else kept
    half_z = half and not wide_z
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]

    @compiled.worker
    def write(job):
        # Columns of the table: addresses of p, y, z, y_low; elements.
        table, numbers = rows_and_numbers(job, 5, 1)
        weight = real(numbers[0])
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            others = 0
            for row in range(first, last):
                elements = table[row, 4]
                p = carray(pointer(table[row, 0]), elements, kept)
                y = carray(pointer(table[row, 1]), elements, kept)
                z = carray(pointer(table[row, 2]), elements, kept_z)
                y_low = carray(pointer(table[row, 3]), elements, np.uint16)
                for i in range(elements):
                    if low_bits:
                        y_i = joined(y[i], y_low[i])
                    else:
                        y_i = bfloat16_to_float32(y[i]) if half else y[i]
                    z_i = bfloat16_to_float32(z[i]) if half_z else z[i]
                    x_i = extrapolated(y_i, z_i, weight)
                    if compares:
                        p_i = bfloat16_to_float32(p[i]) if half else p[i]
                        if half:
                            differs = float32_to_bfloat16(x_i) != p[i]
                        else:
                            differs = real(x_i).view(bits) != real(p_i).view(bits)
                        others += differs and (x_i == x_i or p_i == p_i)
                    else:
                        p[i] = float32_to_bfloat16(x_i) if half else x_i
            if compares:
                count(job, others)

    return write


def show_x_(
    p: Sequence[Tensor],
    y: Sequence[Tensor],
    z: Sequence[Tensor],
    beta: float,
    y_low: Sequence[Tensor] = (),
) -> None:
    """Write x into `p`; contiguous CPU tensors of one dtype (float32, float64 or bfloat16).

    bfloat16 may have `y_low` (see `precision`), and z in float32.
    """
    _run(p, y, z, beta, y_low, compares=False)
    torch.autograd.graph.increment_version(p)


def x_in_parts(y: Tensor, z: Tensor, beta: float, y_low: Tensor | None = None) -> Callable[[int, Tensor], None]:
    """What writes x, from any element on, into another tensor: in the calling thread, in few microseconds besides.

    Tensors as for `show_x_`; they must not be freed before it is.
    """
    work = _worker(y.dtype, False, y_low is not None, z.dtype != y.dtype)
    low = y if y_low is None else y_low
    (y_at, y_size), (z_at, z_size), (low_at, low_size) = ((t.data_ptr(), t.element_size()) for t in (y, z, low))
    weight = 1 - 1 / beta

    def write(first: int, into: Tensor) -> None:
        places = into.data_ptr(), y_at + y_size * first, z_at + z_size * first, low_at + low_size * first
        compiled.run_row(work, (*places, into.numel()), weight)

    return write


def holds_x(
    p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float, y_low: Sequence[Tensor] = ()
) -> bool:
    """Whether `p` holds exactly x (a NaN is any NaN; 0.0 is not -0.0); tensors as for `show_x_`."""
    return _run(p, y, z, beta, y_low, compares=True) == 0


def _run(
    p: Sequence[Tensor],
    y: Sequence[Tensor],
    z: Sequence[Tensor],
    beta: float,
    y_low: Sequence[Tensor],
    *,
    compares: bool,
) -> int:
    job = compiled.Blocks([tensor.numel() for tensor in p]).job((p, y, z, y_low or y), 1)
    dtype = p[0].dtype
    return job.run(_worker(dtype, compares, bool(y_low), z[0].dtype != dtype), (1 - 1 / beta,))
