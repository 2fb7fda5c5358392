"""Whether a checkpoint is whole, by its record; or, written by the stock Trainer, by what its own files tell."""

import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_schedulefree.checkpoint import files as names
from hf_schedulefree.checkpoint.commit import STAGING, checkpoint_folders, step_in_name
from hf_schedulefree.checkpoint.record import (
    RECORD_NAME,
    CheckpointError,
    Record,
    file_checksum,
    files_in,
    read_record,
)

logger = logging.getLogger(__name__)

# Files that the Trainer would load if they lay in a checkpoint: one that the record does not know is not of this save.
_LOADED_FILES = (
    names.MODEL_FILE,
    names.MODEL_INDEX,
    names.ADAPTER_FILE,
    names.PICKLED_MODEL_FILE,
    names.PICKLED_MODEL_INDEX,
    names.PICKLED_ADAPTER_FILE,
    names.FSDP_MODEL_FILE,
    names.OPTIMIZER_FILE,
    names.FSDP_OPTIMIZER_FILE,
    names.SCHEDULER_FILE,
    names.TRAINER_STATE,
    names.SCALER_FILE,
    names.EXTRA_STATE_FILE,
)


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """What is known about a checkpoint that was found whole."""

    folder: Path
    step: int | None
    optimizer: str | None
    record: Record | None
    has_optimizer_state: bool


