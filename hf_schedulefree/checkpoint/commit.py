"""Putting a checkpoint on disk: written aside, synced, recorded, then moved into place as a whole.

A save goes through these states, and only the last is visible to anyone who looks for checkpoints:

    run/_saving/checkpoint-20/...                        files are being written
    run/_saving/checkpoint-20/schedule_free.json         all files are on disk, and so is the record of them
    run/checkpoint-20/                                   one rename (or exchange with the folder that it replaces)

The name `_saving` matches no pattern by which transformers looks for checkpoints, and uploads leave it out.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from hf_schedulefree.checkpoint.files import TRAINER_STATE, read_json
from hf_schedulefree.checkpoint.record import (
    RECORD_NAME,
    CheckpointError,
    CheckpointFacts,
    Record,
    file_checksum,
    files_in,
    read_record,
)

STAGING = "_saving"
_REPLACED = "replaced-"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def step_in_name(folder: str | os.PathLike[str]) -> int | None:
    """The step in a folder's name, `checkpoint-20`; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else None


def staged_folder(run_dir: str | os.PathLike[str], name: str) -> Path:
    """An empty place in which to write `run_dir/name`; what an interrupted save left there is removed."""
    staging = Path(run_dir) / STAGING
    discard_staging(run_dir)
    (staging / name).mkdir(parents=True)
    return staging / name


def discard_staging(run_dir: str | os.PathLike[str]) -> None:
    """Remove what an interrupted save left."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(Path(run_dir) / STAGING)


def finish_interrupted_move(run_dir: str | os.PathLike[str]) -> Path | None:
    """Move a checkpoint into place that was whole on disk, record and all, when its process was killed.

    Only for the process that owns `run_dir`, and only while no save is going on. Returns the checkpoint.
    """
    for staged in sorted((Path(run_dir) / STAGING).glob("checkpoint-*")):
        try:
            recorded = read_record(staged)
        except CheckpointError:
            continue
        destination = Path(run_dir) / staged.name
        # With something in place already, what lies here may just as well be the folder that it replaced.
        if recorded is not None and not destination.exists():
            _move_into_place(staged, destination)
            return destination
    return None


def commit_checkpoint(
    folder: str | os.PathLike[str],
    facts: CheckpointFacts | None = None,
    *,
    destination: str | os.PathLike[str] | None = None,
) -> Record:
    """Make a written checkpoint count: sync its files, write their sizes and checksums into its record, move it.

    When this returns, the checkpoint survives a power loss. When it raises, whatever was at `destination` before is
    still there, whole.

    Args:
        folder: the checkpoint, every file of it written and closed.
        facts: what the writer knows about it. Without them, those of a former record are kept, and otherwise the step
            is taken from `trainer_state.json`.
        destination: where to move the folder, on the same file system; a folder there is replaced as a whole. Without
            it, the checkpoint stays where it is.

    Returns:
        The record that was written.

    Raises:
        OSError: a file could not be written, synced or renamed.
    """
    folder = Path(folder)
    if facts is None:
        facts = _facts_found_in(folder)
    paths = files_in(folder)
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    with ThreadPoolExecutor(max_workers=4) as pool:
        # Syncing waits for the disk and hashing for the processor: both at once, and first what takes the disk longest.
        synced = [pool.submit(sync, paths[name]) for name in sorted(sizes, key=sizes.get, reverse=True)]
        files = {name: (sizes[name], file_checksum(path)) for name, path in paths.items()}
        for result in synced:
            result.result()
    for directory in {path.parent for path in paths.values()} - {folder}:
        for parent in (directory, *directory.parents):
            if parent == folder:
                break
            sync(parent)
    record = Record(**{name: getattr(facts, name) for name in CheckpointFacts.__dataclass_fields__}, files=files)
    _write_durably(folder / RECORD_NAME, record.to_json())
    if destination is not None:
        _move_into_place(folder, Path(destination))
    return record


def _facts_found_in(folder: Path) -> CheckpointFacts:
    with contextlib.suppress(CheckpointError):
        record = read_record(folder)
        if record is not None:
            return record.facts()
    facts = CheckpointFacts(step=step_in_name(folder))
    with contextlib.suppress(CheckpointError):
        step = read_json(folder / TRAINER_STATE).get("global_step")
        if isinstance(step, int):
            facts = replace(facts, step=step)
    return facts


def sync(path: str | os.PathLike[str]) -> None:
    """fsync of a file or a folder."""
    if os.name == "nt" and os.path.isdir(path):  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def _move_into_place(staged: Path, destination: Path) -> None:
    if not os.path.lexists(destination):
        os.rename(staged, destination)
        replaced = None
    elif _exchange(staged, destination):
        replaced = staged
    else:
        # Here, for an instant, neither is in place; `finish_interrupted_move` completes what a kill interrupts.
        replaced = staged.with_name(_REPLACED + staged.name)
        os.rename(destination, replaced)
        try:
            os.rename(staged, destination)
        except OSError:
            os.rename(replaced, destination)
            raise
    sync(destination.parent)
    if replaced is not None:
        if replaced.is_symlink() or not replaced.is_dir():
            replaced.unlink()
        else:
            shutil.rmtree(replaced, ignore_errors=True)
    if staged.parent.name == STAGING:
        with contextlib.suppress(OSError):
            staged.parent.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one atomic step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


def checkpoint_folders(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest step first."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = [entry for entry in Path(run_dir).iterdir() if step_in_name(entry) is not None and entry.is_dir()]
        return sorted(found, key=step_in_name, reverse=True)
    return []


def remove_old_checkpoints(
    run_dir: str | os.PathLike[str], limit: int | None, keep: list[str | os.PathLike[str] | None]
) -> Iterator[Path]:
    """Remove checkpoints until `limit` of them are left: those without a record first, then the oldest step.

    The newest checkpoint that has a record is never removed, and neither are those in `keep`. A folder is first moved
    aside, so that a removal that is interrupted leaves no half of a checkpoint behind.

    Yields:
        Each folder, once it is removed.
    """
    if limit is None or limit <= 0:
        return
    folders = checkpoint_folders(run_dir)
    recorded = [folder for folder in folders if (folder / RECORD_NAME).is_file()]
    kept = {os.path.realpath(folder) for folder in [*keep, *recorded[:1]] if folder is not None}
    removable = [folder for folder in folders if os.path.realpath(folder) not in kept]
    removable.sort(key=lambda folder: (folder in recorded, step_in_name(folder)))
    for folder in removable[: max(0, len(folders) - limit)]:
        aside = Path(run_dir) / STAGING / f"removed-{folder.name}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            aside.parent.rmdir()
        yield folder
