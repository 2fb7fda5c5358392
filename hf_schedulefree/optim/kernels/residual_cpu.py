"""y kept as one byte per parameter beside x and z, and brought back bit for bit, on CPU.

While the parameter holds x, y = y_from_x(x, z) but for rounding: both formulas of `averaging` round, so that the
computed y misses the true one by a unit in the last place here and there. This difference in units, an int8, is what is
kept; the few elements that differ by more (where y is tiny beside x) are kept whole.

Memory is worked on in blocks, each read once, that fit a core's first cache. Each has a checksum of its x, by which
other weights that were loaded meanwhile are noticed: the block is then left as it was.
"""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from hf_schedulefree.optim import kernels
from hf_schedulefree.optim.kernels import jobs
from hf_schedulefree.optim.kernels.workers import Work, dtype_name, worker
from hf_schedulefree.optim.pages import Take, new_bytes

DTYPES = (torch.float32, torch.float64)

BLOCK = 2**11  # small enough for a core's first cache: p, z and the residual

# Plain numbers that the kernels are given: the weights of the two interpolations.
_NUMBERS = 2

# Most blocks that a thread takes at a time.
_BLOCKS_AT_ONCE = 64

# Residuals are in pieces, which the C library takes from memory that was freed (by gradients, say). A larger one would
# come from the system, page by page.
_BLOCKS_PER_PIECE = 2**12

# Residuals of so many bytes are not expected to be in a cache when they are needed.
_BEYOND_CACHES = 2**22

_dtype = attrgetter("dtype")

# As of `Tensor.get_device`.
_CPU = -1

# Columns of the table, one row per block. KEPT_AT: where in the list of whole elements its own begin, or HOLDS_Y.
PARAMETER, Z, RESIDUAL, ELEMENTS, KEPT_AT, SUM_1, SUM_2 = range(7)
COLUMNS = 7
HOLDS_Y = -1


