"""One C function in many threads: in torch's own, where its OpenMP can be called; none left over in a forked child."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol


class Work(Protocol):
    """A compiled function `void work(intptr_t argument)`, as numba's `cfunc` makes it."""

    address: int


_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()
_forked = False


def run(work: Work, argument: int, count: int) -> None:
    """Call `work(argument)` in `count` threads at once, the calling one among them; returns when all have returned.

    torch's threads go on spinning for some milliseconds after each of its operations. Others would have to share the
    cores with them, so these are used: GOMP_parallel is what compiled OpenMP code calls (GNU's and LLVM's have it).
    """
    if count == 1:
        return _function(work.address)(argument)
    parallel = None if _forked else _openmp()
    if parallel is not None:
        return parallel(work.address, argument, count, 0)
    function = _function(work.address)
    futures = [_threads(count - 1).submit(function, argument) for _ in range(count - 1)]
    try:
        function(argument)
    finally:  # nobody may read or free the tensors before all are done
        for future in futures:
            future.result()


@functools.cache
def _function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(address)


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel  # torch puts its OpenMP among the symbols that all can see
    except (OSError, TypeError, AttributeError):  # another one, or another system
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="schedule-free"), count
        return _pool


def _forget_threads() -> None:
    """Threads do not survive a fork, OpenMP's would be waited for in vain, and the lock may have been held by one."""
    global _pool, _pool_size, _lock, _forked
    _pool, _pool_size, _lock, _forked = None, 0, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
