"""The step for bfloat16 parameters on CPU in one pass over memory, for each way to store the state. Needs numba.

The storage and the random numbers are those of `precision`, element by element the same; the arithmetic is that of
`one_pass_cpu`, in float32 and strict IEEE, so that results do not depend on threads, alignment or sharding.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numba import carray, njit

from hf_schedulefree.optim import precision
from hf_schedulefree.optim.kernels.numbers import DenseHalfRow, StepNumbers
from hf_schedulefree.optim.kernels.one_pass_cpu import _bfloat16_to_float32, _compiled, _pointer
from hf_schedulefree.optim.kernels.threads import run_parts

_PLAIN, _COLLECT, _NORMALIZE = 0, 1, 2

_INDEX = np.uint32(precision.INDEX_MULTIPLIERS[0])
_FIRST, _SECOND, _THIRD, _FOURTH = (np.uint32(multiplier) for multiplier in precision.MULTIPLIERS)
_NAN = np.uint16(0x7FC0)


# As `precision.random_bits` and `bits_for`; `h` is what the formula there begins with.


@njit(inline="always")
def _random(h, key):
    h = np.uint32((h ^ (h >> np.uint32(16))) * _FIRST)
    h = np.uint32((h ^ (h >> np.uint32(15)) ^ key) * _SECOND)
    return np.uint32(h ^ (h >> np.uint32(16)))


@njit(inline="always")
def _bits_for_z(random):
    return np.uint32(random & np.uint32(0xFFFF))


@njit(inline="always")
def _bits_for_v(random):
    return np.uint32(random >> np.uint32(16))


@njit(inline="always")
def _bits_for_y(random):
    random = np.uint32(random * _THIRD)
    return np.uint32(np.uint32((random ^ (random >> np.uint32(15))) * _FOURTH) >> np.uint32(16))


@njit(inline="always")
def _join(high, low):
    half = np.uint32(0x8000)
    return np.uint32((np.uint32(high) << 16) + (np.uint32(low) ^ half) - half).view(np.float32)


@njit(inline="always")
def _rounded(value, random):
    bits = np.float32(value).view(np.uint32)
    cut = np.uint16((bits + random) >> np.uint32(16))
    return cut if value == value else _NAN


@functools.cache
def _step(low_bits: bool, wide: bool, kind: int) -> Callable:
    """The compiled step for one storage and one kind of direction.

    The closure holds plain values only: with a compiled function among them, numba's cache on disk would never match.
    """
    kept, size = (np.float32, 4) if wide else (np.uint16, 2)

    @_compiled
    def step(table, random_state, first, last, lr, a, c, weight_decay, beta2, scale, eps):
        """Elements first to last of all tensors laid end to end.

        Columns of `table`: addresses of y, y_low, z, v, g; elements. `random_state`: what the first random
        number of each row begins with, and the second half of its key.
        """
        lr, a, c, weight_decay = np.float32(lr), np.float32(a), np.float32(c), np.float32(weight_decay)
        rest2, beta2, scale, eps = np.float32(1 - beta2), np.float32(beta2), np.float32(scale), np.float32(eps)
        start = 0
        for row in range(table.shape[0]):
            low, high = max(first - start, 0), min(last - start, table[row, 5])
            start += table[row, 5]
            if low >= high:
                continue
            y = carray(_pointer(table[row, 0] + 2 * low), high - low, np.uint16)
            y_low = carray(_pointer(table[row, 1] + 2 * low), high - low, np.uint16)
            z = carray(_pointer(table[row, 2] + size * low), high - low, kept)
            v = carray(_pointer(table[row, 3] + size * low), high - low, kept)
            g = carray(_pointer(table[row, 4] + 2 * low), high - low, np.uint16)
            h, key = np.uint32(random_state[row, 0] + np.uint32(low) * _INDEX), random_state[row, 1]
            for i in range(y.size):
                y_i = _join(y[i], y_low[i]) if low_bits else _bfloat16_to_float32(y[i])
                z_i = np.float32(z[i]) if wide else _bfloat16_to_float32(z[i])
                d = _bfloat16_to_float32(g[i])
                random = _random(np.uint32(h + np.uint32(i) * _INDEX), key)
                if kind != _PLAIN:
                    v_i = beta2 * (np.float32(v[i]) if wide else _bfloat16_to_float32(v[i])) + rest2 * (d * d)
                    if wide:
                        v[i] = v_i
                    else:
                        v[i] = _rounded(v_i, _bits_for_v(random))
                    if kind == _NORMALIZE:
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
                    y[i] = np.uint16((bits + np.uint32(0x8000)) >> 16) if y_i == y_i else _NAN
                    y_low[i] = np.uint16(bits) if y_i == y_i else np.uint16(0)
                else:
                    y[i] = _rounded(y_i, _bits_for_y(random))

    return step


def step_(rows: Sequence[DenseHalfRow], numbers: StepNumbers) -> None:
    """One step in place for bfloat16 parameters on CPU whose state is stored alike; no index crosses 2^32."""
    table = np.empty((len(rows), 6), np.int64)
    random_state = np.empty((len(rows), 2), np.uint32)
    for i, (y, y_low, z, v, grad, first, random_key) in enumerate(rows):
        # A tensor that there is not is never touched; any address will do.
        tensors = (y, y if y_low is None else y_low, z, z if v is None else v, grad)
        table[i] = [*(tensor.data_ptr() for tensor in tensors), y.numel()]
        key = precision.rounding_key(random_key.seed, numbers.k, random_key.parameter)
        random_state[i] = precision.first_hash(key, first), key[1]
    _, y_low, z, *_ = rows[0]
    lr, _, c, weight_decay, direction, _ = numbers
    kind = _PLAIN if direction.beta2 is None else _NORMALIZE if direction.normalizes else _COLLECT
    compiled = _step(y_low is not None, z.dtype == torch.float32, kind)
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
        compiled(table, random_state, first, last, *map(float, scalars))

    run_parts(work, int(table[:, 5].sum()))
    torch.autograd.graph.increment_version([row[0] for row in rows])  # autograd must notice, as for torch's operations
