"""on_cpu.py SCRIPT ARGUMENTS: run a script under an engine that is made for accelerator devices, on CPU processes."""

import os
import runpy
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from accelerate import DistributedType, PartialState
from engines import without_compiled_all_reduce
from transformers import TrainingArguments


def fsdp_knows_cpu():
    """accelerate maps a launch on CPU away from FSDP: let it take these processes for accelerator devices."""
    setup = TrainingArguments.__dict__["_setup_devices"]
    original = setup.func

    def setup_devices(self):
        device = original(self)
        state = PartialState._shared_state
        if state["distributed_type"] == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_GPU
        return device

    setup.func = setup_devices


if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    fsdp_knows_cpu()
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    without_compiled_all_reduce()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # DeepSpeed's threads sometimes abort an ordinary exit
