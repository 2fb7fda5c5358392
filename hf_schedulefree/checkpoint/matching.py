"""Which optimizer state belongs to which tensor: optimizers number their parameters, weight files name them."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from hf_schedulefree.checkpoint.contents import OptimizerState, Stored, Weights
from hf_schedulefree.checkpoint.files import read_json
from hf_schedulefree.checkpoint.record import CheckpointError, Record

# Two tensors are told apart by so many of their elements.
_SAMPLE = 2**16

# How much closer the right tensor must be than any other of its shape.
_MARGIN = 0.7


def match_states(folder: Path, weights: Weights, optimizer: OptimizerState, record: Record | None) -> dict[str, Stored]:
    """Tensor name -> its optimizer state, for every tensor that was trained.

    The names come from the record or the optimizer file; otherwise from the model that the folder's `config.json`
    describes, whose parameters the Trainer numbers by its rule for weight decay; otherwise (an adapter without its base
    model, a model that transformers does not know) from the tensors themselves, as z lies close to x and y.

    Raises:
        CheckpointError: the states and the tensors do not fit, or cannot be told apart.
    """
    matched = _match_parameters(folder, weights, optimizer, record)
    _add_tied(weights, matched)
    _refuse_lost(weights, optimizer, matched)
    return matched


def _refuse_lost(weights: Weights, optimizer: OptimizerState, matched: dict[str, Stored]) -> None:
    """Experts, for one: trained as one tensor and saved as many. Part of x must not pass for x."""
    known = {id(stored.state) for stored in matched.values()}
    lost = sum("z" in state and id(state) not in known for entries in optimizer.entries for state in entries)
    if lost and weights.shapes.keys() - matched.keys():
        raise CheckpointError(
            f"{lost} trained parameters have other names or shapes in the weight file than in the model, and cannot be "
            "matched with their optimizer state. ScheduleFreeTrainer can resume from this checkpoint; its save_model() "
            "writes x"
        )


def _match_parameters(
    folder: Path, weights: Weights, optimizer: OptimizerState, record: Record | None
) -> dict[str, Stored]:
    named = optimizer.names or (record.parameters if record is not None and record.parameters else None)
    if named is not None:
        matched = _by_name(weights, optimizer, [[[name] for name in group] for group in named])
        if matched is not None:
            return matched
    layout = _layout_of_config(folder)
    if layout is not None:
        matched = _by_name(weights, optimizer, layout)
        if matched is not None:
            return matched
    return _by_content(weights, optimizer)


def _add_tied(weights: Weights, matched: dict[str, Stored]) -> None:
    """A tensor that holds the very same values as one that was trained is the same parameter under another name."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in matched:
        by_shape.setdefault(weights.shapes[name], []).append(name)
    for name in weights.shapes.keys() - matched.keys():
        for trained in by_shape.get(weights.shapes[name], ()):
            if matched[trained].state and torch.equal(weights.read(name), weights.read(trained)):
                matched[name] = matched[trained]
                break


def _by_name(weights: Weights, optimizer: OptimizerState, names: list[list[list[str]]]) -> dict[str, Stored] | None:
    """Match by the names of each group's parameters (and their aliases, if tied); None if they do not fit."""
    names = [group for group in names if group]
    entries = [(entries, group) for entries, group in zip(optimizer.entries, optimizer.groups, strict=True) if entries]
    if len(names) == 2 and len(entries) == 1:  # no weight-decay groups: the model's own order
        return None
    if [len(group) for group in names] != [len(group) for group, _ in entries]:
        return None
    matched = {}
    for aliases_of_group, (states, group) in zip(names, entries, strict=True):
        for aliases, state in zip(aliases_of_group, states, strict=True):
            tensors = [tensor for alias in aliases for tensor in tensors_of(weights, alias)]
            for tensor in tensors:
                if "z" in state and tuple(state["z"].shape) != weights.shapes[tensor]:
                    return None
                matched[tensor] = Stored(state, group)
    return matched if matched else None


