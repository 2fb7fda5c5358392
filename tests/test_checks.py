"""What is refused when a Trainer is built, without starting processes; tests/distributed does so in real engines."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy

from hf_schedulefree.optim import AdamWScheduleFree
from hf_schedulefree.weights import refuse_unsupported

ARGUMENTS = SimpleNamespace(fsdp=None, deepspeed=None)


def accelerator(running, **state):
    return SimpleNamespace(distributed_type=running, device=torch.device("cpu"), state=SimpleNamespace(**state))


def fsdp(version=2, cpu_offload=None):
    plugin = SimpleNamespace(fsdp_version=version, cpu_offload=cpu_offload or OffloadPolicy())
    return accelerator(DistributedType.FSDP, fsdp_plugin=plugin)


def deepspeed(**config):
    config = {"zero_optimization": {"stage": 2}} | config
    return accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)


@pytest.mark.parametrize(
    "runs",
    [accelerator(DistributedType.NO), accelerator(DistributedType.MULTI_CPU), fsdp(), deepspeed()],
    ids=["single", "ddp", "fsdp2", "zero2"],
)
def test_what_works_is_let_through(runs):
    refuse_unsupported(runs, ARGUMENTS)
    refuse_unsupported(runs, ARGUMENTS, AdamWScheduleFree([torch.zeros(1)]))


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (fsdp(version=1), "Use FSDP2"),
        (fsdp(cpu_offload=CPUOffloadPolicy()), "CPU offload"),
        (deepspeed(optimizer={"type": "AdamW"}), "'optimizer' section"),
        (deepspeed(scheduler={"type": "WarmupLR"}), "'scheduler' section"),
        (deepspeed(zero_optimization={"stage": 0}), "ZeRO stage 0"),
        (deepspeed(zero_optimization={"stage": 3, "offload_param": {"device": "nvme"}}), "offload_param to 'nvme'"),
        (deepspeed(zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}}), "offload_optimizer"),
    ],
)
def test_what_cannot_be_right_is_refused(runs, words):
    with pytest.raises(ValueError, match=words):
        refuse_unsupported(runs, ARGUMENTS)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_was_asked_for_and_does_not_run_is_refused(engine, monkeypatch):
    runs = accelerator(DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match="was asked for"):
        refuse_unsupported(runs, SimpleNamespace(**{**vars(ARGUMENTS), engine.lower(): True}))
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match="was asked for"):
        refuse_unsupported(runs, ARGUMENTS)


def test_optimizers_of_other_packages_are_refused_where_the_state_is_sharded():
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.AdamWScheduleFree([torch.nn.Parameter(torch.zeros(1))])
    refuse_unsupported(accelerator(DistributedType.MULTI_GPU), ARGUMENTS, optimizer)
    for runs in (fsdp(), deepspeed()):
        with pytest.raises(ValueError, match="not supported"):
            refuse_unsupported(runs, ARGUMENTS, optimizer)


def test_a_sharded_model_is_refused_where_the_trainer_would_wrap_it_for_ddp():
    """As that of transformers before 5.19 does with a model that was sharded while it was loaded."""
    model = nn.Linear(2, 2)
    model.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    for runs in (accelerator(DistributedType.NO), fsdp()):
        refuse_unsupported(runs, ARGUMENTS, None, model)
    ddp = accelerator(DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match=r"transformers to 5\.19"):
        refuse_unsupported(ddp, ARGUMENTS, None, model)
    model.is_distributed_loading_by_transformers = True
    refuse_unsupported(ddp, ARGUMENTS, None, model)
