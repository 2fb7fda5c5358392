"""`export_averaged`: x out of any checkpoint. `inspect_weights`: which weights a checkpoint or a file holds."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hf_schedulefree.checkpoint import files as names
from hf_schedulefree.checkpoint.commit import step_in_name
from hf_schedulefree.checkpoint.contents import Stored, Weights, open_optimizer, open_weights
from hf_schedulefree.checkpoint.deepspeed import AsWritten, DeepSpeedCheckpoint, is_deepspeed_checkpoint
from hf_schedulefree.checkpoint.matching import match_states, tensors_of
from hf_schedulefree.checkpoint.record import RECORD_NAME, CheckpointError, Record, read_record
from hf_schedulefree.checkpoint.verify import optimizer_of_state, schedule_free_class, verify_checkpoint
from hf_schedulefree.checkpoint.writing import write_safetensors
from hf_schedulefree.optim.stored import read_sequences, shows_y, stored_beta

# What an export leaves behind: weights (they are written anew) and what only training needs.
_NOT_COPIED = (
    RECORD_NAME,
    f"{RECORD_NAME}.tmp",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.index.json",
    names.TRAINER_STATE,
    names.SENTINEL,
    names.DEEPSPEED_LATEST,
    "zero_to_*.py",
)

# Folders of a model are known by one of these files, or by their name: a processor with several tokenizers has a folder
# for each further one, and a tokenizer or processor one for all chat templates but the first.
_PART_OF_MODEL = ("adapter_config.json", "tokenizer_config.json")
_CHAT_TEMPLATES = "additional_chat_templates"

_CONFIG = "config.json"

# The folder in which an export is written before it is moved into place ends so.
_ASIDE = ".tmp-export"

Progress = Callable[[str], Any]


@dataclass
class Contents:
    """What is known of a checkpoint folder or weight file.

    Attributes:
        weights: "x", "y", or None if nothing tells.
        reason: how that is known.
        complete: whether the checkpoint (or the saved model) is whole; None for a lone weight file.
        distance: |x - y| / |y| over all trained parameters; None if it cannot be known from what is there.
    """

    path: Path
    weights: Literal["x", "y"] | None
    reason: str
    step: int | None
    optimizer: str | None
    beta: float | None
    complete: bool | None
    problem: str | None
    distance: float | None = None
    note: str | None = None


class _Source:
    """A checkpoint opened for reading: its tensors, and x and y of each."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.record = _record_or_none(path)
        self.weights: Weights
        self.stored: dict[str, Stored] = {}
        self.problem: str | None = None  # why the optimizer state could not be used
        self.has_optimizer = False
        self._groups: list[Mapping[str, Any]] = []
        if path.is_dir() and is_deepspeed_checkpoint(path):
            self.weights = DeepSpeedCheckpoint(path)
            self.stored = self.weights.stored
            self.has_optimizer = self.weights.is_schedule_free
            self._groups = self.weights.groups if self.has_optimizer else []
            if (path / names.ADAPTER_FILE).is_file() or list(path.glob(f"*/{names.ADAPTER_FILE}")):
                self._name_as_adapters(self.weights)
            return
        self.weights = open_weights(path)
        try:
            optimizer = open_optimizer(path) if path.is_dir() else None
            if optimizer is None or not optimizer.is_schedule_free:
                return
            self.has_optimizer = True
            self._groups = optimizer.groups
            self.stored = match_states(self.folder, self.weights, optimizer, self.record)
        except CheckpointError as error:
            self.problem = str(error)

    def _name_as_adapters(self, checkpoint: DeepSpeedCheckpoint) -> None:
        """Adapters beside DeepSpeed's files: only these, by their own names, are what can be loaded."""
        written = open_weights(self.path)
        trained = {tensor: name for name in self.stored for tensor in tensors_of(written, name)}
        if len(trained) == len(self.stored):
            self.weights = AsWritten(checkpoint, written, trained)
            self.stored = {tensor: self.stored[name] for tensor, name in trained.items()}

    def shown(self) -> tuple[Literal["x", "y"] | None, str]:
        """Which weights are stored, and how that is known."""
        if self.record is not None:
            return self.record.weights, f"the record {RECORD_NAME} says so"
        said = self.weights.metadata.get("weights")
        if said in ("x", "y"):
            return said, "the header of the weight file says so"
        if self._groups:
            if all(not shows_y(group) for group in self._groups):
                return "x", "the optimizer beside them was saved in eval mode"
            return "y", "the optimizer beside them was saved in train mode"
        return (
            None,
            "nothing says so: no record, no metadata in the file, and no schedule-free optimizer state beside it",
        )

    def optimizer_name(self) -> str | None:
        if self.record is not None and self.record.optimizer:
            return self.record.optimizer
        if self.weights.metadata.get("optimizer"):
            return self.weights.metadata["optimizer"]
        if self.path.is_dir() and (self.folder / names.OPTIMIZER_FILE).is_file():
            return optimizer_of_state(self.folder)
        return schedule_free_class(self._groups[0]) if self._groups else None

    def beta(self) -> float | None:
        if self._groups:
            return stored_beta(self._groups[0])
        said = self.record.beta if self.record is not None else self.weights.metadata.get("beta")
        return None if said is None else float(said)

    def step(self) -> int | None:
        if self.record is not None:
            return self.record.step
        if self.path.is_dir() and (self.folder / names.TRAINER_STATE).is_file():
            step = names.read_json(self.folder / names.TRAINER_STATE).get("global_step")
            if isinstance(step, int):
                return step
        said = self.weights.metadata.get("step", "")
        if said.isdigit():
            return int(said)
        steps = [group["k"] for group in self._groups if "k" in group]
        return int(steps[0]) if steps else None

    def output_dtype(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """The type to write a tensor in: that asked for, if it is one of real numbers."""
        own = self.weights.dtypes[name]
        return own if dtype is None or not own.is_floating_point else dtype

    def averaged(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """x of one tensor, computed in float64 and rounded once; the stored bits, where they are x already."""
        shown = self.weights.read(name)
        target = self.output_dtype(name, dtype)
        stored = self.stored.get(name)
        if stored is None or "z" not in stored.state:
            return shown.to(target)
        wider = torch.finfo(target).bits > torch.finfo(shown.dtype).bits
        if not shows_y(stored.group) and not wider:
            return shown.to(target)
        return read_sequences(stored.state, stored.group, shown).x.to(target)


def inspect_weights(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Contents:
    """Which weights a checkpoint folder or a weight file holds, and how far x is from y.

    Raises:
        CheckpointError: there are no weights that can be read.
    """
    path = Path(path)
    complete, problem = None, None
    source = _Source(path)
    if path.is_dir() and (source.record is not None or source.has_optimizer or _is_checkpoint(path)):
        try:
            complete = verify_checkpoint(path).folder is not None
        except CheckpointError as error:
            complete, problem = False, str(error)
    elif path.is_dir():
        complete = True  # a saved model: its weight files have just been opened, and there is nothing else to miss
    weights, reason = source.shown()
    contents = Contents(
        path,
        weights,
        reason,
        source.step(),
        source.optimizer_name(),
        source.beta(),
        complete,
        problem,
        note=source.problem,
    )
    if source.stored:
        contents.distance = _distance(source, progress)
    return contents


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is one to resume from, not a saved model (which may have what `trainer.save_state()` writes)."""
    if step_in_name(path) is not None and (path / names.TRAINER_STATE).exists():
        return True
    return any((path / name).exists() for name in (RECORD_NAME, names.OPTIMIZER_FILE))


def _distance(source: _Source, progress: Progress | None) -> float:
    apart, size = 0.0, 0.0
    once = {id(stored): (name, stored) for name, stored in source.stored.items()}  # tied tensors share their state
    for name, stored in once.values():
        if progress is not None:
            progress(name)
        sequences = read_sequences(stored.state, stored.group, source.weights.read(name))
        apart += float((sequences.x - sequences.y).square().sum())
        size += float(sequences.y.square().sum())
    return (apart / size) ** 0.5 if size else 0.0


def export_averaged(
    folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Contents:
    """Write the averaged weights x of a checkpoint as safetensors, ready for `from_pretrained`.

    Takes checkpoints of this package, the stock Trainer's (whether their weights are x or y), FSDP2's sharded ones,
    DeepSpeed's, and adapters. Works tensor by tensor, in float64, rounding once. Configuration, tokenizer and whatever
    else is not weights or training state is copied.

    Args:
        folder: the checkpoint.
        output_dir: a new or empty folder.
        dtype: of the written weights; by default that of the checkpoint's.
        progress: called with the name of each tensor.

    Raises:
        CheckpointError: x cannot be known from what is there, or the checkpoint is damaged.
        FileExistsError: `output_dir` is not empty.
    """
    source_path, output = Path(folder), Path(output_dir)
    # A folder that exists stays what it is: a link, the place of another disk, somebody's working directory.
    stays = output.exists()
    temporary = output / _ASIDE if stays else output.with_name(f"{output.name}{_ASIDE}")
    if stays and (not output.is_dir() or any(path != temporary for path in output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose a new one")
    if source_path.is_dir() and (source_path / RECORD_NAME).exists():
        verify_checkpoint(source_path)
    source = _Source(source_path)
    weights, reason = source.shown()
    if weights is None:
        raise CheckpointError(f"x cannot be found in {source_path}: {source.problem or reason}")
    if weights == "y" and not source.stored:
        raise CheckpointError(
            f"{source_path} holds y, and x cannot be computed: "
            + (source.problem or "there is no optimizer state with z beside it")
        )
    _refuse_unwritable(source, dtype)
    metadata = {"format": "pt"} | names.weight_metadata(
        weights="x", step=source.step() or 0, optimizer=source.optimizer_name() or "unknown", beta=source.beta()
    )
    shutil.rmtree(temporary, ignore_errors=True)
    copied = list(_other_files(source_path)) if source_path.is_dir() else []  # before the new folder, if it lies there
    temporary.mkdir(parents=True)
    try:
        for path in copied:
            target = temporary / path.relative_to(source_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        if dtype is not None:
            _name_dtype(temporary / _CONFIG, dtype)
        for file_name, tensors in source.weights.layout.items():
            _write_averages(source, temporary / file_name, tensors, dtype, metadata, progress)
        _write_index(source, temporary, dtype)
        if stays:
            for path in sorted(temporary.iterdir()):
                os.rename(path, output / path.name)
            temporary.rmdir()
        else:
            os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Contents(output, "x", "computed", source.step(), source.optimizer_name(), source.beta(), None, None)


def _refuse_unwritable(source: _Source, dtype: torch.dtype | None) -> None:
    """torch.save takes any key as a name, and more types of numbers than safetensors files hold."""
    for name, shape in source.weights.shapes.items():
        try:
            usable = name.encode() and name != "__metadata__" and all(isinstance(size, int) for size in shape)
        except (AttributeError, UnicodeEncodeError):
            usable = False
        if not usable:
            raise CheckpointError(f"{source.path} is damaged: it holds a tensor {name!a} of shape {list(shape)}")
        written = source.output_dtype(name, dtype)
        if written not in names.TORCH_DTYPES.values():
            raise CheckpointError(f"{name} is of type {written}, which a safetensors file cannot hold")


def _write_averages(
    source: _Source,
    path: Path,
    tensors: list[str],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    progress: Progress | None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    full_names = {source.weights.name_in_file(name): name for name in tensors}

    def average(name: str) -> Tensor:
        if progress is not None:
            progress(full_names[name])
        return source.averaged(full_names[name], dtype)

    entries = {
        short: (source.output_dtype(name, dtype), source.weights.shapes[name]) for short, name in full_names.items()
    }
    write_safetensors(path, entries, average, metadata, sync=True)


def _other_files(source: Path) -> Iterator[Path]:
    """Configuration, tokenizer, code, adapters' configurations: everything but weights and training state."""
    for path in sorted(source.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in _NOT_COPIED):
            continue
        if path.is_file():
            yield path
        elif _belongs_to_model(path):
            yield from _other_files(path)


def _belongs_to_model(folder: Path) -> bool:
    """Whether a folder in that of a model holds an adapter, a tokenizer or chat templates; not a model of its own."""
    if _is_checkpoint(folder) or (folder / _CONFIG).is_file():
        return False
    return folder.name == _CHAT_TEMPLATES or any((folder / name).is_file() for name in _PART_OF_MODEL)


def _name_dtype(config: Path, dtype: torch.dtype) -> None:
    """`from_pretrained` casts the weights to the type that the configuration names.

    It is that of a part (`text_config`) if only the part is loaded, as by AutoModelForCausalLM of an image model.
    """
    if not config.is_file():
        return
    content = names.read_json(config)
    named = False
    for part in (content, *(value for value in content.values() if isinstance(value, dict) and "model_type" in value)):
        for key in part.keys() & {"dtype", "torch_dtype"}:
            part[key], named = str(dtype).removeprefix("torch."), True
    if named:
        config.unlink()  # the copy of a file that cannot be written to is another such file
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_index(source: _Source, target: Path, dtype: torch.dtype | None) -> None:
    """The index of several weight files; as `save_pretrained` writes it, where there was one."""
    files = source.weights.layout
    if list(files) == [names.MODEL_FILE] or any(Path(file).name == names.ADAPTER_FILE for file in files):
        return
    if not source.path.is_dir():
        return
    metadata = names.read_json(source.path / names.MODEL_INDEX).get("metadata")
    shapes = source.weights.shapes
    total = sum(math.prod(shapes[name]) * source.output_dtype(name, dtype).itemsize for name in shapes)
    index = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": {name: file for file, tensors in sorted(files.items()) for name in tensors},
    }
    (target / names.MODEL_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _record_or_none(path: Path) -> Record | None:
    if not path.is_dir():
        return None
    try:
        return read_record(path)
    except CheckpointError:
        return None
