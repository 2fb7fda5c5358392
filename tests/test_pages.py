"""Large tensors of the state ask for huge pages; memory that is used again may be taken by the system meanwhile."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, pages

HAVE_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() and Path("/proc/self/smaps").exists()


def flags_at(address):
    """The kernel's flags of the memory at an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(hex(address))


@pytest.mark.skipif(not HAVE_HUGE_PAGES, reason="needs a Linux with transparent huge pages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_state_asks_for_huge_pages(dtype):
    p = nn.Parameter(torch.ones(2**23 + 5, dtype=dtype))
    optimizer = AdamWScheduleFree([p], park="copy")
    optimizer.train()
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.eval()
    assert len(optimizer.state[p]) == (3 if dtype == torch.float32 else 4)
    for tensor in optimizer.state[p].values():
        assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)


@pytest.mark.parametrize("size", [3, 3000])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_values_and_strides_are_those_of_torch(size, platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    pages._advise.cache_clear()
    tensor = nn.Parameter(torch.randn(size, size + 1).t())
    copy, zeros = pages.copy_of(tensor), pages.zeros_like(tensor, torch.int16)
    pages._advise.cache_clear()
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride() and not copy.requires_grad
    assert copy.data_ptr() != tensor.data_ptr()
    expected = torch.zeros_like(tensor, dtype=torch.int16, memory_format=torch.preserve_format)
    assert torch.equal(zeros, expected) and zeros.stride() == expected.stride() and not zeros.requires_grad


def lazily_freed():
    """KiB of this process that the system may take."""
    return sum(map(int, re.findall(r"^LazyFree: +(\d+) kB$", Path("/proc/self/smaps").read_text(), re.MULTILINE)))


@pytest.mark.skipif(not HAVE_HUGE_PAGES, reason="needs a Linux with transparent huge pages")
def test_reserved_memory_is_used_again_and_the_system_may_take_it_meanwhile():
    reserve, before = pages.Reserve(), lazily_freed()
    size = 3 * 2**21 + 70_000
    first, second = reserve.take(size), reserve.take(size)
    assert first.dtype == torch.int8 and len(first) == len(second) == size
    assert len({first.data_ptr(), second.data_ptr()}) == 2
    assert "hg" in flags_at(first.data_ptr()) and "hg" not in flags_at(first.data_ptr() + size - 1)
    for memory in (first, second):
        memory.fill_(1)
    assert lazily_freed() == before
    reserve.put_back([first])
    assert lazily_freed() - before >= 3 * 2**11
    assert (second == 1).all()
    assert reserve.take(size + 1).data_ptr() != first.data_ptr()  # another size
    assert reserve.take(size).data_ptr() == first.data_ptr()
    assert reserve.take(size).data_ptr() not in (first.data_ptr(), second.data_ptr())  # it was there once
    first.fill_(2)
    assert lazily_freed() == before and (first == 2).all()


@pytest.mark.parametrize("size", [0, 1, 4095, 2**21 + 1])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_reserve_has_memory_of_any_size_on_any_system(size, platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    pages._advise.cache_clear()
    reserve = pages.Reserve()
    for _ in range(2):
        memory = reserve.take(size).fill_(5)
        assert len(memory) == size and (memory == 5).all()
        reserve.put_back([memory])
    pages._advise.cache_clear()
    assert len(reserve._kept) == (platform == sys.platform == "linux")


def test_only_what_was_put_back_last_is_kept():
    reserve = pages.Reserve()
    reserve.put_back([reserve.take(5000), reserve.take(6000)])
    reserve.put_back([reserve.take(5000)])
    assert len(reserve._kept) <= 1
