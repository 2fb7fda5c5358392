"""What cannot be right is refused before training starts, in words."""

import os
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from hf_schedulefree.optim import ScheduleFreeOptimizer


def refuse_unsupported(
    accelerator: Accelerator, args: Any, optimizer: Any = None, model: nn.Module | None = None
) -> None:
    """Refuse the set-ups in which schedule-free training could not be right.

    Args:
        accelerator: what the Trainer made of its arguments and of the environment.
        args: the `TrainingArguments`.
        optimizer: the optimizer that the user gave to the Trainer, if any.
        model: the model as the user gave it.

    Raises:
        ValueError: the engine asked for does not run, or does not let the optimizer switch between x and y; or what is
            saved of the model could not be loaded.
    """
    _check_names(model)
    running = accelerator.distributed_type
    asked_for_fsdp = bool(args.fsdp) or _environment("ACCELERATE_USE_FSDP")
    asked_for_deepspeed = bool(args.deepspeed) or _environment("ACCELERATE_USE_DEEPSPEED")
    if asked_for_fsdp and running != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate runs {running.value} on {accelerator.device.type}: every process "
            "would hold the whole model. Launch with torchrun or accelerate launch on more than one accelerator "
            "device, or do not ask for FSDP."
        )
    if asked_for_deepspeed and running != DistributedType.DEEPSPEED:
        raise ValueError(
            f"DeepSpeed was asked for, but accelerate runs {running.value}. Give TrainingArguments(deepspeed=...), or "
            "an accelerate config with distributed_type: DEEPSPEED."
        )
    sharded = running in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and optimizer is not None and not isinstance(optimizer, ScheduleFreeOptimizer):
        raise ValueError(
            f"{type(optimizer).__name__} under {running.value} is not supported: it comes back to y by arithmetic, and "
            "what the exact way needs would not be saved. Use an optimizer of hf_schedulefree.optim, or DDP."
        )
    loaded_in_shards = getattr(model, "is_distributed_loading_by_transformers", False)
    if isinstance(model, FSDPModule) and not loaded_in_shards and not sharded and running != DistributedType.NO:
        raise ValueError(
            f"The model is sharded already (FSDP2), but accelerate runs {running.value} and would wrap it for DDP. If "
            "from_pretrained(..., distributed_config=...) sharded it, update transformers to 5.19 or later, whose "
            "Trainer knows such models. Else let the Trainer shard it: TrainingArguments(fsdp=True, "
            "fsdp_config={'version': 2})."
        )
    if running == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin)
    elif running == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)


def compiled_in_place(model: Any) -> Any:
    """The model whose parameters have their own names, of what `torch.compile(model)` returned; others as they are."""
    original = getattr(model, "_modules", {}).get("_orig_mod")  # of the model itself: adapters ask their base model
    compiler = getattr(model, "dynamo_ctx", None)
    if not hasattr(original, "save_pretrained") or not callable(compiler):
        return model
    original._compiled_call_impl = compiler(original._call_impl)  # what original.compile() does, with its options
    return original


def _check_names(model: nn.Module | None) -> None:
    """Refuse a model with parts that `torch.compile` returned: from_pretrained knows no weights by their names.

    Of an adapter inside, PEFT writes a file without a tensor, without a word.
    """
    if not hasattr(getattr(model, "_orig_mod", model), "save_pretrained"):
        return  # nobody reads it by from_pretrained
    if any("_orig_mod" in name.split(".") for name, _ in model.named_parameters()):
        raise ValueError(
            "The model, or a part of it, is what torch.compile(...) returned: its parameters have other names "
            "(_orig_mod), by which from_pretrained would not find the weights that are saved. Give the model itself, "
            "and compile it by TrainingArguments(torch_compile=True) or by its own method, model.compile()."
        )


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} can lose the optimizer's state, and the averaged weights with "
            "it. Use FSDP2: TrainingArguments(fsdp=True, fsdp_config={'version': 2}), or fsdp_version: 2 in the "
            "accelerate config."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("FSDP2 with CPU offload is not supported. Remove cpu_offload (fsdp_offload_params).")


def _check_deepspeed(config: dict[str, Any]) -> None:
    if "optimizer" in config:
        raise ValueError(
            "The DeepSpeed config has an 'optimizer' section: DeepSpeed's own optimizer would replace the "
            "schedule-free one. Remove the section and name the optimizer in TrainingArguments(optim=...)."
        )
    if "scheduler" in config:
        raise ValueError(
            "The DeepSpeed config has a 'scheduler' section, but schedule-free training has no schedule other than "
            "the optimizer's own warm-up. Remove the section and give TrainingArguments(warmup_steps=...)."
        )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"DeepSpeed with ZeRO stage {stage} is not supported. Use stage 1, 2 or 3, or DDP.")
    for section in ("offload_optimizer", "offload_param"):
        device = (zero.get(section) or {}).get("device", "none")
        if device != "none":
            raise ValueError(
                f"DeepSpeed with {section} to {device!r} is not supported. Remove it or set its device to 'none'."
            )


def _environment(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
