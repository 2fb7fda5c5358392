"""torchrun --nproc_per_node 2 deepspeed_run.py STAGE FOLDER: a run of the stock Trainer under DeepSpeed, saved at y."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
from checkpoint_runs import tiny_trainer
from transformers import Trainer

stage, folder = int(sys.argv[1]), sys.argv[2]
# On CPU it would compile a faster all-reduce at the start, which takes a C++ compiler and a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
config = {
    "zero_optimization": {"stage": stage},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
if stage == 3:
    config["zero_optimization"] |= {"sub_group_size": 2000, "stage3_gather_16bit_weights_on_model_save": True}
tiny_trainer(
    folder, trainer_class=Trainer, optim="schedule_free_adamw", deepspeed=config, max_steps=2, max_grad_norm=0.0
).train()
