"""y as x, z and a residual, block by block; see `residual_cpu`."""

from collections.abc import Callable

import numpy as np
from numba import carray, njit

from hf_schedulefree.optim.kernels.jobs import CACHE_LINE
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
    write_past_caches,
)

_INTEGERS = {4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}

# Bits of the sign and the exponent.
_ABOVE_FRACTION = {4: 9, 8: 12}

# A residual beyond these is one of them, and its element is kept whole.
_LOWEST, _HIGHEST = -128, 127

_STRIDE, _FACTOR = 0x9E3779B1, 0x85EBCA77  # odd

# Memory within a worker, counted in 8 bytes: for residuals, with room to begin at a cache line, and for places of
# elements, of 2 bytes each.
_RESIDUALS, _PLACES = (BLOCK + CACHE_LINE) // 8, BLOCK // 4


def _types(dtype: str) -> tuple:
    """The type of the elements, their size, the integers of that size, and what `_added` needs."""
    real = TYPES[dtype][1]
    size = np.dtype(real).itemsize
    whole, unsigned = _INTEGERS[size]
    above = _ABOVE_FRACTION[size]
    shifts = unsigned(above), unsigned(8 * size - above), unsigned(4 * size - 1)
    return real, size, whole, (unsigned, unsigned(_STRIDE), unsigned(_FACTOR), *shifts)


@njit(inline="always")
def _added(bits, place, sum_1, sum_2, constants):
    """The checksum with one more element: any change of a single one changes `sum_1`.

    A product takes no bit downward. So the sign and the exponent go to the lower end first: of numbers that change in
    the sign alone, two would else cancel out once in 2^16 times.
    """
    unsigned, stride, factor, above, below, half = constants
    place = unsigned(place + stride)
    turned = unsigned(unsigned(bits) << above) | unsigned(unsigned(bits) >> below)
    mixed = unsigned((unsigned(turned) ^ place) * factor)
    return place, unsigned(sum_1 + mixed), unsigned(sum_2 + unsigned(mixed >> half) * mixed)


@njit
def _any_whole(residual):
    lowest = highest = np.int8(0)
    for i in range(residual.size):
        lowest, highest = min(lowest, residual[i]), max(highest, residual[i])
    return lowest == _LOWEST or highest == _HIGHEST


@njit(inline="always")
def _find_whole(residuals, elements, places):
    """Write the places of the elements that are kept whole; returns how many these are."""
    found = 0
    for start in range(0, elements, CACHE_LINE):
        part = carray(pointer(residuals + start), min(elements - start, CACHE_LINE), np.int8)
        if _any_whole(part):
            for i in range(part.size):
                if part[i] == _LOWEST or part[i] == _HIGHEST:
                    places[found] = start + i
                    found += 1
    return found


def park(dtype: str, past_caches: bool) -> Callable[[int], None]:
    """y in the parameter becomes x, in all blocks that hold y.

    With `past_caches`, residuals are written to memory at once, whole lines, which need not be read before: for more of
    them than the caches hold.
    """
    real, size, whole, constants = _types(dtype)
    unsigned = constants[0]

    def park(job):
        table, numbers = rows_and_numbers(job, COLUMNS, 2)
        to_x, to_y = real(numbers[0]), real(numbers[1])
        former = carray(pointer(stack(BLOCK)), BLOCK, whole)
        aside = (stack(_RESIDUALS) + (CACHE_LINE - 1)) & -CACHE_LINE
        places = carray(pointer(stack(_PLACES)), BLOCK, np.uint16)
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
                residuals = aside if past_caches else table[row, RESIDUAL]
                residual = carray(pointer(residuals), elements, np.int8)
                sum_1 = sum_2 = place = unsigned(0)
                for i in range(elements):
                    former[i] = p[i]
                    x_i = real(extrapolated(whole(p[i]).view(real), z[i], to_x))
                    y_i = real(extrapolated(x_i, z[i], to_y))
                    beyond = whole(p[i] - y_i.view(whole)) if y_i == y_i else whole(_HIGHEST)
                    residual[i] = np.int8(min(max(beyond, whole(_LOWEST)), whole(_HIGHEST)))
                    p[i] = x_i.view(whole)
                    place, sum_1, sum_2 = _added(x_i.view(unsigned), place, sum_1, sum_2, constants)
                if past_caches:
                    for start in range(0, elements, CACHE_LINE):
                        write_past_caches(aside + start, table[row, RESIDUAL] + start)
                kept_at = 0
                if _any_whole(residual):
                    others = _find_whole(residuals, elements, places)
                    kept_at = count(job, others)
                    kept = carray(pointer(extra(job) + size * kept_at), others, whole)
                    for i in range(others):
                        kept[i] = former[places[i]]
                table[row, SUM_1], table[row, SUM_2] = np.int64(sum_1), np.int64(sum_2)
                table[row, KEPT_AT] = kept_at

    return park


def restore(dtype: str, compares_only: bool) -> Callable[[int], None]:
    """x in the parameter becomes y, in all blocks that hold x; counts the blocks that hold something else."""
    real, size, whole, constants = _types(dtype)
    unsigned = constants[0]

    def restore(job):
        table, numbers = rows_and_numbers(job, COLUMNS, 2)
        to_y = real(numbers[1])
        former = carray(pointer(stack(BLOCK)), BLOCK, whole)
        places = carray(pointer(stack(_PLACES)), BLOCK, np.uint16)
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
                    place, sum_1, sum_2 = _added(p[i], place, sum_1, sum_2, constants)
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
                    others = _find_whole(table[row, RESIDUAL], elements, places)
                    kept = carray(pointer(extra(job) + size * kept_at), others, whole)
                    for i in range(others):
                        p[places[i]] = kept[i]
                table[row, KEPT_AT] = HOLDS_Y

    return restore
