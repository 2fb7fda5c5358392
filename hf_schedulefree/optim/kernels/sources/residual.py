"""y as x, z and a residual, block by block; see `residual_cpu`."""

from collections.abc import Callable

import numpy as np
from numba import carray, njit

from hf_schedulefree.optim.kernels.residual_cpu import (
    BLOCK,
    COLUMNS,
    ELEMENTS,
    HOLDS_Y,
    KEPT_AT,
    PARAMETER,
    RESIDUAL,
    SUM_1,
    SUM_2,
    Z,
)
from hf_schedulefree.optim.kernels.sources.elements import (
    TYPES,
    count,
    extra,
    extrapolated,
    pointer,
    rows_and_numbers,
    stack,
    take_rows,
)

_INTEGERS = {4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}

# The residual of an element that is kept whole.
_WHOLE = -128

_STRIDE, _FACTOR = 0x9E3779B1, 0x85EBCA77  # odd


@njit
def _any_whole(residual):
    lowest = np.int8(0)
    for i in range(residual.size):
        lowest = min(lowest, residual[i])
    return lowest == _WHOLE


def park(dtype: str) -> Callable[[int], None]:
    """y in the parameter becomes x, in all blocks that hold y."""
    real = TYPES[dtype][1]
    size = np.dtype(real).itemsize
    whole, unsigned = _INTEGERS[size]
    stride, factor, half = unsigned(_STRIDE), unsigned(_FACTOR), unsigned(4 * size - 1)

    def park(job):
        table, numbers = rows_and_numbers(job, COLUMNS, 2)
        to_x, to_y = real(numbers[0]), real(numbers[1])
        former = carray(pointer(stack(BLOCK)), BLOCK, whole)
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            for row in range(first, last):
                if table[row, KEPT_AT] != HOLDS_Y:
                    continue
                elements = table[row, ELEMENTS]
                p = carray(pointer(table[row, PARAMETER]), elements, whole)
                z = carray(pointer(table[row, Z]), elements, real)
                residual = carray(pointer(table[row, RESIDUAL]), elements, np.int8)
                sum_1 = sum_2 = place = unsigned(0)
                for i in range(elements):
                    former[i] = p[i]
                    x_i = real(extrapolated(whole(p[i]).view(real), z[i], to_x))
                    y_i = real(extrapolated(x_i, z[i], to_y))
                    shifted = unsigned(whole(p[i] - y_i.view(whole)) + 127) if y_i == y_i else unsigned(255)
                    residual[i] = np.int8(shifted - 127) if shifted < unsigned(255) else np.int8(_WHOLE)
                    p[i] = x_i.view(whole)
                    # The checksum: any change of one element changes sum_1.
                    place = unsigned(place + stride)
                    mixed = unsigned((x_i.view(unsigned) ^ place) * factor)
                    sum_1 = unsigned(sum_1 + mixed)
                    sum_2 = unsigned(sum_2 + unsigned(mixed >> half) * mixed)
                kept_at = 0
                if _any_whole(residual):
                    others = 0
                    for i in range(elements):
                        others += residual[i] == _WHOLE
                    kept_at = count(job, others)
                    kept = carray(pointer(extra(job) + size * kept_at), others, whole)
                    at = 0
                    for i in range(elements):
                        if residual[i] == _WHOLE:
                            kept[at] = former[i]
                            at += 1
                table[row, SUM_1], table[row, SUM_2] = np.int64(sum_1), np.int64(sum_2)
                table[row, KEPT_AT] = kept_at

    return park


def restore(dtype: str, compares_only: bool) -> Callable[[int], None]:
    """x in the parameter becomes y, in all blocks that hold x; counts the blocks that hold something else."""
    real = TYPES[dtype][1]
    size = np.dtype(real).itemsize
    whole, unsigned = _INTEGERS[size]
    stride, factor, half = unsigned(_STRIDE), unsigned(_FACTOR), unsigned(4 * size - 1)

    def restore(job):
        table, numbers = rows_and_numbers(job, COLUMNS, 2)
        to_y = real(numbers[1])
        former = carray(pointer(stack(BLOCK)), BLOCK, whole)
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            for row in range(first, last):
                kept_at, elements = table[row, KEPT_AT], table[row, ELEMENTS]
                if kept_at == HOLDS_Y:
                    continue
                p = carray(pointer(table[row, PARAMETER]), elements, whole)
                z = carray(pointer(table[row, Z]), elements, real)
                residual = carray(pointer(table[row, RESIDUAL]), elements, np.int8)
                sum_1 = sum_2 = place = unsigned(0)
                for i in range(elements):
                    place = unsigned(place + stride)
                    mixed = unsigned((unsigned(p[i]) ^ place) * factor)
                    sum_1 = unsigned(sum_1 + mixed)
                    sum_2 = unsigned(sum_2 + unsigned(mixed >> half) * mixed)
                    if not compares_only:
                        former[i] = p[i]
                        y_i = real(extrapolated(whole(p[i]).view(real), z[i], to_y))
                        p[i] = whole(y_i.view(whole) + whole(residual[i]))
                if np.int64(sum_1) != table[row, SUM_1] or np.int64(sum_2) != table[row, SUM_2]:
                    count(job, 1)
                    if not compares_only:
                        for i in range(elements):
                            p[i] = former[i]
                    continue
                if compares_only:
                    continue
                if _any_whole(residual):
                    kept = carray(pointer(extra(job) + size * kept_at), elements, whole)
                    at = 0
                    for i in range(elements):
                        if residual[i] == _WHOLE:
                            p[i] = kept[at]
                            at += 1
                table[row, KEPT_AT] = HOLDS_Y

    return restore
