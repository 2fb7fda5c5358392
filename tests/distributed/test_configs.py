"""The ready accelerate configs: accelerate takes them, they mean the engine in their name, and the docs name them."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "scripts" / "accelerate"
ENGINES = {
    "ddp": ("MULTI_GPU", {}, {}),
    "fsdp2": ("FSDP", {"fsdp_version": 2, "fsdp_offload_params": False}, {}),
    "zero1": ("DEEPSPEED", {}, {"zero_stage": 1}),
    "zero2": ("DEEPSPEED", {}, {"zero_stage": 2}),
    "zero3": ("DEEPSPEED", {}, {"zero_stage": 3, "zero3_save_16bit_model": True}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_config_means_the_engine_in_its_name(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # raises for keys that accelerate does not know
    distributed_type, fsdp, deepspeed = ENGINES[name]
    assert config.distributed_type.value == distributed_type
    assert config.fsdp_config.items() >= fsdp.items()
    assert config.deepspeed_config.items() >= deepspeed.items()
    assert config.num_machines == 1
    assert config.mixed_precision == "no"  # the Trainer's --bf16 decides


def test_every_config_is_in_the_docs_and_every_one_in_the_docs_exists():
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    named = set(re.findall(r"scripts/accelerate/(\w+)\.yaml", text))
    assert named == {path.stem for path in CONFIGS.glob("*.yaml")} == set(ENGINES)
