"""What is put into the safetensors files that the hosts write: metadata, and other content for some of the tensors.

None of the functions that write weights (`save_pretrained` of transformers and of PEFT, the Trainer's own) can be asked
for either; all of them end in `safetensors.torch.save_file`, which calls two functions of its module: one
flattens the tensors, the other writes them. They are replaced here, once, and do as before outside of the blocks below.
Can go when `save_pretrained` takes metadata and lets its caller write the tensors.
"""

import bisect
import contextlib
import contextvars
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from hf_schedulefree.checkpoint.deferred import DeferredTensor, made
from hf_schedulefree.checkpoint.files import TORCH_DTYPES
from hf_schedulefree.checkpoint.writing import Pieces, write_safetensors

# What flattens the tensors, in newer and in older versions of safetensors.
_FLATTEN = ("_flatten_as_ptr", "_flatten")

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_DICTIONARIES = (dict, OrderedDict)

# A device and an address.
_Place = tuple[str, int]

_metadata: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar("weight_metadata", default=None)
_streamed: contextvars.ContextVar["StreamedFiles | None"] = contextvars.ContextVar("streamed_files", default=None)


class CannotStream(Exception):
    """Files would not hold what was asked for; what was written of them is removed."""


@contextlib.contextmanager
def describe_weight_files(metadata: Mapping[str, str]) -> Iterator[None]:
    """Add `metadata` to the header of every safetensors file that this thread writes in a `with` block.

    Of tensors that are deferred, one at a time is made and written.
    """
    _intercept()
    token = _metadata.set(metadata)
    try:
        yield
    finally:
        _metadata.reset(token)


@contextlib.contextmanager
def streamed_weight_files(
    replaced: Sequence[tuple[Tensor, Pieces]], known: Iterable[Tensor], required: Iterable[Tensor]
) -> Iterator[None]:
    """In the safetensors files that this thread writes in a `with` block, some tensors have other content.

    What is handed to the writer is recognized by its place in memory. A tensor in `replaced` is written by its pieces,
    and one in `known` as it is. Any other one was made by the host, perhaps from what is replaced, and ends the block.

    Args:
        replaced: tensors and what is written instead of them.
        known: tensors that may be written as they are.
        required: those among the replaced tensors that the files must hold.

    Raises:
        CannotStream: the files would not be those that a host writes of tensors with this content.
    """
    _intercept()
    files = StreamedFiles(replaced, known)
    token = _streamed.set(files)
    try:
        yield
        files.check(required)
    except BaseException as error:
        if files.refusal is None:
            raise
        files.remove()
        raise CannotStream(files.refusal) from error
    finally:
        _streamed.reset(token)


class StreamedFiles:
    """The files that are written in one block of `streamed_weight_files`."""

    def __init__(self, replaced: Sequence[tuple[Tensor, Pieces]], known: Iterable[Tensor]):
        self.replaced = _Ranges(replaced)
        if self.replaced.overlap:
            raise CannotStream("parameters share memory")
        self.known = _Ranges((tensor, None) for tensor in known)
        self._written: set[_Place] = set()
        self._paths: list[Path] = []
        self.refusal: str | None = None

    def write(self, tensors: Any, path: Any, metadata: Mapping[str, str] | None) -> None:
        """As `safetensors.torch.save_file`."""
        content = self._content(tensors)
        if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
            self.refuse("metadata that are no text")
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_safetensors(path, entries, content, metadata)
        self._paths.append(Path(path))
        self._written |= {_place(tensor) for tensor in tensors.values()}

    def refuse(self, reason: str) -> NoReturn:
        self.refusal = reason  # the host may keep the exception to itself
        raise CannotStream(reason)

    def _content(self, tensors: Any) -> dict[str, Tensor | Pieces]:
        """What to write for each tensor."""
        if type(tensors) not in _DICTIONARIES or "__metadata__" in tensors:
            self.refuse("not a dictionary of tensors")
        content: dict[str, Tensor | Pieces] = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or type(tensor) not in _PLAIN_TENSORS:
                self.refuse(f"{name} is no plain tensor")
            if tensor.layout != torch.strided or not tensor.is_contiguous():
                self.refuse(f"{name} is not contiguous")
            if tensor.is_neg():
                self.refuse(f"{name} does not lie in memory as it is")
            if tensor.dtype not in TORCH_DTYPES.values():
                self.refuse(f"{name} is of type {tensor.dtype}")
            owner = self.replaced.overlapping(tensor)
            if owner is None:
                content[name] = tensor
                if tensor.numel() and not self.known.holds(tensor):
                    self.refuse(f"{name} was computed for this save")
            else:
                content[name] = owner.pieces
                if (owner.first, owner.last) != _extent(tensor) or not owner.whole or owner.dtype != tensor.dtype:
                    self.refuse(f"{name} is a part of a parameter")
        if _Ranges((tensor, None) for tensor in tensors.values()).overlap:
            self.refuse("tensors share memory")
        return content

    def check(self, required: Iterable[Tensor]) -> None:
        """Raise unless nothing was refused and everything that is required was written here."""
        if self.refusal is not None:
            raise CannotStream(self.refusal)
        if any(_place(tensor) not in self._written for tensor in required if tensor.numel()):
            self.refuse("not all trained parameters were written as safetensors")

    def remove(self) -> None:
        """Remove what was written."""
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink()


