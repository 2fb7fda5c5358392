"""`ScheduleFreeOptimizer`: options, state and the skeleton of a step, shared by every optimizer here."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_schedulefree.optim import (
    averaging,
    capturable,
    conversion,
    hooks,
    kernels,
    pages,
    pieces,
    precision,
    precision_step,
    sharding,
)
from hf_schedulefree.optim.averaging import Scalar
from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.kernels import IMPLEMENTATIONS, Implementation
from hf_schedulefree.optim.kernels.numbers import StepNumbers
from hf_schedulefree.optim.modes import FRESH_COUNTERS, NOT_PARKED, Modes
from hf_schedulefree.optim.option_ranges import check_options
from hf_schedulefree.optim.parts import GroupParts
from hf_schedulefree.optim.precision import RandomKey, Storage
from hf_schedulefree.optim.precision_step import HalfRow
from hf_schedulefree.optim.repeated import Choices, Made, RepeatedStep
from hf_schedulefree.optim.switching import PARKS, Park, Residuals

logger = logging.getLogger(__name__)

# What `load_state_dict` gives an optimizer, as other objects.
_REPLACED_BY_LOADING = ("state", "param_groups", "_residuals", "_parts", "_repeated")

# A group, its mode, and those of its parameters, with their states, that have to show another x.
_ToShow = tuple[dict[str, Any], Any, list[tuple[Tensor, dict[str, Tensor]]]]


class ScheduleFreeOptimizer(Modes, torch.optim.Optimizer):
    """Base of the schedule-free optimizers (https://arxiv.org/abs/2405.15682); see `averaging` for the equations.

    The model's parameters hold y in train mode (gradients are taken there) and the averaged weights x in eval mode
    (evaluate, save and publish these). As with the `schedulefree` package, call `.train()` before training and
    `.eval()` before reading the weights; an optimizer starts in eval mode.

    `.eval()` parks y and `.train()` brings back the very same bits. A `state_dict` taken in eval mode contains the
    parked y, so the return is exact after a checkpoint, too. As with torch's optimizers, only one thread may use an
    optimizer at a time.

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
            parameters on CPU by torch's operations: to compile the step would cost more than it saves). All give the
            same numbers within rounding.
        park: how y is kept in eval mode: "copy" (one more copy of the parameters), "residual" (1 byte per parameter: y
            follows from x and z but for rounding, and that is what is kept) or None ("residual"). Where a residual will
            not do (it takes float32 or float64 on CPU, and the compiled kernels) it is a copy. Exact in either way.
        foreach: accepted for code written for `schedulefree`: True means implementation="foreach", False "for-loop".

    Raises:
        ValueError: an option is out of range; the message names it, its value and the range.
    """

    # Inside `state_dicts_at_x`.
    _state_dicts_at_x = False

    # What the last call of `load_state_dict` was given, once the hooks of others have seen to it.
    _loading: Sequence[dict[str, Any]] = ()

    # What torch wraps the `step` of a class in.
    profile_hook_step = staticmethod(hooks.profile_hook_step)

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
        self._parts = GroupParts()
        # By id of the group; one for each, as it keeps the parameters alive: DeepSpeed shows others in turn.
        self._repeated: dict[int, RepeatedStep | None] = {}
        check_options(type(self).__name__, options)
        super().__init__(params, {**options, **FRESH_COUNTERS, "train_mode": False, **NOT_PARKED})

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

    # State

    @torch.no_grad()
    def init_state(self) -> None:
        """Create the state of every trainable parameter that has none yet, as if its first gradient had just come."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._init_state(group, p)

    def _init_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        state = self.state.get(p)
        if not state or "z" not in state:
            # All of it or nothing joins, as memory may be short, or somebody may interrupt.
            with torch.inference_mode(False), torch.no_grad():  # a step could not write to what is created in that mode
                new = {"z": pages.copy_of(p), **self._new_state(p)}
                conversion.convert(p, new, self._storage(group, p))
                if group["train_mode"] is False:
                    new["y"] = pages.copy_of(p)
                    group["parked_k"] = int(group["k"])
            state = self.state[p]
            state.update(new)
        return state

    def _storage(self, group: dict[str, Any], p: Tensor) -> Storage | None:
        """How the state of a half-precision parameter is kept; None if simply in the parameter's dtype."""
        return precision.storage_for(p.dtype, group["state_precision"])

    def _convert_state(self, group: dict[str, Any], started: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Bring state along, if its parameters, which hold y, were given another dtype, or the group a precision."""
        changes: Counter[str] = Counter()
        for p, state in started:
            storage = self._storage(group, p)
            if not conversion.fits(p, state, storage):
                with torch.inference_mode(False), torch.no_grad():  # a step could not write to what is created in it
                    changes.update(conversion.convert(p, state, storage))
        if changes:
            logger.warning(conversion.message(changes, "state of parameters that have another dtype now"))

    def _started(self, group: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The parameters of a group that have had a gradient, with their state (reading creates none)."""
        known = self.state.get
        return [(p, state) for p in group["params"] if (state := known(p)) and "z" in state]

    @hooks.never_compiled
    def state_dict(self) -> dict[str, Any]:
        """As in torch; the groups also carry `foreach`, which `schedulefree` needs to load them."""
        # Before the hooks of others: one of them may return anything.
        handle = self.register_state_dict_post_hook(lambda _, state_dict: self._complete(state_dict), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _complete(self, state_dict: dict[str, Any]) -> None:
        """Make torch's state dict, which refers to the states of the parameters, one of this package."""
        self._residuals.become_copies(self.state)
        if self._state_dicts_at_x:
            pieces.park(self.param_groups, state_dict)
        for group in state_dict["param_groups"]:
            group["foreach"] = self.implementation != "for-loop"
            group.update(capturable.plain_counters(group))
        state_dict["state"] = {i: conversion.gatherable(state) for i, state in state_dict["state"].items()}

    @hooks.never_compiled
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; a state that was kept in another precision (also by `schedulefree`) is converted to this one's.

        Precision and `capturable` are this object's choice, as the dtype of the parameters is; the rounding seed is
        that of the run. If it cannot be loaded, or is interrupted, the optimizer is as it was.

        Raises:
            ValueError: groups or sizes do not fit, the state is that of another kind of optimizer, or its beta is one
                at which x could not be recovered.
        """
        loaded: list[dict[str, Any]] = []
        self._loading = loaded
        own = [{name: group[name] for name in ("state_precision", "capturable")} for group in self.param_groups]
        former = {name: getattr(self, name) for name in _REPLACED_BY_LOADING}
        to_show: list[_ToShow] = []
        is_whole = False

        def complete(_: torch.optim.Optimizer) -> None:
            nonlocal is_whole
            if self._loading is not loaded:  # that call was interrupted before it could remove its hooks
                return
            changes = self._convert_loaded(loaded[0], own, to_show)
            is_whole = True
            for group, mode, shown in to_show:
                for p, state in shown:
                    sharding.local(p).copy_(precision.rounded_x(state, self._shown_beta(group)))
                group["train_mode"] = mode
            if changes:
                logger.warning(conversion.message(changes))

        handles = [
            self.register_load_state_dict_pre_hook(lambda _, state_dict: loaded.append(state_dict)),
            self.register_load_state_dict_post_hook(complete, prepend=True),  # those of others may use the optimizer
        ]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            if not is_whole:
                self.__dict__.update(former)
            raise
        finally:
            self._loading = ()
            for handle in handles:
                handle.remove()

    def _convert_loaded(
        self, state_dict: dict[str, Any], own: list[dict[str, Any]], to_show: list[_ToShow]
    ) -> Counter[str]:
        """After torch has loaded a state dict: give the groups their `own` choices, and the state its precision.

        Returns:
            What was changed. What has to show another x now is added to `to_show`; its groups are in mode None, so that
            the next switch completes what is interrupted.
        """
        conversion.refuse_others(state_dict)
        changes: Counter[str] = Counter()
        for group, choices in zip(self.param_groups, own, strict=True):
            betas = {name: group[name] for name in ("betas", "momentum") if name in self.defaults}
            check_options(type(self).__name__, betas)
            group.update(choices)
        conversion.undo_casts(self, state_dict)
        lost = 0
        for group in self.param_groups:
            if group["train_mode"] is False and group["parked_k"] == group["k"]:
                lost += sum("y" not in state for _, state in self._started(group))
        if lost:
            logger.warning(conversion.LOST_Y, lost)
        for group in self.param_groups:
            shown = []
            for p, state in self._started(group):
                storage, beta = self._storage(group, p), self._shown_beta(group)
                changed, shows_x = conversion.convert_loaded(p, state, storage, beta)
                changes.update(changed)
                shown += [(p, state)] if shows_x else []
            if shown:
                to_show.append((group, group["train_mode"], shown))
                group["train_mode"] = None
        return changes

    def __getstate__(self) -> dict[str, Any]:
        self._residuals.become_copies(self.state)
        return {**super().__getstate__(), "implementation": self.implementation, "park": self.park}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._residuals = Residuals()
        for group in self.param_groups:
            group.pop("foreach", None)  # how to compute is this object's choice, not the checkpoint's
            for key, default in self.defaults.items():
                if key != "differentiable":  # torch has just put it there; a state_dict would have one more option
                    group.setdefault(key, default)
            # A y parked at another step was left there by an optimizer that does not know it.
            if group["train_mode"] or group["parked_k"] != group["k"]:
                for _, param_state in self._started(group):
                    param_state.pop("y", None)
                group.update(NOT_PARKED)
        self._parts = GroupParts()
        self._repeated = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new group is validated and joins in the mode that the optimizer is in."""
        if isinstance(param_group, dict):  # torch says what is wrong with others
            check_options(type(self).__name__, param_group)
            if self.param_groups:
                param_group.setdefault("train_mode", self.mode == "train")
        super().add_param_group(param_group)
        self._repeated.clear()  # with more parameters, other implementations may be chosen for the earlier groups, too
        group = self.param_groups[-1]
        refusal = None
        for p in group["params"]:
            if p.is_complex():
                refusal = f"{type(self).__name__} takes real parameters; got one of dtype {p.dtype}"
        if len(set(map(id, group["params"]))) < len(group["params"]):
            refusal = (
                f"{type(self).__name__} got a parameter group with the same parameter several times, which would be "
                "stepped and switched as often; give each once"
            )
        if refusal:
            self.param_groups.pop()
            raise ValueError(refusal)
        if group["state_precision"] == "parameter" and any(p.dtype in precision.HALF_DTYPES for p in group["params"]):
            warnings.warn(
                f"{type(self).__name__}: with state_precision='parameter' and half-precision parameters, small updates "
                "are rounded away, and x is not the average any more. Leave it out (or use 'split', 'stochastic' or "
                "'full') to keep the average.",
                stacklevel=2,
            )

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; parameters without a gradient are left alone, and gradients are not overwritten.

        Args:
            closure: reevaluates the model at y and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: in eval mode (also if it is the closure's), or for sparse gradients.
        """
        former = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(False)  # what torch.no_grad() does through ten of Python's calls
            return self._step_in_no_grad(closure)
        finally:
            torch.set_grad_enabled(former)

    def _step_in_no_grad(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None and self._is_dry_run():
            self.init_state()
            return None
        self._refuse_at_x()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._refuse_at_x()  # it may have looked at x
        capturable.check_capture(self)
        first = 0
        for group in self.param_groups:
            if group["params"]:
                self._parts.recall(group, self.state)
                self._step_group(group, first)
                self._parts.keep(group, self.state)
            first += len(group["params"])
        return loss

    def _refuse_at_x(self) -> None:
        if not all(group["train_mode"] is True for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() was called in eval mode, where the model holds the averaged weights x. "
                "Call optimizer.train() before computing gradients, and optimizer.eval() before evaluating or saving."
            )

    def _step_group(self, group: dict[str, Any], first: int) -> None:
        (numbers, counters), params = self._step_numbers(group), group["params"]
        choices = Choices(
            self.implementation, group["state_precision"], group["rounding_seed"], group["capturable"], first
        )
        repeated = self._repeated.get(id(group))
        try:
            stepped, interruption = Made() if repeated is None else repeated(params, self.state, choices, numbers)
            is_repeated = repeated is not None and len(stepped) == repeated.count
            if not is_repeated:
                self._convert_state(group, self._started(group))
                self._step_rows(group, first, numbers, stepped)
            capturable.set_counters(group, counters)  # only now: a step that could not be made does not count
        except BaseException:
            if repeated is not None and repeated.is_made:
                capturable.set_counters(group, counters)
            raise
        if is_repeated:
            repeated.counted()
        else:
            self._repeated[id(group)] = RepeatedStep.of(params, self.state, choices, compiled=self._one_pass)
        if interruption is not None:
            raise interruption

    def _step_numbers(self, group: dict[str, Any]) -> tuple[StepNumbers, dict[str, Scalar]]:
        """The numbers of the group's next step, which its counters take part in; and the counters after it."""
        capturable.place_counters(group)
        k, lr = group["k"], capturable.learning_rate(group) * self._lr_factor(group)
        lr_max = averaging.at_least(lr, group["lr_max"])
        c, weight_sum = averaging.averaging_weight(k, lr_max, group["r"], group["weight_lr_power"], group["weight_sum"])
        # scheduled_lr: the rate this step really used, for logging
        counters = {"k": k + 1, "weight_sum": weight_sum, "lr_max": lr_max, "scheduled_lr": lr}
        return StepNumbers(lr, self._beta(group), c, group["weight_decay"], self._direction(group), k), counters

    def _step_rows(
        self, group: dict[str, Any], first: int, numbers: StepNumbers, stepped: Sequence[Tensor] = ()
    ) -> None:
        """The step of a group whose tensors may be of any kind; the state of some may still be missing.

        Those that were `stepped` already are left out.
        """
        made = set(map(id, stepped))
        rows: list[kernels.Row] = []
        half_rows: list[HalfRow] = []
        uses_v = numbers.direction.beta2 is not None
        for position, p in enumerate(group["params"], start=first):
            grad = p.grad
            if grad is None or id(p) in made:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
            grad = sharding.placed_as(p, grad)
            state = self._init_state(group, p)
            if uses_v and "exp_avg_sq" not in state:
                raise RuntimeError(
                    f"{type(self).__name__}.step() found a state without exp_avg_sq: it is that of another optimizer. "
                    "Load a state of this one, or none."
                )
            storage = self._storage(group, p) if p.dtype in precision.HALF_DTYPES else None
            if storage is None:
                rows.append((p, state["z"], state["exp_avg_sq"] if uses_v else None, grad))
                continue
            key = RandomKey(group["rounding_seed"], position)
            half_rows.append(HalfRow(p, grad, state, storage, key))
        if rows:
            kernels.step_(rows, numbers, self.implementation, compiled=self._one_pass)
        if half_rows:
            precision_step.step_(half_rows, numbers, self.implementation)

    def _is_dry_run(self) -> bool:
        """Whether this is torch.distributed.checkpoint's way to create the state: a step at lr 0 on zero gradients.

        It must neither raise in eval mode nor count as a step.
        """
        if self.state or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)
