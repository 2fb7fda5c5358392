"""What a checkpoint holds, whoever wrote it: its tensors one by one, and the optimizer state that belongs to each."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from hf_schedulefree.checkpoint import files as names
from hf_schedulefree.checkpoint.record import CheckpointError
from hf_schedulefree.checkpoint.verify import load_pickled


@dataclass(frozen=True)
class Stored:
    """The optimizer state of one parameter, and its parameter group."""

    state: Mapping[str, Tensor] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)


class Weights(ABC):
    """The weights in a checkpoint. Tensors are read one at a time."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""

    @property
    @abstractmethod
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Name -> type of every tensor."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the weights say about themselves: `weights`, `step`, `optimizer`, `beta`; mostly nothing."""
        return {}

    @property
    def layout(self) -> Mapping[str, list[str]]:
        """Output file -> the tensors that it is to hold."""
        return {names.MODEL_FILE: sorted(self.shapes)}

    def name_in_file(self, name: str) -> str:
        """What a tensor is called in its file: the same, but for adapters of several folders."""
        return name


class SafetensorsWeights(Weights):
    """Weights in one or several safetensors files: a model's, its shards, or adapters'."""

    def __init__(self, paths: list[Path], folder: Path):
        self._headers = {path: names.read_header(path) for path in paths}
        self._folder = folder
        self._adapters = any(path.name == names.ADAPTER_FILE for path in paths)
        self._files: dict[str, tuple[Path, str]] = {}
        for path, header in self._headers.items():
            # Several adapters have the same tensors: the folder tells them apart.
            prefix = "" if path.parent == folder else f"{path.parent.name}/"
            for name in header:
                if name != "__metadata__":
                    self._files[prefix + name] = (path, name)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(self._headers[path][key]["shape"]) for name, (path, key) in self._files.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: names.torch_dtype(self._headers[path][key]) for name, (path, key) in self._files.items()}

    def read(self, name: str) -> Tensor:
        path, key = self._files[name]
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return file.get_tensor(key)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path.name} is damaged: {error}") from error

    @property
    def metadata(self) -> Mapping[str, str]:
        found = [names.schedule_free_metadata(header) for header in self._headers.values()]
        return found[0] if found and all(said.get("weights") == found[0].get("weights") for said in found) else {}

    @property
    def layout(self) -> Mapping[str, list[str]]:
        layout: dict[str, list[str]] = {}
        for name, (path, _) in self._files.items():
            layout.setdefault(path.relative_to(self._folder).as_posix(), []).append(name)
        return layout

    def name_in_file(self, name: str) -> str:
        return self._files[name][1]


