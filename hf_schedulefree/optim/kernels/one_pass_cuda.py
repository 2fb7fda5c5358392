"""The step on GPU in one pass over memory: one launch for all tensors that are stored alike. Needs triton.

A step waits for nothing and uploads ten numbers, and the table of addresses if it has changed. Both are read from
device memory: nothing is compiled again when they change, and a captured launch reads what they hold at its replay.
"""

import contextlib
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.kernels import one_pass_triton
from hf_schedulefree.optim.kernels.numbers import DenseRow, ReadyStep, StepNumbers
from hf_schedulefree.optim.precision import wrapped

logger = logging.getLogger(__name__)

_KINDS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# The kernel may read 16 bytes at a time where all addresses are multiples of 16.
_ALIGNMENT = 16

# A program takes one chunk of a tensor, and of that one block at a time; a block has 8 elements for each thread.
CHUNK, BLOCK, WARPS = 8192, 1024, 4


def runs() -> bool:
    """Whether Triton compiles for the current GPU and launches there: tried out, on one element."""
    if not (torch.cuda.is_available() and isinstance(one_pass_triton.step, JITFunction)):
        return False  # under TRITON_INTERPRET=1 the kernel would read a GPU's addresses from the CPU
    try:
        y, z, gradient = torch.zeros(3, 1, device="cuda").unbind()
        prepare([DenseRow(y, None, z, None)])([[gradient.data_ptr()]], StepNumbers(0.0, 0.9, 0.0, 0.0, Direction()))
    except Exception as error:  # no C compiler, an old GPU, a driver that does not go with triton: it may be anything
        logger.info("The one-pass kernel does not run on this GPU, torch's operations do. Triton says: %s", error)
        return False
    return True


def prepare(rows: Sequence[DenseRow]) -> ReadyStep:
    """A `numbers.Kernel` for parameters of one device and floating-point dtype."""
    y, y_low, z, v, _, key = rows[0]
    options = {
        "P": _KINDS[y.dtype],
        "Z": _KINDS[z.dtype],
        "V": _KINDS[z.dtype if v is None else v.dtype],
        "REAL": tl.float64 if y.dtype == torch.float64 else tl.float32,
        "LOW_BITS": y_low is not None,
        "STOCHASTIC": key is not None,
        "HAS_V": v is not None,
        "PART": CHUNK,
        "STEP": BLOCK,
        "num_warps": WARPS,
        "enable_fp_fusion": False,  # every operation is rounded, as on CPU
    }

    return OnePass(rows, options)


class OnePass:
    """A `numbers.ReadyStep`, for all tensors or none of them.

    Args:
        rows: the parameters.
        options: of the kernel.
    """

    overlaps = False

    def __init__(self, rows: Sequence[DenseRow], options: dict[str, Any]):
        self._params, self._columns, self._options = [row.y for row in rows], _columns(rows), options
        self._latest: StepNumbers | None = None

    def __call__(self, batches: Iterable[Sequence[int]], numbers: StepNumbers) -> None:
        params, chunks = self._params, int(self._columns[0, -1])
        grads, device = list(itertools.chain.from_iterable(batches)), params[0].device
        if len(grads) < len(params):
            return
        if chunks:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                table = _on_device(_table(self._columns, grads), device)
                one_pass_triton.step[(chunks,)](table, _numbers(numbers, device), **self._options)
            torch.autograd.graph.increment_version(params)  # autograd must notice, as for torch's operations
        self._latest = numbers

    def stepped(self, numbers: StepNumbers) -> int:
        return len(self._params) if numbers is self._latest else 0


def _numbers(numbers: StepNumbers, device: torch.device) -> Tensor:
    """What `one_pass_triton.NUMBERS` lists, on the device."""
    lr, _, c, weight_decay, direction, k = numbers
    beta2 = direction.beta2 or 0.0
    values = [lr, numbers.direction_factor, c, weight_decay, beta2, 1 - beta2, 1 / direction.correction, direction.eps]
    values += [direction.normalizes, k]
    if numbers.are_plain:
        return _upload(np.array(values, np.float64), device)
    tensors = (
        v if isinstance(v, Tensor) else torch.full((), float(v), dtype=torch.float64, device=device) for v in values
    )
    return torch.stack([tensor.to(torch.float64) for tensor in tensors])  # bool and float64 ones


# The tables


class _Table(NamedTuple):
    tensor: Tensor
    staged: Tensor | None  # the host memory that a captured upload reads again at every replay


_MOST_TABLES = 64
_tables: OrderedDict[tuple, _Table] = OrderedDict()
_captured: list[_Table] = []
_spare: dict[int, Tensor] = {}
_lock = threading.Lock()


def _columns(rows: Sequence[DenseRow]) -> np.ndarray:
    """What `one_pass_triton.COLUMNS` lists, but for the gradients: a row each, of which the first counts chunks."""
    columns = np.zeros((len(one_pass_triton.COLUMNS), len(rows)), np.int64)
    chunks, elements, _, y, y_low, z, v, _, first, seed, parameter = columns
    elements[:] = [row.y.numel() for row in rows]
    y[:] = [row.y.data_ptr() for row in rows]
    z[:] = [row.z.data_ptr() for row in rows]
    # A tensor that there is not is never touched; any address will do.
    y_low[:] = y if rows[0].y_low is None else [row.y_low.data_ptr() for row in rows]
    v[:] = z if rows[0].v is None else [row.v.data_ptr() for row in rows]
    first[:] = [row.first for row in rows]
    if rows[0].key is not None:
        seed[:] = [wrapped(row.key.seed) for row in rows]
        parameter[:] = [row.key.parameter for row in rows]
    chunks[:] = np.cumsum(-(-elements // CHUNK))
    return columns


def _table(columns: np.ndarray, grads: Sequence[int]) -> np.ndarray:
    """The table as the kernel reads it: the number of rows, and the columns with the addresses of the gradients."""
    columns[7] = grads
    columns[2] = (columns[3:8] % _ALIGNMENT == 0).all(0)
    return np.concatenate(([columns.shape[1]], columns.ravel()))


def _on_device(table: np.ndarray, device: torch.device) -> Tensor:
    """A table, uploaded unless the same one is there already."""
    if device.type != "cuda":
        return torch.from_numpy(table)
    capturing = torch.cuda.is_current_stream_capturing()
    # Other streams do not wait for an upload.
    key = (device, torch.cuda.current_stream(device).cuda_stream, table.tobytes())
    with _lock:
        found = _tables.get(key)
        if found is None:
            found = _upload_table(table, device, capturing)
        if capturing:  # the graph reads this memory whenever it is replayed
            _captured.append(found)
        else:
            _tables[key] = found
            _tables.move_to_end(key)
            if len(_tables) > _MOST_TABLES:
                _tables.popitem(last=False)
    return found.tensor


def _upload_table(table: np.ndarray, device: torch.device, capturing: bool) -> _Table:
    staged = _spare.pop(table.size, None) if capturing else None
    staged = torch.from_numpy(table).pin_memory() if staged is None else staged.copy_(torch.from_numpy(table))
    if not capturing and table.size not in _spare:  # pinned memory must not be asked for during a capture
        _spare[table.size] = torch.empty_like(staged, pin_memory=True)
    return _Table(staged.to(device, non_blocking=True), staged if capturing else None)


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, without waiting: torch keeps the pinned memory until it has been read."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
