"""Files of weights, written piece by piece. They are never whole in memory."""

import bisect
import collections
import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_schedulefree.checkpoint.files import TORCH_DTYPES

# Bytes of a file that are computed and written at once: they stay in the processor's cache in between. A file is cut at
# multiples of it, as the system takes much longer over a part of a page than over a whole one.
_PIECE_BYTES = 2**20

# Bytes of a file that are worth a second thread.
_WORTH_A_THREAD = 2**22

# The thread in which a file that was replaced is closed.
CLOSING = "schedule-free-close"

# What file systems answer that cannot reserve space beforehand.
_CANNOT_RESERVE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENODEV}


class Pieces(Protocol):
    """The content of a tensor that is computed while it is written.

    Attributes:
        device: where it is computed.
        by_caller_alone: whether no other threads work for the one that reads; two may then read at once.
    """

    device: torch.device
    by_caller_alone: bool

    def read(self, first: int, into: Tensor) -> None:
        """Put the elements from `first` on (in row-major order) into `into`: flat, on CPU, in the tensor's dtype."""


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    content: Mapping[str, Tensor | Pieces] | Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    sync: bool = False,
) -> None:
    """Write a safetensors file as `safetensors` itself does, with the tensors in its order.

    Like there, the file appears under its name when it is whole; after an error nothing of it is left.

    Args:
        path: the file.
        entries: name -> dtype (one of `TORCH_DTYPES`) and shape.
        content: the tensors, or their pieces, which may be read by two threads at once; or a function that makes each
            tensor when its turn has come.
        metadata: of the header; all strings.
        sync: wait until the file is on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _former_file.wait()  # its place on the disk may be needed
    try:
        with open(temporary, "wb", buffering=0) as file:
            written = _FileContent(entries, content, metadata)
            _reserve(file.fileno(), written.size)
            if isinstance(content, Mapping) and written.size >= _WORTH_A_THREAD and _can_help(content.values()):
                _write_with_help(file.fileno(), written)
            else:
                _write(file.fileno(), written, written.pieces())
            if sync:
                os.fsync(file.fileno())
        _former_file.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class _FormerFile:
    """The file that was replaced last. The system takes a third of the time over it that it took to write one.

    It does so when nobody has it open any more: that is left to a thread.
    """

    def __init__(self) -> None:
        self._closing: threading.Thread | None = None

    def replace(self, source: Path, path: Path) -> None:
        """As `os.replace`, which would wait for it."""
        former = _opened_if_large(path)
        try:
            os.replace(source, path)
        finally:
            if former is not None:
                self._close(former)

    def wait(self) -> None:
        """Until it has left the disk."""
        if self._closing is not None:
            self._closing.join()

    def _close(self, descriptor: int) -> None:
        closing = threading.Thread(target=os.close, args=(descriptor,), name=CLOSING)
        try:
            closing.start()
        except RuntimeError:  # the system has no thread to give
            os.close(descriptor)
        else:
            self._closing = closing


_former_file = _FormerFile()


def _opened_if_large(path: Path) -> int | None:
    if os.name != "posix":  # other systems do not replace a file that is open
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    if os.fstat(descriptor).st_size >= _WORTH_A_THREAD:
        return descriptor
    os.close(descriptor)
    return None


class _FileContent:
    """The bytes of a safetensors file, by their place in it."""

    def __init__(
        self,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        content: Mapping[str, Tensor | Pieces] | Callable[[str], Tensor],
        metadata: Mapping[str, str] | None,
    ):
        header, ends = _header(entries, metadata)
        self._header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        # The header is the first of the contents.
        self._names = ["", *ends]
        self._dtypes = [torch.uint8, *(entries[name][0] for name in ends)]
        self._starts = [0, len(header), *ends.values()]
        self._content = content.__getitem__ if isinstance(content, Mapping) else content
        self._last: tuple[int, Tensor | Pieces] | None = None

    @property
    def size(self) -> int:
        return self._starts[-1]

    def pieces(self) -> Iterator[int]:
        """Where each piece starts. Two threads may share it: each piece goes to one of them."""
        return iter(range(0, self.size, _PIECE_BYTES))

    def read(self, start: int, buffer: Tensor, bytes_in_buffer: memoryview) -> memoryview:
        """The piece that starts at a place: as it lies in memory, or else put together in `buffer`."""
        end = min(start + _PIECE_BYTES, self.size)
        index = bisect.bisect_right(self._starts, start) - 1
        if end <= self._starts[index + 1]:
            in_memory = self._in_memory(index, start, end)
            if in_memory is not None:
                return in_memory
        place = start
        while place < end:
            until = min(end, self._starts[index + 1])
            if place < until:  # it has elements
                in_memory = self._in_memory(index, place, until)
                if in_memory is not None:  # not by torch, which would have its threads help with it
                    bytes_in_buffer[place - start : until - start] = in_memory
                else:
                    self._put(index, place, buffer[place - start : until - start])
            place, index = until, index + 1
        return bytes_in_buffer[: end - start]

    def _in_memory(self, index: int, start: int, end: int) -> memoryview | None:
        content = self._at(index)
        if not isinstance(content, Tensor) or not content.is_cpu:
            return None
        first, width = self._starts[index], self._dtypes[index].itemsize
        return bytes_of(content[(start - first) // width : (end - first) // width])

    def _put(self, index: int, start: int, into: Tensor) -> None:
        dtype, content = self._dtypes[index], self._at(index)
        first, elements = (start - self._starts[index]) // dtype.itemsize, into.view(dtype)
        if isinstance(content, Tensor):
            elements.copy_(content[first : first + elements.numel()])
        else:
            content.read(first, elements)

    def _at(self, index: int) -> Tensor | Pieces:
        if index == 0:
            return self._header
        last = self._last
        if last is None or last[0] != index:
            self._last = last = None  # not in memory while the next one is made
            content = self._content(self._names[index])
            last = index, content.detach().reshape(-1) if isinstance(content, Tensor) else content
            self._last = last
        return last[1]


def _can_help(contents: Iterable[Tensor | Pieces]) -> bool:
    """Whether a second thread may read these, and has a processor to run on."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (
        processors > 1
        and hasattr(os, "pwrite")
        and all(
            content.device.type == "cpu" and (isinstance(content, Tensor) or content.by_caller_alone)
            for content in contents
        )
    )


