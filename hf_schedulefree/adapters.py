"""Checkpoints of models with several adapters: the Trainer reads back only the first active one.

PEFT saves every adapter but "default" into a folder of its own. From these folders `Trainer._load_best_model` loads
nothing (with a warning), `Trainer._push_from_checkpoint` publishes nothing, and `Trainer._load_from_checkpoint` leaves
one adapter active and trainable where there were several.
Nothing here imports PEFT: without it there is no adapter to keep.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers.trainer_utils import _is_peft_model
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME


def has_adapter_folders(model: nn.Module, checkpoint: str) -> bool:
    """Whether adapters of `model` lie in folders of their own below `checkpoint`."""
    return bool(_adapter_folders(model, checkpoint))


def copy_adapter_folders(model: nn.Module, checkpoint: str, output_dir: str) -> None:
    """Copy the adapters that lie in folders of their own; for a push in training the Trainer copies `default` only."""
    for folder in _adapter_folders(model, checkpoint):
        shutil.copytree(folder, Path(output_dir) / folder.name, dirs_exist_ok=True)


def _adapter_folders(model: nn.Module, checkpoint: str) -> list[Path]:
    if not _is_peft_model(model):
        return []
    folders = [Path(checkpoint) / adapter for adapter in model.peft_config]
    return [folder for folder in folders if _has_adapter(folder)]


def _has_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME))


def load_default(model: nn.Module, checkpoint: str) -> None:
    """Load the adapter that lies beside the folders of others: transformers 5.17 leaves it as it is."""
    beside_others = has_adapter_folders(model, checkpoint) and _has_adapter(Path(checkpoint))
    if beside_others and "default" in model.peft_config:
        model.load_adapter(checkpoint, "default", is_trainable="default" in model.active_adapters)


@contextlib.contextmanager
def active_adapters_kept(model: nn.Module) -> Iterator[None]:
    """After the `with` block the same adapters are active, and the same parameters trainable, as before it."""
    if not _is_peft_model(model):
        yield
        return
    active = list(model.active_adapters)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    yield
    if list(model.active_adapters) != active:
        model.base_model.set_adapter(active)
    for name, p in model.named_parameters():
        if name in trainable:  # not so those of an adapter that only the checkpoint had
            p.requires_grad_(trainable[name])
