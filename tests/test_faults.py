"""Faults: kills, write errors at every file operation of a save, and damaged records and headers."""

import builtins
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_runs import same, tiny_trainer, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from hf_schedulefree import saving
from hf_schedulefree.checkpoint import CheckpointError, latest_committed, read_header, read_record, verify_checkpoint
from hf_schedulefree.checkpoint.record import _content_checksum

CAMPAIGN = Path(__file__).parents[1] / "scripts/fault_campaign.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(run)
    trainer.train()
    return run, weights_of(trainer)


def campaign(kills):
    command = [sys.executable, str(CAMPAIGN), "--kills", str(kills)]
    environment = {**os.environ, "PYTHONPATH": str(CAMPAIGN.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_handful_of_kills():
    campaign(8)


@pytest.mark.slow
def test_many_kills():
    campaign(200)


# Write errors


class FailingOperations:
    """Counts the file operations below a folder, and makes the n-th one of them (and all later ones) fail."""

    def __init__(self, monkeypatch, folder, at=None, code=errno.ENOSPC, lasting=False):
        self.folder, self.at, self.code, self.lasting, self.count = str(folder), at, code, lasting, 0
        names = ("mkdir", "open", "fsync", "rename", "replace", "posix_fallocate", "pwrite")
        for owner, name in (*((os, name) for name in names), (builtins, "open")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))
        monkeypatch.setattr(torch, "save", self.wrap(torch.save, 1, RuntimeError))
        monkeypatch.setattr(
            safetensors.torch,
            "serialize_file",
            self.wrap(safetensors.torch.serialize_file, 1, safetensors.SafetensorError),
        )

    def wrap(self, operation, position=0, error=None):
        def wrapped(*args, **kwargs):
            target = args[position] if len(args) > position else ""
            writes = operation is not builtins_open or (len(args) > 1 and "r" not in args[1])
            concerned = isinstance(target, int) or (
                isinstance(target, str | os.PathLike) and self.folder in str(target)
            )
            if concerned and writes:
                self.count += 1
                if self.at is not None and (self.count == self.at or (self.lasting and self.count > self.at)):
                    text = os.strerror(self.code)
                    if error is RuntimeError:
                        raise RuntimeError(
                            f"[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0: {text}"
                        )
                    if error is not None:
                        raise error(f"Error while serializing: I/O error: {text} (os error {self.code})")
                    raise OSError(self.code, text, str(target))
            return operation(*args, **kwargs)

        return wrapped


builtins_open = builtins.open


def failing_run(folder, monkeypatch, at, code, lasting=False):
    """A run whose second save meets an error at its `at`-th operation; what was logged, and the trainer."""
    trainer = tiny_trainer(folder, save_total_limit=1, max_steps=3, save_steps=1)
    lines = []
    monkeypatch.setattr(saving.logger, "error", lambda text, *args: lines.append(text))
    faults = FaultsInSecondSave(folder, at, code, lasting, trainer)
    trainer.add_callback(faults)
    trainer.train()
    return trainer, lines, faults.count


class FaultsInSecondSave(TrainerCallback):
    """Around the save at step 2, by events: a method of the Trainer's that were replaced would change how it saves."""

    def __init__(self, folder, at, code, lasting, trainer):
        self.arguments, self.trainer = (folder, at, code, lasting), trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            assert self.trainer._can_stream()
            self.patch = pytest.MonkeyPatch()
            self.faults = FailingOperations(self.patch, *self.arguments)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.patch.undo()
            self.count = self.faults.count
            assert latest_whole(self.arguments[0]), f"operation {self.arguments[1]}: no whole checkpoint is left"


def latest_whole(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", builtins_open)
        return [path for path in Path(folder).glob("checkpoint-*") if is_whole(path)]


def is_whole(path):
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def test_at_every_operation_of_a_save_an_error_is_reported_and_training_goes_on(tmp_path, monkeypatch):
    undisturbed, _, operations = failing_run(tmp_path / "count", monkeypatch, None, 0)
    expected = weights_of(undisturbed)
    assert operations > 20
    generator = random.Random(0)
    codes = [errno.ENOSPC, errno.EIO, errno.EACCES]
    for at in range(1, operations + 1):
        folder = tmp_path / f"run-{at}"
        code = generator.choice(codes)
        trainer, lines, _ = failing_run(folder, monkeypatch, at, code, lasting=at % 2 == 0)
        assert same(weights_of(trainer), expected), at
        assert latest_committed(folder) == str(folder / "checkpoint-3"), at
        assert not (folder / "_saving").exists(), at
        if lines:
            assert "checkpoint-2 failed" in lines[0] and os.strerror(code) in lines[0], (at, lines)
            assert "the newest whole one is" in lines[0], (at, lines)
        shutil.rmtree(folder)


def test_a_full_disk(tmp_path):
    """The real thing: files may not grow beyond a limit, which torch and safetensors meet in their own code."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from checkpoint_runs import tiny_trainer
from transformers import TrainerCallback
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Limit(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        # Less than the weights; then more than these, but less than the optimizer.
        limit = {{2: 10_000, 3: 60_000}}.get(state.global_step, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
tiny_trainer(sys.argv[1], max_steps=4, save_steps=1, more={{"callbacks": [Limit()]}}).train()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(CAMPAIGN.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if "failed: " in line]
    assert len(errors) == 2, done.stderr[-3000:]
    assert "checkpoint-2 failed: " in errors[0] and "File too large" in errors[0]
    assert "checkpoint-3 failed: torch could not write a file to its end, as on a full disk" in errors[1]
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["checkpoint-1", "checkpoint-4"]
    assert latest_committed(tmp_path / "run") == str(tmp_path / "run/checkpoint-4")


# The record and the header


@pytest.fixture(scope="module")
def scratch(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch") / "checkpoint-6"
    shutil.copytree(finished[0] / "checkpoint-6", folder)
    return folder


fuzzing = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


@fuzzing
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_record_is_seen(scratch, position, bit):
    path = scratch / "schedule_free.json"
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[position % len(content)] ^= 1 << bit
    try:
        same_content = json.loads(bytes(damaged)) == json.loads(content)
    except ValueError:
        same_content = False
    path.write_bytes(bytes(damaged))
    try:
        if same_content:  # white space
            verify_checkpoint(scratch)
        else:
            with pytest.raises(CheckpointError, match=r"schedule_free\.json"):
                verify_checkpoint(scratch)
    finally:
        path.write_bytes(content)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@fuzzing
@given(
    field=st.sampled_from(
        ["format", "weights", "step", "files", "parameters", "beta", "world_size", "checksum", "new"]
    ),
    value=anything,
)
def test_a_record_with_any_other_content_is_refused(scratch, field, value):
    path = scratch / "schedule_free.json"
    content = path.read_text()
    fields = json.loads(content)
    if fields.get(field) == value and type(fields.get(field)) is type(value):
        return
    path.write_text(json.dumps({**fields, field: value}))
    try:
        with pytest.raises(CheckpointError, match=r"schedule_free\.json"):
            read_record(scratch)
    finally:
        path.write_text(content)


@fuzzing
@given(text=st.binary(max_size=200))
def test_a_record_of_garbage_is_refused(scratch, text):
    path = scratch / "schedule_free.json"
    content = path.read_bytes()
    path.write_bytes(text)
    try:
        with pytest.raises(CheckpointError, match=r"schedule_free\.json"):
            read_record(scratch)
    finally:
        path.write_bytes(content)


def _checksummed(fields):
    """A record with a right checksum over wrong content."""
    fields.pop("checksum", None)
    return json.dumps({**fields, "checksum": _content_checksum(fields)})


@fuzzing
@given(field=st.sampled_from(["files", "parameters", "step", "world_size", "beta"]), value=anything)
def test_even_with_a_right_checksum_wrong_types_are_refused(scratch, field, value):
    path = scratch / "schedule_free.json"
    content = path.read_text()
    fields = {**json.loads(content), field: value}
    path.write_text(_checksummed(fields))
    try:
        try:
            record = read_record(scratch)
        except CheckpointError:
            return
        assert json.loads(json.dumps(getattr(record, field))) == json.loads(json.dumps(value)) or value != value
    finally:
        path.write_text(content)


@fuzzing
@given(data=st.data())
def test_a_damaged_safetensors_header_never_raises_anything_else(finished, tmp_path_factory, data):
    content = (finished[0] / "checkpoint-6/model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    kind = data.draw(st.sampled_from(["flip", "cut", "garbage", "json"]))
    if kind == "flip":
        damaged = bytearray(content)
        damaged[data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        damaged = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "garbage":
        damaged = data.draw(st.binary(max_size=100))
    else:
        text = json.dumps(data.draw(anything)).encode()
        damaged = len(text).to_bytes(8, "little") + text
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    path.write_bytes(bytes(damaged))
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)
    else:
        assert isinstance(header, dict)
        assert kind != "cut"