def verify_checkpoint(folder: str | os.PathLike[str], *, checksums: bool = True) -> VerifiedCheckpoint:
    """Check that a checkpoint is whole.

    With a record: every file that it names is there, with its size and checksum, and no file was slipped in that would
    be loaded instead. Without one (the stock Trainer's): weights, optimizer, scheduler and trainer state are there, can
    be read, and agree on the step. No pickled code is executed.

    Args:
        folder: the checkpoint.
        checksums: False leaves the contents of recorded files unread and checks their sizes only.

    Raises:
        CheckpointError: it is not whole; the message names the file and says what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist" if not folder.exists() else f"{folder} is no folder")
    record = read_record(folder)
    if record is None:
        verified = _verify_stock(folder)
        _verify_pickles(folder)
        return verified
    _verify_recorded(folder, record, checksums)
    _verify_pickles(folder)
    return VerifiedCheckpoint(folder, record.step, record.optimizer, record, _has_optimizer_state(folder))


def _verify_recorded(folder: Path, record: Record, checksums: bool) -> None:
    step = step_in_name(folder)
    if step is not None and record.step not in (None, step):
        raise CheckpointError(f"{RECORD_NAME} is that of step {record.step}: it was moved here from another checkpoint")
    present = files_in(folder)
    for name, (size, checksum) in record.files.items():
        if name not in present:
            raise CheckpointError(f"{name} is missing")
        try:
            actual = present[name].stat().st_size
            if actual != size:
                kind = "is empty" if actual == 0 else "is truncated" if actual < size else "is altered"
                raise CheckpointError(f"{name} {kind}: it has {actual} bytes, the record says {size}")
            if checksums and file_checksum(present[name]) != checksum:
                raise CheckpointError(f"{name} is altered: its checksum is not the one in the record")
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from error
    for name in present:
        if name in _LOADED_FILES and name not in record.files:
            raise CheckpointError(f"{name} does not belong to this checkpoint: the record does not know it")


def _verify_stock(folder: Path) -> VerifiedCheckpoint:
    """The checks of a checkpoint without a record."""
    if (folder / names.SENTINEL).exists():
        raise CheckpointError(f"{names.SENTINEL} is there: the save was interrupted")
    state = names.read_json(folder / names.TRAINER_STATE)
    step = state.get("global_step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{names.TRAINER_STATE} is damaged: global_step is {step!r}")
    if step_in_name(folder) not in (None, step):
        raise CheckpointError(f"{names.TRAINER_STATE} is that of step {step}: it belongs to another checkpoint")
    _verify_weights(folder)
    optimizer_step = None
    if (folder / names.OPTIMIZER_FILE).exists():
        optimizer_step = _finished_steps(_first_group(load_pickled(folder / names.OPTIMIZER_FILE)))
    if (folder / names.SCHEDULER_FILE).exists():
        scheduler = load_pickled(folder / names.SCHEDULER_FILE)
        # Both advance with every step that was not skipped; a scheduler that follows a metric counts otherwise.
        scheduler_step = scheduler.get("last_epoch") if "lr_lambdas" in scheduler else None
        if optimizer_step is not None and scheduler_step not in (None, optimizer_step):
            raise CheckpointError(
                f"{names.OPTIMIZER_FILE} is that of step {optimizer_step}, {names.SCHEDULER_FILE} that of step "
                f"{scheduler_step}: they do not belong together"
            )
    elif optimizer_step is not None:
        raise CheckpointError(f"{names.SCHEDULER_FILE} is missing, and with it the learning rate to go on with")
    if optimizer_step is not None and optimizer_step > step:
        raise CheckpointError(
            f"{names.OPTIMIZER_FILE} is that of step {optimizer_step}: it belongs to another checkpoint"
        )
    for path in sorted(folder.glob("rng_state*.pth")) + [
        folder / n for n in (names.SCALER_FILE, names.EXTRA_STATE_FILE)
    ]:
        if path.exists():
            _check_archive(path)
    return VerifiedCheckpoint(folder, step, None, None, _has_optimizer_state(folder))


def _verify_pickles(folder: Path) -> None:
    """That sharded folders hold nothing but data: torch, which is to load them, unpickles whatever is there."""
    from hf_schedulefree.checkpoint import sharded  # it reads through this module

    if (folder / names.FSDP_MODEL_FOLDER / ".metadata").is_file():
        sharded.read_metadata(folder / names.FSDP_MODEL_FOLDER)
    if (folder / names.FSDP_OPTIMIZER_FOLDER / ".metadata").is_file():
        sharded.open_sharded_optimizer(folder / names.FSDP_OPTIMIZER_FOLDER)


def _verify_weights(folder: Path) -> None:
    headers = {path: names.read_header(path) for path in names.weight_files(folder)}
    for path, header in headers.items():
        if names.schedule_free_metadata(header):
            raise CheckpointError(f"{RECORD_NAME}, with which {path.name} was saved, is missing")
    if (folder / names.MODEL_INDEX).is_file() and not (folder / names.MODEL_FILE).is_file():
        for tensor, shard in names.read_index(folder / names.MODEL_INDEX).items():
            if tensor not in headers[folder / shard]:
                raise CheckpointError(f"{shard} holds no {tensor}, which {names.MODEL_INDEX} says it does")
    if headers:
        return
    archives = [folder / name for name in (names.PICKLED_MODEL_FILE, names.PICKLED_ADAPTER_FILE, names.FSDP_MODEL_FILE)]
    if (folder / names.PICKLED_MODEL_INDEX).is_file():
        shards = set(names.read_index(folder / names.PICKLED_MODEL_INDEX).values())
        archives += [folder / shard for shard in sorted(shards)]
        for path in archives[3:]:
            if not path.exists():
                raise CheckpointError(f"{path.name}, which {names.PICKLED_MODEL_INDEX} names, is missing")
    sharded = [folder / names.FSDP_MODEL_FOLDER]
    if not any(path.exists() for path in archives + sharded) and not (folder / names.DEEPSPEED_LATEST).exists():
        raise CheckpointError(f"{names.MODEL_FILE} is missing, and there are no other weights")
    for path in archives:
        if path.exists():
            _check_archive(path)
    for path in sharded:
        if path.exists() and not (path / ".metadata").is_file():
            raise CheckpointError(f"{path.name}/.metadata is missing")


def _has_optimizer_state(folder: Path) -> bool:
    alternatives = (
        names.OPTIMIZER_FILE,
        names.FSDP_OPTIMIZER_FILE,
        names.FSDP_OPTIMIZER_FOLDER,
        names.DEEPSPEED_LATEST,
    )
    return any((folder / name).exists() for name in alternatives)


def optimizer_of_state(folder: str | os.PathLike[str]) -> str | None:
    """The class of the optimizer that wrote a checkpoint without a record, as far as its state tells.

    None where there is no `optimizer.pt`; "another optimizer" if it is not schedule-free.
    """
    path = Path(folder) / names.OPTIMIZER_FILE
    if not path.is_file():
        return None
    content = load_pickled(path)
    group, states = _first_group(content), content.get("state")
    states = states.values() if isinstance(states, Mapping) else ()
    if "train_mode" not in group or any(not isinstance(state, Mapping) or "z" not in state for state in states):
        return "another optimizer"
    return schedule_free_class(group)


def schedule_free_class(group: Mapping[str, Any]) -> str:
    """The class of the schedule-free optimizer that a stored parameter group is of."""
    if "prodigy_steps" in group:
        return "ProdigyPlusScheduleFree"
    sgd = "momentum" in group and "betas" not in group
    kind = "SGD" if sgd else "RAdam" if "silent_sgd_phase" in group else "AdamW"
    return f"{kind}ScheduleFree" if "k" in group else f"ScheduleFree{kind}"  # so pytorch_optimizer calls them


def _first_group(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first parameter group in the state of an optimizer, of whatever kind; empty if it has none."""
    groups = content.get("param_groups")
    return groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], dict) else {}


