"""The step for bfloat16, two elements at a time; see `one_pass_half_cpu`.

What limits these loops are the conversions. So they read and write words of two elements each: a half of such a word is
a float32 after one operation, where 16-bit numbers would have to be widened first, and narrowed again.
"""

from collections.abc import Callable

import numpy as np
from numba import carray, njit

from hf_schedulefree.optim import precision
from hf_schedulefree.optim.kernels.one_pass_cpu import NUMBERS, PLAIN
from hf_schedulefree.optim.kernels.sources.elements import (
    add,
    both,
    either,
    merged,
    multiply,
    pointer,
    rows_and_numbers,
    shift_left,
    shift_right,
    shift_right_signed,
    stack,
    take_rows,
)
from hf_schedulefree.optim.kernels.sources.step import plain_numbers, update

_INDEX, _UPPER_INDEX = map(np.uint32, precision.INDEX_MULTIPLIERS)
_FIRST, _SECOND, _THIRD, _FOURTH = map(np.uint32, precision.MULTIPLIERS)
_SPLITMIX_0, _SPLITMIX_1, _SPLITMIX_2 = map(np.uint64, precision.SPLITMIX)
_UPPER, _NAN = 0xFFFF0000, np.float32(np.nan)


# As `precision.rounding_key`, `random_bits` and `bits_for`; `h` is what the formula of `random_bits` begins with.


@njit(inline="always")
def _absorbed(key, word):
    key = key + np.uint64(word) + _SPLITMIX_0
    key = (key ^ (key >> np.uint64(30))) * _SPLITMIX_1
    key = (key ^ (key >> np.uint64(27))) * _SPLITMIX_2
    return key ^ (key >> np.uint64(31))


@njit(inline="always")
def _first_hash_and_key(seed, k, parameter, first):
    """Of a row whose first element has the global index `first`: what `h` is there, and the second half of the key."""
    key = _absorbed(_absorbed(_absorbed(np.uint64(0), seed), k), parameter)
    index = add(multiply(np.uint32(first), _INDEX), multiply(np.uint32(first >> 32), _UPPER_INDEX))
    return add(index, np.uint32(key)), np.uint32(key >> np.uint64(32))


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


# An element of a word as the upper half of a float32's bits, and two such halves as a word again.


@njit(inline="always")
def _first(word):
    return np.uint32(shift_left(word, 16))


@njit(inline="always")
def _second(word):
    return np.uint32(both(word, _UPPER))


@njit(inline="always")
def _word(first, second):
    return np.uint32(merged(shift_right(first, 16), both(second, _UPPER)))


@njit(inline="always")
def _value(bits):
    return np.uint32(bits).view(np.float32)


@njit(inline="always")
def _bits(value):
    return np.float32(value).view(np.uint32)


@njit(inline="always")
def _usual(value):
    """Of all NaN, the one whose lower half is 0."""
    return value if value == value else _NAN


@njit(inline="always")
def _joined(high, low):
    """As `precision.join`; a NaN has a lower half that is 0."""
    value = _value(add(_bits(high), low))
    return value if value == value else high


# Rounded values, in the upper half of what is returned. A NaN stays one without being asked for, as it comes from an
# operand whose lower half is 0: nothing is carried beyond the upper half.


@njit(inline="always")
def _to_nearest(value):
    bits = _bits(value)
    return add(add(bits, 0x7FFF), both(shift_right(bits, 16), 1))


@njit(inline="always")
def _rounded(value, is_random, random):
    return np.uint32(add(_bits(value), random) if is_random else _to_nearest(value))


