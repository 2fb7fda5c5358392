"""New memory of an optimizer on CPU: what is large in huge pages, where Linux has them on request.

A step reads and writes all of its tensors once, and each 4 KiB page costs a translation of its address; with pages of
2 MiB a step is some 5 % faster, and new memory is there at once instead of page by page.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Of a page as it usually is, and of a huge one, which a tensor of that size may share with its neighbours.
_PAGE, _LARGE = 2**12, 2**21

# Advice to Linux: MADV_FREE (its content is not needed any more), MADV_HUGEPAGE.
_FREE, _HUGE_PAGES = 8, 14


def copy_of(tensor: Tensor) -> Tensor:
    """A copy without a gradient, in the strides of `tensor` where it is dense."""
    return _empty_like(tensor.detach()).copy_(tensor.detach())


def zeros_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `torch.zeros_like`, in the strides of `tensor` where it is dense."""
    return _empty_like(tensor.detach(), dtype).zero_()


def _empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    new = torch.empty_like(tensor, dtype=dtype, memory_format=torch.preserve_format)
    advise = _advise()
    if advise is not None and new.is_cpu and type(new) is Tensor and new.nbytes >= _LARGE:
        first = -(-new.data_ptr() // _PAGE) * _PAGE
        advise(first, new.data_ptr() + new.nbytes - first, _HUGE_PAGES)  # no more than advice: it may be refused
    return new


# Gives so many bytes, as an int8 tensor with any content.
Take = Callable[[int], Tensor]


def new_bytes(size: int) -> Tensor:
    """The C library's memory: what was freed before, if there is any of that size."""
    return torch.empty(size, dtype=torch.int8, device="cpu")  # whatever torch.set_default_device says


class Reserve:
    """Memory that is needed now and then, each time for a while, and is not what something else has just freed.

    To get pages from the system takes several times as long as to fill them. So what is put back is kept for the next
    time; but the system may take it for anything else meanwhile, as if it were free.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """A `Take`: out of what was put back, if that is among it."""
        for i, memory in enumerate(self._kept):
            if memory.numel() == size:
                return self._kept.pop(i)
        return _new_pages(size)

    def put_back(self, taken: Iterable[Tensor]) -> None:
        """Keep these for the next time, and nothing else; nobody may use them meanwhile."""
        advise = _advise()
        self._kept = []
        for memory in taken:
            if advise is not None and advise(memory.data_ptr(), memory.numel() // _PAGE * _PAGE, _FREE) == 0:
                self._kept.append(memory)


def _new_pages(size: int) -> Tensor:
    advise = _advise()
    if advise is None:
        return new_bytes(size)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = torch.frombuffer(mmap.mmap(-1, size + _LARGE, flags=private), dtype=torch.int8)
    memory = memory[-memory.data_ptr() % _LARGE :][:size]
    advise(memory.data_ptr(), size // _LARGE * _LARGE, _HUGE_PAGES)  # not for the rest, which would be made a whole one
    return memory


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The C library's `madvise`, on Linux."""
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
