"""`ScheduleFreeOptimizer`: modes, state, validation and the skeleton of a step, shared by every optimizer here."""

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from hf_schedulefree.optim import (
    averaging,
    capturable,
    conversion,
    kernels,
    pieces,
    precision,
    precision_step,
    sharding,
    switching,
)
from hf_schedulefree.optim.averaging import Scalar
from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.kernels import IMPLEMENTATIONS, Implementation
from hf_schedulefree.optim.kernels.numbers import StepNumbers
from hf_schedulefree.optim.option_ranges import check_options
from hf_schedulefree.optim.precision import RandomKey, Storage
from hf_schedulefree.optim.precision_step import HalfRow
from hf_schedulefree.optim.switching import PARKS, Park, Residuals

logger = logging.getLogger(__name__)

# Counters of a group at the start of a run; plain numbers, as the Trainer loads checkpoints with weights_only=True.
_FRESH_COUNTERS = dict(zip(capturable.COUNTERS, (0, 0.0, -1.0, 0.0), strict=True))

# `parked_k` of a group whose y is in the model, not in the state.
_NOT_PARKED = -1


class ScheduleFreeOptimizer(torch.optim.Optimizer):
    """Base of the schedule-free optimizers (https://arxiv.org/abs/2405.15682); see `averaging` for the equations.

    The model's parameters hold y in train mode (gradients are taken there) and the averaged weights x in eval mode
    (evaluate, save and publish these). As with the `schedulefree` package, call `.train()` before training and
    `.eval()` before reading the weights; an optimizer starts in eval mode.

    `.eval()` parks y and `.train()` brings back the very same bits. A `state_dict` taken in eval mode contains the
    parked y, so the return is exact after a checkpoint, too.

    A subclass gives its direction (`_direction`), its learning-rate factor (`_lr_factor`) and the name of its
    averaging beta (`_beta`). It never touches x, y or z.

    State per parameter, created at the parameter's first gradient: `z`, what the subclass adds, `y` while a copy of it
    is parked, and for half-precision parameters `y_low`, 16 more bits of y (see `state_precision`). Group keys are
    those of `schedulefree` 1.4.1 where the meaning is the same, and `state_dict`s load in both directions.

    Two group options concern parameters in bfloat16 or float16 only, whose small updates would be rounded away; others
    keep everything in their own dtype:

    - `state_precision`: "split" (y is the parameter and 16 more bits in the state, z and the second moment are
      stochastically rounded; 8 bytes per parameter, the parameter included), "stochastic" (all of them stochastically
      rounded; 6 bytes), "full" (y as in "split", the others in float32; 12 bytes), "parameter" (all in the parameter's
      dtype, rounded to nearest, as in `schedulefree`: x is not the average any more; 6 bytes), or None ("split").
    - `rounding_seed`: seeds the stochastic rounding, which draws nothing from torch's generators.

    Args:
        params: parameters or parameter groups; a group may override every option below.
        options: the group defaults (lr, weight_decay, warmup_steps, r, weight_lr_power, capturable and the subclass's
            own). With capturable=True, `step` may be captured in a CUDA graph after a first step: the counters are
            tensors on the device, and so is an `lr` that is to change from replay to replay.
        implementation: "for-loop" (one tensor at a time), "foreach" (multi-tensor operations), "fused" (one pass over
            memory, where a compiler is at hand: see `kernels`) or None ("fused", but with less than a million
            parameters on CPU by torch's operations: numba would cost more than it saves). All give the same numbers
            within rounding.
        park: how y is kept in eval mode: "copy" (one more copy of the parameters), "residual" (1 byte per parameter: y
            follows from x and z but for rounding, and that is what is kept) or None ("residual"). Where a residual will
            not do (it takes float32 or float64 on CPU, and the compiled kernels) it is a copy. Exact in either way.
        foreach: accepted for code written for `schedulefree`: True means implementation="foreach", False "for-loop".

    Raises:
        ValueError: an option is out of range; the message names it, its value and the range.
    """

    # Inside `state_dicts_at_x`.
    _state_dicts_at_x = False

    def __init__(
        self,
        params: Iterable[Any],
        options: dict[str, Any],
        *,
        implementation: Implementation | None = None,
        park: Park | None = None,
        foreach: bool | None = None,
    ):
        if foreach is not None:
            if implementation is not None:
                raise ValueError(
                    f"implementation={implementation!r} and foreach={foreach!r} were both given; give one of them"
                )
            implementation = "foreach" if foreach else "for-loop"
        if implementation is not None and implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={implementation!r} is unknown; expected None or one of {IMPLEMENTATIONS}")
        if park is not None and park not in PARKS:
            raise ValueError(f"park={park!r} is unknown; expected None or one of {PARKS}")
        self.implementation = implementation
        self.park = park
        self._residuals = Residuals()
        self._forget_parts()
        check_options(type(self).__name__, options)
        super().__init__(params, {**options, **_FRESH_COUNTERS, "train_mode": False, "parked_k": _NOT_PARKED})

    # What a subclass gives

    def _beta(self, group: dict[str, Any]) -> float:
        """The interpolation factor between z (0) and x (1) at which gradients are taken."""
        raise NotImplementedError

    def _lr_factor(self, group: dict[str, Any]) -> Scalar:
        """The factor on the group's `lr` at this step; by default the linear warm-up."""
        return averaging.warmup_factor(group["k"], group["warmup_steps"])

    def _direction(self, group: dict[str, Any]) -> Direction:
        """The base optimizer's direction d at this step, without weight decay."""
        raise NotImplementedError

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        """The base optimizer's state for one parameter, besides `z`."""
        return {}

    # Modes. A group's `train_mode` is True while the model holds its y, False while it holds its x, and None in the
    # middle of a switch: a switch that was interrupted (Ctrl-C) is completed by the next call, in either direction.

    @property
    def mode(self) -> Literal["train", "eval"]:
        """ "eval" while the model holds x, else "train"."""
        return "eval" if all(group["train_mode"] is False for group in self.param_groups) else "train"

    @torch.no_grad()
    def eval(self) -> None:
        """Show x in the parameters and park y. Does nothing in eval mode; creates no state."""
        for group in self.param_groups:
            if group["train_mode"] is False:
                continue
            group["train_mode"] = None
            beta, started = self._beta(group), list(self._started(group))
            if self._one_pass and self.park != "copy":
                self._residuals.park(group, started, beta)
            parked = self._residuals.params(group)
            copied = [(p, state) for p, state in started if p not in parked]
            for p, state in copied:
                if "y" not in state:
                    state["y"] = p.detach().clone(memory_format=torch.preserve_format)
            switching.show_x(copied, beta, one_pass=self._one_pass)
            group["parked_k"] = int(group["k"])
            group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Bring back exactly the y that `eval` parked. Does nothing in train mode; creates no state.

        If the parameters do not hold x any more (other weights were loaded meanwhile), these weights are kept and the
        optimizer starts anew from them, with a warning.
        """
        replaced = self._copies_replaced()
        for group in self.param_groups:
            if self._residuals.params(group):
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
            if group["train_mode"] is False:
                for p, state in self._started(group):
                    if "y" not in state:  # a state_dict of `schedulefree`: the return is as exact as theirs
                        state["y"] = p.detach().clone(memory_format=torch.preserve_format)
                        y = averaging.y_from_x(precision.wide(p), sharding.local(state["z"]), self._beta(group))
                        precision.store_y(y, state["y"], state)
            group["train_mode"] = None
            for p, state in self._started(group):
                if "y" in state:
                    p.copy_(state["y"])
            for _, state in self._started(group):
                state.pop("y", None)
            self._residuals.forget(group)
            group["parked_k"] = _NOT_PARKED
            group["train_mode"] = True

    @property
    def parked_bytes(self) -> int:
        """The memory that the parked y takes now."""
        return self._residuals.nbytes + sum(state["y"].nbytes for state in self.state.values() if "y" in state)

    @torch.no_grad()
    def weights_replaced(self) -> bool:
        """Whether, in eval mode, the parameters hold anything else than the x that follows from the parked y and z.

        Of sharded parameters (`DTensor`) each process compares its own shard; the answer is the same in all of them.
        """
        return self._copies_replaced() or (self.mode == "eval" and not self._residuals.intact())

    def _copies_replaced(self) -> bool:
        """`weights_replaced` for the parameters whose y is parked as a copy."""
        groups = [group for group in self.param_groups if group["train_mode"] is False]
        if not groups:
            return False
        replaced = any(
            not switching.holds_x(
                ((p, state) for p, state in self._started(group) if "y" in state),
                self._beta(group),
                one_pass=self._one_pass,
            )
            for group in groups
        )
        return sharding.in_any_process(replaced, (p for group in groups for p in group["params"]))

    # x for files, while the parameters hold y and go on to hold it.

    def x_in_pieces(self) -> list[tuple[Tensor, pieces.AveragedPieces]]:
        """In train mode, what `eval` would show: the parameters that have had a gradient, each with its x in pieces.

        Raises:
            ValueError: a parameter, or its state, is not contiguous.
        """
        return [
            (p, pieces.AveragedPieces(p, state, self._beta(group), one_pass=self._one_pass))
            for group in self.param_groups
            for p, state in self._started(group)
        ]

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
        small = sum([p.numel() for p in params]) < kernels.COMPILED_FROM
        return not small or any(p.dtype in precision.HALF_DTYPES for p in params)

    def restart(self) -> None:
        """Start anew from the weights that the model holds: x = y = z, counters and moments as in a new optimizer."""
        self.state.clear()
        self._residuals.clear()
        for group in self.param_groups:
            group.update(_FRESH_COUNTERS, parked_k=_NOT_PARKED)
        self._forget_parts()

    # State

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state of every trainable parameter that has none yet, as if its first gradient had just come."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._init_state(group, p)

    def _init_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if "z" not in state:
            state["z"] = p.detach().clone(memory_format=torch.preserve_format)
            state.update(self._new_state(p))
            conversion.convert(p, state, self._storage(group, p))
            if group["train_mode"] is False:
                state["y"] = p.detach().clone(memory_format=torch.preserve_format)
                group["parked_k"] = int(group["k"])
        return state

    def _storage(self, group: dict[str, Any], p: Tensor) -> Storage | None:
        """How the state of a half-precision parameter is kept; None if simply in the parameter's dtype."""
        return precision.storage_for(p.dtype, group["state_precision"])

    def _started(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The parameters of a group that have had a gradient, with their state (reading creates none)."""
        for p in group["params"]:
            state = self.state.get(p)
            if state and "z" in state:
                yield p, state

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the groups also carry `foreach`, which `schedulefree` needs to load them."""
        self._residuals.become_copies(self.state)
        state_dict = super().state_dict()
        if self._state_dicts_at_x:
            pieces.park(self.param_groups, state_dict)
        for group in state_dict["param_groups"]:
            group["foreach"] = self.implementation != "for-loop"
            group.update(capturable.plain_counters(group))
        state_dict["state"] = {i: conversion.gatherable(state) for i, state in state_dict["state"].items()}
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; a state that was kept in another precision (also by `schedulefree`) is converted to this one's.

        Precision and `capturable` are this object's choice, as the dtype of the parameters is; the rounding seed is
        that of the run.
        """
        loaded: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, state_dict: loaded.append(state_dict))
        own = [{name: group[name] for name in ("state_precision", "capturable")} for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, choices in zip(self.param_groups, own, strict=True):
            group.update(choices)
        conversion.undo_casts(self, loaded[0])
        changes: Counter[str] = Counter()
        for group in self.param_groups:
            for p, state in self._started(group):
                changes.update(conversion.convert_loaded(p, state, self._storage(group, p), self._beta(group)))
        if changes:
            logger.warning(conversion.message(changes))

    def __getstate__(self) -> dict[str, Any]:
        self._residuals.become_copies(self.state)
        return {**super().__getstate__(), "implementation": self.implementation, "park": self.park}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._residuals = Residuals()
        for group in self.param_groups:
            group.pop("foreach", None)  # how to compute is this object's choice, not the checkpoint's
            for key, default in self.defaults.items():
                group.setdefault(key, default)
            # A y parked at another step was left there by an optimizer that does not know it.
            if group["train_mode"] or group["parked_k"] != group["k"]:
                for _, param_state in self._started(group):
                    param_state.pop("y", None)
                group["parked_k"] = _NOT_PARKED
        self._forget_parts()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new group is validated and joins in the mode that the optimizer is in."""
        check_options(type(self).__name__, param_group)
        if self.param_groups:
            param_group.setdefault("train_mode", self.mode == "train")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(f"{type(self).__name__} takes real parameters; got one of dtype {p.dtype}")
        if group["state_precision"] == "parameter" and any(p.dtype in precision.HALF_DTYPES for p in group["params"]):
            warnings.warn(
                f"{type(self).__name__}: with state_precision='parameter' and half-precision parameters, small updates "
                "are rounded away, and x is not the average any more. Leave it out (or use 'split', 'stochastic' or "
                "'full') to keep the average.",
                stacklevel=2,
            )

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; parameters without a gradient are left alone, and gradients are not overwritten.

        Args:
            closure: reevaluates the model at y and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: in eval mode, or for sparse gradients.
        """
        if self._is_dry_run():
            self.init_state()
            return None
        if not all(group["train_mode"] is True for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() was called in eval mode, where the model holds the averaged weights x. "
                "Call optimizer.train() before computing gradients, and optimizer.eval() before evaluating or saving."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capturable.check_capture(self)
        one_pass = self._one_pass
        for index, group in enumerate(self.param_groups):
            if group["params"]:
                self._recall_counters(group)
                self._step_group(index, group, one_pass=one_pass)
                self._keep_counters(group)
        return loss

    # DeepSpeed ZeRO-3 calls step() once per sub-group: `params` then holds one part of a group, is empty in the other
    # groups, and each part has made its own number of steps. As soon as a group turns out to be stepped in parts, the
    # counters of each part are kept with its parameters, and the group shows those of the part stepped last.

    def _forget_parts(self) -> None:
        self._stepped: dict[int, list[Tensor]] = {}  # id of a group -> the parameters that it stepped last
        self._before: dict[int, dict[str, float]] = {}  # id of a group -> its counters before its first step here
        self._in_parts: set[int] = set()  # the ids of the groups that are stepped in parts

    def _recall_counters(self, group: dict[str, Any]) -> None:
        """Before a step: give the group the counters of the parameters that it holds now."""
        if group["capturable"]:
            return
        key = id(group)  # not its place: DeepSpeed ZeRO-1 and -2 show one group at a time
        own = next((state.get("counters") for _, state in self._started(group)), None)
        stepped = self._stepped.get(key)
        if stepped is None:
            self._before[key] = {name: group[name] for name in _FRESH_COUNTERS}
        elif key not in self._in_parts and stepped[0] is not group["params"][0]:
            if set(map(id, stepped)).isdisjoint(map(id, group["params"])):
                self._in_parts.add(key)
                self._store_counters(group, stepped)
        if own is not None:
            self._in_parts.add(key)
            group.update(own)
        elif key in self._in_parts:
            group.update(self._before[key])

    def _keep_counters(self, group: dict[str, Any]) -> None:
        """After a step: keep the group's counters with its parameters, if the group is stepped in parts."""
        if group["capturable"]:
            return
        self._stepped[id(group)] = list(group["params"])
        if id(group) in self._in_parts:
            self._store_counters(group, group["params"])

    def _store_counters(self, group: dict[str, Any], params: Iterable[Tensor]) -> None:
        for p in params:
            if "z" in self.state.get(p, ()):
                self.state[p]["counters"] = {name: group[name] for name in _FRESH_COUNTERS}

    def _step_group(self, index: int, group: dict[str, Any], *, one_pass: bool) -> None:
        capturable.place_counters(group)
        lr = capturable.learning_rate(group) * self._lr_factor(group)
        capturable.set_counter(group, "scheduled_lr", lr)  # the rate this step really used, for logging
        capturable.set_counter(group, "lr_max", averaging.at_least(lr, group["lr_max"]))
        c, weight_sum = averaging.averaging_weight(
            group["k"], group["lr_max"], group["r"], group["weight_lr_power"], group["weight_sum"]
        )
        capturable.set_counter(group, "weight_sum", weight_sum)
        numbers = StepNumbers(lr, self._beta(group), c, group["weight_decay"], self._direction(group), group["k"])
        rows: list[kernels.Row] = []
        half_rows: list[HalfRow] = []
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        for position, p in enumerate(group["params"], start=first):
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
            state = self.state[p]
            if "z" not in state:
                state = self._init_state(group, p)
            storage = self._storage(group, p) if p.dtype in precision.HALF_DTYPES else None
            if storage is None:
                rows.append((p, state["z"], state.get("exp_avg_sq"), grad))
                continue
            key = RandomKey(group["rounding_seed"], position)
            half_rows.append(HalfRow(p, grad, state, storage, key))
        if rows:
            kernels.step_(rows, numbers, self.implementation, compiled=one_pass)
        if half_rows:
            precision_step.step_(half_rows, numbers, self.implementation)
        capturable.set_counter(group, "k", group["k"] + 1)

    def _is_dry_run(self) -> bool:
        """Whether this is torch.distributed.checkpoint's way to create the state: a step at lr 0 on zero gradients.

        It must neither raise in eval mode nor count as a step.
        """
        if self.state or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)