def _finished_steps(group: Mapping[str, Any]) -> int | None:
    """What a schedule-free optimizer says of itself; None where it counts otherwise (prodigy-plus, from 1 on)."""
    return group["k"] if type(group.get("k")) is int and "prodigy_steps" not in group else None


def _check_archive(path: Path) -> None:
    """That a file of torch.save is whole: each of its parts carries a CRC."""
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path.name} is empty")
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path.name} is truncated or damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path.name} is damaged: {damaged} in it is not what was saved")


def load_pickled(path: Path) -> dict[str, Any]:
    """A state dict written by torch.save, loaded with `weights_only=True` and mapped, not read, into memory.

    Raises:
        CheckpointError: the file is damaged, or holds something else than tensors and plain values.
    """
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} is damaged, or holds objects that are not safe to load: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} holds no state dict")
    return content


def find_committed(
    run_dir: str | os.PathLike[str], *, need_optimizer: bool = False, last_step: int | None = None
) -> tuple[VerifiedCheckpoint | None, list[str]]:
    """The newest whole checkpoint of a run, and for each newer one a word on why it was skipped.

    Args:
        run_dir: the folder that holds `checkpoint-N`.
        need_optimizer: skip checkpoints without optimizer state (`save_only_model`).
        last_step: skip later ones, which other nodes do not have.
    """
    skipped = []
    if (Path(run_dir) / STAGING).is_dir():
        skipped += [f"{path.name} (the save was interrupted)" for path in (Path(run_dir) / STAGING).glob("checkpoint*")]
    for folder in checkpoint_folders(run_dir):
        if last_step is not None and step_in_name(folder) > last_step:
            skipped.append(f"{folder.name} (it is not whole on all nodes)")
            continue
        try:
            found = verify_checkpoint(folder)
        except CheckpointError as error:
            skipped.append(f"{folder.name} ({error})")
            continue
        if need_optimizer and not found.has_optimizer_state:
            skipped.append(f"{folder.name} (it has no optimizer state)")
            continue
        return found, skipped
    return None, skipped


def latest_committed(run_dir: str | os.PathLike[str]) -> str | None:
    """The path of the newest whole checkpoint in a run's output directory, or None."""
    found, skipped = find_committed(run_dir)
    if skipped:
        logger.warning("Skipped in %s: %s", run_dir, "; ".join(skipped))
    return str(found.folder) if found is not None else None
