"""torchrun --nproc_per_node 2 deepspeed_run.py FOLDER STAGE[-KIND] ...: runs of the stock Trainer, saved at y.

Each leaves its x beside its checkpoints, as the module shows it when the optimizer has switched DeepSpeed's partitions.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
from checkpoint_runs import tiny_model, tiny_trainer
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_schedulefree import averaged_weights


def model_of(kind):
    model = tiny_model()
    if kind == "frozen":
        model.model.layers[0].requires_grad_(False)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return model


def run(folder, stage, kind):
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }
    if stage == 3:
        config["zero_optimization"] |= {"sub_group_size": 2000, "stage3_gather_16bit_weights_on_model_save": True}
    trainer = tiny_trainer(
        folder,
        model=model_of(kind),
        trainer_class=Trainer,
        optim="schedule_free_adamw",
        deepspeed=config,
        max_steps=2,
        max_grad_norm=0.0,
    )
    trainer.train()
    with averaged_weights(trainer.model_wrapped, trainer.optimizer):  # by schedulefree's own eval()
        averages = trainer.accelerator.get_state_dict(trainer.deepspeed)
    if trainer.is_world_process_zero():
        torch.save(averages, folder / "x.pt")


# On CPU it would compile a faster all-reduce at the start, which takes a C++ compiler and a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
for name in sys.argv[2:]:
    stage, _, kind = name.partition("-")
    run(Path(sys.argv[1]) / f"zero{name}", int(stage), kind)
