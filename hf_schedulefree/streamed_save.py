"""`StreamedSaveMixin`: a save writes x straight from y and z, without a switch, wherever that is surely the same."""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerCallback
from transformers.trainer_utils import _is_peft_model
from transformers.utils import is_sagemaker_mp_enabled, logging

from hf_schedulefree import weights
from hf_schedulefree.checkpoint import CannotStream, describe_weight_files, streamed_weight_files
from hf_schedulefree.optim import ScheduleFreeOptimizer
from hf_schedulefree.optim.pieces import AveragedPieces
from hf_schedulefree.rng import generators_restored

logger = logging.get_logger(__name__)

# What runs in a save. Whoever overrides one of these may read the weights, and finds x in them.
_SAVING_METHODS = (
    "_save_checkpoint",
    "_tune_save_checkpoint",
    "save_model",
    "_save",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
    "_get_output_dir",
    "_push_from_checkpoint",
    "create_model_card",
    "store_flos",
)
_KNOWN = ("transformers", "hf_schedulefree")
# TRL's Trainers write the model card when they save a checkpoint, and nothing else that has to do with the model.
_KNOWN_OVERRIDES = {"_save_checkpoint": (*_KNOWN, "trl"), "create_model_card": (*_KNOWN, "trl")}

# The functions that hand a model's own tensors to the writer.
_KNOWN_SAVES = (
    ("transformers.modeling_utils", "PreTrainedModel.save_pretrained"),
    ("peft.peft_model", "PeftModel.save_pretrained"),
)

_STATE_DICT_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
_STATE_DICT_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")

# These callbacks and their base class read no weights.
_CALLBACKS_WITHOUT_WEIGHTS = TrainerCallback.__module__


