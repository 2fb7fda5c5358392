"""Files of weights and of states, written tensor by tensor and piece by piece. They are never whole in memory."""

import contextlib
import errno
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_schedulefree.checkpoint.deferred import made
from hf_schedulefree.checkpoint.files import TORCH_DTYPES

# A piece that is computed stays in the processor's cache until it is written: 0.5 MiB of float32.
_PIECE_ELEMENTS = 2**17

# What file systems answer that cannot reserve space beforehand.
_CANNOT_RESERVE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENODEV}


class Pieces(Protocol):
    """The content of a tensor that is computed while it is written."""

    device: torch.device

    def read(self, first: int, into: Tensor) -> None:
        """Put the elements from `first` on (in row-major order) into `into`: flat, on CPU, in the tensor's dtype."""


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    content: Callable[[str], Tensor | Pieces],
    metadata: Mapping[str, str] | None = None,
    *,
    sync: bool = False,
) -> None:
    """Write a safetensors file as `safetensors` itself does, with the tensors in its order.

    Like there, the file appears under its name when it is whole; after an error nothing of it is left.

    Args:
        path: the file.
        entries: name -> dtype (one of `TORCH_DTYPES`) and shape.
        content: gives each tensor, or its pieces, when its turn has come.
        metadata: of the header; all strings.
        sync: wait until the file is on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    text, order, size = _header(entries, metadata)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            start = len(text).to_bytes(8, "little") + text
            _reserve(file.fileno(), len(start) + size)
            _write(file, start)
            buffers: dict[tuple[torch.dtype, bool], Tensor] = {}
            for name in order:
                dtype, shape = entries[name]
                _write_tensor(file, content(name), dtype, math.prod(shape), buffers)
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_pickled(path: str | os.PathLike[str], content: Any) -> None:
    """Write what `torch.save(content, path)` would; of tensors in it that are deferred, one at a time is made.

    Args:
        path: the file.
        content: dictionaries and lists with tensors and plain values.
    """
    with FakeTensorMode():
        planned = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), content)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(planned, path)
        places = tree_leaves(torch.load(path, weights_only=True))
    checksums: dict[int, int] = {}
    with open(path, "r+b", buffering=0) as file:
        for tensor, place in zip(tree_leaves(content), places, strict=True):
            if isinstance(tensor, Tensor) and tensor.numel():
                written, offset = _bytes_of(made(tensor)), place.untyped_storage()._checkpoint_offset
                file.seek(offset)
                _write(file, written)
                checksums[offset] = zlib.crc32(written)
        _set_checksums(file, checksums)
        os.fsync(file.fileno())


def _set_checksums(file: Any, checksums: Mapping[int, int]) -> None:
    """Give the entries of a zip archive, by where their content starts, other checksums, wherever it names them."""

    def at(position: int, layout: str) -> tuple[int, ...]:
        file.seek(position)
        return struct.unpack(layout, file.read(struct.calcsize(layout)))

    with zipfile.ZipFile(file) as archive:
        entries, position = archive.infolist(), archive.start_dir
    for entry in entries:  # in the order of the directory
        name, extra, comment = at(position + 28, "<HHH")
        header = entry.header_offset
        start = header + 30 + sum(at(header + 26, "<HH"))
        if start in checksums:
            places = [position + 16, header + 14]
            if at(start + entry.file_size, "<4s") == (b"PK\x07\x08",):
                places.append(start + entry.file_size + 4)
            for place in places:
                file.seek(place)
                _write(file, struct.pack("<I", checksums[start]))
        position += 46 + name + extra + comment


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _header(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str], int]:
    """The text of the header, the names in the order of the file, and the bytes of all tensors."""
    ranks = {dtype: rank for rank, dtype in enumerate(TORCH_DTYPES.values())}
    dtype_names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    # Wide dtypes first: each tensor then starts at a multiple of its width.
    order = sorted(entries, key=lambda name: (ranks[entries[name][0]], name.encode()))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        dtype, shape = entries[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), order, offset


def _reserve(descriptor: int, size: int) -> None:
    """Take the space on the disk, where that can be done: a full one is noticed at once, and writes go faster."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise


def _write_tensor(
    file: Any,
    content: Tensor | Pieces,
    dtype: torch.dtype,
    elements: int,
    buffers: dict[tuple[torch.dtype, bool], Tensor],
) -> None:
    if isinstance(content, Tensor) and content.device.type == "cpu":
        _write(file, _bytes_of(content))
        return
    pinned = content.device.type == "cuda"  # a device copies faster into memory that stays in its place
    if (dtype, pinned) not in buffers:
        buffers[dtype, pinned] = torch.empty(_PIECE_ELEMENTS, dtype=dtype, pin_memory=pinned)
    buffer = buffers[dtype, pinned]
    flat = content.detach().reshape(-1) if isinstance(content, Tensor) else None
    for first in range(0, elements, _PIECE_ELEMENTS):
        piece = buffer[: min(_PIECE_ELEMENTS, elements - first)]
        if flat is None:
            content.read(first, piece)
        else:
            piece.copy_(flat[first : first + piece.numel()])
        _write(file, memoryview(piece.view(torch.uint8).numpy()))


def _write(file: Any, content: bytes | memoryview) -> None:
    """Write all of it: one call of the system writes 2 GiB at most, and less on a disk that is filling up."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
