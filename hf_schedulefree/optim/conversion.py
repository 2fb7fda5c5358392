"""Optimizer state that was saved in another precision than the one it is loaded into."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, pages, precision, sharding
from hf_schedulefree.optim.precision import Y_LOW, Storage

# Of a state that was saved by this package, for so many parameters.
LOST_Y = (
    "The loaded optimizer state was saved in eval mode, but the parked y of %d parameters is not in it: y will follow "
    "from x and z, but for rounding. torch.distributed.checkpoint loads no more than the optimizer's own state has: to "
    "load such a checkpoint exactly, be in eval mode, as a new optimizer is."
)


def undo_casts(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give the state the dtypes again in which it was saved: torch has cast all of it to those of the parameters."""
    ids = (i for group in state_dict["param_groups"] for i in group["params"])
    params = (p for group in optimizer.param_groups for p in group["params"])
    for i, p in zip(ids, params, strict=True):
        for name, saved in state_dict["state"].get(i, {}).items():
            kept = optimizer.state[p].get(name) if p in optimizer.state else None
            if isinstance(kept, Tensor) and kept.dtype != saved.dtype:
                optimizer.state[p][name] = saved.to(device=p.device)


def gatherable(state: Any) -> Any:
    """The state of one parameter as it is saved: of a `DTensor`, `y_low` as int32, as no collective takes int16.

    It is a dict of its own, out of which a later switch takes no y. What somebody else has put beside the states stays
    what it is.
    """
    if not isinstance(state, dict):
        return state
    low = state.get(Y_LOW)
    if low is None or not sharding.is_sharded(low):
        return dict(state)
    return {**state, Y_LOW: low.to(torch.int32)}


def fits(p: Tensor, state: Mapping[str, Any], storage: Storage | None) -> bool:
    """Whether the state of one parameter, in train mode, is kept in `storage`: `convert` would change nothing."""
    return (Y_LOW in state) == bool(storage and storage.low_bits) and all(
        state[name].dtype == (p.dtype if storage is None else storage.dtype(name))
        for name in ("z", "exp_avg_sq", Y_LOW)
        if name in state
    )


def convert(p: Tensor, state: dict[str, Tensor], storage: Storage | None) -> list[str]:
    """Bring the state of one parameter into `storage`: tensors are replaced, never written to.

    Values are rounded to nearest where the new storage is narrower.

    Returns:
        What was changed, in words.
    """
    changes = []
    if Y_LOW in state and state[Y_LOW].dtype != torch.int16:  # saved by `gatherable`
        state[Y_LOW] = state[Y_LOW].to(torch.int16)
    has_low, keeps_low = Y_LOW in state, storage is not None and storage.low_bits
    parked = precision.wide(state["y"], state) if "y" in state and state["y"].dtype != p.dtype else None
    if has_low and not keeps_low:
        del state[Y_LOW]
        changes.append(f"{Y_LOW} dropped")
    elif keeps_low and (not has_low or parked is not None or _is_of_other_half(state, p.dtype)):
        state[Y_LOW] = pages.zeros_like(p, torch.int16)
        changes.append(f"{Y_LOW} {'renewed' if has_low else 'added'}")
    for name, kept in list(state.items()):
        if not (isinstance(kept, Tensor) and kept.is_floating_point()):
            continue
        dtype = p.dtype if storage is None or name == "y" else storage.dtype(name)
        if kept.dtype != dtype:
            state[name] = kept.to(dtype)
            changes.append(f"{name} from {kept.dtype} to {dtype}")
    if parked is not None:
        precision.store_y(parked, state["y"], state)
    return changes


def _is_of_other_half(state: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether it was kept for parameters of the other half-precision dtype, whose low bits mean something else."""
    return "z" in state and state["z"].dtype in precision.HALF_DTYPES and state["z"].dtype != dtype


def refuse_others(state_dict: Mapping[str, Any]) -> None:
    """Raise for the state of another kind of optimizer: it would be dropped, or its averaging begin at 0 again.

    What schedule-free optimizers of `schedulefree` and of this package count in their groups is k. (Those of
    `pytorch_optimizer` have z, but count otherwise.)
    """
    for group in state_dict["param_groups"]:
        if "k" not in group and any(state_dict["state"].get(i) for i in group["params"]):
            raise ValueError(
                "The optimizer state has no counter k in its groups: it was written by another package than "
                "schedulefree or hf_schedulefree, and cannot be continued. Load its weights without it."
            )
        if group.get("inner_momentum"):
            raise ValueError(
                f"The optimizer state was written with inner_momentum={group['inner_momentum']}, which there is not "
                "here. Load its weights without it."
            )


def convert_loaded(p: Tensor, state: dict[str, Tensor], storage: Storage | None, beta: float) -> tuple[list[str], bool]:
    """As `convert`, for a state that may hold a parked y: the parameter has to show the x of the converted state then.

    Where the parameter does not hold the x of the saved state (the weights may be loaded later), the parked y is
    dropped, and y will follow from the weights.

    Returns:
        What was changed, and whether the parameter, which is not written to, held x: it is another one now.
    """
    for name in state.keys() - precision.usable(state).keys():
        del state[name]
    saved = dict(state)
    changes = convert(p, state, storage)
    if not (changes and "y" in saved):
        return changes, False
    shows_x = averaging.same_bits(sharding.local(p), precision.rounded_x(saved, beta).to(p.dtype))
    if not shows_x:
        del state["y"]
    return changes, shows_x


def message(changes: Mapping[str, int], state: str = "loaded optimizer state") -> str:
    """What to tell the user about converted state: `changes` counts the tensors of each change."""
    listed = ", ".join(f"{change} ({count} tensors)" for change, count in changes.items())
    return (
        f"The {state} was kept in another precision and is converted: {listed}. To continue a run bit "
        "for bit, use the state_precision and the dtype of the model that it was started with."
    )
