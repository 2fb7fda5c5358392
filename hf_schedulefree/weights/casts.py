"""`casts_undone`: a model that somebody casts to another dtype comes back with the bits that it had."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def casts_undone(model: nn.Module) -> Iterator[None]:
    """After the `with` block every parameter and buffer that was cast has its dtype and bits again, where it lies now.

    Nothing is copied: what `model.to(dtype=...)` replaces is kept for the length of the block.
    """
    parameters = [(p, p.data) for p in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        for p, data in parameters:
            if p.dtype != data.dtype:
                p.data = data.to(p.device)
        for module, name, buffer in buffers:
            now = getattr(module, name)
            if now is not None and now.dtype != buffer.dtype:
                setattr(module, name, buffer.to(now.device))