def tensors_of(weights: Weights, parameter: str) -> list[str]:
    """The tensors that hold a parameter. PEFT leaves the adapter's name out of its files."""
    if parameter in weights.shapes:
        return [parameter]
    parts = parameter.split(".")
    folders = {tensor.partition("/")[0] for tensor in weights.shapes if "/" in tensor}
    found = []
    for position, adapter in enumerate(parts):
        shorter = [*parts[:position], *parts[position + 1 :]]
        without_wrapper = [part for part in shorter if part != "modules_to_save"]
        for candidate in (shorter, shorter[:-1], without_wrapper):
            # What lies outside of the adapter's own folder is another's.
            tensor = ".".join(candidate) if adapter not in folders else f"{adapter}/" + ".".join(candidate)
            if tensor in weights.shapes and tensor not in found:
                found.append(tensor)
    return found[:1]


def _layout_of_config(folder: Path) -> list[list[list[str]]] | None:
    """The parameters of the model in `config.json`, in the Trainer's two groups; each with all its names, if tied."""
    if not (folder / "config.json").is_file():
        return None
    architectures = read_json(folder / "config.json").get("architectures") or [None]
    name = architectures[0] if isinstance(architectures, list) else None
    model_class = getattr(transformers, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = model_class(config)
    except Exception:  # whatever a configuration of another version, or a package that is not installed, leads to
        return None
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    groups: list[list[list[str]]] = [[], []]
    for name, parameter in model.named_parameters():
        groups[0 if name in decayed else 1].append(aliases[id(parameter)])
    return groups


def _by_content(weights: Weights, optimizer: OptimizerState) -> dict[str, Stored]:
    """Match each state to the tensor of its shape that is closest to its z.

    A match counts if each of the two is the other's closest by a clear margin; what is left may follow from its place:
    lora_B comes right after the lora_A of the same layer.
    """
    states = [
        (group, number, state)
        for group, entries in enumerate(optimizer.entries)
        for number, state in enumerate(entries)
        if "z" in state
    ]
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(weights.shapes, key=_natural):
        by_shape.setdefault(weights.shapes[name], []).append(name)
    found: dict[tuple[int, int], str] = {}
    for shape, tensors in by_shape.items():
        of_shape = [entry for entry in states if tuple(entry[2]["z"].shape) == shape]
        if not of_shape:
            continue
        distances = _distances([entry[2]["z"] for entry in of_shape], [weights.read(name) for name in tensors])
        for row, (group, number, _) in enumerate(of_shape):
            column = int(distances[row].argmin())
            if _clearly_smallest(distances[row], column) and _clearly_smallest(distances[:, column], row):
                found[group, number] = tensors[column]
    for group, number, state in states:
        before = found.get((group, number - 1), "")
        follows = before.replace("lora_A", "lora_B")
        if (group, number) not in found and follows != before and follows in weights.shapes:
            if weights.shapes[follows] == tuple(state["z"].shape) and follows not in found.values():
                found[group, number] = follows
    unclear = len(states) - len(found)
    if unclear or len(set(found.values())) != len(found):
        raise CheckpointError(
            f"{unclear} of {len(states)} optimizer states cannot be told apart: the checkpoint does not name their "
            "parameters, and they are not those of all parameters of a model of transformers that config.json describes"
            ". With the model as it was trained (the same parameters frozen), ScheduleFreeTrainer can resume from this "
            "checkpoint; its save_model() writes x"
        )
    return {
        name: Stored(optimizer.entries[group][number], optimizer.groups[group])
        for (group, number), name in found.items()
    }


def _distances(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([tensor.reshape(-1)[:_SAMPLE].double() for tensor in one])
    columns = torch.stack([tensor.reshape(-1)[:_SAMPLE].double() for tensor in other])
    center = columns.mean()  # the weights of a norm lie around 1: what differs between them is the rest
    rows, columns = rows - center, columns - center
    return torch.stack([(columns - row).norm(dim=1) / (columns.norm(dim=1) + row.norm() + 1e-30) for row in rows])


def _clearly_smallest(distances: Tensor, position: int) -> bool:
    others = torch.cat([distances[:position], distances[position + 1 :]])
    return len(others) == 0 or bool(distances[position] < _MARGIN * others.min())


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
