"""What schedule-free users watch besides the loss: how much a step still moves the average, and how far x is from y."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, precision, sharding
from hf_schedulefree.weights import WeightSwitch

if TYPE_CHECKING:
    from accelerate import Accelerator

_COUNTERS = ("k", "lr_max", "r", "weight_lr_power", "weight_sum")


def progress(switch: WeightSwitch, accelerator: "Accelerator") -> dict[str, float]:
    """The metrics that the Trainer logs beside the training loss; every process must call this.

    Returns:
        `averaging_weight`: c of the last step, with which the newest z entered the average x (first parameter group).
        `relative_distance`: |x - y| / |y| over all trained parameters, in the 2-norm.
        Each is left out where the optimizer does not tell it.
    """
    metrics = {}
    c = averaging_weight(switch.param_groups[0])
    if c is not None:
        metrics["averaging_weight"] = c
    with switch.reaching_parameters():
        squares = squared_norms(switch.optimizer)
    squares = accelerator.reduce(squares.to(accelerator.device), reduction="sum")
    distance, norm = squares.sqrt().tolist()
    if norm > 0:
        metrics["relative_distance"] = distance / norm
    return metrics


def averaging_weight(group: dict[str, Any]) -> float | None:
    """c of the last step of a parameter group; None before the first, or if the group does not count as ours do."""
    if not all(key in group for key in _COUNTERS) or group["k"] < 1:
        return None
    r, power = group["r"], group["weight_lr_power"]
    _, weight = averaging.averaging_weight(group["k"] - 1, group["lr_max"], r, power, weight_sum=0.0)
    return float(weight / group["weight_sum"]) if group["weight_sum"] else 0.0


@torch.no_grad()
def squared_norms(optimizer: Any) -> Tensor:
    """[|x - y|^2, |y|^2] over what this process holds, in one pass that forms no x: x - y = (1 - 1/beta)(z - y)."""
    distances, norms = [], []
    for group in optimizer.param_groups:
        if "train_mode" not in group:  # a wrapper of another package, whose z and beta are elsewhere
            continue
        beta = group["betas"][0] if "betas" in group else group.get("momentum")
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "z" not in state or not beta:
                continue
            z = sharding.local(state["z"])
            if group["train_mode"] is False and "y" not in state:
                y = averaging.y_from_x(precision.wide(p), z, beta)  # true to rounding
            else:
                y = precision.wide(state.get("y", p), state)
            distances.append((1 - 1 / beta) ** 2 * torch.linalg.vector_norm(z - y, dtype=torch.float32) ** 2)
            norms.append(torch.linalg.vector_norm(y, dtype=torch.float32) ** 2)
    if not norms:
        return torch.zeros(2)
    device = norms[0].device
    return torch.stack([torch.stack([value.to(device) for value in values]).sum() for values in (distances, norms)])
