"""DeepSpeed's checkpoints: the fp32 partitions of all ranks and the optimizer state beside them, tensor by tensor.

ZeRO-1 and -2 flatten each parameter group into one vector, which the ranks hold in equal parts. ZeRO-3 splits each
parameter evenly over the ranks and lays the parts of many parameters end to end, cut into sub-groups at parameter
boundaries. In both, the state tensors (z, y, ...) have the layout of the fp32 weights.
"""

import contextlib
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_schedulefree.checkpoint import files as names
from hf_schedulefree.checkpoint.contents import Stored, Weights, check_groups
from hf_schedulefree.checkpoint.record import CheckpointError

_SHOWN = "fp32 weights"  # not a state key


def is_deepspeed_checkpoint(folder: Path) -> bool:
    """Whether a folder holds DeepSpeed's own files."""
    return bool(list(folder.glob("*/*_optim_states.pt")) or list(folder.glob("*_optim_states.pt")))


@contextlib.contextmanager
def _form_known() -> Iterator[None]:
    """Within: what does not lie in the files as it is looked for there is a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"DeepSpeed's files are damaged, or of a form that is not known here ({type(error).__name__}: {error})"
        ) from error


class _Shell:
    """Stands for an object of DeepSpeed's in a checkpoint; only keeps what it was made with."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments


