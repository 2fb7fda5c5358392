"""x from y and z, element by element; see `switch_cpu`."""

from collections.abc import Callable

import numpy as np
from numba import carray

from hf_schedulefree.optim.kernels.sources.elements import (
    TYPES,
    bfloat16_to_float32,
    count,
    extrapolated,
    float32_to_bfloat16,
    joined,
    pointer,
    rows_and_numbers,
    take_rows,
)


def write(dtype: str, compares: bool, low_bits: bool, wide_z: bool) -> Callable[[int], None]:
    """The pass that writes x into p, or counts the elements of p that are not x."""
    kept, real = TYPES[dtype]
    half, kept_z = kept is np.uint16, real if wide_z else kept
    half_z = half and not wide_z
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[np.dtype(kept).itemsize]

    def write(job):
        # Columns of the table: addresses of p, y, z, y_low; elements.
        table, numbers = rows_and_numbers(job, 5, 1)
        weight = real(numbers[0])
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            others = 0
            for row in range(first, last):
                elements = table[row, 4]
                p = carray(pointer(table[row, 0]), elements, kept)
                y = carray(pointer(table[row, 1]), elements, kept)
                z = carray(pointer(table[row, 2]), elements, kept_z)
                y_low = carray(pointer(table[row, 3]), elements, np.uint16)
                for i in range(elements):
                    if low_bits:
                        y_i = joined(y[i], y_low[i])
                    else:
                        y_i = bfloat16_to_float32(y[i]) if half else y[i]
                    z_i = bfloat16_to_float32(z[i]) if half_z else z[i]
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
