"""The one-pass kernel on a real GPU."""

import importlib.util

import pytest
import torch
from cases import CASES
from test_kernels import DIRECTIONS, SHAPES, TOLERANCE, by_kernel, numba_step, numbers_for, run_and_compare, tensors
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, kernels, precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba (the extra `fast`)")

TOLERANCES = {**TOLERANCE, torch.float16: 2**-11}
LARGE = [*SHAPES, (8192,), (8193,), (300_001,), (1000, 1024), (16_383,)]


def gpu_step(*args):
    by_kernel(kernels.one_pass_kernel("cuda"), *args)


def on_gpu(groups):
    return [[t.cuda() for t in group] for group in groups]


def equal(a, b):
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach().cpu(), b.detach().cpu()
    return bool(((a.view(whole) == b.view(whole)) | ((a != a) & (b != b))).all())


def test_there_is_a_kernel():
    assert kernels.one_pass_kernel("cuda") is not None
    assert kernels.kernel_for(torch.device("cuda"), torch.float16) is not None


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_one_step(kind, weight_decay, dtype, monkeypatch):
    monkeypatch.setitem(TOLERANCE, torch.float16, TOLERANCES[torch.float16])
    run_and_compare(gpu_step, *on_gpu(tensors(LARGE, dtype)), numbers_for(kind, weight_decay))


@needs_numba
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_the_bits_are_those_of_the_step_on_cpu(kind, dtype):
    numbers = numbers_for(kind, 0.1)
    here, there = tensors(LARGE, dtype), on_gpu(tensors(LARGE, dtype))
    for groups in (here, there):  # addresses that are no multiples of 16
        for column in range(4):
            groups[column][-2] = groups[column][-2].flatten()[column:-5].clone()[: 999 * 1024][1:]
    for step, groups in ((numba_step, here), (gpu_step, there)):
        step(*groups[:2], groups[2] if numbers.direction.beta2 is not None else [], groups[3], numbers)
    for a, b in zip(here, there, strict=True):
        assert all(equal(x, y) for x, y in zip(a, b, strict=True))


def make(kind, dtype, device, shapes=LARGE, **options):
    params = [nn.Parameter(t.to(device)) for t in tensors(shapes, dtype)[0]]
    optimizer = CASES[kind].ours(params, **{"lr": CASES[kind].lr, **options})
    optimizer.train()
    return params, optimizer


def give_gradients(params, step):
    for p, g in zip(params, tensors([p.shape for p in params], params[0].dtype, seed=step)[3], strict=True):
        p.grad = g.to(p.device) if p.grad is None else p.grad.copy_(g)


def run(params, optimizer, steps):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def kept(params, optimizer):
    return [t for p in params for t in (p, *optimizer.state[p].values())]


@needs_numba
@pytest.mark.parametrize("state_precision", ["split", "stochastic", "full"])
@pytest.mark.parametrize("kind", CASES)
def test_a_run_in_half_precision_has_the_bits_of_a_run_on_cpu(kind, state_precision):
    found = []
    for device in ("cpu", "cuda"):
        one = make(kind, torch.bfloat16, device, state_precision=state_precision, weight_decay=0.1)
        run(*one, range(8))
        found.append(kept(*one))
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("state_precision", ["split", "stochastic", "full"])
def test_float16_is_that_of_torchs_operations(state_precision):
    found = []
    for implementation in (None, "foreach"):
        one = make("adamw", torch.float16, "cuda", state_precision=state_precision, implementation=implementation)
        run(*one, range(3))
        found.append([precision.wide_x(p, one[1].state[p], 0.9) for p in one[0] if p.numel()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-9, atol=2**-9)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_is_one_launch_waits_for_nothing_and_allocates_nothing(dtype, capturable, monkeypatch):
    from hf_schedulefree.optim.kernels import one_pass_triton

    launches = []
    kernel = one_pass_triton.step

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    shapes = [(257, 1024)] * 150
    params, optimizer = make("adamw", dtype, "cuda", shapes, capturable=capturable, warmup_steps=10)
    run(params, optimizer, range(2))
    compiled = sum(len(caches[0]) for caches in kernel.device_caches.values())
    monkeypatch.setattr(one_pass_triton, "step", Counted())
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(launches) == 5
    assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before < 5 * 50 * 512
    assert sum(len(caches[0]) for caches in kernel.device_caches.values()) == compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_capture_and_replay(kind, dtype):
    lr = torch.tensor(CASES[kind].lr, device="cuda")
    captured, plain = make(kind, dtype, "cuda", lr=lr, capturable=True), make(kind, dtype, "cuda", capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*captured, range(2))
    torch.cuda.current_stream().wait_stream(stream)
    give_gradients(captured[0], 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured[1].step()
    for step in range(2, 12):
        give_gradients(captured[0], step)
        graph.replay()
    run(*plain, range(12))
    assert captured[1].param_groups[0]["k"] == 12
    for a, b in zip(kept(*captured), kept(*plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    captured[1].eval()
    captured[1].train()
    lr.fill_(0.0)
    z = [captured[1].state[p]["z"].clone() for p in captured[0]]
    graph.replay()
    assert all(torch.equal(captured[1].state[p]["z"], t) for p, t in zip(captured[0], z, strict=True))


def test_a_capture_with_the_backward_pass():
    """Gradients are allocated during the capture: their addresses reach the kernel by a copy in the graph."""
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1)).cuda()
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.01, capturable=True)
    optimizer.train()
    x = torch.randn(256, 64, device="cuda")

    def make_step():
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            first = make_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = make_step()
    for _ in range(200):
        graph.replay()
        torch.empty(1000).pin_memory()  # what the graph reads is not given to others
    assert optimizer.param_groups[0]["k"] == 203
    assert loss < 0.5 * first


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    count = 2**31 + 1025
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip("needs 18 GB")
    p = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = CASES["sgd"].ours([p], lr=1.0, state_precision="parameter", implementation="fused")
    optimizer.train()
    optimizer.step()
    for part in (p[:1000], p[2**31 - 1000 : 2**31 + 1000], p[-1:]):
        assert bool((part == -1).all())
    assert float(p.sum(dtype=torch.float32)) == pytest.approx(-count, rel=1e-6)
