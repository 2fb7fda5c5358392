"""How threads divide the work of a compiled CPU kernel: tables of blocks, and jobs that go through them.

A kernel is a C function `worker(job)`, called once by each thread. It takes some rows after others of a table of
addresses, each a block of a tensor, until nothing is left: a thread that the machine gives less time takes fewer.
"""

import bisect
import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_schedulefree.optim.kernels import threads

# What a worker is told, as int64: the next row (shared by all threads), rows in all, how many are taken at once, the
# addresses of the table and of the plain numbers, what the workers count, what else they need, how many rows are ready,
# how many threads have left as no more of them came.
NEXT, ROWS, AT_ONCE, TABLE, NUMBERS, COUNTED, EXTRA, READY, LEFT = range(9)
SLOTS = 9

# Bytes that processors move at a time.
CACHE_LINE = 64

# Elements that pay for waking one more thread.
_ELEMENTS_PER_THREAD = 2**14

# Elements of a block, unless a kernel has reasons for another number: long enough for what the memory does ahead of the
# reader, and short enough that all threads end at about the same time.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 2**13, 2**18
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
        self.owner = np.repeat(np.arange(len(in_all)), counts)
        self.ends = [0, *np.cumsum(counts).tolist()]  # the blocks of so many tensors
        index = np.arange(len(self.owner)) - self.of(self.ends[:-1])
        self.first = index * largest
        self.elements = np.minimum(self.of(in_all) - self.first, largest)

    def of(self, values: Sequence[int] | np.ndarray) -> np.ndarray:
        """A whole number per tensor -> per block."""
        return np.asarray(values, np.int64)[self.owner]

    def addresses(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Where the blocks of contiguous tensors of one dtype begin."""
        return self.of(list(map(Tensor.data_ptr, tensors))) + self.first * tensors[0].element_size()

    def job(self, columns: Iterable[Sequence[Tensor]], numbers: int, *others: np.ndarray, **options: Any) -> "Job":
        """A job whose table has the addresses of some lists of tensors, the elements of the blocks, and other columns.

        Options are those of `Job`.
        """
        table = np.stack([*map(self.addresses, columns), self.elements, *others], axis=1)
        return Job(table, int(self.elements.sum()), numbers, **options)


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
        # Arrays of ctypes: numpy takes a microsecond to write a few numbers.
        self._numbers = (ctypes.c_double * numbers)()
        self._slots = (ctypes.c_int64 * SLOTS)()
        self._places = table.ctypes.data, ctypes.addressof(self._numbers)
        self._argument = ctypes.addressof(self._slots)

    @property
    def threads(self) -> int:
        """How many work on it."""
        return max(1, min(torch.get_num_threads(), self._elements // _ELEMENTS_PER_THREAD))

    def run(
        self,
        work: "threads.Work",
        numbers: Sequence[float],
        *,
        counted: int = 0,
        extra: int = 0,
        ready: Iterable[int] | None = None,
    ) -> int:
        """Do it.

        Args:
            work: from `worker`.
            numbers: what is the same for all rows.
            counted: where to begin to count.
            extra: an address for the workers.
            ready: how many rows are written, again and again as they become more; other threads work on these
                meanwhile, and the rest is left alone. None: all are.

        Returns:
            What the workers have counted.
        """
        count, rows = self.threads, len(self.table)
        self._numbers[:] = numbers
        at_once = rows if count == 1 else min(self._at_once, max(1, rows // (count * _BLOCKS_PER_THREAD)))
        self._slots[:] = (0, rows, at_once, *self._places, counted, extra, rows if ready is None else 0, 0)
        if ready is None:
            threads.run(work, self._argument, count)
        else:
            try:
                threads.run_meanwhile(work, self._argument, count, lambda: self._write(ready), self._is_left)
            except BaseException:
                threads.run(work, self._argument, 1)  # nothing is left to do, unless that was interrupted itself
                raise
        return self._slots[COUNTED]

    def _write(self, ready: Iterable[int]) -> None:
        slots = self._slots
        try:
            for rows in ready:
                slots[READY] = rows  # after what was written to the table, as x86 keeps the order
        finally:
            slots[ROWS] = slots[READY]

    def _is_left(self) -> bool:
        return self._slots[LEFT] > 0

    @property
    def done(self) -> int:
        """How many rows the last run has worked on, also if it was interrupted."""
        return min(self._slots[NEXT], self._slots[READY])  # those that were taken are done, or it had not returned

    def forget(self) -> None:
        """Have no row `done` until the next run."""
        self._slots[READY] = 0


class Column:
    """The addresses of gradients in the table of a job: others at each step, but mostly in the same places."""

    def __init__(self, job: Job, index: int, blocks: Blocks, element_size: int):
        self._job, self._index, self._blocks = job, index, blocks
        self._offsets = blocks.first * element_size
        self._shown: dict[int, Sequence[int]] = {}  # by the first tensor

    def show(self, first: int, addresses: Sequence[int]) -> int:
        """Put those of some contiguous tensors of one dtype there.

        Args:
            first: the tensors before these.
            addresses: of the tensors.

        Returns:
            The rows of all tensors until the last of these.
        """
        begin, end = self._blocks.ends[first], self._blocks.ends[first + len(addresses)]
        if addresses != self._shown.get(first):
            self._shown.pop(first, None)  # if this is interrupted, it is not known what is there
            own = self._blocks.owner[begin:end] - first
            self._job.table[begin:end, self._index] = np.array(addresses, np.int64)[own] + self._offsets[begin:end]
            self._shown[first] = addresses
        return end

    def tensors(self, rows: int) -> int:
        """How many tensors have all their rows among the first so many."""
        return bisect.bisect_right(self._blocks.ends, rows) - 1


def run_row(work: "threads.Work", row: tuple[int, ...], number: float) -> None:
    """Do what a `Job` of one row and one plain number would, in the calling thread, and in 2 us besides.

    Python lets no other thread work meanwhile: so that matters where two threads have many small ones to do.
    """
    job = (ctypes.c_int64 * (SLOTS + 1 + len(row)))()
    place = ctypes.addressof(job)
    job[ROWS] = job[READY] = job[AT_ONCE] = 1
    job[NUMBERS], job[TABLE] = place + 8 * SLOTS, place + 8 * (SLOTS + 1)
    ctypes.c_double.from_address(job[NUMBERS]).value = number
    job[SLOTS + 1 :] = row
    threads.run(work, place, 1)
