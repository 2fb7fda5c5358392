"""The engines under test: one row each. What an engine needs besides the Trainer's arguments is here."""

import os
from dataclasses import dataclass, field
from typing import Any

from accelerate import DistributedType, PartialState
from torch import distributed
from transformers import LlamaForCausalLM, TrainingArguments


def without_compiled_all_reduce():
    """On CPU DeepSpeed would compile a faster all-reduce at the start, which takes a C++ compiler and a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass
class EngineRow:
    """`DistributedDataParallel`, and what the others have in common with it."""

    processes: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    # The run in one process that x and y must follow, and how far they may be from it (largest difference).
    reference: str = "single"
    tolerance: float = 1e-5
    resumes_elsewhere: bool = True
    resumes_on: int = 4
    # Whether the parameters themselves are bfloat16; the average is then kept by the default state precision.
    half: bool = False

    def arguments(self, **options):
        return TrainingArguments(**options, **self.options)

    def refused(self):
        """Changes to the arguments that must be refused -> a word that the message must have."""
        return []

    def memory_options(self):
        """So that the engine itself does not hold all of this small model at a time."""
        return {}

    def model(self, config, folder):
        model = LlamaForCausalLM(config)
        return model.bfloat16() if self.half else model

    def whole_model(self, trainer):
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)


@dataclass
class Fsdp2Row(EngineRow):
    """FSDP2 through accelerate."""

    def arguments(self, **options):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        args = TrainingArguments(**{**self.options, **options})
        # accelerate knows FSDP on accelerator devices only: let it take these CPU processes for such.
        state = PartialState._shared_state
        if state["distributed_type"] == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        return args

    def refused(self):
        return [
            ({"fsdp_config": {"version": 1, "sync_module_states": False}}, "FSDP2"),
            ({"fsdp_config": {"version": 2, "cpu_offload": True}}, "CPU offload"),
        ]


@dataclass
class NativeFsdp2Row(EngineRow):
    """FSDP2 by transformers, while it loads the model."""

    def model(self, config, folder):
        from transformers.distributed import DistributedConfig

        if int(os.environ["RANK"]) == 0 and not folder.exists():
            LlamaForCausalLM(config).save_pretrained(folder)
        distributed.barrier()
        return LlamaForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
        )

    def whole_model(self, trainer):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(trainer.model, options=options)


@dataclass
class ZeroRow(EngineRow):
    """DeepSpeed."""

    stage: int = 1
    bf16: bool = False
    sub_group_size: int = 4000
    resumes_elsewhere: bool = False

    def arguments(self, **options):
        without_compiled_all_reduce()
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": self.bf16},
            "zero_optimization": {"stage": self.stage},
            **options.pop("deepspeed", {}),
        }
        if config["zero_optimization"]["stage"] == 3:
            config["zero_optimization"] |= {
                "sub_group_size": self.sub_group_size,
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 100,
            }
        return TrainingArguments(**options, deepspeed=config, bf16=self.bf16, **self.options)

    def memory_options(self):
        sizes = {"allgather_bucket_size": 100_000}
        if self.stage == 3:
            elements = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
            sizes = {f"stage3_{name}": 100_000 for name in elements}
        return {"deepspeed": {"zero_optimization": {"stage": self.stage, **sizes}}}

    def refused(self):
        offload = {"stage": self.stage, "offload_optimizer": {"device": "cpu"}}
        return [
            ({"deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}}, "'optimizer' section"),
            ({"deepspeed": {"scheduler": {"type": "WarmupLR", "params": {}}}}, "'scheduler' section"),
            ({"deepspeed": {"zero_optimization": offload}}, "offload_optimizer"),
            ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "stage 0"),
        ]


def fsdp2(state_dict_type, **row):
    options = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": state_dict_type}}
    return Fsdp2Row(options=options, **row)


ENGINES = {
    "single": EngineRow(processes=1),
    "ddp": EngineRow(),
    "fsdp2-full": fsdp2("FULL_STATE_DICT"),
    "fsdp2-sharded": fsdp2("SHARDED_STATE_DICT"),
    "fsdp2-native": NativeFsdp2Row(),
    "zero1": ZeroRow(stage=1),
    "zero2": ZeroRow(stage=2),
    "zero3": ZeroRow(stage=3),
}
IN_HALF = {"half": True, "tolerance": 5e-2, "reference": "single-bf16", "resumes_elsewhere": False}
ENGINES["single-bf16"] = EngineRow(processes=1, half=True)
ENGINES["ddp-bf16"] = EngineRow(**IN_HALF)
ENGINES["fsdp2-full-bf16"] = fsdp2("FULL_STATE_DICT", **IN_HALF)
ENGINES["fsdp2-sharded-bf16"] = fsdp2("SHARDED_STATE_DICT", **IN_HALF)
# Gradients rounded to bf16 depend on how a batch is split: the reference is the same engine in one process.
for stage in (1, 2, 3):
    ENGINES[f"zero{stage}-bf16"] = ZeroRow(stage=stage, bf16=True, tolerance=5e-2, reference=f"zero{stage}-bf16-alone")
    ENGINES[f"zero{stage}-bf16-alone"] = ZeroRow(stage=stage, bf16=True, processes=1)
