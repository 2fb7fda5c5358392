"""The counters of a group that is stepped under a CUDA graph: tensors on its device, which a replay advances.

A captured step runs no Python at its replay. So with `capturable=True` whatever a step counts is a 0-dimensional
float64 tensor in the group, written in place; the formulas of `averaging` and of the optimizers take it as they take a
number.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_schedulefree.optim.averaging import Scalar

COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr")


def place_counters(group: dict[str, Any]) -> None:
    """Before a step: the counters as numbers, those of a capturable group as tensors beside its first parameter."""
    if not group["capturable"]:
        if isinstance(group["k"], Tensor):
            group.update(plain_counters(group))
        return
    device = group["params"][0].device
    if isinstance(group["k"], Tensor) and group["k"].device == device:
        return
    for name in COUNTERS:
        group[name] = torch.tensor(float(group[name]), dtype=torch.float64, device=device)


def plain_counters(group: Mapping[str, Any]) -> dict[str, float]:
    """The counters as Python's numbers, as checkpoints hold them; waits for the device if they are there."""
    return {name: int(group[name]) if name == "k" else float(group[name]) for name in COUNTERS}


def set_counters(group: dict[str, Any], counters: Mapping[str, Scalar]) -> None:
    """Give the counters new values, all at once, or in the tensors that they are in."""
    if not isinstance(group["k"], Tensor):
        group.update(counters)
        return
    for name, value in counters.items():
        group[name].copy_(value)


def learning_rate(group: Mapping[str, Any]) -> Scalar:
    """The group's `lr`: a Python number, or for a capturable group a tensor beside its counters.

    Only a tensor on the device is read again at a replay.
    """
    lr = group["lr"]
    if not group["capturable"]:
        return float(lr)
    k = group["k"]
    if isinstance(lr, Tensor) and lr.device == k.device:
        return lr.to(k.dtype).reshape(())
    return torch.full_like(k, float(lr))


def check_capture(optimizer: Optimizer) -> None:
    """Refuse what a capture would get wrong without a word.

    Raises:
        RuntimeError: a step is captured that is not capturable, or is the first one.
    """
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            f"{name}.step() is being captured in a CUDA graph, which would repeat this one step's learning rate "
            "and averaging weight. Make the optimizer with capturable=True."
        )
    if not all(p in optimizer.state for group in groups for p in group["params"] if p.grad is not None):
        raise RuntimeError(
            f"{name}.step() is being captured in a CUDA graph before its state exists, which every replay would "
            "create anew. Make a step, or call init_state(), before the capture."
        )
