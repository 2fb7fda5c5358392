"""The writer of safetensors files: the bytes of safetensors' own, by one thread or two, and what happens at errors."""

import errno
import os
import signal
import threading
import time

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from hf_schedulefree.checkpoint import writing
from hf_schedulefree.checkpoint.files import TORCH_DTYPES
from hf_schedulefree.checkpoint.writing import write_safetensors


def test_the_file_is_that_of_safetensors(tmp_path):
    """Every dtype, names of all kinds, scalars, tensors without elements; metadata apart."""
    tensors = {
        f'{i % 3} ü\n"{name}': torch.ones(i + 1, 2).to(dtype) for i, (name, dtype) in enumerate(TORCH_DTYPES.items())
    }
    tensors |= {"": torch.tensor(2.0), "none": torch.zeros(0, 3), "a" * 300: torch.zeros(3, dtype=torch.bfloat16)}
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    for metadata in (None, {"one": "é"}):
        write_safetensors(tmp_path / "ours", entries, tensors.__getitem__, metadata)
        safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["ours", "theirs"]


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_reserves_no_space(code, tmp_path, monkeypatch):
    tensors = {"one": torch.arange(5.0), "two": torch.arange(300)}
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(tmp_path / "reserved", entries, tensors.__getitem__)

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write_safetensors(tmp_path / "not", entries, tensors.__getitem__)
    monkeypatch.delattr(os, "posix_fallocate")
    write_safetensors(tmp_path / "unknown", entries, tensors.__getitem__)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_short_writes(tmp_path, monkeypatch):
    """The system may write less than it is given."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: whole(file, content[:7], offset))
    with open(tmp_path / "file", "wb") as file:
        writing.write_at(file.fileno(), b"0123456789" * 10, 3)
    assert (tmp_path / "file").read_bytes() == bytes(3) + b"0123456789" * 10


# What is replaced

LARGE = {"large": torch.zeros(2**20 + 1)}


def write(path, tensors):
    write_safetensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors)


@pytest.fixture
def closed(monkeypatch):
    """By which threads files were closed whose names begin with "model", and when the next one was begun."""
    close, reserve, seen = os.close, writing._reserve, []

    def watched(descriptor):
        ours = "model" in os.readlink(f"/proc/self/fd/{descriptor}")
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        close(descriptor)
        if ours:
            seen.append(threading.current_thread().name)

    monkeypatch.setattr(os, "close", watched)
    monkeypatch.setattr(writing, "_reserve", lambda *args: seen.append("begun") or reserve(*args))
    return seen


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_a_large_file_that_is_replaced_is_closed_elsewhere_and_gone_before_the_next_one_is_begun(tmp_path, closed):
    for name in ("model-1", "model-1", "model-2"):
        write(tmp_path / name, LARGE)
    assert closed == ["begun", "begun", writing.CLOSING, "begun"]
    write(tmp_path / "model-3", {"small": torch.zeros(3)})
    write(tmp_path / "model-3", LARGE)
    assert closed[4:] == ["begun", "begun", "MainThread"]
    assert torch.equal(load_file(tmp_path / "model-3")["large"], LARGE["large"])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_no_file_stays_open(tmp_path, monkeypatch):
    write(tmp_path / "model", LARGE)
    (tmp_path / "folder" / "model").mkdir(parents=True)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        write(tmp_path / "folder" / "model", LARGE)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    write(tmp_path / "model", LARGE)
    assert os.listdir("/proc/self/fd") == before


# Two threads


class FromThreads:
    """The content of a tensor of bytes; notes which threads read it, and can go wrong in one of them."""

    device = torch.device("cpu")
    by_caller_alone = True

    def __init__(self, error=None, in_helper=True):
        self.threads, self.error, self.in_helper = [], error, in_helper
        self.both = threading.Barrier(2)

    def read(self, first, into):
        thread = threading.current_thread()
        if thread not in self.threads:
            self.threads.append(thread)
            self.both.wait(10)
        if self.error is not None and self.in_helper == (thread is not threading.main_thread()):
            raise self.error
        into.copy_(torch.arange(first, first + into.numel()) % 251)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(writing, "_PIECE_BYTES", 64)
    monkeypatch.setattr(writing, "_WORTH_A_THREAD", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    running = threading.active_count()
    yield
    assert threading.active_count() == running


ENTRY = {"bytes": (torch.uint8, (10_001,))}


def test_two_threads_write_a_file(tmp_path, two_threads):
    content = FromThreads()
    write_safetensors(tmp_path / "file", ENTRY, {"bytes": content})
    assert len(content.threads) == 2
    assert torch.equal(load_file(tmp_path / "file")["bytes"], (torch.arange(10_001) % 251).to(torch.uint8))


@pytest.mark.parametrize(
    "alone",
    ["made in turn", "one processor", "no thread to be had", "small", "on another device", "in torch's threads"],
)
def test_where_one_thread_writes_a_file(alone, tmp_path, two_threads, monkeypatch):
    content = FromThreads()
    given = {"bytes": content}
    if alone == "made in turn":
        given = given.__getitem__
    elif alone == "one processor":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    elif alone == "small":
        monkeypatch.setattr(writing, "_WORTH_A_THREAD", 2**20)
    elif alone == "on another device":
        content.device = torch.device("meta")
    elif alone == "in torch's threads":
        content.by_caller_alone = False
    started = []

    def refuse(thread):
        started.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    content.both = threading.Barrier(1)
    write_safetensors(tmp_path / "file", ENTRY, given)
    assert content.threads == [threading.main_thread()] and len(started) == (alone == "no thread to be had")
    assert torch.equal(load_file(tmp_path / "file")["bytes"], (torch.arange(10_001) % 251).to(torch.uint8))


@pytest.mark.parametrize("in_helper", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), MemoryError()])
def test_an_error_in_either_thread_ends_both_and_leaves_nothing(error, in_helper, tmp_path, two_threads):
    (tmp_path / "file").write_bytes(b"former")
    content = FromThreads(error, in_helper)
    with pytest.raises(type(error)) as raised:
        write_safetensors(tmp_path / "file", ENTRY, {"bytes": content})
    assert raised.value is error
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"former")]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends signals to threads")
def test_ctrl_c_twice_waits_for_the_other_thread(tmp_path, two_threads):
    """The second one comes while the first one waits for the helper, which is in the middle of a piece."""

    class Slow(FromThreads):
        def read(self, first, into):
            super().read(first, into)
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            while self.interrupts:
                time.sleep(0.05)
                signal.pthread_kill(threading.main_thread().ident, self.interrupts.pop())
            time.sleep(0.05)

    content = Slow()
    content.interrupts = [signal.SIGINT] * 2
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "file", ENTRY, {"bytes": content})
    assert not content.interrupts and not list(tmp_path.iterdir())
