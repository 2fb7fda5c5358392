"""The files that the hosts write into a checkpoint, and what a weight file says about itself in its header."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from hf_schedulefree.checkpoint.record import RECORD_NAME, CheckpointError

MODEL_FILE = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
PICKLED_MODEL_FILE = "pytorch_model.bin"
PICKLED_MODEL_INDEX = "pytorch_model.bin.index.json"
PICKLED_ADAPTER_FILE = "adapter_model.bin"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"
SCALER_FILE = "scaler.pt"
# What training needs to go on from y, where the state of the optimizer does not hold it all.
EXTRA_STATE_FILE = "schedule_free_state.pt"
FSDP_MODEL_FILE = "pytorch_model_fsdp.bin"
FSDP_MODEL_FOLDER = "pytorch_model_fsdp_0"
FSDP_OPTIMIZER_FILE = "optimizer.bin"
FSDP_OPTIMIZER_FOLDER = "optimizer_0"
DEEPSPEED_LATEST = "latest"
# transformers' SIGTERM handler puts it into a folder that it has not finished.
SENTINEL = "checkpoint-is-incomplete.txt"

# Where safetensors metadata says what the weights are. All values are strings.
METADATA_PREFIX = "schedule_free."

_MAX_HEADER_BYTES = 100 * 2**20  # as in safetensors

_DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}

# Those that torch can hold: what is written here, and read by an export. In the order in which safetensors writes them.
TORCH_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def weight_metadata(*, weights: str, step: int, optimizer: str, beta: float | None) -> dict[str, str]:
    """What a weight file says about itself: `schedule_free.weights` ("x" or "y"), `.step`, `.optimizer`, `.beta`."""
    facts = {"weights": weights, "step": str(step), "optimizer": optimizer}
    if beta is not None:
        facts["beta"] = repr(float(beta))
    return {METADATA_PREFIX + name: value for name, value in facts.items()}


def is_write_error(error: BaseException) -> bool:
    """Whether a save failed because a file could not be written (full disk, no permission, I/O error).

    torch.save and safetensors raise errors of their own instead of OSError.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, safetensors.SafetensorError):
        return "os error" in str(error)
    writer = ("PytorchStreamWriter", "inline_container", "cannot be opened", "unexpected pos", "Parent directory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in writer)


def write_error_text(error: BaseException) -> str:
    """What went wrong, for the log: torch.save tells only how many bytes of its file are missing."""
    of_torch = isinstance(error, RuntimeError) and is_write_error(error)
    return f"torch could not write a file to its end, as on a full disk ({error})" if of_torch else str(error)


def _checkpoint_exception() -> type[BaseException]:
    # Its 74 modules are loaded when there is an error to look at: not by transformers 5.17 to 5.19, nor by most runs.
    from torch.distributed.checkpoint.api import CheckpointException

    return CheckpointException


@contextlib.contextmanager
def sharded_write_errors() -> Iterator[None]:
    """Within: when torch cannot write sharded files, all processes get an OSError, and not its `CheckpointException`.

    That one is no `Exception`, and its text is a traceback.
    """
    try:
        yield
    except _checkpoint_exception() as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        if not all(is_write_error(failure) for failure in failures.values()):
            raise
        raise OSError("; ".join(f"process {rank}: {failure}" for rank, failure in failures.items())) from error


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file: `__metadata__`, and each tensor's dtype and shape.

    Raises:
        CheckpointError: the file is no whole safetensors file.
    """
    name = Path(path).name
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{name} is truncated or no safetensors file ({size} bytes)")
            text = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text.decode("utf-8"))
        metadata = header.get("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata")
        end = _end(entry for tensor, entry in header.items() if tensor != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: its header is not that of a safetensors file") from error
    expected = 8 + length + end
    if size != expected:
        raise CheckpointError(f"{name} has {size} bytes; its header asks for {expected}")
    return header


def _end(entries: Iterable[Mapping[str, Any]]) -> int:
    """Where the last tensor ends; each begins where the one before it ends, as safetensors demands."""
    last = 0
    for begin, end, shape, dtype in sorted(
        (*entry["data_offsets"], entry["shape"], entry["dtype"]) for entry in entries
    ):
        if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
            raise ValueError("numbers")
        width = _DTYPE_BYTES.get(dtype)  # None: a type that is not known here (of less than a byte, ...)
        if begin != last or end < begin or (width is not None and end - begin != math.prod(shape) * width):
            raise ValueError("offsets")
        last = end
    return last


def torch_dtype(entry: Mapping[str, Any]) -> torch.dtype:
    """The type of a tensor in a safetensors header."""
    try:
        return TORCH_DTYPES[entry["dtype"]]
    except KeyError as error:
        raise CheckpointError(f"tensors of type {entry['dtype']} are not supported") from error


def schedule_free_metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """The schedule-free part of a header's metadata, without its prefix; empty in any other file."""
    metadata = header.get("__metadata__", {})
    return {
        key.removeprefix(METADATA_PREFIX): value for key, value in metadata.items() if key.startswith(METADATA_PREFIX)
    }


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that hold a folder's weights: one, the shards of an index, or those of adapters.

    Raises:
        CheckpointError: an index is damaged or names a shard that is not there.
    """
    folder = Path(folder)
    if (folder / MODEL_FILE).is_file():
        return [folder / MODEL_FILE]
    adapters = adapter_files(folder, ADAPTER_FILE)
    if folder / ADAPTER_FILE in adapters:
        return adapters
    if (folder / MODEL_INDEX).is_file():
        shards = [folder / shard for shard in sorted(set(read_index(folder / MODEL_INDEX).values()))]
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(f"{shard.name}, which {MODEL_INDEX} names, is missing")
        return shards
    return adapters


def adapter_files(folder: Path, name: str) -> list[Path]:
    """The files of a model's adapters, not of its checkpoints: each but `default` has a folder of its own."""
    own = [folder / name] if (folder / name).is_file() else []
    of_checkpoints = (RECORD_NAME, TRAINER_STATE, OPTIMIZER_FILE)
    return own + [
        path
        for path in sorted(folder.glob(f"*/{name}"))
        if not any((path.parent / other).exists() for other in of_checkpoints)
    ]


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index file: tensor -> file.

    Raises:
        CheckpointError: the index is damaged.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise CheckpointError(f"{path.name} is damaged: it has no weight_map from tensors to files")
    return weight_map


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or holds something else.
    """
    name = Path(path).name
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: it is no JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} is damaged: it holds no JSON object")
    return content
