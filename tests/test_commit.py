"""What a commit does to the disk, and in which order."""

import os
from pathlib import Path

import pytest

from hf_schedulefree.checkpoint import commit, staged_folder
from hf_schedulefree.checkpoint.record import RECORD_NAME, CheckpointFacts, file_checksum

FILES = {"model.safetensors": 3_000_000, "optimizer.pt": 1, "empty": 0, "part/0/shard": 700_000, "part/list": 12}


@pytest.fixture
def staged(tmp_path):
    folder = staged_folder(tmp_path, "checkpoint-4")
    for name, size in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    return folder


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, str]]:
    """What is done to the disk from here on: (function, path), each once it has returned."""
    calls: list[tuple[str, str]] = []

    def watched(name):
        original = getattr(os, name)

        def call(what, *rest):
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
            result = original(what, *rest)
            calls.append((name, path))
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        watched(name)
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="file descriptors have no names here")
def test_every_file_is_on_disk_before_the_record_and_the_record_before_the_move(staged, done, tmp_path):
    record = commit.commit_checkpoint(staged, CheckpointFacts(step=4), destination=tmp_path / "checkpoint-4")
    written = done.index(("replace", str(staged / f"{RECORD_NAME}.tmp")))
    moved = done.index(("rename", str(staged)))
    before = {path for name, path in done[:written] if name == "fsync"}
    folders = {staged / "part", staged / "part" / "0"}
    assert before == {str(staged / f"{RECORD_NAME}.tmp"), *(str(staged / name) for name in FILES), *map(str, folders)}
    assert ("fsync", str(staged)) in done[written:moved]  # the names of its files, the record's among them
    assert ("fsync", str(tmp_path)) in done[moved:]
    assert record.files == {
        name: (size, file_checksum(tmp_path / "checkpoint-4" / name)) for name, size in FILES.items()
    }


@pytest.mark.parametrize("fails", FILES)
def test_a_file_that_cannot_be_synced_leaves_no_record_and_nothing_in_place(staged, tmp_path, monkeypatch, fails):
    def sync(path):
        if os.fspath(path) == str(staged / fails):
            raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(commit, "sync", sync)
    with pytest.raises(OSError, match="Input/output error"):
        commit.commit_checkpoint(staged, CheckpointFacts(step=4), destination=tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-4").exists() and not (staged / RECORD_NAME).exists()
