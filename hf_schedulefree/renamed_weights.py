"""Checkpoints whose weights have other names and shapes than the model's own: the Trainer does not read them back.

Since version 5 transformers keeps the experts of a mixture in one tensor, and has other names than it had; it saves
both in the former way, and `from_pretrained` converts them. The Trainer calls `load_state_dict`, which passes over what
it does not know, and so leaves these weights as they are. The same goes for what was saved of a model that
`torch.compile(model)` returned, whose names have one part more.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_schedulefree.rng import generators_restored


@contextlib.contextmanager
def renamed_weights_loaded(model: nn.Module, checkpoint: str) -> Iterator[None]:
    """Within: `model.load_state_dict` loads what lies in `checkpoint` under other names, too.

    Args:
        model: not wrapped.
        checkpoint: the folder that is read.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "is_quantized", False):
        yield
        return
    own, load = vars(model).get("load_state_dict"), model.load_state_dict
    converted: dict[str, Tensor] | None = None  # once, however many files there are

    def load_converted(weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        nonlocal converted
        names = model.state_dict().keys()
        weights = {name if name in names else _without_compiler(name): value for name, value in weights.items()}
        if converted is None and not weights.keys() <= names:
            converted = _converted(model, checkpoint)
        if converted is not None:
            known = {name: value for name, value in weights.items() if name in names}
            weights = {**converted, **known}
        return load(weights, *args, **kwargs)

    model.load_state_dict = load_converted
    try:
        yield
    finally:
        vars(model).pop("load_state_dict", None)
        if own is not None:
            model.load_state_dict = own


def _without_compiler(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _converted(model: PreTrainedModel, checkpoint: str) -> dict[str, Tensor]:
    """The weights in a folder, named and shaped as the model's; in float32, which holds all other types exactly."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "distributed_config"):
        config.distributed_config = None  # whole tensors are wanted
    with generators_restored():  # it draws what the folder does not have
        loaded, report = type(model).from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True
        )
    absent = {*report["missing_keys"]}
    return {name: value for name, value in loaded.state_dict().items() if name not in absent}
