"""y kept as one byte per parameter beside x and z, and brought back bit for bit. CPU; needs numba.

While the parameter holds x, y = y_from_x(x, z) but for rounding: both formulas of `averaging` round, so that the
computed y misses the true one by a unit in the last place here and there. This difference in units, an int8, is what is
kept; the few elements that differ by more (where y is tiny beside x) are kept whole.

Memory is worked on in blocks, each read once, that fit a core's first cache. Each has a checksum of its x, by which
other weights that were loaded meanwhile are noticed: the block is then left as it was.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from hf_schedulefree.optim.kernels import compiled
from hf_schedulefree.optim.kernels.compiled import count, extra, pointer, rows_and_numbers, take_rows
from hf_schedulefree.optim.kernels.switch_cpu import extrapolated
from hf_schedulefree.optim.kernels.threads import Work

DTYPES = (torch.float32, torch.float64)

_BLOCK = 2**11  # small enough for a core's first cache: p, z and the residual

# Most blocks that a thread takes at a time.
_BLOCKS_AT_ONCE = 64

# Residuals are allocated in pieces, which the C library takes from memory that was freed (by gradients, say). A larger
# one would come from the system, page by page.
_BLOCKS_PER_PIECE = 2**12

# Columns of the table, one row per block. _KEPT_AT: where in the list of whole elements its own begin, or _HOLDS_Y.
_PARAMETER, _Z, _RESIDUAL, _ELEMENTS, _KEPT_AT, _SUM_1, _SUM_2 = range(7)
_COLUMNS = 7
_HOLDS_Y = -1

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


@functools.cache
def _park(dtype: torch.dtype) -> Work:
    """y in the parameter becomes x, in all blocks that hold y."""
    real, size = compiled.NUMBA_TYPES[dtype][1], dtype.itemsize
    whole, unsigned = _INTEGERS[size]
    stride, factor, half = unsigned(_STRIDE), unsigned(_FACTOR), unsigned(4 * size - 1)

    @compiled.worker
    def park(job):
        table, numbers = rows_and_numbers(job, _COLUMNS, 2)
        to_x, to_y = real(numbers[0]), real(numbers[1])
        former = np.empty(_BLOCK, whole)
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            for row in range(first, last):
                if table[row, _KEPT_AT] != _HOLDS_Y:
                    continue
                elements = table[row, _ELEMENTS]
                p = carray(pointer(table[row, _PARAMETER]), elements, whole)
                z = carray(pointer(table[row, _Z]), elements, real)
                residual = carray(pointer(table[row, _RESIDUAL]), elements, np.int8)
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
                table[row, _SUM_1], table[row, _SUM_2] = np.int64(sum_1), np.int64(sum_2)
                table[row, _KEPT_AT] = kept_at

    return park


@functools.cache
def _restore(dtype: torch.dtype, compares_only: bool) -> Work:
    """x in the parameter becomes y, in all blocks that hold x; counts the blocks that hold something else."""
    real, size = compiled.NUMBA_TYPES[dtype][1], dtype.itemsize
    whole, unsigned = _INTEGERS[size]
    stride, factor, half = unsigned(_STRIDE), unsigned(_FACTOR), unsigned(4 * size - 1)

    @compiled.worker
    def restore(job):
        table, numbers = rows_and_numbers(job, _COLUMNS, 2)
        to_y = real(numbers[1])
        former = np.empty(_BLOCK, whole)
        while True:
            first, last = take_rows(job)
            if first == last:
                return
            for row in range(first, last):
                kept_at, elements = table[row, _KEPT_AT], table[row, _ELEMENTS]
                if kept_at == _HOLDS_Y:
                    continue
                p = carray(pointer(table[row, _PARAMETER]), elements, whole)
                z = carray(pointer(table[row, _Z]), elements, real)
                residual = carray(pointer(table[row, _RESIDUAL]), elements, np.int8)
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
                if np.int64(sum_1) != table[row, _SUM_1] or np.int64(sum_2) != table[row, _SUM_2]:
                    count(job, 1)
                    if not compares_only:
                        p[:] = former[:elements]
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
                table[row, _KEPT_AT] = _HOLDS_Y

    return restore


class ParkedResidual:
    """The way back to y for parameters that hold x, or are about to: made before they are touched.

    Each block knows whether it holds x or y. So `park` and `restore` may be called again after an interruption, in any
    order.

    Args:
        params: contiguous, on CPU, of one of `DTYPES`, in any shapes; they hold y.
        z: the same of z.
        beta: the interpolation factor between z (0) and x (1).
    """

    def __init__(self, params: Sequence[Tensor], z: Sequence[Tensor], beta: float):
        self.params = list(params)
        self._z = list(z)  # so that it is not freed
        self._weights = (1 - 1 / beta, 1 - beta)
        self._dtype = self.params[0].dtype
        self._sizes = [p.numel() for p in self.params]
        self._blocks = compiled.Blocks(self._sizes, _BLOCK)
        self._kept = np.empty(0, np.dtype(f"i{self._dtype.itemsize}"))
        self._table = np.empty((len(self._blocks.elements), _COLUMNS), np.int64)
        self._table[:, _Z] = self._blocks.addresses(self._z)
        self._table[:, _ELEMENTS] = self._blocks.elements
        self._table[:, _KEPT_AT] = _HOLDS_Y
        self._residuals = []
        for start in range(0, len(self._table), _BLOCKS_PER_PIECE):
            sizes = self._blocks.elements[start : start + _BLOCKS_PER_PIECE]
            ends = np.cumsum(sizes)
            self._residuals.append(np.empty(ends[-1], np.int8))
            self._table[start : start + len(sizes), _RESIDUAL] = self._residuals[-1].ctypes.data + ends - sizes
        self._job = compiled.Job(self._table, sum(self._sizes), len(self._weights), at_once=_BLOCKS_AT_ONCE)

    @property
    def nbytes(self) -> int:
        """What it takes to come back."""
        return sum(piece.nbytes for piece in (*self._residuals, self._kept, self._table))

    def park(self) -> None:
        """Show x in the parameters."""
        # Room for all elements that are y, of which only what is written to becomes memory.
        used, to_park = len(self._kept), self._table[:, _KEPT_AT] == _HOLDS_Y
        room = np.empty(used + int(self._table[to_park, _ELEMENTS].sum()), self._kept.dtype)
        room[:used] = self._kept
        self._kept = room
        used = self._run(_park(self._dtype), self.params, counted=used)
        torch.autograd.graph.increment_version(self.params)
        self._kept = room[:used].copy()

    def restore(self) -> bool:
        """Bring back y, if the parameters still hold x: else nothing changes, and it returns False."""
        if not self._as_parked():
            return False
        others = self._run(_restore(self._dtype, compares_only=False), self.params)
        torch.autograd.graph.increment_version(self.params)
        if others == 0:
            return True
        self.park()
        return False

    def intact(self) -> bool:
        """Whether the parameters still hold x."""
        return self._as_parked() and self._run(_restore(self._dtype, compares_only=True), self.params) == 0

    def y(self) -> list[Tensor]:
        """Copies of y in the shapes of the parameters, which go on holding x; of other weights where they do not."""
        copies = [p.detach().clone() for p in self.params]
        if not self._as_parked():
            return copies
        table = self._table.copy()
        self._run(_restore(self._dtype, compares_only=False), copies)
        self._table[:] = table
        return copies

    def _as_parked(self) -> bool:
        sizes = [p.numel() for p in self.params if p.is_contiguous() and p.dtype == self._dtype and p.is_cpu]
        return sizes == self._sizes

    def _run(self, work: Work, tensors: Sequence[Tensor], counted: int = 0) -> int:
        self._table[:, _PARAMETER] = self._blocks.addresses(tensors)
        return self._job.run(work, self._weights, counted=counted, extra=self._kept.ctypes.data)
