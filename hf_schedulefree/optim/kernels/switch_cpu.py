"""x from y and z on CPU in one pass over memory, without temporaries: the bits of `averaging.x_from_y`. Needs numba.

Strict IEEE as in `one_pass_cpu`: subtraction, product and sum are rounded one by one.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from hf_schedulefree.optim.kernels.one_pass_cpu import (
    _as_it_is,
    _bfloat16_to_float32,
    _compiled,
    _float32_to_bfloat16,
    _pointer,
)
from hf_schedulefree.optim.kernels.threads import run_parts


@njit(inline="always")
def _bits32(value):
    return np.float32(value).view(np.uint32)


@njit(inline="always")
def _bits64(value):
    return np.float64(value).view(np.uint64)


def _make(stored: type, real: type, load: Callable, store: Callable, bits: Callable) -> Callable:
    """The pass for tensors of one dtype: kept as `stored`, computed in `real`, compared as `bits`."""
    size = np.dtype(stored).itemsize

    @_compiled
    def write(p, y, z, weight):
        for i in range(p.size):
            y_i = load(y[i])
            p[i] = store((load(z[i]) - y_i) * weight + y_i)

    @_compiled
    def count(p, y, z, weight):
        others = 0
        for i in range(p.size):
            y_i, p_i = load(y[i]), load(p[i])
            x_i = (load(z[i]) - y_i) * weight + y_i
            others += bits(store(x_i)) != bits(p[i]) and (x_i == x_i or p_i == p_i)
        return others

    @_compiled
    def run(table, first, last, weight, is_count):
        """Elements first to last of all tensors laid end to end. Columns of `table`: addresses of p, y, z; size."""
        weight = real(weight)
        start = others = 0
        for row in range(table.shape[0]):
            low, high = max(first - start, 0), min(last - start, table[row, 3])
            start += table[row, 3]
            if low >= high:
                continue
            elements, skip = high - low, low * size
            p = carray(_pointer(table[row, 0] + skip), elements, stored)
            y = carray(_pointer(table[row, 1] + skip), elements, stored)
            z = carray(_pointer(table[row, 2] + skip), elements, stored)
            if is_count:
                others += count(p, y, z, weight)
            else:
                write(p, y, z, weight)
        return others

    return run


_RUN = {
    torch.float32: _make(np.float32, np.float32, _as_it_is, _as_it_is, _bits32),
    torch.float64: _make(np.float64, np.float64, _as_it_is, _as_it_is, _bits64),
    torch.bfloat16: _make(np.uint16, np.float32, _bfloat16_to_float32, _float32_to_bfloat16, _as_it_is),
}


def show_x_(p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float) -> None:
    """Write x into `p`; contiguous CPU tensors of one dtype (float32, float64 or bfloat16)."""
    _all_parts(p, y, z, beta, is_count=False)
    torch.autograd.graph.increment_version(p)


def holds_x(p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float) -> bool:
    """Whether `p` holds exactly x (a NaN is any NaN; 0.0 is not -0.0); tensors as for `show_x_`."""
    return not any(_all_parts(p, y, z, beta, is_count=True))


def _all_parts(p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float, is_count: bool) -> list[int]:
    table = np.empty((len(p), 4), np.int64)
    for column, tensors in enumerate((p, y, z)):
        table[:, column] = [tensor.data_ptr() for tensor in tensors]
    table[:, 3] = [tensor.numel() for tensor in p]
    run, weight = _RUN[p[0].dtype], 1 - 1 / beta
    return run_parts(lambda first, last: run(table, first, last, weight, is_count), int(table[:, 3].sum()))
