"""Threads for compiled CPU code that releases the GIL: as many as torch uses, and none left over in a forked child."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

# Handing work to another thread takes some 20 us, as long as one thread needs for this many elements of a step.
_ELEMENTS_PER_THREAD = 2**17

# Parts begin at multiples of this, so that no two threads write to one cache line.
_ALIGNMENT = 1024

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def run_parts(work: Callable[[int, int], Any], elements: int) -> list[Any]:
    """Call `work(first, last)` on parts of range(elements), in torch's number of threads; this thread takes one part.

    Returns:
        What `work` returned, in the order of the parts.
    """
    count = max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD))
    if count == 1:
        return [work(0, elements)]
    size = -(-elements // (count * _ALIGNMENT)) * _ALIGNMENT
    parts = [(first, min(first + size, elements)) for first in range(0, elements, size)]
    pool = _threads(len(parts) - 1)
    futures = [pool.submit(work, *part) for part in parts[1:]]
    try:
        first_result = work(*parts[0])
    finally:  # nobody may read or free the tensors before all are done
        results = [future.result() for future in futures]
    return [first_result, *results]


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="schedule-free"), count
        return _pool


def _forget_pool() -> None:
    """Threads do not survive a fork, and the lock may have been held by one of them."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
