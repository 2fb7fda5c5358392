"""The step, element by element; see `one_pass_cpu`."""

from collections.abc import Callable

from numba import carray, njit

from hf_schedulefree.optim.kernels.one_pass_cpu import NORMALIZE, NUMBERS, PLAIN
from hf_schedulefree.optim.kernels.sources.elements import TYPES, pointer, rows_and_numbers, square_root, take_rows


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
    d = g / (square_root(v_next * scale) + eps) if kind == NORMALIZE else g
    d = d + weight_decay * y
    return y + c * (z - y) + a * d, z - lr * d, v_next


def step(dtype: str, kind: int) -> Callable[[int], None]:
    """The step for one dtype and one kind of direction."""
    real = TYPES[dtype][1]

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
