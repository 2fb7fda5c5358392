"""How threads divide the work of a compiled CPU kernel: tables of blocks, and jobs that go through them.

A kernel is a C function `worker(job)`, called once by each thread. It takes some rows after others of a table of
addresses, each a block of a tensor, until nothing is left: a thread that the machine gives less time takes fewer.
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_schedulefree.optim.kernels import threads

# What a worker is told, as int64: the next row (shared by all threads), rows in all, how many are taken at once, the
# addresses of the table and of the plain numbers, what the workers count, what else they need.
NEXT, ROWS, AT_ONCE, TABLE, NUMBERS, COUNTED, EXTRA = range(7)
SLOTS = 7

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
        return self._slots[COUNTED]


class Column:
    """The addresses of gradients in the table of a job: others at each step, but mostly in the same places."""

    def __init__(self, job: Job, index: int, blocks: Blocks, element_size: int):
        self._job, self._index, self._blocks = job, index, blocks
        self._offsets = blocks.first * element_size
        self._shown: Sequence[int] = ()

    def show(self, addresses: Sequence[int]) -> None:
        """Put those of contiguous tensors of one dtype there."""
        if addresses != self._shown:
            self._shown = ()  # if this is interrupted, it is not known what is there
            self._job.table[:, self._index] = self._blocks.of(addresses) + self._offsets
            self._shown = addresses


def run_row(work: "threads.Work", row: tuple[int, ...], number: float) -> None:
    """Do what a `Job` of one row and one plain number would, in the calling thread, and in 2 us besides.

    Python lets no other thread work meanwhile: so that matters where two threads have many small ones to do.
    """
    job = (ctypes.c_int64 * (SLOTS + 1 + len(row)))()
    place = ctypes.addressof(job)
    job[ROWS] = job[AT_ONCE] = 1
    job[NUMBERS], job[TABLE] = place + 8 * SLOTS, place + 8 * (SLOTS + 1)
    ctypes.c_double.from_address(job[NUMBERS]).value = number
    job[SLOTS + 1 :] = row
    threads.run(work, place, 1)
