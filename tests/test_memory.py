"""Evaluating and saving needs no more memory than training does: the parked y comes when the gradients are gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import inner, tiny_llama, train

ROOT = Path(__file__).parents[1]

RUN = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from hf_schedulefree import ScheduleFreeTrainer

# Not ru_maxrss: that of a child process starts at its parent's.
def peak_in_kib():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1])

folder, options = sys.argv[1], json.loads(sys.argv[2])
sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=16, **sizes))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 1024, (16, 8))]
arguments = {"output_dir": folder, "optim": "adamw_schedulefree", "max_steps": 4, "per_device_train_batch_size": 2,
             "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
trainer = ScheduleFreeTrainer(model=model, args=TrainingArguments(**{**arguments, **options}), train_dataset=rows,
                              eval_dataset=rows[:4])
before = peak_in_kib()
trainer.train()
peak = peak_in_kib()
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
print("PEAK", (peak - before) / size)
"""


def copies_at_the_peak(folder: Path, **options) -> float:
    """How many copies of the parameters a run needs at its peak beyond what it had when it was made."""
    # Freed memory goes back at once, so that the peak is that of what is alive.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(folder), json.dumps(options)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.split("PEAK")[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_that_of_training_alone(tmp_path):
    alone = copies_at_the_peak(tmp_path / "alone")
    reading = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    read = copies_at_the_peak(tmp_path / "read", **reading)
    assert alone > 2.5  # gradients, z and the second moment
    assert read <= alone + 0.1  # the code that evaluates and saves; a copy of the parameters would be 1


def test_only_trainable_parameters_are_parked(tmp_path):
    model = tiny_llama()
    model.model.requires_grad_(False)
    trainer = train(tmp_path, model=model)
    optimizer = inner(trainer.optimizer)
    parked = [state["y"] for state in optimizer.state_dict()["state"].values()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [y.shape for y in parked] == [p.shape for p in trainable]
    assert 0 < optimizer.parked_bytes <= sum(p.nbytes for p in trainable)
    with trainer.training_weights():
        assert optimizer.parked_bytes == 0
        assert all("y" not in state for state in optimizer.state_dict()["state"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_on_a_gpu_is_that_of_training_alone(tmp_path):
    peaks = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train(tmp_path, model=tiny_llama(hidden_size=512, intermediate_size=2048), use_cpu=False, **options)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0] * 1.01
