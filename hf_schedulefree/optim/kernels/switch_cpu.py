"""x from y and z on CPU in one pass over memory, without temporaries: the bits of `averaging.x_from_y`. Needs numba.

Strict IEEE as in `one_pass_cpu`: subtraction, product and sum are rounded one by one.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from hf_schedulefree.optim.kernels import compiled
from hf_schedulefree.optim.kernels.compiled import (
    bfloat16_to_float32,
    count,
    float32_to_bfloat16,
    pointer,
    rows_and_numbers,
    take_part,
)
from hf_schedulefree.optim.kernels.threads import Work


@njit(inline="always")
def extrapolated(start, end, weight):
    """As `averaging`: x from (y, z) or y from (x, z)."""
    return (end - start) * weight + start


@functools.cache
def _worker(dtype: torch.dtype, compares: bool) -> Work:
    """The pass that writes x into p, or counts the elements of p that are not x."""
    kept, real = compiled.NUMBA_TYPES[dtype]
    half, size = kept is np.uint16, dtype.itemsize
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[size]

    @compiled.worker
    def write(job):
        # Columns of the table: addresses of p, y, z; elements.
        table, numbers = rows_and_numbers(job, 4, 1)
        weight = real(numbers[0])
        while True:
            first, last = take_part(job)
            if first == last:
                return
            start = others = 0
            for row in range(table.shape[0]):
                low, high = max(first - start, 0), min(last - start, table[row, 3])
                start += table[row, 3]
                if low >= high:
                    continue
                p = carray(pointer(table[row, 0] + size * low), high - low, kept)
                y = carray(pointer(table[row, 1] + size * low), high - low, kept)
                z = carray(pointer(table[row, 2] + size * low), high - low, kept)
                for i in range(p.size):
                    y_i = bfloat16_to_float32(y[i]) if half else y[i]
                    z_i = bfloat16_to_float32(z[i]) if half else z[i]
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


def show_x_(p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float) -> None:
    """Write x into `p`; contiguous CPU tensors of one dtype (float32, float64 or bfloat16)."""
    _run(p, y, z, beta, compares=False)
    torch.autograd.graph.increment_version(p)


def holds_x(p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float) -> bool:
    """Whether `p` holds exactly x (a NaN is any NaN; 0.0 is not -0.0); tensors as for `show_x_`."""
    return _run(p, y, z, beta, compares=True) == 0


def _run(p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float, *, compares: bool) -> int:
    table = np.empty((len(p), 4), np.int64)
    for column, tensors in enumerate((p, y, z)):
        table[:, column] = [tensor.data_ptr() for tensor in tensors]
    table[:, 3] = [tensor.numel() for tensor in p]
    return compiled.run(_worker(p[0].dtype, compares), table, (1 - 1 / beta,), int(table[:, 3].sum()))
