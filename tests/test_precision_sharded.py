"""Half precision in several processes: no bit depends on the sharding, and replicas stay bit-identical."""

import copy
import itertools
import os

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_schedulefree.optim import AdamWScheduleFree

PRECISIONS = ["split", "stochastic", "full"]
SHAPES = [(7, 6), (5,), (3, 4, 2), (1, 9)]


def whole(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.int16:  # which no collective takes
        tensor = tensor.int()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_run(params, optimizer, plain, plain_optimizer):
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(whole(p), q)
        for name, value in plain_optimizer.state[q].items():
            assert torch.equal(whole(optimizer.state[p][name]), whole(value)), name


def take_step(params, optimizer, plain, plain_optimizer, step):
    generator = torch.Generator().manual_seed(step)
    for p, q in zip(params, plain, strict=True):
        q.grad = torch.randn(q.shape, generator=generator).bfloat16()
        p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
    optimizer.step()
    plain_optimizer.step()


def check_shards(mesh, implementation, placements):
    for state_precision in PRECISIONS:
        for placement in placements:
            shapes = [shape for shape in SHAPES if len(shape) > getattr(placement, "dim", 0)]
            generator = torch.Generator().manual_seed(3)
            values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
            plain = [nn.Parameter(value.clone()) for value in values]
            params = [nn.Parameter(distribute_tensor(value, mesh, [placement])) for value in values]
            options = {"lr": 0.01, "state_precision": state_precision, "implementation": implementation}
            runs = (params, AdamWScheduleFree(params, **options), plain, AdamWScheduleFree(plain, **options))
            for optimizer in runs[1::2]:
                optimizer.train()
            for step in range(4):
                take_step(*runs, step)
            assert_same_run(*runs)
            for optimizer in runs[1::2]:
                optimizer.eval()
            assert not runs[1].weights_replaced()
            assert_same_run(*runs)
            for optimizer in runs[1::2]:
                optimizer.train()
            take_step(*runs, 4)
            assert_same_run(*runs)


def check_gradients_that_lie_otherwise(mesh, rank, implementation):
    """Summands of them in each process, as autograd leaves those of norms in sequence parallelism, or all of them."""
    for dtype, placement in itertools.product((torch.bfloat16, torch.float32), (Replicate(), Shard(0))):
        generator = torch.Generator().manual_seed(3)
        plain = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
        params = [nn.Parameter(distribute_tensor(q.detach().clone(), mesh, [placement])) for q in plain]
        runs = [AdamWScheduleFree(some, lr=0.01, implementation=implementation) for some in (params, plain)]
        for optimizer in runs:
            optimizer.train()
        for step in range(4):
            for p, q in zip(params, plain, strict=True):
                summands = [torch.randn(q.shape, generator=generator).to(dtype) for _ in range(2)]
                q.grad = summands[0] + summands[1]
                if step % 2:
                    p.grad = DTensor.from_local(q.grad, mesh, [Replicate()])
                else:
                    p.grad = DTensor.from_local(summands[rank], mesh, [Partial()])
            for optimizer in runs:
                optimizer.step()
        assert_same_run(params, runs[0], plain, runs[1])
        for p in params if placement == Replicate() else []:
            others = [torch.empty_like(p.to_local()) for _ in range(2)]
            distributed.all_gather(others, p.to_local().detach())
            assert torch.equal(*others)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).bfloat16()


def train(model, optimizer, steps, rank=0):
    optimizer.train()
    for step in steps:
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 * rank + step)).bfloat16()
        model(batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_replicas(rank):
    """Each process sees other data; the gradients are averaged."""
    for state_precision in PRECISIONS:
        model = DistributedDataParallel(net())
        optimizer = AdamWScheduleFree(model.parameters(), lr=0.01, state_precision=state_precision, rounding_seed=5)
        torch.manual_seed(rank)  # not what the rounding takes its numbers from
        train(model, optimizer, range(6), rank)
        for p in model.parameters():
            for tensor in (p.detach(), *optimizer.state[p].values()):
                others = [torch.empty_like(tensor.float()) for _ in range(2)]
                distributed.all_gather(others, tensor.float())
                assert torch.equal(*others)


def check_fsdp2(mesh):
    for state_precision in PRECISIONS:
        options = {"lr": 0.01, "state_precision": state_precision}
        plain, sharded, resumed = net(), net(), net()
        for model in (sharded, resumed):
            fully_shard(model, mesh=mesh)
        plain_optimizer = AdamWScheduleFree(plain.parameters(), **options)
        optimizer = AdamWScheduleFree(sharded.parameters(), **options)
        train(plain, plain_optimizer, range(4))
        train(sharded, optimizer, range(4))  # the same batch in both processes: its mean is exact
        runs = (list(sharded.parameters()), optimizer, list(plain.parameters()), plain_optimizer)
        assert_same_run(*runs)
        optimizer.eval()
        plain_optimizer.eval()
        assert_same_run(*runs)
        other = AdamWScheduleFree(resumed.parameters(), **options)
        gathered = StateDictOptions(full_state_dict=state_precision != "full")
        saved = copy.deepcopy(get_optimizer_state_dict(sharded, optimizer, options=gathered))
        with torch.no_grad():
            for p, q in zip(resumed.parameters(), sharded.parameters(), strict=True):
                p.copy_(q)
        set_optimizer_state_dict(resumed, other, saved, options=gathered)
        assert other.mode == "eval" and not other.weights_replaced()
        train(resumed, other, range(4, 7))
        train(plain, plain_optimizer, range(4, 7))
        assert_same_run(list(resumed.parameters()), other, *runs[2:])


def work(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        check_shards(mesh, "for-loop", [Shard(0), Shard(1), Replicate()])
        check_shards(mesh, None, [Shard(0), Replicate()])  # columns are not for the compiled step
        for implementation in (None, "foreach"):
            check_gradients_that_lie_otherwise(mesh, rank, implementation)
        check_replicas(rank)
        check_fsdp2(mesh)
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # torch's threads sometimes abort an ordinary exit


@pytest.mark.distributed
def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
