"""Large tensors of the state ask for huge pages; otherwise they are what torch's functions give."""

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
