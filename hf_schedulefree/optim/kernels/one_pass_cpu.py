"""The step on CPU in one pass over memory: reads y, z, v, g, writes y, z, v, allocates nothing. Needs numba.

Imported only when a step is to be made; `kernels` falls back on `torch_ops` where numba is missing. The code is
compiled at the first step of a dtype (some seconds, once per machine: numba keeps it in `__pycache__`, or where
NUMBA_CACHE_DIR says).

The arithmetic is strict IEEE (no fused multiply-add, no reordering): results do not depend on the number of threads,
on alignment, or on how parameters are split between processes.
"""

import functools
import importlib
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from hf_schedulefree.optim.kernels import compiled
from hf_schedulefree.optim.kernels.compiled import pointer, rows_and_numbers, take_rows
from hf_schedulefree.optim.kernels.numbers import DenseRow, ReadyStep, StepNumbers
from hf_schedulefree.optim.kernels.threads import Work

# How many numbers a step needs: see `numbers_of`.
NUMBERS = 7

# What to do with the gradient.
PLAIN, COLLECT, NORMALIZE = 0, 1, 2


@njit(inline="always")
def plain_numbers(numbers, real):
    """What `update` needs of the numbers of `numbers_of`, each of type `real`."""
    lr, a, c, weight_decay = real(numbers[0]), real(numbers[1]), real(numbers[2]), real(numbers[3])
    beta2, rest2, scale, eps = real(numbers[4]), real(1 - numbers[4]), real(numbers[5]), real(numbers[6])
    return lr, a, c, weight_decay, beta2, rest2, scale, eps


@njit(inline="always")
def update(kind, y, z, v, g, plain):
    """One element of y, z and v (of any value where `kind` is PLAIN) after the step."""
    lr, a, c, weight_decay, beta2, rest2, scale, eps = plain
    v_next = v if kind == PLAIN else beta2 * v + rest2 * (g * g)
    d = g / (np.sqrt(v_next * scale) + eps) if kind == NORMALIZE else g
    d = d + weight_decay * y
    return y + c * (z - y) + a * d, z - lr * d, v_next


@functools.cache
def _worker(dtype: torch.dtype, kind: int) -> Work:
    """The compiled step for one dtype and one kind of direction."""
    real = compiled.NUMBA_TYPES[dtype][1]

    @compiled.worker
    def step(job):
        # Columns of the table: addresses of y, z, v, g; elements.
        table, numbers = rows_and_numbers(job, 5, NUMBERS)
        plain = plain_numbers(numbers, real)
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            for row in range(first, last):
                elements = table[row, 4]
                y = carray(pointer(table[row, 0]), elements, real)
                z = carray(pointer(table[row, 1]), elements, real)
                v = carray(pointer(table[row, 2]), elements, real)
                g = carray(pointer(table[row, 3]), elements, real)
                for i in range(elements):
                    y_next, z_next, v_next = update(kind, y[i], z[i], real(0) if kind == PLAIN else v[i], g[i], plain)
                    y[i], z[i] = y_next, z_next
                    if kind != PLAIN:
                        v[i] = v_next

    return step


def prepare(rows: Sequence[DenseRow]) -> ReadyStep:
    """A `numbers.Kernel` for parameters on CPU in float32, float64 or bfloat16; no index crosses a multiple of 2^32."""
    y, _, z, v, *_ = zip(*rows, strict=True)
    if y[0].dtype == torch.bfloat16:
        return importlib.import_module(".one_pass_half_cpu", __package__).prepare(rows)
    blocks = compiled.Blocks([tensor.numel() for tensor in y])
    # A tensor that there is not is never touched; any address will do.
    job = blocks.job((y, z, y if v[0] is None else v, y), NUMBERS)
    gradients, dtype = compiled.Column(job, 3, blocks), y[0].dtype

    def step_(grads: Sequence[Tensor], numbers: StepNumbers) -> None:
        gradients.show(grads)
        job.run(_worker(dtype, kind_of(numbers)), numbers_of(numbers))
        torch.autograd.graph.increment_version(y)  # autograd must notice, as it does for torch's own operations

    return step_


def kind_of(numbers: StepNumbers) -> int:
    """What the step does with the gradient."""
    direction = numbers.direction
    return PLAIN if direction.beta2 is None else NORMALIZE if direction.normalizes else COLLECT


def numbers_of(numbers: StepNumbers) -> tuple[float, ...]:
    """lr, the factor on d in y, c, weight decay, beta2, 1 / bias correction, eps."""
    lr, _, c, weight_decay, direction, _ = numbers
    beta2, scale = direction.beta2 or 0.0, 1 / direction.correction
    return lr, numbers.direction_factor, c, weight_decay, beta2, scale, direction.eps
