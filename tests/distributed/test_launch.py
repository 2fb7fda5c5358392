"""The ready configs, launched as docs/distributed.md says, but on CPU: each trains and leaves x and its checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from launching import ROOT, free_port, needs_its_engine  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hf_schedulefree.checkpoint import export_averaged, inspect_weights, read_record, verify_checkpoint  # noqa: E402
from hf_schedulefree.checkpoint.deepspeed import DeepSpeedCheckpoint  # noqa: E402

# Config -> the engine in the record, and the machines: the documented command for several nodes, with two on this one.
LAUNCHES = {"ddp": ("ddp", 1), "fsdp2": ("fsdp", 2), "zero1": ("deepspeed", 1), "zero2": ("deepspeed", 1)}
LAUNCHES |= {"zero3": ("deepspeed", 1)}
TINY = {
    "max_steps": 3,
    "save_steps": 2,
    "eval_steps": 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "block_size": 32,
    "max_train_samples": 32,
    "max_eval_samples": 8,
    "disable_tqdm": True,
    "report_to": "none",
}

pytestmark = pytest.mark.distributed


def launch(name, machines, folder):
    text = folder / "text.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8") * 2, encoding="utf-8")
    arguments = [part for option, value in TINY.items() for part in (f"--{option}", str(value))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    port, launched = str(free_port()), []
    for rank in range(machines):
        several = ["--num_machines", str(machines), "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / f"scripts/accelerate/{name}.yaml")),
            *(several if machines > 1 else []),
            *("--num_processes", "2", "--main_process_port", port),
            *(str(HERE / "on_cpu.py"), str(ROOT / "scripts/finetune_lm.py"), "--use_cpu"),
            *("--train_file", str(text), "--output_dir", str(folder / "run"), *arguments),
        ]
        with open(folder / f"log_{rank}.txt", "w") as log:
            launched.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for launcher in launched:
            launcher.wait(timeout=300)
    finally:
        for launcher in launched:
            launcher.kill()
    if not (folder / "run/all_results.json").exists():
        pytest.fail("\n".join((folder / f"log_{rank}.txt").read_text()[-3000:] for rank in range(machines)))
    return folder / "run"


# zero1.yaml is zero2.yaml but for one number.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "zero1")) for name in LAUNCHES]
)
def test_a_config_trains_and_saves(name, tmp_path):
    needs_its_engine(name)
    engine, machines = LAUNCHES[name]
    run = launch(name, machines, tmp_path)
    checkpoint = run / "checkpoint-2"
    verify_checkpoint(checkpoint)
    record = read_record(checkpoint)
    assert (record.engine, record.world_size, record.weights) == (engine, 2, "x")
    if engine == "deepspeed":
        assert DeepSpeedCheckpoint(checkpoint)._stage == int(name[-1])
    assert (checkpoint / "pytorch_model_fsdp_0").exists() == (name == "fsdp2")  # sharded, as the config says
    assert inspect_weights(run).weights == "x"
    AutoModelForCausalLM.from_pretrained(run)
    # The newest checkpoint is of the last step: what export finds in it is the model that was saved.
    export_averaged(run / "checkpoint-3", tmp_path / "exported")
    exported, saved = load_file(tmp_path / "exported/model.safetensors"), load_file(run / "model.safetensors")
    assert all((exported[key] - tensor).abs().max() < 1e-6 for key, tensor in saved.items())