def _write_with_help(descriptor: int, content: _FileContent) -> None:
    """Write a file in two threads: one computes a piece while the system copies that of the other one."""
    pieces = content.pieces()
    begun, finished, failures = threading.Event(), threading.Event(), []

    def write() -> None:
        begun.set()
        try:
            _write(descriptor, content, pieces)
        except BaseException as error:
            failures.append(error)
        finally:
            finished.set()

    helper = threading.Thread(target=write, name="schedule-free-save")
    try:
        with contextlib.suppress(RuntimeError):  # the system has no thread to give
            helper.start()
        _write(descriptor, content, pieces)
    finally:
        _leave(pieces)
        if begun.is_set():  # if it begins later, it finds nothing to do
            _wait_for(finished)
        if helper.is_alive():
            helper.join()
    if failures:
        raise failures[0]


def _leave(pieces: Iterator[int]) -> None:
    """Leave no piece for the other thread."""
    collections.deque(pieces, maxlen=0)


def _wait_for(event: threading.Event) -> None:
    """Wait also when Ctrl-C is pressed again: the file that is written to is about to be closed."""
    interrupt: KeyboardInterrupt | None = None
    while not event.is_set():  # not `Thread.join`: an interrupted one takes the thread for finished (CPython 3.11)
        try:
            event.wait()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _write(descriptor: int, content: _FileContent, pieces: Iterator[int]) -> None:
    pinned = torch.cuda.is_initialized()  # a device copies faster into memory that stays in its place
    try:
        buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        bytes_in_buffer = bytes_of(buffer)
        for start in pieces:
            write_at(descriptor, content.read(start, buffer, bytes_in_buffer), start)
    finally:
        _leave(pieces)  # after an error


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of it: one call of the system writes 2 GiB at most, and less on a disk that is filling up."""
    rest = memoryview(content)
    while rest:
        if hasattr(os, "pwrite"):
            written = os.pwrite(descriptor, rest, offset)
        else:
            os.lseek(descriptor, offset, os.SEEK_SET)
            written = os.write(descriptor, rest)
        rest, offset = rest[written:], offset + written


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a tensor: on CPU, of one dimension, contiguous."""
    return memoryview(flat.view(torch.uint8).numpy())


def _header(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """How the file starts; the names in its order, with where each tensor ends."""
    ranks = {dtype: rank for rank, dtype in enumerate(TORCH_DTYPES.values())}
    dtype_names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    # Wide dtypes first: each tensor then starts at a multiple of its width.
    order = sorted(entries, key=lambda name: (ranks[entries[name][0]], name.encode()))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    ends: dict[str, int] = {}
    offset = 0
    for name in order:
        dtype, shape = entries[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = ends[name] = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + end for name, end in ends.items()}


def _reserve(descriptor: int, size: int) -> None:
    """Take the space on the disk, where that can be done: a full one is noticed at once, and writes go faster."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
