"""What the compiled CPU kernels share: how they are compiled, how threads divide the work, bfloat16. Needs numba.

A kernel is a C function `worker(job)`, called once by each thread. It takes part after part of the work, which is
numbered from 0 to `elements`, until nothing is left: a thread that the machine gives less time takes fewer parts.

A worker's closure must hold plain values only. With a compiled function among them, numba's cache on disk would never
match: it would compile anew, and write another file, in each process.
"""

from collections.abc import Callable

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_schedulefree.optim.kernels import threads

# What a job holds, as int64: the next part (shared by all threads), elements in all, elements of a part, the addresses
# of the table and of the plain numbers, rows of the table, what the workers count, what else they need.
_NEXT, _ELEMENTS, _PART, _TABLE, _NUMBERS, _ROWS, _COUNTED, _EXTRA = range(8)
_SLOTS = 8

# Elements that pay for waking one more thread, and bounds of a part.
_ELEMENTS_PER_THREAD = 2**14
_SMALLEST_PART, _LARGEST_PART = 2**13, 2**17
_PARTS_PER_THREAD = 8


@intrinsic
def pointer(typing_context, address):
    """An integer as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _fetch_add(typing_context, address, amount):
    """Add to the int64 at an address, as one operation among all threads; returns the former value."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], cgutils.intp_t.as_pointer())
        return builder.atomic_rmw("add", place, args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


def worker(function: Callable) -> "threads.Work":
    """Compile a worker; its compilation is kept on disk where that can be written to."""
    signature = types.void(types.int64)
    options = {"nopython": True, "error_model": "numpy"}
    try:
        return cfunc(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder to write the cache to: compiled anew in each process
        return cfunc(signature, **options)(function)


@njit
def rows_and_numbers(job, columns, numbers):
    """The table (int64) and the plain numbers (float64) that a job was started with."""
    slots = carray(pointer(job), _SLOTS, np.int64)
    table = carray(pointer(slots[_TABLE]), (slots[_ROWS], columns), np.int64)
    return table, carray(pointer(slots[_NUMBERS]), numbers, np.float64)


@njit
def take_part(job):
    """The next part (first, last) for the calling thread; first = last when all are taken."""
    slots = carray(pointer(job), _SLOTS, np.int64)
    first = min(_fetch_add(job + 8 * _NEXT, slots[_PART]), slots[_ELEMENTS])
    return first, min(first + slots[_PART], slots[_ELEMENTS])


@njit
def count(job, amount):
    """Add to what the job counts; returns the former value."""
    return _fetch_add(job + 8 * _COUNTED, amount)


@njit
def extra(job):
    """The address that the job was started with."""
    return carray(pointer(job), _SLOTS, np.int64)[_EXTRA]


def run(
    work: "threads.Work",
    table: np.ndarray,
    numbers: tuple[float, ...],
    elements: int,
    *,
    weight: int = 1,
    counted: int = 0,
    extra: int = 0,
    one_thread: bool = False,
) -> int:
    """Do a job in torch's number of threads.

    Args:
        work: from `worker`.
        table: int64, C-contiguous.
        numbers: what is the same for all rows.
        elements: how much there is to do.
        weight: how many elements of a tensor each of these stands for.
        counted: where to begin to count.
        extra: an address for the workers.
        one_thread: do it in the calling thread.

    Returns:
        What the workers have counted.
    """
    threads_used = max(1, min(torch.get_num_threads(), elements * weight // _ELEMENTS_PER_THREAD))
    if one_thread:
        threads_used = 1
    part = elements
    if threads_used > 1:
        part = min(max(elements * weight // (threads_used * _PARTS_PER_THREAD), _SMALLEST_PART), _LARGEST_PART)
        part = -(-part // weight)
    values = np.array(numbers, np.float64)
    job = np.array([0, elements, part, table.ctypes.data, values.ctypes.data, len(table), counted, extra], np.int64)
    threads.run(work, job.ctypes.data, threads_used)
    return int(job[_COUNTED])


# Arithmetic in 32 bits. numba's own operators widen to 64, and a loop then takes half as many elements at a time.


def _in_32_bits(instruction: str) -> Callable:
    @intrinsic
    def operation(typing_context, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return types.uint32(types.uint32, types.uint32), generate

    return operation


add, subtract, multiply = _in_32_bits("add"), _in_32_bits("sub"), _in_32_bits("mul")
both, either = _in_32_bits("and_"), _in_32_bits("xor")
shift_left, shift_right = _in_32_bits("shl"), _in_32_bits("lshr")


@njit(inline="always")
def bfloat16_to_float32(bits):
    return np.uint32(shift_left(bits, 16)).view(np.float32)


@njit(inline="always")
def float32_to_bfloat16(value):
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    rounded = shift_right(add(add(bits, 0x7FFF), both(shift_right(bits, 16), 1)), 16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


@njit(inline="always")
def joined(high, low):
    """As `precision.join`: a bfloat16 and the 16 bits that are missing in it, both as they are stored."""
    return np.uint32(add(shift_left(high, 16), subtract(either(low, 0x8000), 0x8000))).view(np.float32)


# A torch dtype -> how numba sees its elements, and the type that is computed with.
NUMBA_TYPES = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.uint16, np.float32),
}