class PickledWeights(Weights):
    """Weights in files of torch.save, mapped into memory."""

    def __init__(self, paths: list[Path], layout_file: str = names.MODEL_FILE):
        self._tensors: dict[str, Tensor] = {}
        self._layout_file = layout_file
        for path in paths:
            content = load_pickled(path)
            self._tensors.update(
                {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
            )

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    @property
    def layout(self) -> Mapping[str, list[str]]:
        return {self._layout_file: sorted(self._tensors)}


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """The weights in a checkpoint folder, or in one weight file.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            return SafetensorsWeights([path], path.parent)
        return PickledWeights([path])
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    found = names.weight_files(path)
    if found:
        return SafetensorsWeights(found, path)
    if (path / names.FSDP_MODEL_FOLDER / ".metadata").is_file():
        from hf_schedulefree.checkpoint.sharded import ShardedWeights

        return ShardedWeights(path / names.FSDP_MODEL_FOLDER)
    for name in (names.PICKLED_MODEL_FILE, names.FSDP_MODEL_FILE):
        if (path / name).is_file():
            return PickledWeights([path / name])
    if (path / names.PICKLED_MODEL_INDEX).is_file():
        shards = sorted(set(names.read_index(path / names.PICKLED_MODEL_INDEX).values()))
        return PickledWeights([path / shard for shard in shards])
    if (path / names.PICKLED_ADAPTER_FILE).is_file():
        if len(names.adapter_files(path, names.PICKLED_ADAPTER_FILE)) > 1:
            raise CheckpointError(
                f"{names.PICKLED_ADAPTER_FILE} of several adapters cannot be read, that of a single one can"
            )
        return PickledWeights([path / names.PICKLED_ADAPTER_FILE], names.ADAPTER_FILE)
    raise CheckpointError(f"there are no weights in {path}")


@dataclass(frozen=True)
class OptimizerState:
    """A stored optimizer: `entries[i][j]` belongs to the j-th parameter of the i-th group.

    `names` gives those parameters' names, where the file knows them.
    """

    groups: list[Mapping[str, Any]]
    entries: list[list[Mapping[str, Tensor]]]
    names: list[list[str]] | None = None

    @property
    def is_schedule_free(self) -> bool:
        """Whether a schedule-free optimizer wrote it."""
        states = [state for group in self.entries for state in group if state]
        return bool(self.groups) and "train_mode" in self.groups[0] and all("z" in state for state in states)


def open_optimizer(folder: str | os.PathLike[str]) -> OptimizerState | None:
    """The optimizer state in a checkpoint folder; None where there is none (or DeepSpeed's, which has its own reader).

    Raises:
        CheckpointError: it is damaged.
    """
    folder = Path(folder)
    if (folder / names.FSDP_OPTIMIZER_FOLDER / ".metadata").is_file():
        from hf_schedulefree.checkpoint.sharded import open_sharded_optimizer

        return open_sharded_optimizer(folder / names.FSDP_OPTIMIZER_FOLDER)
    for name in (names.OPTIMIZER_FILE, names.FSDP_OPTIMIZER_FILE):
        if (folder / name).is_file():
            return optimizer_from_state_dict(load_pickled(folder / name), name)
    return None


def optimizer_from_state_dict(content: Mapping[str, Any], file_name: str) -> OptimizerState:
    """An `OptimizerState` from a `state_dict`, keyed by number (torch) or by parameter name (FSDP)."""
    groups, states = content.get("param_groups"), content.get("state")
    if not isinstance(groups, list) or not isinstance(states, Mapping):
        raise CheckpointError(f"{file_name} holds no optimizer state in a form that is known here")
    if not all(isinstance(each, Mapping) for each in (*groups, *states.values())):
        raise CheckpointError(f"{file_name} holds no optimizer state in a form that is known here")
    check_groups(groups, file_name)
    if not all(isinstance(state.get(name), Tensor | None) for state in states.values() for name in ("z", "y")):
        raise CheckpointError(f"{file_name} is damaged: its state is not that of a schedule-free optimizer")
    keys = [list(group.get("params", ())) for group in groups]
    named = [list(group["param_names"]) for group in groups if "param_names" in group]
    if len(named) != len(groups):
        named = keys if all(isinstance(key, str) for group in keys for key in group) and any(keys) else None
    return OptimizerState(groups, [[states.get(key, {}) for key in group] for group in keys], named)


def check_groups(groups: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse parameter groups of a schedule-free optimizer that lack what is read from them.

    Raises:
        CheckpointError: one does; the message names `where`.
    """
    if any("train_mode" in group for group in groups) and not all(map(_is_whole, groups)):
        raise CheckpointError(f"{where} is damaged: its groups are not those of a schedule-free optimizer")


def _is_whole(group: Mapping[str, Any]) -> bool:
    """Whether what is read from a parameter group is there, each of its type."""
    keys, named = group.get("params", ()), group.get("param_names", ())
    betas = group.get("betas", (group.get("momentum"),))
    return (
        all(isinstance(values, list | tuple) for values in (keys, named, betas))
        and all(isinstance(key, int | str) for key in (*keys, *named))
        and len(betas) > 0
        and isinstance(betas[0], float | int | Tensor)
        and isinstance(group.get("train_mode", ""), bool | None)
        and all(isinstance(group.get(name, 0), int) for name in ("k", "parked_k"))
        and isinstance(group.get("parked_beta"), float | int | None)
    )
