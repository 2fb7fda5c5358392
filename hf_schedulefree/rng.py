"""Keep the random number generators as they are while somebody reads the model."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Put the generators of Python, NumPy, torch and every initialized accelerator back to where they were on entry.

    An evaluation draws from them (a DataLoader takes its base seed from torch's; sampling text takes more), and with
    dropout or shuffling in the model that would change the training that follows.
    """
    # NumPy's global generator is the one that data sets and collators use.
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    device = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    module = torch.get_device_module(device) if device is not None else None
    on_device = None
    if module is not None and module.is_available() and getattr(module, "is_initialized", lambda: True)():
        on_device = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else module.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if on_device is not None:
            getattr(module, "set_rng_state_all", module.set_rng_state)(on_device)
