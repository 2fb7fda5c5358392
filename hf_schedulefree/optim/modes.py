"""`Modes`: which of x and y the parameters of an optimizer hold, and the way between the two."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hf_schedulefree.optim import averaging, capturable, hooks, kernels, pages, pieces, precision, sharding, switching
from hf_schedulefree.optim.kernels import Implementation
from hf_schedulefree.optim.parts import GroupParts
from hf_schedulefree.optim.switching import Park, Residuals

logger = logging.getLogger(__name__)

# Counters of a group at the start of a run; plain numbers, as the Trainer loads checkpoints with weights_only=True.
FRESH_COUNTERS = dict(zip(capturable.COUNTERS, (0, 0.0, -1.0, 0.0), strict=True))

# Of a group whose y is in the model, not in the state; else the step and the beta with which y was parked, as somebody
# may change beta while x is shown (a scheduler of momentum, say).
NOT_PARKED = {"parked_k": -1, "parked_beta": None}


class Modes:
    """The part of `ScheduleFreeOptimizer` that switches between its modes, and starts anew.

    A group's `train_mode` is True while the model holds its y, False while it holds its x, and None in the middle of a
    switch: one that was interrupted (Ctrl-C) is completed by the next call, in either direction.
    """

    # What the optimizer has.
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    implementation: Implementation | None
    park: Park | None
    _residuals: Residuals
    _parts: GroupParts
    _state_dicts_at_x: bool

    @property
    def mode(self) -> Literal["train", "eval"]:
        """ "eval" while the model holds x, else "train"."""
        return "eval" if all(group["train_mode"] is False for group in self.param_groups) else "train"

    @hooks.never_compiled
    @torch.no_grad()
    def eval(self) -> None:
        """Show x in the parameters and park y. Does nothing in eval mode; creates no state."""
        for group in self.param_groups:
            if group["train_mode"] is False:
                continue
            # What is shown already, if this was interrupted, was computed with the beta of that time.
            beta = self._shown_beta(group) if group["train_mode"] is None else self._beta(group)
            group.update(train_mode=None, parked_k=int(group["k"]), parked_beta=float(beta))
            # Inside a block of torch.autocast a model would go on with the casts that were made of the former weights.
            torch.clear_autocast_cache()
            started = self._started(group)
            if self._one_pass and self.park != "copy":
                self._residuals.park(group, started, beta)
            parked = set(map(id, self._residuals.params(group)))
            copied = [(p, state) for p, state in started if id(p) not in parked]
            self._convert_state(group, [(p, state) for p, state in copied if "y" not in state])
            for p, state in copied:
                if "y" not in state:
                    state["y"] = pages.copy_of(p)
            switching.show_x(copied, beta, one_pass=self._one_pass)
            group["train_mode"] = False

    @hooks.never_compiled
    @torch.no_grad()
    def train(self) -> None:
        """Bring back exactly the y that `eval` parked. Does nothing in train mode; creates no state.

        If the parameters do not hold x any more (other weights were loaded meanwhile), these weights are kept and the
        optimizer starts anew from them, with a warning.
        """
        replaced = self._copies_replaced()
        parked = set(map(id, self._residuals.all_params()))
        for group in self.param_groups:  # also such as somebody has put in the place of others
            if not parked.isdisjoint(map(id, group["params"])):
                group["train_mode"] = None
        if replaced or not self._residuals.restore():
            logger.warning(
                "The weights were replaced while the optimizer was in eval mode: it starts anew from them "
                "(x = y = z, averaging and second moment reset)."
            )
            self.restart()
        for group in self.param_groups:
            if group["train_mode"] is True:
                continue
            torch.clear_autocast_cache()  # as in eval
            if group["train_mode"] is False:
                self._park_what_follows_from_x(group)
            group["train_mode"] = None
            copied = self._copied(group)
            for p, state in copied:
                p.copy_(state["y"])
            for _, state in copied:
                del state["y"]
            self._residuals.forget(group)
            group.update(NOT_PARKED)
            group["train_mode"] = True
        self._residuals.forget_replaced(self.param_groups)

    def _park_what_follows_from_x(self, group: dict[str, Any]) -> None:
        """Of a state_dict of `schedulefree`, which knows no y: the return is as exact as theirs."""
        # What was restored, for a group that somebody has replaced by another one, holds its y already.
        restored = set(map(id, self._residuals.all_params()))
        beta, states, parked = self._beta(group), [], []
        for p, state in self._started(group):
            if "y" not in state and id(p) not in restored:
                y = pages.copy_of(p)
                precision.store_y(averaging.y_from_x(precision.wide(p), sharding.local(state["z"]), beta), y, state)
                states.append(state)
                parked.append({"y": y})
        # These y lead to x but for rounding. So all of them are there and the switch has begun, or nothing has
        # happened: in a call that Python does not interrupt.
        begun = {"train_mode": None, "parked_k": int(group["k"]), "parked_beta": float(beta)}
        list(map(dict.update, [*states, group], [*parked, begun]))

    @property
    def parked_bytes(self) -> int:
        """The memory that the parked y takes now."""
        states = (state for state in self.state.values() if isinstance(state, dict))
        return self._residuals.nbytes + sum(state["y"].nbytes for state in states if "y" in state)

    @hooks.never_compiled
    @torch.no_grad()
    def weights_replaced(self) -> bool:
        """Whether, in eval mode, the parameters hold anything else than the x that follows from the parked y and z.

        Of sharded parameters (`DTensor`) each process compares its own shard; the answer is the same in all of them.
        """
        return self._copies_replaced() or (self.mode == "eval" and not self._residuals.intact())

    def _shown_beta(self, group: dict[str, Any]) -> float:
        """The beta with which x in the parameters, in eval mode, follows from y and z."""
        return self._beta(group) if group["parked_beta"] is None else group["parked_beta"]

    def _copies_replaced(self) -> bool:
        """`weights_replaced` for the parameters whose y is parked as a copy."""
        groups = [group for group in self.param_groups if group["train_mode"] is False]
        if not groups:
            return False
        replaced = any(
            not switching.holds_x(copied, self._shown_beta(group), one_pass=self._one_pass)
            for group in groups
            if (copied := self._copied(group))
        )
        return sharding.in_any_process(replaced, (p for group in groups for p in group["params"]))

    def _copied(self, group: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The parameters of a group whose y is parked as a copy, with their state."""
        known = self.state.get
        return [(p, state) for p in group["params"] if (state := known(p)) and "y" in state and "z" in state]

    # x for files, while the parameters hold y and go on to hold it.

    def x_in_pieces(self) -> list[tuple[Tensor, pieces.AveragedPieces]]:
        """In train mode, what `eval` would show: the parameters that have had a gradient, each with its x in pieces.

        Raises:
            ValueError: a parameter, or its state, is not contiguous.
        """
        one_pass, found = self._one_pass, []
        for group in self.param_groups:
            beta, started = self._beta(group), self._started(group)
            self._convert_state(group, started)
            found += [(p, pieces.AveragedPieces(p, state, beta, one_pass=one_pass)) for p, state in started]
        return found

    @contextlib.contextmanager
    def state_dicts_at_x(self) -> Iterator[None]:
        """Within: `state_dict` in train mode is that of eval mode, with the parameters themselves as the parked y."""
        former, self._state_dicts_at_x = self._state_dicts_at_x, True
        try:
            yield
        finally:
            self._state_dicts_at_x = former

    @property
    def _one_pass(self) -> bool:
        """Whether the compiled kernels for CPU may be used: a choice that stays the same all through a run."""
        if self.implementation is not None:
            return self.implementation == "fused"
        params = [p for group in self.param_groups for p in group["params"]]
        try:
            size = sum([p.numel() for p in params])
        except ValueError:  # a layer that torch makes at its first forward pass (LazyLinear) has no size before
            size = sum([p.numel() for p in params if not is_lazy(p)])
        small = size < kernels.COMPILED_FROM
        return not small or any(p.dtype in precision.HALF_DTYPES for p in params)

    def restart(self) -> None:
        """Start anew from the weights that the model holds: x = y = z, counters and moments as in a new optimizer."""
        # In this order, so that one that was interrupted is made again by the next train().
        for group in self.param_groups:
            group.update(FRESH_COUNTERS, **NOT_PARKED)
        self._parts = GroupParts()
        self.state.clear()
        self._residuals.clear()
