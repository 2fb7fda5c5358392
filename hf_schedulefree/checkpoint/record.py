"""The commit record `schedule_free.json`: what a checkpoint holds, and the size and checksum of each of its files.

Format 1, one JSON object:

    format           1
    weights          "x": what the weight files hold
    optimizer        class name of the optimizer, e.g. "AdamWScheduleFree"
    version          version of this package
    step             finished optimizer steps
    world_size       processes that wrote the checkpoint
    engine           "single", "ddp", "fsdp" or "deepspeed"
    beta             interpolation factor of the first parameter group
    parameters       per parameter group, the names of its parameters in the optimizer's order
    files            path inside the folder -> [size in bytes, xxh3_64 in hexadecimal]
    checksum         xxh3_64 of all of the above, as compact JSON with sorted keys
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

RECORD_NAME = "schedule_free.json"
FORMAT = 1

# A file is hashed in pieces of so many bytes, one for each thread; the disk it is synced to is slower anyway.
_PIECE = 2**18


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is; the message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What the writer of a checkpoint knows about it; see the module's docstring."""

    step: int | None = None
    optimizer: str | None = None
    version: str | None = None
    world_size: int = 1
    engine: str = "single"
    weights: str = "x"
    beta: float | None = None
    parameters: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Record(CheckpointFacts):
    """A commit record: the facts, and what is on disk."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    def facts(self) -> CheckpointFacts:
        """The part that the writer of the checkpoint gave."""
        return CheckpointFacts(**{name: getattr(self, name) for name in CheckpointFacts.__dataclass_fields__})

    def to_json(self) -> str:
        """The text of the record's file."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({**content, "checksum": _content_checksum(content)}, indent=1, sort_keys=True) + "\n"


# field -> the types it may have in the file (bool is an int in Python and is refused below).
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int, type(None)),
    "optimizer": (str, type(None)),
    "version": (str, type(None)),
    "world_size": (int,),
    "engine": (str,),
    "weights": (str,),
    "beta": (float, int, type(None)),
    "parameters": (list,),
    "files": (dict,),
}


def read_record(folder: str | os.PathLike[str]) -> Record | None:
    """The record of a checkpoint, or None where there is none.

    Raises:
        CheckpointError: there is one, but it is damaged or of a later format.
    """
    path = Path(folder) / RECORD_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{RECORD_NAME} cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{RECORD_NAME} is damaged: it is no JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{RECORD_NAME} is damaged: it holds no JSON object")
    if type(content.get("format")) is int and content["format"] > FORMAT:
        raise CheckpointError(
            f"{RECORD_NAME} is of format {content['format']}; this version of hf_schedulefree reads up to {FORMAT}. "
            "Update hf_schedulefree"
        )
    checksum = content.pop("checksum", None)
    if checksum != _content_checksum(content) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{RECORD_NAME} is damaged: its checksum does not match its content")
    if content.keys() != _FIELD_TYPES.keys() or any(
        type(value) not in _FIELD_TYPES[name] for name, value in content.items()
    ):
        raise CheckpointError(f"{RECORD_NAME} is damaged: its fields are not those of format {FORMAT}")
    return Record(**{**content, "files": {name: _file_entry(name, entry) for name, entry in content["files"].items()}})


def _file_entry(name: str, entry: Any) -> tuple[int, str]:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise CheckpointError(f"{RECORD_NAME} is damaged: {name!r} is no file inside the checkpoint")
    match entry:
        case [int(size), str(checksum)]:
            return size, checksum
    raise CheckpointError(f"{RECORD_NAME} is damaged: no size and checksum for {name!r}")


def _content_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def file_checksum(path: str | os.PathLike[str]) -> str:
    """xxh3_64 of a file, in hexadecimal. Read in pieces: a memory map would count as memory of the process."""
    checksum = xxhash.xxh3_64()
    piece = memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(piece):
            checksum.update(piece[:length])
    return checksum.hexdigest()


def files_in(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Every file below `folder` but the record: path inside the folder, with forward slashes -> path.

    Links that lead nowhere, pipes and sockets are none: they have no content.
    """
    folder = Path(folder)
    found = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory) / name
            inside = path.relative_to(folder).as_posix()
            if inside != RECORD_NAME and path.is_file():
                found[inside] = path
    return dict(sorted(found.items()))
