"""Files of `torch.save`, written tensor by tensor: they are never whole in memory."""

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_schedulefree.checkpoint.deferred import made
from hf_schedulefree.checkpoint.writing import bytes_of, write_at


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
                flat = made(tensor).detach().cpu().contiguous().reshape(-1)
                written, offset = bytes_of(flat), place.untyped_storage()._checkpoint_offset
                write_at(file.fileno(), written, offset)
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
                write_at(file.fileno(), struct.pack("<I", checksums[start]), place)
        position += 46 + name + extra + comment