class StreamedSaveMixin:
    """The part of `ScheduleFreeMixin` that saves without a switch.

    The host's own code runs while the parameters hold y; of each trained parameter that it hands to the writer of
    safetensors, x is written. Where any code that is not known to do just that could read the parameters, or hands on
    something else, the save runs at x in the ordinary way.
    """

    _streaming = False
    _cannot_stream: str | None = None  # why an earlier save could not; the next one does not try again

    @contextlib.contextmanager
    def _saving_x(self) -> Iterator[None]:
        """Within: what is saved is x, and so is the mode in the optimizer's `state_dict`."""
        if self._streaming:
            yield
            return
        if not self._can_stream():
            with self.averaged_weights():
                yield
            return
        keep_generators = generators_restored() if self._training else contextlib.nullcontext()
        described = describe_weight_files(self._weight_metadata())
        with keep_generators, described, self._switch.optimizer.state_dicts_at_x():
            self._streaming = True
            try:
                yield
            finally:
                self._streaming = False

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # Here the weights are written.
        if not self._streaming or self._switch.mode == "eval" or not self.args.should_save:
            return super()._save(*args, **kwargs)
        try:
            with _x_in_weight_files(self.model, self._switch.optimizer.x_in_pieces()):
                return super()._save(*args, **kwargs)
        except CannotStream as refusal:
            self._cannot_stream = str(refusal)
            logger.info(f"Saves of this model switch to x and back instead of writing x directly: {refusal}.")
        with self.averaged_weights():
            return super()._save(*args, **kwargs)

    def _can_stream(self) -> bool:
        """Whether a save may be tried without a switch; in the end it depends on what is handed to the writer."""
        return (
            self._cannot_stream is None
            and _x_in_pieces(self._switch) is not None
            and self._writes_by_save()
            and not self._batch_norm_callbacks
            and self._only_known_code_saves()
            and _hands_on_its_own_tensors(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        )

    def _writes_by_save(self) -> bool:
        """Whether the Trainer's `save_model` comes down to one call of `_save`, by the process that writes."""
        return (
            self.args.device.type in ("cpu", "cuda")
            and not (self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sagemaker_mp_enabled())
            and not getattr(self, "is_distributed_loading_by_transformers", False)  # from transformers 5.19 on
            and getattr(self.args, "save_safetensors", True)
        )

    def _only_known_code_saves(self) -> bool:
        methods = all(_is_known(self, name, _KNOWN_OVERRIDES.get(name, _KNOWN)) for name in _SAVING_METHODS)
        exported = [cb for cb in (*self.callback_handler.callbacks, self.control) if isinstance(cb, ExportableState)]
        return methods and all(_is_known(owner, "state", _KNOWN) for owner in exported)


def listens(handler: CallbackHandler, event: str) -> bool:
    """Whether any callback does something at an event that could have to do with the weights."""
    if type(handler).call_event is not CallbackHandler.call_event:
        return True
    for callback in handler.callbacks:
        if _home(getattr(getattr(callback, event, None), "__func__", None)) != _CALLBACKS_WITHOUT_WEIGHTS:
            return True
    return False


def _home(function: Any) -> str:
    """The module whose code a function is; unlike its `__module__`, a wrapper cannot take it over."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def save_averaged(
    model: nn.Module, optimizer: torch.optim.Optimizer, save_directory: str | os.PathLike[str], **options: Any
) -> None:
    """`model.save_pretrained(save_directory, **options)` at x, for a training loop of one's own.

    Args:
        model: of transformers or PEFT, without a wrapper around it (DDP, `torch.compile`).
        optimizer: its schedule-free optimizer, as wrapped for training.
        save_directory: the folder.
        options: `max_shard_size` and what else `save_pretrained` takes.
    """
    switch = weights.switch_for(model, optimizer)
    in_pieces = _x_in_pieces(switch)
    if in_pieces is not None and _is_of_a_host(model) and _hands_on_its_own_tensors(model):
        tried = dict(options)
        if tried.get("state_dict") is not None:
            tried["state_dict"] = copy.copy(tried["state_dict"])  # transformers empties it
        with contextlib.suppress(CannotStream), _x_in_weight_files(model, in_pieces):
            return model.save_pretrained(save_directory, **tried)
    with weights.averaged_weights(model, optimizer):
        return model.save_pretrained(save_directory, **options)


def _x_in_weight_files(
    model: nn.Module, in_pieces: list[tuple[Tensor, AveragedPieces]]
) -> contextlib.AbstractContextManager[None]:
    """Within: of the parameters of `model` that hold y, x goes into the safetensors files that are written."""
    of_model = {id(p) for p in model.parameters()}
    required = [p for p, _ in in_pieces if id(p) in of_model]
    return streamed_weight_files(in_pieces, [*model.parameters(), *model.buffers()], required)


def _x_in_pieces(switch: weights.WeightSwitch | None) -> list[tuple[Tensor, AveragedPieces]] | None:
    """x of the parameters; None unless they hold y, and are all that a switch changes, in the way that is known."""
    if type(switch) is not weights.WeightSwitch:
        return None
    optimizer = switch.optimizer
    if not all(group["train_mode"] is True for group in optimizer.param_groups):
        return None
    if optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks:
        return None
    for name in ("eval", "train", "state_dict"):
        if getattr(type(optimizer), name) is not getattr(ScheduleFreeOptimizer, name) or name in vars(optimizer):
            return None
    try:
        return optimizer.x_in_pieces()
    except ValueError:
        return None


def _is_known(owner: Any, name: str, packages: tuple[str, ...]) -> bool:
    """Whether every definition of a method is the code of one of some packages, and none is the instance's own."""
    definitions = [vars(kind)[name] for kind in type(owner).__mro__ if name in vars(kind)]
    return name not in vars(owner) and all(_home(function).partition(".")[0] in packages for function in definitions)


def _is_of_a_host(model: nn.Module) -> bool:
    """Whether `save_pretrained` of a model may be that of transformers or PEFT."""
    return isinstance(model, PreTrainedModel) or _is_peft_model(model)


def _hands_on_its_own_tensors(model: nn.Module) -> bool:
    """Whether a model's save takes its tensors as they are from its modules, by code that is known."""
    if _is_of_a_host(model):
        save = type(model).save_pretrained
        if (_home(save), save.__qualname__) not in _KNOWN_SAVES:
            return False
        if "save_pretrained" in vars(model) or getattr(model, "hf_quantizer", None) is not None:
            return False
    return all(
        all(
            getattr(type(module), name) is getattr(nn.Module, name) and name not in vars(module)
            for name in _STATE_DICT_METHODS
        )
        and not any(getattr(module, hooks) for hooks in _STATE_DICT_HOOKS)
        for module in model.modules()
    )
