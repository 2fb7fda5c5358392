"""Checkpoints of torch.distributed.checkpoint (FSDP with sharded state dicts), read by one process, tensor by tensor.

torch unpickles their metadata and plain values freely; here only the classes of the format itself are let in.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from hf_schedulefree.checkpoint.contents import OptimizerState, Weights, check_groups
from hf_schedulefree.checkpoint.record import CheckpointError

_SAFE_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_SAFE_CLASSES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        value_of_torch = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if value_of_torch or (module, name) in _SAFE_CLASSES or (module in _SAFE_MODULES and "." not in name):
            found = super().find_class(module, name)
            if isinstance(found, type | torch.dtype) or (module, name) in _SAFE_CLASSES:
                return found
        raise CheckpointError(f".metadata asks for {module}.{name}, which does not belong into it")


class _Reader(dcp.FileSystemReader):
    """A reader that unpickles the metadata itself."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metadata_read = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata_read


class _Planner(dcp.DefaultLoadPlanner):
    """A planner that takes plain values only, and leaves the keys as they are stored."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read_metadata(folder: Path) -> Metadata:
    """The `.metadata` of a sharded checkpoint.

    Raises:
        CheckpointError: it is damaged, or holds something else.
    """
    try:
        with open(folder / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder.name}/.metadata is missing") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{folder.name}/.metadata is damaged: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder.name}/.metadata is damaged: it is no metadata of torch.distributed.checkpoint")
    entries = vars(metadata).get("state_dict_metadata")  # unpickling sets what the file holds, and nothing else
    if not isinstance(entries, dict) or not all(isinstance(key, str) and _is_whole(entries[key]) for key in entries):
        raise CheckpointError(f"{folder.name}/.metadata is damaged: it does not say which tensors there are")
    return metadata


def _is_whole(entry: Any) -> bool:
    """Whether what is read from an entry of the metadata is there, each of its type."""
    if isinstance(entry, BytesStorageMetadata):
        return True
    if not isinstance(entry, TensorStorageMetadata):
        return False
    size, properties = vars(entry).get("size"), vars(entry).get("properties")
    return isinstance(size, torch.Size) and isinstance(getattr(properties, "dtype", None), torch.dtype)


class _Folder:
    """The tensors and values in one sharded folder, by their full key."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = _Reader(folder)
        self.entries = self._reader.read_metadata().state_dict_metadata

    def read(self, key: str) -> Any:
        entry = self.entries[key]
        try:
            value = None
            if isinstance(entry, TensorStorageMetadata):
                value = torch.empty(entry.size, dtype=entry.properties.dtype)
            loaded = {key: value}
            dcp.load(loaded, storage_reader=self._reader, planner=_Planner(), no_dist=True)
        except (Exception, dcp.api.CheckpointException) as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{key} in {self.folder.name} cannot be read: {error}") from error
        return loaded[key]


class ShardedWeights(Weights):
    """The weights in `pytorch_model_fsdp_0`."""

    def __init__(self, folder: Path):
        self._folder = _Folder(folder)
        self._keys = {
            key.removeprefix("model."): key
            for key, entry in self._folder.entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(self._folder.entries[key].size) for name, key in self._keys.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: self._folder.entries[key].properties.dtype for name, key in self._keys.items()}

    def read(self, name: str) -> Tensor:
        return self._folder.read(self._keys[name])


class _State(Mapping[str, Tensor]):
    """One parameter's optimizer state; a tensor is read when it is asked for."""

    def __init__(self, folder: _Folder, keys: Mapping[str, str]):
        self._folder, self._keys = folder, keys

    def __getitem__(self, name: str) -> Tensor:
        return self._folder.read(self._keys[name])

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def open_sharded_optimizer(folder: Path) -> OptimizerState:
    """The optimizer state in `optimizer_0`: keyed by the names of the parameters."""
    opened = _Folder(folder)
    groups: dict[int, dict[str, Any]] = {}
    states: dict[str, dict[str, str]] = {}
    for key, entry in opened.entries.items():
        inner = key.removeprefix("optimizer.")
        if inner.startswith("param_groups."):
            number, _, option = inner.removeprefix("param_groups.").partition(".")
            if not number.isdecimal():
                raise CheckpointError(f"{folder.name}/.metadata is damaged: it names {key}")
            if isinstance(entry, BytesStorageMetadata):
                groups.setdefault(int(number), {})[option] = opened.read(key)
            elif not option.startswith("params"):
                groups.setdefault(int(number), {})[option] = opened.read(key)
        elif inner.startswith("state."):
            parameter, _, name = inner.removeprefix("state.").rpartition(".")
            states.setdefault(parameter, {})[name] = key
    ordered = [groups[number] for number in sorted(groups)]
    check_groups(ordered, folder.name)
    names = [list(group.get("params", ())) for group in ordered]
    return OptimizerState(ordered, [[_State(opened, states.get(name, {})) for name in group] for group in names], names)