class ParkedResidual:
    """The way back to y for parameters that hold x, or are about to: made before they are touched.

    Each block knows whether it holds x or y. So `park` and `restore` may be called again after an interruption, in any
    order.

    Args:
        params: contiguous, on CPU, of one of `DTYPES`, in any shapes; they hold y.
        z: the same of z.
        beta: the interpolation factor between z (0) and x (1).
        take: gives so many bytes of memory (int8); all that it gave are in `memory`.
    """

    def __init__(self, params: Sequence[Tensor], z: Sequence[Tensor], beta: float, take: Take = new_bytes):
        self._dtype = params[0].dtype
        self._sizes = [p.numel() for p in params]
        self._blocks = jobs.Blocks(self._sizes, BLOCK)
        self._offsets = self._blocks.first * self._dtype.itemsize
        self._kept = self._none_kept = np.empty(0, np.dtype(f"i{self._dtype.itemsize}"))
        self._table = np.empty((len(self._blocks.elements), COLUMNS), np.int64)
        self._table[:, ELEMENTS] = self._blocks.elements
        self._job = self._job_over(self._table)
        # Where the table says that parameters and z are; of each piece of memory its length, and where blocks begin.
        self._places: dict[int, list[int]] = {PARAMETER: [], Z: []}
        self._pieces: list[tuple[int, np.ndarray]] = []
        for start in range(0, len(self._table), _BLOCKS_PER_PIECE):
            lines = -(-self._blocks.elements[start : start + _BLOCKS_PER_PIECE] // jobs.CACHE_LINE)
            ends = np.cumsum(lines)  # each block has whole lines to itself
            self._pieces.append(((int(ends[-1]) + 1) * jobs.CACHE_LINE, (ends - lines) * jobs.CACHE_LINE))
        self._past_caches = sum(size for size, _ in self._pieces) >= _BEYOND_CACHES
        self._begin(params, z, beta, take)

    def _begin(self, params: Sequence[Tensor], z: Sequence[Tensor], beta: float, take: Take) -> None:
        self.params = list(params)
        self._z = list(z)  # so that they live on; their memory may be exchanged, and is looked up at each run
        self._point_at(self._table, self._places, PARAMETER, list(map(Tensor.data_ptr, self.params)))
        self._point_at(self._table, self._places, Z, list(map(Tensor.data_ptr, self._z)))
        self._weights = (1 - 1 / beta, 1 - beta)
        self._kept = self._none_kept
        self._table[:, KEPT_AT] = HOLDS_Y
        self.memory: list[Tensor] = []
        first = 0
        for size, offsets in self._pieces:
            self.memory.append(take(size))
            begin = -(-self.memory[-1].data_ptr() // jobs.CACHE_LINE) * jobs.CACHE_LINE
            self._table[first : first + len(offsets), RESIDUAL] = begin + offsets
            first += len(offsets)

    def begin_again(self, params: Sequence[Tensor], z: Sequence[Tensor], beta: float, take: Take) -> bool:
        """Be a new one, after `end`, if these lie where the last ones did, and are of their kind; else return False.

        It takes a third of the time.
        """
        alike = kernels.are_plain(params) and kernels.are_plain(z)
        if not (alike and self._are_in_place(params, PARAMETER) and self._are_in_place(z, Z)):
            return False
        self._begin(params, z, beta, take)
        return True

    def end(self) -> list[Tensor]:
        """Hold on to nothing any more; returns the memory that it took."""
        memory = self.memory
        self.params, self._z, self.memory, self._kept = [], [], [], self._none_kept
        return memory

    @property
    def count(self) -> int:
        """How many parameters it is, or was, for."""
        return len(self._sizes)

    @property
    def nbytes(self) -> int:
        """What it takes to come back."""
        return sum(piece.nbytes for piece in (*self.memory, self._kept, self._table))

    def fits(self) -> bool:
        """Whether parameters and z are still what the table is for: of that kind and size.

        They may be in another place: the table then has that one.
        """
        for tensors, column in ((self.params, PARAMETER), (self._z, Z)):
            if self._are_in_place(tensors, column):
                continue
            if not kernels.are_alike(tensors, self._dtype, _CPU) or list(map(Tensor.numel, tensors)) != self._sizes:
                return False
            self._point_at(self._table, self._places, column, list(map(Tensor.data_ptr, tensors)))
        return True

    def _are_in_place(self, tensors: Sequence[Tensor], column: int) -> bool:
        """Whether these are where the table says, of that size: the usual case, which is found out in half the time."""
        return (
            list(map(Tensor.data_ptr, tensors)) == self._places[column]
            and list(map(Tensor.numel, tensors)) == self._sizes
            and list(map(_dtype, tensors)).count(self._dtype) == len(tensors)
            and all(map(Tensor.is_contiguous, tensors))
        )

    def park(self) -> None:
        """Show x in the parameters, which have been seen to fit."""
        # Room for all elements that are y, of which only what is written to becomes memory.
        used, to_park = len(self._kept), self._table[:, KEPT_AT] == HOLDS_Y
        room = np.empty(used + int(self._table[to_park, ELEMENTS].sum()), self._kept.dtype)
        room[:used] = self._kept
        self._kept = room
        used = self._run(self._work("park", self._past_caches), counted=used)
        torch.autograd.graph.increment_version(self.params)
        self._kept = room[:used].copy()

    def restore(self) -> bool:
        """Bring back y, if the parameters still hold x: else nothing changes, and it returns False."""
        if not self.fits():
            return False
        others = self._run(self._work("restore", False))
        torch.autograd.graph.increment_version(self.params)
        if others == 0:
            return True
        self.park()
        return False

    def intact(self) -> bool:
        """Whether the parameters still hold x."""
        return self.fits() and self._run(self._work("restore", True)) == 0

    def y(self) -> list[Tensor]:
        """Copies of y in the shapes of the parameters, which go on holding x; of other weights where they do not."""
        copies = [p.detach().clone() for p in self.params]
        if self.fits():
            self._run(self._work("restore", False), tensors=copies)
        return copies

    def _job_over(self, table: np.ndarray) -> jobs.Job:
        return jobs.Job(table, sum(self._sizes), _NUMBERS, at_once=_BLOCKS_AT_ONCE)

    def _work(self, name: str, *options: bool) -> Work:
        return worker(f"residual.{name}", dtype_name(self.params[0]), *options)

    def _run(self, work: Work, *, counted: int = 0, tensors: Sequence[Tensor] | None = None) -> int:
        """Over the parameters, which have been seen to fit; or over others instead.

        Those have a table of their own, so that this one stays as it is.
        """
        job = self._job
        if tensors is not None:
            table = self._table.copy()
            self._point_at(table, {}, PARAMETER, list(map(Tensor.data_ptr, tensors)))
            job = self._job_over(table)
        return job.run(work, self._weights, counted=counted, extra=self._kept.ctypes.data)

    def _point_at(self, table: np.ndarray, places: dict[int, list[int]], column: int, addresses: list[int]) -> None:
        """Put the addresses of tensors into a table, unless they are there: `places` says so."""
        if addresses != places.get(column):
            places[column] = []  # if this is interrupted, it is not known what is there
            table[:, column] = self._blocks.of(addresses) + self._offsets
            places[column] = addresses