def _load(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed, with `weights_only=True`: its own classes (of no interest here) become empty shells."""
    try:
        shells = []
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
            if name.startswith("deepspeed."):
                shells.append((type(name.rpartition(".")[2], (_Shell,), {}), name))
        with torch.serialization.safe_globals(shells):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} is damaged, or holds objects that are not safe to load: {str(error).splitlines()[0]}"
        ) from error


class DeepSpeedCheckpoint(Weights):
    """A checkpoint of ZeRO-1, -2 or -3.

    Attributes:
        groups: the optimizer's parameter groups.
    """

    @_form_known()
    def __init__(self, folder: Path):
        inner = self._inner_folder(folder)
        ranks = sorted(inner.glob("*_optim_states.pt"), key=lambda path: _rank(path.name))
        self._ranks = [_load(path)["optimizer_state_dict"] for path in ranks]
        model_files = sorted(inner.glob("*_model_states.pt"), key=lambda path: _rank(path.name))
        if not model_files:
            raise CheckpointError(f"{inner.name} holds no *_model_states.pt")
        self._model = _load(model_files[0])
        first = self._ranks[0]
        count = first.get("partition_count", len(ranks))
        count = max(count) if isinstance(count, list) else count
        if count != len(ranks):
            raise CheckpointError(f"{inner.name} holds the optimizer states of {len(ranks)} of {count} processes")
        stage = first.get("zero_stage", 0)
        self._stage = int(stage.arguments[0] if isinstance(stage, _Shell) else stage)
        state_key = "optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"
        self._states = [rank.get(state_key) for rank in self._ranks]
        if not all(isinstance(state, dict) and "state" in state for state in self._states):
            raise CheckpointError(f"{inner.name} holds an optimizer state in a form that is not known here")
        self.groups: list[Mapping[str, Any]] = self._states[0]["param_groups"]
        check_groups(self.groups, inner.name)
        self._places = self._place_parameters()
        module = self._model.get("module") or {}
        self._others = {
            name: tensor
            for name, tensor in module.items()
            if isinstance(name, str) and isinstance(tensor, Tensor) and name not in self._places and self._stage != 3
        }
        if self._stage == 3:
            buffers = self._model.get("buffer_names") or []
            self._others = {name: module[name] for name in buffers if name in module}
        self._frozen = _frozen(model_files) if self._stage == 3 else {}
        self._shared = {
            alias: name for alias, name in dict(self._model.get("shared_params") or {}).items() if name in self._places
        }
        for alias in self._shared:
            self._others.pop(alias, None)
        self._dtype = self._model_dtype(folder, module)

    @staticmethod
    def _inner_folder(folder: Path) -> Path:
        if list(folder.glob("*_optim_states.pt")):
            return folder
        latest = folder / names.DEEPSPEED_LATEST
        if latest.is_file():
            named = folder / latest.read_text(encoding="utf-8").strip()
            if named.parent == folder and named.is_dir():
                return named
            raise CheckpointError(f"{named.name}, which {latest.name} names, is missing")
        return sorted(path.parent for path in folder.glob("*/*_optim_states.pt"))[-1]

    @property
    def is_schedule_free(self) -> bool:
        """Whether a schedule-free optimizer wrote it."""
        return "train_mode" in self.groups[0]

    def _model_dtype(self, folder: Path, module: Mapping[str, Any]) -> torch.dtype:
        """The type of the weights that were trained; the partitions are float32 always."""
        for name in self._places:
            if isinstance(module.get(name), Tensor) and module[name].numel():
                return module[name].dtype
        if (folder / names.MODEL_FILE).is_file():
            for name, entry in names.read_header(folder / names.MODEL_FILE).items():
                if name in self._places:
                    return names.torch_dtype(entry)
        return torch.float32

    def _place_parameters(self) -> dict[str, tuple[int, int, tuple[int, ...]]]:
        """Name -> the flat vector that a parameter is in, where it starts there, and its shape."""
        places = {}
        paddings = self._ranks[0].get("param_alignment_paddings")
        shapes: list[Mapping[str, Any]] = self._model["param_shapes"]
        if self._stage != 3:
            for group, of_group in enumerate(shapes):
                offset = 0
                for position, (name, shape) in enumerate(of_group.items()):
                    places[name] = (group, offset, tuple(shape))
                    offset += math.prod(shape) + (paddings[group][position] if paddings else 0)
            return places
        lengths = [len(flat) for flat in self._flat(0, _SHOWN)]
        number, offset = 0, 0
        for of_group in shapes:
            for name, shape in of_group.items():
                while number < len(lengths) and offset >= lengths[number]:
                    number, offset = number + 1, 0
                places[name] = (number, offset, tuple(shape))
                offset += math.ceil(math.prod(shape) / len(self._ranks))
        return places

    def _flat(self, rank: int, what: str) -> list[Tensor]:
        """The flat vectors of one rank."""
        if what == _SHOWN:
            content = self._ranks[rank]
            for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
                if key in content:
                    return content[key]
            raise CheckpointError("the checkpoint holds no fp32 weights")
        states = self._states[rank]["state"]
        return [states[number][what] for number in sorted(states)]

    @_form_known()
    def gather(self, name: str, what: str) -> Tensor:
        """One parameter (or a state tensor of it), from the parts of all ranks."""
        number, offset, shape = self._places[name]
        elements = math.prod(shape)
        if self._stage == 3:
            part = math.ceil(elements / len(self._ranks))
            parts = [self._flat(rank, what)[number][offset : offset + part] for rank in range(len(self._ranks))]
            return torch.cat(parts)[:elements].view(shape).detach()
        parts, start = [], 0
        for rank in range(len(self._ranks)):
            flat = self._flat(rank, what)[number].view(-1)
            begin, end = max(offset - start, 0), min(offset + elements - start, len(flat))
            if begin < end:
                parts.append(flat[begin:end])
            start += len(flat)
        return torch.cat(parts).view(shape).detach()

    @cached_property
    @_form_known()
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            **{name: place[2] for name, place in self._places.items()},
            **{name: tuple(tensor.shape) for name, tensor in self._others.items()},
            **{name: shape for name, (shape, _) in self._frozen.items()},
        }

    @cached_property
    @_form_known()
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {
            **dict.fromkeys(self._places, self._dtype),
            **{name: tensor.dtype for name, tensor in self._others.items()},
            **{name: parts[0].dtype for name, (_, parts) in self._frozen.items()},
        }

    @_form_known()
    def read(self, name: str) -> Tensor:
        if name in self._frozen:
            shape, parts = self._frozen[name]
            return torch.cat(parts)[: math.prod(shape)].view(shape)
        return self.gather(name, _SHOWN) if name in self._places else self._others[name]

    @property
    @_form_known()
    def stored(self) -> dict[str, Stored]:
        """Name -> optimizer state, for every trained parameter."""
        if not self.is_schedule_free:
            return {}
        keys = set(next(iter(self._states[0]["state"].values()), {}))
        owner = self._groups_of_vectors()
        return {
            name: Stored(_State(self, name, keys), self.groups[owner[number]])
            for name, (number, _, _) in self._places.items()
        }

    def _groups_of_vectors(self) -> list[int]:
        """The parameter group of each flat vector."""
        return [group for group, content in enumerate(self.groups) for _ in content["params"]]


def _frozen(model_files: list[Path]) -> dict[str, tuple[tuple[int, ...], list[Tensor]]]:
    """Shape and parts of each parameter that ZeRO-3 does not train; each rank's file holds a part."""
    models = [_load(path) for path in model_files]
    shapes: Mapping[str, Any] = models[0].get("frozen_param_shapes") or {}
    return {
        name: (tuple(shape), [model["frozen_param_fragments"][name] for model in models])
        for name, shape in shapes.items()
    }


class AsWritten(Weights):
    """DeepSpeed's tensors by the names that the weight files beside them give them: an adapter has others there.

    Args:
        checkpoint: DeepSpeed's own files.
        written: the weight files.
        names: for each tensor in them that was trained, its name in DeepSpeed's.
    """

    def __init__(self, checkpoint: DeepSpeedCheckpoint, written: Weights, names: Mapping[str, str]):
        self._checkpoint, self._written, self._names = checkpoint, written, names

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._written.shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return self._written.dtypes

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._names[name]) if name in self._names else self._written.read(name)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._written.metadata

    @property
    def layout(self) -> Mapping[str, list[str]]:
        return self._written.layout

    def name_in_file(self, name: str) -> str:
        return self._written.name_in_file(name)


class _State(Mapping[str, Tensor]):
    """One parameter's optimizer state; a tensor is put together when it is asked for."""

    def __init__(self, checkpoint: DeepSpeedCheckpoint, parameter: str, keys: set[str]):
        self._checkpoint, self._parameter, self._keys = checkpoint, parameter, keys

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys:
            raise KeyError(name)
        return self._checkpoint.gather(self._parameter, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _rank(name: str) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(match[1]) if match else 0
