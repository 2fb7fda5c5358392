"""The step for bfloat16 parameters on CPU in one pass over memory, for each way to store the state. Needs numba.

The storage and the random numbers are those of `precision`, element by element the same; the arithmetic is that of
`one_pass_cpu`, in float32 and strict IEEE, so that results do not depend on threads, alignment or sharding.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit

from hf_schedulefree.optim import precision
from hf_schedulefree.optim.kernels import compiled
from hf_schedulefree.optim.kernels.compiled import (
    add,
    bfloat16_to_float32,
    both,
    either,
    joined,
    multiply,
    pointer,
    rows_and_numbers,
    shift_right,
    take_part,
)
from hf_schedulefree.optim.kernels.numbers import DenseHalfRow, StepNumbers
from hf_schedulefree.optim.kernels.one_pass_cpu import NORMALIZE, PLAIN, kind_of, plain_numbers
from hf_schedulefree.optim.kernels.threads import Work

_INDEX = np.uint32(precision.INDEX_MULTIPLIERS[0])
_FIRST, _SECOND, _THIRD, _FOURTH = (np.uint32(multiplier) for multiplier in precision.MULTIPLIERS)
_NAN = np.uint16(0x7FC0)


# As `precision.random_bits` and `bits_for`; `h` is what the formula there begins with.


@njit(inline="always")
def _random(h, key):
    h = multiply(either(h, shift_right(h, 16)), _FIRST)
    h = multiply(either(either(h, shift_right(h, 15)), key), _SECOND)
    return either(h, shift_right(h, 16))


@njit(inline="always")
def _bits_for_z(random):
    return both(random, 0xFFFF)


@njit(inline="always")
def _bits_for_v(random):
    return shift_right(random, 16)


@njit(inline="always")
def _bits_for_y(random):
    random = multiply(random, _THIRD)
    return shift_right(multiply(either(random, shift_right(random, 15)), _FOURTH), 16)


@njit(inline="always")
def _rounded(value, random):
    cut = np.uint16(shift_right(add(np.float32(value).view(np.uint32), random), 16))
    return cut if value == value else _NAN


@functools.cache
def _worker(low_bits: bool, wide: bool, kind: int) -> Work:
    """The compiled step for one storage and one kind of direction."""
    kept, size = (np.float32, 4) if wide else (np.uint16, 2)

    @compiled.worker
    def step(job):
        # Columns of the table: addresses of y, y_low, z, v, g; elements; what the first random number of the row begins
        # with, and the second half of its key.
        table, numbers = rows_and_numbers(job, 8, 7)
        lr, a, c = np.float32(numbers[0]), np.float32(numbers[1]), np.float32(numbers[2])
        weight_decay, beta2, rest2 = np.float32(numbers[3]), np.float32(numbers[4]), np.float32(1 - numbers[4])
        scale, eps = np.float32(numbers[5]), np.float32(numbers[6])
        while True:
            first, last = take_part(job)
            if first == last:
                return
            start = 0
            for row in range(table.shape[0]):
                low, high = max(first - start, 0), min(last - start, table[row, 5])
                start += table[row, 5]
                if low >= high:
                    continue
                y = carray(pointer(table[row, 0] + 2 * low), high - low, np.uint16)
                y_low = carray(pointer(table[row, 1] + 2 * low), high - low, np.uint16)
                z = carray(pointer(table[row, 2] + size * low), high - low, kept)
                v = carray(pointer(table[row, 3] + size * low), high - low, kept)
                g = carray(pointer(table[row, 4] + 2 * low), high - low, np.uint16)
                h, key = np.uint32(np.uint32(table[row, 6]) + np.uint32(low) * _INDEX), np.uint32(table[row, 7])
                for i in range(y.size):
                    y_i = joined(y[i], y_low[i]) if low_bits else bfloat16_to_float32(y[i])
                    z_i = np.float32(z[i]) if wide else bfloat16_to_float32(z[i])
                    d = bfloat16_to_float32(g[i])
                    random = _random(add(h, multiply(i, _INDEX)), key)
                    if kind != PLAIN:
                        v_i = beta2 * (np.float32(v[i]) if wide else bfloat16_to_float32(v[i])) + rest2 * (d * d)
                        if wide:
                            v[i] = v_i
                        else:
                            v[i] = _rounded(v_i, _bits_for_v(random))
                        if kind == NORMALIZE:
                            d = d / (np.sqrt(v_i * scale) + eps)
                    d = d + weight_decay * y_i
                    z_next = z_i - lr * d
                    if wide:
                        z[i] = z_next
                    else:
                        z[i] = _rounded(z_next, _bits_for_z(random))
                    y_i = np.float32(y_i + c * (z_i - y_i) + a * d)
                    if low_bits:
                        bits = y_i.view(np.uint32)
                        y[i] = np.uint16(shift_right(add(bits, 0x8000), 16)) if y_i == y_i else _NAN
                        y_low[i] = np.uint16(bits) if y_i == y_i else np.uint16(0)
                    else:
                        y[i] = _rounded(y_i, _bits_for_y(random))

    return step


def step_(rows: Sequence[DenseHalfRow], numbers: StepNumbers) -> None:
    """One step in place for bfloat16 parameters on CPU whose state is stored alike; no index crosses 2^32."""
    table = np.empty((len(rows), 8), np.int64)
    y, y_low, z, v, grad, first, keys = zip(*rows, strict=True)
    # A tensor that there is not is never touched; any address will do.
    columns = (y, y if y_low[0] is None else y_low, z, z if v[0] is None else v, grad)
    for column, tensors in enumerate(columns):
        table[:, column] = [tensor.data_ptr() for tensor in tensors]
    table[:, 5] = [tensor.numel() for tensor in y]
    seeds, parameters = ([precision.wrapped(key[i]) for key in keys] for i in range(2))
    key = precision.rounding_key(np.array(seeds), numbers.k, np.array(parameters))
    table[:, 6], table[:, 7] = precision.first_hash(key, np.array(first)), key[1]
    work = _worker(y_low[0] is not None, z[0].dtype == torch.float32, kind_of(numbers))
    compiled.run(work, table, plain_numbers(numbers), int(table[:, 5].sum()))
    torch.autograd.graph.increment_version(y)  # autograd must notice, as for torch's operations
