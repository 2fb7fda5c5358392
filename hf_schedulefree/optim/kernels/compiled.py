"""What the compiled CPU kernels share: how they are compiled, how threads divide the work, bfloat16. Needs numba.

A kernel is a C function `worker(job)`, called once by each thread. It takes some rows after others of a table of
addresses, each a block of a tensor, until nothing is left: a thread that the machine gives less time takes fewer.

A worker's closure must hold plain values only. With a compiled function among them, numba's cache on disk would never
match: it would compile anew, and write another file, in each process.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from hf_schedulefree.optim.kernels import threads

# What a worker is told, as int64: the next row (shared by all threads), rows in all, how many are taken at once, the
# addresses of the table and of the plain numbers, what the workers count, what else they need.
_NEXT, _ROWS, _AT_ONCE, _TABLE, _NUMBERS, _COUNTED, _EXTRA = range(7)
_SLOTS = 7

# Elements that pay for waking one more thread.
_ELEMENTS_PER_THREAD = 2**14

# Elements of a block, unless a kernel has reasons for another number: long enough for what the memory does ahead of the
# reader, and short enough that all threads end at about the same time.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 2**13, 2**16
_BLOCKS_PER_THREAD = 8


class Blocks:
    """Tensors as the rows of a table: each is divided into blocks, of which it takes one row each.

    Args:
        sizes: the elements of each tensor.
        largest: most elements of a block; None: what suits torch's number of threads.
    """

    def __init__(self, sizes: Sequence[int], largest: int | None = None):
        in_all = np.array(sizes, np.int64)
        if largest is None:
            share = int(in_all.sum()) // (torch.get_num_threads() * _BLOCKS_PER_THREAD)
            largest = min(max(share // _SMALLEST_BLOCK, 1) * _SMALLEST_BLOCK, _LARGEST_BLOCK)
        counts = -(-in_all // largest)
        self._owner = np.repeat(np.arange(len(in_all)), counts)
        index = np.arange(len(self._owner)) - self.of(np.cumsum(counts) - counts)
        self.first = index * largest
        self.elements = np.minimum(self.of(in_all) - self.first, largest)

    def of(self, values: Sequence[int] | np.ndarray) -> np.ndarray:
        """A whole number per tensor -> per block."""
        return np.asarray(values, np.int64)[self._owner]

    def addresses(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Where the blocks of contiguous tensors of one dtype begin."""
        return self.of(list(map(Tensor.data_ptr, tensors))) + self.first * tensors[0].element_size()

    def job(self, columns: Iterable[Sequence[Tensor]], numbers: int, *others: np.ndarray, **options: Any) -> "Job":
        """A job whose table has the addresses of some lists of tensors, the elements of the blocks, and other columns.

        Options are those of `Job`.
        """
        table = np.stack([*map(self.addresses, columns), self.elements, *others], axis=1)
        return Job(table, int(self.elements.sum()), numbers, **options)


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
def take_rows(job):
    """The next rows (first, last) for the calling thread; first = last when all are taken."""
    slots = carray(pointer(job), _SLOTS, np.int64)
    first = min(_fetch_add(job + 8 * _NEXT, slots[_AT_ONCE]), slots[_ROWS])
    return first, min(first + slots[_AT_ONCE], slots[_ROWS])


@njit
def count(job, amount):
    """Add to what the job counts; returns the former value."""
    return _fetch_add(job + 8 * _COUNTED, amount)


@njit
def extra(job):
    """The address that the job was started with."""
    return carray(pointer(job), _SLOTS, np.int64)[_EXTRA]


class Job:
    """A table, ready to be worked on again and again in torch's number of threads.

    Args:
        table: int64, C-contiguous; its owner may write to it between two runs.
        elements: what the rows stand for.
        numbers: how many plain numbers a run is given.
        at_once: how many rows a thread takes at a time, if there are enough.
    """

    def __init__(self, table: np.ndarray, elements: int, numbers: int, *, at_once: int = 1):
        self.table = table
        self._elements, self._at_once = elements, at_once
        self._numbers = np.empty(numbers, np.float64)
        self._slots = np.empty(_SLOTS, np.int64)
        self._places = table.ctypes.data, self._numbers.ctypes.data
        self._argument = self._slots.ctypes.data

    def run(self, work: "threads.Work", numbers: Sequence[float], *, counted: int = 0, extra: int = 0) -> int:
        """Do it.

        Args:
            work: from `worker`.
            numbers: what is the same for all rows.
            counted: where to begin to count.
            extra: an address for the workers.

        Returns:
            What the workers have counted.
        """
        count = max(1, min(torch.get_num_threads(), self._elements // _ELEMENTS_PER_THREAD))
        rows = len(self.table)
        self._numbers[:] = numbers
        at_once = rows if count == 1 else min(self._at_once, max(1, rows // (count * _BLOCKS_PER_THREAD)))
        self._slots[:] = (0, rows, at_once, *self._places, counted, extra)
        threads.run(work, self._argument, count)
        return int(self._slots[_COUNTED])


class Column:
    """The addresses of gradients in the table of a job: others at each step, but mostly in the same places."""

    def __init__(self, job: Job, index: int, blocks: Blocks):
        self._job, self._index, self._blocks = job, index, blocks
        self._shown: list[int] = []

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Put those of contiguous tensors of one dtype there."""
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses != self._shown:
            self._job.table[:, self._index] = self._blocks.addresses(tensors)
            self._shown = addresses


def run_row(work: "threads.Work", row: tuple[int, ...], number: float) -> None:
    """Do what a `Job` of one row and one plain number would, in the calling thread, and in 2 us besides.

    Python lets no other thread work meanwhile: so that matters where two threads have many small ones to do.
    """
    job = (ctypes.c_int64 * (_SLOTS + 1 + len(row)))()
    place = ctypes.addressof(job)
    job[_ROWS] = job[_AT_ONCE] = 1
    job[_NUMBERS], job[_TABLE] = place + 8 * _SLOTS, place + 8 * (_SLOTS + 1)
    ctypes.c_double.from_address(job[_NUMBERS]).value = number
    job[_SLOTS + 1 :] = row
    threads.run(work, place, 1)


# Arithmetic in 32 bits. numba's own operators widen to 64, and a loop then takes half as many elements at a time.


def _in_32_bits(instruction: str) -> Callable:
    @intrinsic
    def operation(typing_context, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return types.uint32(types.uint32, types.uint32), generate

    return operation


add, subtract, multiply = _in_32_bits("add"), _in_32_bits("sub"), _in_32_bits("mul")
both, either, merged = _in_32_bits("and_"), _in_32_bits("xor"), _in_32_bits("or_")
shift_left, shift_right, shift_right_signed = _in_32_bits("shl"), _in_32_bits("lshr"), _in_32_bits("ashr")


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
