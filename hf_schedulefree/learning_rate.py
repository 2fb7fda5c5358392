"""`LearningRateMixin`: one warm-up, in the optimizer, and then a constant rate."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Schedulers that leave the rate alone after the warm-up; "linear" is the Trainer's default and counts as unset.
_CONSTANT_SCHEDULERS = (SchedulerType.LINEAR, SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


class LearningRateMixin:
    """The part of `ScheduleFreeMixin` that deals with schedulers and warm-up."""

    _warmup_steps: int | None = None  # what this Trainer last gave the optimizer
    _schedule: SchedulerType | None = None  # what this Trainer last made; None if that was not for it to choose

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        # Warm-up happens once, in the optimizer; the default (linear) decay would undo what schedule-free is for.
        if self._switch is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        given = (self.args.lr_scheduler_type, self.args.warmup_steps, self.args.lr_scheduler_kwargs)
        scheduler_type = SchedulerType(self.args.lr_scheduler_type)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        warmup_in_optimizer = self._warm_up_in_optimizer(warmup_steps)
        if scheduler_type == SchedulerType.LINEAR:
            logger.info("Schedule-free: the default lr_scheduler_type 'linear' is replaced by 'constant'.")
        if scheduler_type not in _CONSTANT_SCHEDULERS:
            logger.warning(
                f"Schedule-free optimizers need no schedule; lr_scheduler_type={scheduler_type.value!r} is honoured."
            )
        elif warmup_in_optimizer:
            scheduler_type = SchedulerType.CONSTANT
        else:
            scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
        self._schedule = scheduler_type
        try:
            self.args.lr_scheduler_type = scheduler_type
            if warmup_in_optimizer:
                self.args.warmup_steps = 0
                self.args.lr_scheduler_kwargs = _without_warmup(scheduler_type, given[2], warmup_steps)
            if optimizer is None and not isinstance(self.optimizer, torch.optim.Optimizer):
                optimizer = self._switch.schedulable
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_type, self.args.warmup_steps, self.args.lr_scheduler_kwargs = given

    def _warm_up_in_optimizer(self, warmup_steps: int) -> bool:
        """Give the resolved number of warm-up steps to the optimizer; False if it knows no warm-up.

        A number that the user gave to an optimizer passed in `optimizers=` stands, and so does that of a started run.
        """
        groups = self._switch.param_groups
        if not all("warmup_steps" in group for group in groups):
            return False
        for group in groups:
            own = group["warmup_steps"]
            if group.get("k", 0) > 0 or own == warmup_steps:
                continue
            if own >= 1 and own != self._warmup_steps:
                if warmup_steps:
                    logger.warning(f"The optimizer's own warmup_steps={own} stands; that of the arguments is ignored.")
                continue
            group["warmup_steps"] = warmup_steps
        self._warmup_steps = warmup_steps
        return True

    @property
    def _constant_rate(self) -> bool:
        """Whether it is known that the rate was constant, after the warm-up."""
        return self._switch is not None and self._schedule in _CONSTANT_SCHEDULERS

    @contextlib.contextmanager
    def _arguments_naming_the_schedule(self) -> Iterator[None]:
        """Within: `lr_scheduler_type` is the schedule that was used, for those who write the arguments down."""
        given = self.args.lr_scheduler_type
        if self._constant_rate:
            warms_up = self.args.warmup_steps > 0
            self.args.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP if warms_up else SchedulerType.CONSTANT
        try:
            yield
        finally:
            self.args.lr_scheduler_type = given

    def _get_learning_rate(self) -> float:
        # The rate that the last step really used, warm-up included; the scheduler does not know it.
        switch = self._switch
        group = switch.param_groups[0] if switch is not None else {}
        if group.get("k", 0) > 0 and "scheduled_lr" in group:
            return float(group["scheduled_lr"])
        return super()._get_learning_rate()


def _without_warmup(
    scheduler_type: SchedulerType, options: dict[str, Any] | str | None, warmup_steps: int
) -> dict[str, Any] | str | None:
    """A scheduler's options for when the optimizer does its warm-up: without one, two schedules would lie elsewhere."""
    given = options if isinstance(options, dict) else {}
    if warmup_steps and scheduler_type == SchedulerType.INVERSE_SQRT and given.get("timescale") is None:
        return {**given, "timescale": warmup_steps}  # 10,000 without a warm-up: next to no decay in most runs
    stable_steps = given.get("num_stable_steps")
    if warmup_steps and scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and stable_steps is not None:
        # Or the decay would end that many steps too early, and the run would end at a rate of 0.
        return {**given, "num_stable_steps": stable_steps + warmup_steps}
    return options
