"""The checkpoint on SIGTERM (`enable_jit_checkpoint`), from which a resumed run goes on exactly."""

from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler, TrainerControl
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


def save_between_steps(handler: CallbackHandler) -> None:
    """Let transformers' own callback save where a resume is exact; those of users stay what they are."""
    for callback in handler.callbacks:
        if type(callback) is JITCheckpointCallback:
            callback.__class__ = _SavedBetweenSteps


class _SavedBetweenSteps(JITCheckpointCallback):
    """transformers' checkpoint on SIGTERM, written where a resumed run finds the generators as this one had them.

    Before `optimizer.step()` the forward passes have moved them on: the step would be taken again with other dropout.
    In the first step of an epoch, the DataLoader has drawn its seed. Both wait for the end of the step.

    Of several processes each has its own signal at a moment of its own, or one has it alone. One that saved at once
    would wait for others that are elsewhere: all save when the same step has ended.

    An evaluation that the step or the epoch ends with comes after that, and may take longer than there is time: what it
    found (the best model, say) is in a second save. The end of an epoch is none if the run has only been ended within
    it: an evaluation there would not be one of the whole run's, and a save could be one from the middle of a step.
    """

    _epoch_begins = False
    # Whether it has saved in this epoch.
    _saved = False

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._epoch_begins, self._saved = True, False

    def on_step_begin(self, args: Any, *others: Any, **kwargs: Any) -> None:
        if not self._epoch_begins and args.world_size == 1:
            self._saved |= self._is_requested
            super().on_step_begin(args, *others, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._epoch_begins = False
        if args.world_size > 1 and self.jit_manager is not None:
            requested = torch.tensor(float(self.jit_manager.is_checkpoint_requested), device=args.device)
            torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX)
            self.jit_manager.is_checkpoint_requested = bool(requested)
        requested = self._is_requested
        self._saved |= requested
        super().on_step_end(args, state, control, **kwargs)
        if requested:
            control.should_save = control.should_evaluate

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size == 1 and self._is_requested:
            super().on_epoch_end(args, state, control, **kwargs)
            control.should_save = control.should_evaluate
        elif self._saved and state.global_step < state.max_steps and not float(state.epoch).is_integer():
            control.should_evaluate = control.should_save = False
        elif self._saved:
            control.should_save |= control.should_evaluate

    @property
    def _is_requested(self) -> bool:
        return self.jit_manager is not None and self.jit_manager.is_checkpoint_requested