@dataclass
class _Range:
    first: int
    last: int
    whole: bool
    dtype: torch.dtype
    pieces: Any


class _Ranges:
    """Which memory belongs to which of some tensors; those that have none are left out."""

    def __init__(self, tensors: Iterable[tuple[Tensor, Any]]):
        self._of_device: dict[str, list[_Range]] = {}
        for tensor, pieces in tensors:
            if type(tensor) in _PLAIN_TENSORS and tensor.layout == torch.strided and tensor.numel():
                own = _Range(*_extent(tensor), tensor.is_contiguous(), tensor.dtype, pieces)
                self._of_device.setdefault(str(tensor.device), []).append(own)
        self._furthest: dict[str, list[int]] = {}
        for device, ranges in self._of_device.items():
            ranges.sort(key=_first)
            self._furthest[device] = list(itertools.accumulate((r.last for r in ranges), max))

    @property
    def overlap(self) -> bool:
        """Whether any two of the tensors have memory in common."""
        return any(
            following.first < furthest
            for device, ranges in self._of_device.items()
            for following, furthest in zip(ranges[1:], self._furthest[device], strict=False)
        )

    def overlapping(self, tensor: Tensor) -> _Range | None:
        """One of the ranges that overlap a tensor's memory. For ranges that do not overlap each other."""
        if not tensor.numel():
            return None
        first, last = _extent(tensor)
        ranges = self._of_device.get(str(tensor.device), [])
        before = bisect.bisect_left(ranges, last, key=_first)
        return ranges[before - 1] if before and first < ranges[before - 1].last else None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of them, or a part of one."""
        first, last = _extent(tensor)
        before = bisect.bisect_right(self._of_device.get(str(tensor.device), []), first, key=_first)
        return before > 0 and last <= self._furthest[str(tensor.device)][before - 1]


def _first(own: _Range) -> int:
    return own.first


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's memory."""
    if tensor.is_contiguous():
        span = tensor.numel()
    else:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + span * tensor.element_size()


def _place(tensor: Tensor) -> _Place:
    return str(tensor.device), tensor.data_ptr()


class _Unflattened(dict):
    """Tensors on their way from the function that would flatten them to the one that writes."""


def _intercept() -> None:
    """Replace the functions of safetensors, unless they are replaced already."""
    module = safetensors.torch
    for names, replaced in ((_FLATTEN, _flattening), (("serialize_file",), _writing), (("serialize",), _serializing)):
        for name in names:
            original = getattr(module, name, None)
            if original is not None and getattr(original, "__module__", None) != __name__:
                replacement = functools.wraps(original)(replaced(original))
                replacement.__module__ = __name__
                setattr(module, name, replacement)


def _flattening(original: Callable[..., Any]) -> Callable[..., Any]:
    def flatten(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tensors) not in _DICTIONARIES:
            return original(tensors, *args, **kwargs)
        deferred = any(isinstance(tensor, DeferredTensor) for tensor in tensors.values())
        if _streamed.get() is None and not deferred:
            return original(tensors, *args, **kwargs)
        return _Unflattened(tensors)

    return flatten


def _writing(original: Callable[..., Any]) -> Callable[..., Any]:
    def serialize_file(
        tensors: Any, filename: Any, metadata: Mapping[str, str] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        added = _metadata.get()
        if added:
            metadata = {**(metadata or {}), **added}
        files = _streamed.get()
        if files is not None:
            return files.write(dict(tensors) if type(tensors) is _Unflattened else None, filename, metadata)
        if type(tensors) is _Unflattened:  # some are deferred: made one at a time
            entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            return write_safetensors(filename, entries, lambda name: made(tensors[name]), metadata)
        return original(tensors, filename, metadata, *args, **kwargs)

    return serialize_file


def _serializing(original: Callable[..., Any]) -> Callable[..., Any]:
    def serialize(*args: Any, **kwargs: Any) -> Any:
        files = _streamed.get()
        if files is not None:
            files.refuse("safetensors in memory")
        return original(*args, **kwargs)

    return serialize
