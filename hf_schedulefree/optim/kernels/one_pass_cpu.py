"""The step on CPU in one pass over memory: reads y, z, v, g, writes y, z, v, allocates nothing. Needs numba.

Imported only when a step is to be made; `kernels` falls back on `torch_ops` where numba is missing. The code is
compiled at the first step of a dtype (some seconds, once per machine: numba keeps it in `__pycache__`, or where
NUMBA_CACHE_DIR says).

The arithmetic is strict IEEE (no fused multiply-add, no reordering): results do not depend on the number of threads,
on alignment, or on how parameters are split between processes. bfloat16 is computed in float32 and rounded once.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray
from torch import Tensor

from hf_schedulefree.optim.kernels import compiled
from hf_schedulefree.optim.kernels.compiled import (
    bfloat16_to_float32,
    float32_to_bfloat16,
    pointer,
    rows_and_numbers,
    take_part,
)
from hf_schedulefree.optim.kernels.numbers import StepNumbers
from hf_schedulefree.optim.kernels.threads import Work

# What to do with the gradient.
PLAIN, COLLECT, NORMALIZE = 0, 1, 2


@functools.cache
def _worker(dtype: torch.dtype, kind: int) -> Work:
    """The compiled step for one dtype and one kind of direction."""
    kept, real = compiled.NUMBA_TYPES[dtype]
    half, size = kept is np.uint16, dtype.itemsize

    @compiled.worker
    def step(job):
        # Columns of the table: addresses of y, z, v, g; elements.
        table, numbers = rows_and_numbers(job, 5, 7)
        lr, a, c, weight_decay = real(numbers[0]), real(numbers[1]), real(numbers[2]), real(numbers[3])
        beta2, rest2 = real(numbers[4]), real(1 - numbers[4])
        scale, eps = real(numbers[5]), real(numbers[6])
        while True:
            first, last = take_part(job)
            if first == last:
                return
            start = 0
            for row in range(table.shape[0]):
                low, high = max(first - start, 0), min(last - start, table[row, 4])
                start += table[row, 4]
                if low >= high:
                    continue
                y = carray(pointer(table[row, 0] + size * low), high - low, kept)
                z = carray(pointer(table[row, 1] + size * low), high - low, kept)
                v = carray(pointer(table[row, 2] + size * low), high - low, kept)
                g = carray(pointer(table[row, 3] + size * low), high - low, kept)
                for i in range(y.size):
                    y_i = bfloat16_to_float32(y[i]) if half else y[i]
                    z_i = bfloat16_to_float32(z[i]) if half else z[i]
                    d = bfloat16_to_float32(g[i]) if half else g[i]
                    if kind != PLAIN:
                        v_i = beta2 * (bfloat16_to_float32(v[i]) if half else v[i]) + rest2 * (d * d)
                        v[i] = float32_to_bfloat16(v_i) if half else v_i
                        if kind == NORMALIZE:
                            d = d / (np.sqrt(v_i * scale) + eps)
                    d = d + weight_decay * y_i
                    y_next = y_i + c * (z_i - y_i) + a * d
                    z_next = z_i - lr * d
                    y[i] = float32_to_bfloat16(y_next) if half else y_next
                    z[i] = float32_to_bfloat16(z_next) if half else z_next

    return step


def step_(
    y: Sequence[Tensor], z: Sequence[Tensor], v: Sequence[Tensor], grads: Sequence[Tensor], numbers: StepNumbers
) -> None:
    """One step in place over contiguous CPU tensors of one dtype (float32, float64 or bfloat16)."""
    table = np.empty((len(y), 5), np.int64)
    for column, tensors in enumerate((y, z, v or y, grads)):
        table[:, column] = [tensor.data_ptr() for tensor in tensors]
    table[:, 4] = [tensor.numel() for tensor in y]
    work = _worker(y[0].dtype, kind_of(numbers))
    compiled.run(work, table, plain_numbers(numbers), int(table[:, 4].sum()))
    torch.autograd.graph.increment_version(y)  # autograd must notice, as it does for torch's own operations


def kind_of(numbers: StepNumbers) -> int:
    """What the step does with the gradient."""
    direction = numbers.direction
    return PLAIN if direction.beta2 is None else NORMALIZE if direction.normalizes else COLLECT


def plain_numbers(numbers: StepNumbers) -> tuple[float, ...]:
    """lr, the factor on d in y, c, weight decay, beta2, 1 / bias correction, eps."""
    lr, _, c, weight_decay, direction, _ = numbers
    beta2, scale = direction.beta2 or 0.0, 1 / direction.correction
    return lr, numbers.direction_factor, c, weight_decay, beta2, scale, direction.eps
