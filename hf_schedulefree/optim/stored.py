"""The three sequences of a parameter, read from a stored optimizer state: the inverse of what `state_dict` wrote.

This is the only place, besides the optimizers, that knows how y and z are stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, precision


@dataclass(frozen=True)
class Sequences:
    """x, y and z of one parameter (or of one shard of it), in float64."""

    x: Tensor
    y: Tensor
    z: Tensor


def stored_beta(group: Mapping[str, Any]) -> float | None:
    """The interpolation factor of a stored parameter group: `betas[0]`, or SGD's `momentum`; None if it has neither."""
    beta = group["betas"][0] if "betas" in group else group.get("momentum")
    return None if beta is None else float(beta)


def shows_y(group: Mapping[str, Any]) -> bool:
    """Whether the weights that were stored beside this group are y (it was in train mode), not x."""
    return bool(group["train_mode"])


def read_sequences(state: Mapping[str, Tensor], group: Mapping[str, Any], shown: Tensor) -> Sequences:
    """x, y and z from a stored state.

    Args:
        state: one parameter's entry in the optimizer's `state_dict`. Empty for one that never had a gradient.
        group: its parameter group.
        shown: the weights stored beside it.
    """
    if "z" not in state:
        shown = shown.to(torch.float64)
        return Sequences(shown, shown, shown)
    state = precision.usable(state)
    z = state["z"].to(torch.float64)
    beta = stored_beta(group)
    if shows_y(group):
        y = precision.wide(shown, state).to(torch.float64)
    elif "y" in state and group.get("parked_k", group.get("k")) == group.get("k"):
        y = precision.wide(state["y"], state).to(torch.float64)
        beta = group.get("parked_beta") or beta
    else:
        x = shown.to(torch.float64)
        return Sequences(x, averaging.y_from_x(x, z, beta), z)
    return Sequences(averaging.x_from_y(y, z, beta), y, z)
