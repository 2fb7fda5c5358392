"""One C function in many threads: in torch's own, where its OpenMP can be called; none left over in a forked child."""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from hf_schedulefree.optim.kernels import machine_code


class Work(Protocol):
    """A compiled function `void work(intptr_t argument)`, as numba's `cfunc` makes it."""

    address: int


_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()
_forked = False

_HELPER, _CALLER = "helper", "caller"


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
    _run_with_helpers(_function(work.address), argument, count - 1)


def run_meanwhile(
    work: Work, argument: int, count: int, prepare: Callable[[], None], is_left: Callable[[], bool]
) -> None:
    """As `run`, but the calling thread first prepares what there is to do; the others begin as soon as there is any.

    Args:
        work: what waits for more to do until there will be no more of it, or it has waited too long.
        argument: for `work`.
        count: of threads.
        prepare: if it ends by an exception, this is raised when what was prepared is done.
        is_left: whether a thread has waited too long.
    """
    region = _openmp_region() if count > 1 and not _forked else None
    if region is None:
        try:
            prepare()
        finally:
            run(work, argument, count)
        return
    begin, end = region
    address = work.address  # where it is a property, that may be interrupted
    function = _function(address)
    try:
        try:  # Python raises what interrupts it after a C function has returned: a region that has begun ends
            begin(address, argument, count)
            prepare()
            if not is_left():
                function(argument)
        finally:
            end()
    finally:
        run(work, argument, count if is_left() else 1)  # what is left to do, if anything


def _run_with_helpers(function: Callable[[int], None], argument: int, count: int) -> None:
    claims: dict[int, str] = {}  # who takes the part of each helper; the first one to say so does
    finished = [threading.Event() for _ in range(count)]

    def help_(index: int) -> None:
        if claims.setdefault(index, _HELPER) == _HELPER:
            try:
                function(argument)
            finally:
                finished[index].set()

    try:
        with contextlib.suppress(RuntimeError):  # no thread to be had: those that there are do all of it
            for index in range(count):
                _threads(count).submit(help_, index)
        function(argument)
    finally:
        _leave_and_wait(claims, finished)


def _leave_and_wait(claims: dict[int, str], finished: Sequence[threading.Event]) -> None:
    """Leave nothing to helpers that have not begun, and wait for the others, also while Ctrl-C is pressed again.

    Nobody may read or free the tensors before all are done.
    """
    interrupt, done = None, False
    while not done:
        try:
            for index, event in enumerate(finished):
                if claims.setdefault(index, _CALLER) == _HELPER:
                    event.wait()
            done = True
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


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


@functools.cache
def _openmp_region() -> tuple[Callable[[int, int, int], None], Callable[[], None]] | None:
    """How the calling thread begins and ends what others take part in; None where they would not see in order what it
    writes.

    It is what compilers called before there was GOMP_parallel (GNU's OpenMP has it still, and LLVM's).
    """
    if _openmp() is None or not machine_code.AVAILABLE:
        return None
    try:
        library = ctypes.CDLL(None)
        begin, end = library.GOMP_parallel_start, library.GOMP_parallel_end
    except AttributeError:
        return None
    begin.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_uint]
    end.argtypes = []
    begin.restype = end.restype = None
    return begin, end


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
