"""The step on CPU in one pass over memory: reads y, z, v, g, writes y, z, v, allocates nothing. Needs numba.

Imported only when a step is to be made; `kernels` falls back on `torch_ops` where numba is missing. The code is
compiled at the first step of a dtype (some seconds, once per machine: numba keeps it in `__pycache__`, or where
NUMBA_CACHE_DIR says).

The arithmetic is strict IEEE (no fused multiply-add, no reordering): results do not depend on the number of threads,
on alignment, or on how parameters are split between processes. bfloat16 is computed in float32 and rounded once.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from hf_schedulefree.optim.kernels.numbers import StepNumbers
from hf_schedulefree.optim.kernels.threads import run_parts

# What to do with the gradient; compile-time branches would triple the compilation, a loop each is all they need.
_PLAIN, _COLLECT, _NORMALIZE = 0, 1, 2


@intrinsic
def _pointer(typing_context, address):
    """An integer as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _compiled(function: Callable) -> Callable:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to write the cache to: compiled anew in each process
        return njit(**options)(function)


@njit(inline="always")
def _bfloat16_to_float32(bits):
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


@njit(inline="always")
def _float32_to_bfloat16(value):
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16)
    return rounded if value == value else np.uint16(0x7FC0)


@njit(inline="always")
def _as_it_is(value):
    return value


def _make_step(stored: type, real: type, load: Callable, store: Callable) -> Callable:
    """The step for tensors of one dtype: kept as `stored`, computed in `real`."""
    size = np.dtype(stored).itemsize

    @_compiled
    def plain(y, z, g, lr, a, c, weight_decay):
        for i in range(y.size):
            y_i, z_i = load(y[i]), load(z[i])
            d = load(g[i]) + weight_decay * y_i
            y[i] = store(y_i + c * (z_i - y_i) + a * d)
            z[i] = store(z_i - lr * d)

    @_compiled
    def collect(y, z, v, g, lr, a, c, weight_decay, beta2, rest2):
        for i in range(y.size):
            y_i, z_i, g_i = load(y[i]), load(z[i]), load(g[i])
            v[i] = store(beta2 * load(v[i]) + rest2 * (g_i * g_i))
            d = g_i + weight_decay * y_i
            y[i] = store(y_i + c * (z_i - y_i) + a * d)
            z[i] = store(z_i - lr * d)

    @_compiled
    def normalize(y, z, v, g, lr, a, c, weight_decay, beta2, rest2, scale, eps):
        for i in range(y.size):
            y_i, z_i, g_i = load(y[i]), load(z[i]), load(g[i])
            v_i = beta2 * load(v[i]) + rest2 * (g_i * g_i)
            v[i] = store(v_i)
            d = g_i / (np.sqrt(v_i * scale) + eps) + weight_decay * y_i
            y[i] = store(y_i + c * (z_i - y_i) + a * d)
            z[i] = store(z_i - lr * d)

    @_compiled
    def step(table, first, last, kind, lr, a, c, weight_decay, beta2, scale, eps):
        """Elements first to last of all tensors laid end to end. Columns of `table`: addresses of y, z, v, g; size."""
        lr, a, c, weight_decay, rest2 = real(lr), real(a), real(c), real(weight_decay), real(1 - beta2)
        beta2, scale, eps = real(beta2), real(scale), real(eps)
        start = 0
        for row in range(table.shape[0]):
            low, high = max(first - start, 0), min(last - start, table[row, 4])
            start += table[row, 4]
            if low >= high:
                continue
            count, skip = high - low, low * size
            y = carray(_pointer(table[row, 0] + skip), count, stored)
            z = carray(_pointer(table[row, 1] + skip), count, stored)
            g = carray(_pointer(table[row, 3] + skip), count, stored)
            if kind == _PLAIN:
                plain(y, z, g, lr, a, c, weight_decay)
                continue
            v = carray(_pointer(table[row, 2] + skip), count, stored)
            if kind == _COLLECT:
                collect(y, z, v, g, lr, a, c, weight_decay, beta2, rest2)
            else:
                normalize(y, z, v, g, lr, a, c, weight_decay, beta2, rest2, scale, eps)

    return step


_STEPS = {
    torch.float32: _make_step(np.float32, np.float32, _as_it_is, _as_it_is),
    torch.float64: _make_step(np.float64, np.float64, _as_it_is, _as_it_is),
    torch.bfloat16: _make_step(np.uint16, np.float32, _bfloat16_to_float32, _float32_to_bfloat16),
}


def step_(
    y: Sequence[Tensor], z: Sequence[Tensor], v: Sequence[Tensor], grads: Sequence[Tensor], numbers: StepNumbers
) -> None:
    """One step in place over contiguous CPU tensors of one dtype (float32, float64 or bfloat16)."""
    table = np.empty((len(y), 5), np.int64)
    for column, tensors in enumerate((y, z, v or y, grads)):
        table[:, column] = [tensor.data_ptr() for tensor in tensors]
    table[:, 4] = [tensor.numel() for tensor in y]
    lr, _, c, weight_decay, direction, _ = numbers
    kind = _PLAIN if direction.beta2 is None else _NORMALIZE if direction.normalizes else _COLLECT
    compiled = _STEPS[y[0].dtype]
    scalars = (
        lr,
        numbers.direction_factor,
        c,
        weight_decay,
        direction.beta2 or 0.0,
        1 / direction.correction,
        direction.eps,
    )

    def work(first: int, last: int) -> None:
        compiled(table, first, last, kind, *map(float, scalars))

    run_parts(work, int(table[:, 4].sum()))
    torch.autograd.graph.increment_version(y)  # autograd must notice, as it does for torch's own operations