@njit(inline="always")
def _step_pairs(places, pairs, h, key, plain, kind, low_bits, kept, wide, is_random):
    """The step of 2 * pairs elements of y, y_low, z, v, g; `h` is what the first random number begins with."""
    y = carray(pointer(places[0]), pairs, np.uint32)
    y_low = carray(pointer(places[1]), pairs, np.uint32)
    z = carray(pointer(places[2]), 2 * pairs if wide else pairs, kept)
    v = carray(pointer(places[3]), 2 * pairs if wide else pairs, kept)
    g = carray(pointer(places[4]), pairs, np.uint32)
    for i in range(pairs):
        y_a, y_b = _value(_first(y[i])), _value(_second(y[i]))
        if low_bits:
            y_a = _joined(y_a, shift_right_signed(shift_left(y_low[i], 16), 16))
            y_b = _joined(y_b, shift_right_signed(y_low[i], 16))
        z_a = np.float32(z[2 * i]) if wide else _value(_first(z[i]))
        z_b = np.float32(z[2 * i + 1]) if wide else _value(_second(z[i]))
        v_a = v_b = np.float32(0)
        if kind != PLAIN:
            v_a = np.float32(v[2 * i]) if wide else _value(_first(v[i]))
            v_b = np.float32(v[2 * i + 1]) if wide else _value(_second(v[i]))
        y_next_a, z_a, v_a = update(kind, y_a, z_a, v_a, _value(_first(g[i])), plain)
        y_next_b, z_b, v_b = update(kind, y_b, z_b, v_b, _value(_second(g[i])), plain)
        random_a, random_b = _random(h, key), _random(add(h, _INDEX), key)
        h = add(h, shift_left(_INDEX, 1))
        if wide:
            z[2 * i], z[2 * i + 1] = z_a, z_b
            if kind != PLAIN:
                v[2 * i], v[2 * i + 1] = v_a, v_b
        else:
            z_bits_a = _rounded(z_a, is_random, _bits_for_z(random_a))
            z_bits_b = _rounded(z_b, is_random, _bits_for_z(random_b))
            z[i] = _word(z_bits_a, z_bits_b)
            if kind != PLAIN:
                v_bits_a = _rounded(v_a, is_random, _bits_for_v(random_a))
                v_bits_b = _rounded(v_b, is_random, _bits_for_v(random_b))
                v[i] = _word(v_bits_a, v_bits_b)
        if low_bits:
            # From z and v in float32 a NaN of any kind may come.
            bits_a = _bits(_usual(y_next_a) if wide else y_next_a)
            bits_b = _bits(_usual(y_next_b) if wide else y_next_b)
            y[i] = _word(add(bits_a, 0x8000), add(bits_b, 0x8000))
            y_low[i] = merged(both(bits_a, 0xFFFF), shift_left(bits_b, 16))
        else:
            bits_a = _rounded(y_next_a, is_random, _bits_for_y(random_a))
            bits_b = _rounded(y_next_b, is_random, _bits_for_y(random_b))
            y[i] = _word(bits_a, bits_b)


def step(low_bits: bool, wide: bool, is_random: bool, kind: int) -> Callable[[int], None]:
    """The step for one storage and one kind of direction."""
    # z and v: two elements in a word, or each in one of its own; a single element.
    kept, kept_alone, size = (np.float32, np.float32, 4) if wide else (np.uint32, np.uint16, 2)

    def step(job):
        # Columns of the table: addresses of y, y_low, z, v, g; elements; the global index of the first one; what
        # `precision.RandomKey` has. After the numbers of `numbers_of`, k.
        table, numbers = rows_and_numbers(job, 9, NUMBERS + 1)
        plain, k = plain_numbers(numbers, np.float32), np.int64(numbers[NUMBERS])
        alone = stack(5)
        pair = (alone, alone + 8, alone + 16, alone + 24, alone + 32)
        y_alone, low_alone = carray(pointer(pair[0]), 1, np.uint16), carray(pointer(pair[1]), 1, np.uint16)
        z_alone, v_alone = carray(pointer(pair[2]), 1, kept_alone), carray(pointer(pair[3]), 1, kept_alone)
        g_alone = carray(pointer(pair[4]), 1, np.uint16)
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            for row in range(first, last):
                places = (table[row, 0], table[row, 1], table[row, 2], table[row, 3], table[row, 4])
                elements = table[row, 5]
                h, key = _first_hash_and_key(table[row, 7], k, table[row, 8], table[row, 6])
                _step_pairs(places, elements // 2, h, key, plain, kind, low_bits, kept, wide, is_random)
                if elements % 2 == 0:
                    continue
                # What is left, as the first of a pair of its own.
                rest = elements - 1
                y = carray(pointer(places[0] + 2 * rest), 1, np.uint16)
                y_low = carray(pointer(places[1] + 2 * rest), 1, np.uint16)
                z = carray(pointer(places[2] + size * rest), 1, kept_alone)
                v = carray(pointer(places[3] + size * rest), 1, kept_alone)
                g = carray(pointer(places[4] + 2 * rest), 1, np.uint16)
                y_alone[0], low_alone[0], z_alone[0], v_alone[0], g_alone[0] = y[0], y_low[0], z[0], v[0], g[0]
                h = add(h, multiply(rest, _INDEX))
                _step_pairs(pair, 1, h, key, plain, kind, low_bits, kept, wide, is_random)
                y[0], z[0] = y_alone[0], z_alone[0]
                if kind != PLAIN:
                    v[0] = v_alone[0]
                if low_bits:
                    y_low[0] = low_alone[0]

    return step
