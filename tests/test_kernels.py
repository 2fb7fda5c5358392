"""Every implementation of the step against averaging.py in float64, on tensors of every kind."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import profile

from hf_schedulefree.optim import AdamWScheduleFree, averaging, directions, kernels, switching
from hf_schedulefree.optim.kernels import machine_code, torch_ops
from hf_schedulefree.optim.kernels.numbers import DenseRow, StepNumbers

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba (the extra `fast`)")

# Largest error of one step, relative to the largest value of the tensor. bfloat16: half a unit in the last place.
TOLERANCE = {torch.float32: 4e-7, torch.float64: 1e-15, torch.bfloat16: 2**-8}

DIRECTIONS = {
    "sgd": directions.Direction(),
    "collect": directions.adaptive(0.99, 1e-8, 2, normalizes=False),
    "adam": directions.adaptive(0.99, 1e-8, 40),
    "adam, first step": directions.adaptive(0.0, 1e-3, 0),
}
SHAPES = [(7, 5), (), (1,), (0,), (1023,), (3, 1, 4), (64, 33), (2, 0, 3)]


def by_kernel(kernel, y, z, v, grads, numbers):
    """One step by a compiled kernel."""
    ready = kernel([DenseRow(*row) for row in zip(y, [None] * len(y), z, v or [None] * len(y), strict=True)])
    ready([[grad.data_ptr() for grad in grads]], numbers)


def numba_step(*args):
    by_kernel(kernels.one_pass_kernel("cpu"), *args)


BACKENDS = {
    "foreach": torch_ops.foreach_,
    "torch fused": torch_ops.fused_,
    "numba": pytest.param(numba_step, marks=needs_numba),
}


def backends(*names):
    params = [BACKENDS[name] for name in names]
    return pytest.mark.parametrize("step", params, ids=names)


def tensors(shapes, dtype, seed=0):
    """y, z, v, g: z near y and v that of gradients like g, as in a run."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes]

    y, offset, g, noise = normal(1.0), normal(0.05), normal(0.1), normal(0.1)
    z = [a + b for a, b in zip(y, offset, strict=True)]
    return [[t.to(dtype) for t in group] for group in (y, z, [t**2 + 1e-4 for t in noise], g)]


def numbers_for(kind, weight_decay=0.0, **changes):
    return StepNumbers(
        **{"lr": 0.01, "beta": 0.9, "c": 0.03, **changes}, weight_decay=weight_decay, direction=DIRECTIONS[kind]
    )


def expected(y, z, v, g, numbers):
    """The step in float64, with averaging.py's single formula."""
    y, z, v, g = ([t.double() for t in group] for group in (y, z, v, g))
    v = v if numbers.direction.beta2 is not None else []
    d = [a + numbers.weight_decay * b for a, b in zip(directions.compute(numbers.direction, g, v), y, strict=True)]
    averaging.update_(y, z, d, lr=numbers.lr, beta=numbers.beta, c=numbers.c)
    return y, z, v


def assert_close(actual, wanted, tolerance):
    for a, b in zip(actual, wanted, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=0.1)


def run_and_compare(step, y, z, v, g, numbers):
    wanted = expected(y, z, v, g, numbers)
    tolerance = TOLERANCE[y[0].dtype]
    grads = [t.clone() for t in g]
    step(y, z, v if numbers.direction.beta2 is not None else [], g, numbers)
    for actual, want in zip((y, z, v), wanted, strict=False):
        if want:
            assert_close(actual, want, tolerance)
    assert all(torch.equal(a, b) for a, b in zip(g, grads, strict=True))


@backends(*BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_one_step(step, kind, weight_decay, dtype):
    run_and_compare(step, *tensors(SHAPES, dtype), numbers_for(kind, weight_decay))


@pytest.mark.parametrize("elements", [1, 50, 64 * 33, 10**6])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_torchs_operations_take_each_element_once(kind, elements, monkeypatch):
    """They go through the tensors part by part, as much at a time as a cache holds."""
    monkeypatch.setattr(torch_ops, "_CACHED_ELEMENTS", elements)
    shapes = SHAPES if elements > 1 else [(3,), (), (0,), (2, 2)]
    run_and_compare(torch_ops.fused_, *tensors(shapes, torch.float32), numbers_for(kind, 0.1))


@backends(*BACKENDS)
@pytest.mark.parametrize("changes", [{"c": 1.0}, {"c": 0.0}, {"lr": 0.0}, {"beta": 0.98}, {"beta": 0.3}], ids=str)
def test_one_step_at_the_ends_of_the_ranges(step, changes):
    run_and_compare(step, *tensors(SHAPES, torch.float32), numbers_for("adam", 0.1, **changes))


@needs_numba
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_bfloat16_is_computed_in_float32_and_rounded_once(kind, weight_decay):
    numbers = numbers_for(kind, weight_decay)
    half = tensors(SHAPES, torch.bfloat16)
    wide = [[t.float() for t in group] for group in half]
    run_and_compare(numba_step, *half, numbers)
    v = wide[2] if numbers.direction.beta2 is not None else []
    numba_step(wide[0], wide[1], v, wide[3], numbers)
    for half_group, wide_group in zip(half[:2] + ([half[2]] if v else []), wide[:2] + ([v] if v else []), strict=True):
        for a, b in zip(half_group, wide_group, strict=True):
            assert torch.equal(a, b.bfloat16())


@needs_numba
@pytest.mark.filterwarnings("ignore:.*small updates are rounded away")
@pytest.mark.parametrize("state_precision", ["split", "full", "stochastic", "parameter"])
def test_bfloat16_at_any_address(state_precision):
    """Two elements are read at a time: not so where a tensor begins within a word, or ends there."""
    sizes = [1, 2, 3, 40_001, 40_000, 7]
    values, grads = (tensors([(size,) for size in sizes], torch.bfloat16)[i] for i in (0, 3))
    found = []
    for odd in (True, False):
        flat = torch.full((2, sum(sizes) + 2), 77.0, dtype=torch.bfloat16)
        parts = [row[1:-1].split(sizes) if odd else values for row in flat]
        params = [nn.Parameter(part.copy_(value)) for part, value in zip(parts[0], values, strict=True)]
        optimizer = AdamWScheduleFree(params, lr=0.01, weight_decay=0.1, state_precision=state_precision)
        optimizer.train()
        for _ in range(2):
            for p, grad, part in zip(params, grads, parts[1], strict=True):
                p.grad = part.copy_(grad) if odd else grad
            optimizer.step()
        assert torch.equal(flat[:, [0, -1]], torch.full((2, 2), 77.0, dtype=torch.bfloat16))
        found.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_numba
@pytest.mark.parametrize("bits", [0x7FFF, -1, 0x7F81], ids=hex)
@pytest.mark.parametrize("group", [0, 1, 2, 3])
def test_every_nan_of_bfloat16_stays_one(group, bits):
    groups = tensors([(3,)], torch.bfloat16)
    groups[group][0][:] = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
    numba_step(*groups, numbers_for("adam", 0.1))
    assert groups[0][0].isnan().all() and groups[1][0].isnan().all()


@needs_numba
def test_bfloat16_extremes():
    y = [torch.tensor([float("nan"), 3.38e38, -1e-40, 1.0]).bfloat16()]
    z = [y[0].clone()]
    numba_step(y, z, [], [torch.zeros(4).bfloat16()], numbers_for("sgd", c=0.0, lr=0.0))
    assert z[0][0].isnan() and torch.equal(z[0][1:], torch.tensor([3.38e38, -1e-40, 1.0]).bfloat16())


# One-pass kernel on CPU


@needs_numba
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    shapes = [(700_001,), (3,), (500, 999), (0,), (123_457,)]
    one, many = tensors(shapes, torch.float32), tensors(shapes, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        numba_step(*one, numbers_for("adam", 0.1))
        torch.set_num_threads(threads)
        numba_step(*many, numbers_for("adam", 0.1))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for group_one, group_many in zip(one, many, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group_one, group_many, strict=True))


@needs_numba
def test_the_arithmetic_is_strict():
    """numpy's float32, operation by operation: the same bits, whatever the position in a vector."""
    y, z, v, g = tensors([(1037,)], torch.float32)
    n = numbers_for("adam", 0.1)
    f = np.float32
    y_, z_, v_, g_ = (t[0].numpy().copy() for t in (y, z, v, g))
    v_ = f(n.direction.beta2) * v_ + f(1 - n.direction.beta2) * (g_ * g_)
    d = g_ / (np.sqrt(v_ * f(1 / n.direction.correction)) + f(n.direction.eps)) + f(n.weight_decay) * y_
    y_ = y_ + f(n.c) * (z_ - y_) + f(n.lr * (n.beta * (1 - n.c) - 1)) * d
    z_ = z_ - f(n.lr) * d
    numba_step(y, z, v, g, n)
    for actual, want in ((y, y_), (z, z_), (v, v_)):
        assert np.array_equal(actual[0].numpy(), want)


def _child(groups, queue):
    numba_step(*groups, numbers_for("adam", 0.1))
    queue.put(groups[0][0].numpy().sum())


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_steps_too():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # torch's own threads would not survive the fork
        here, there = (tensors([(600_000,)], torch.float32) for _ in range(2))
        torch.set_num_threads(2)
        numba_step(*here, numbers_for("adam", 0.1))
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_child, args=(there, queue))
        child.start()
        assert queue.get(timeout=60) == here[0][0].numpy().sum()
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


def allocated(step, *args):
    """The bytes that torch allocates during a call, one allocation after the other."""
    with profile(profile_memory=True) as profiler:
        step(*args)
    return [event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage > 0]


@backends("torch fused", "numba")
@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_no_temporaries(step, kind, weight_decay, monkeypatch):
    """But for weight decay where d is the gradient, by torch's operations: of some elements at a time."""
    monkeypatch.setattr(torch_ops, "_CACHED_ELEMENTS", 2500)
    groups = tensors([(100_000,), (50_000,)], torch.float32)
    numbers = numbers_for(kind, weight_decay)
    groups[2] = groups[2] if numbers.direction.beta2 is not None else []
    step(*groups, numbers)  # compiles
    if step is torch_ops.fused_ and weight_decay and not numbers.direction.normalizes:
        assert 0 < max(allocated(step, *groups, numbers)) <= 10_000
    else:
        assert sum(allocated(step, *groups, numbers)) < 10_000
    if groups[2]:
        assert sum(allocated(torch_ops.foreach_, *groups, numbers_for("adam"))) > 1_000_000  # the measurement measures


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["sgd", "collect"])
def test_where_d_is_the_gradient_torchs_operations_round_as_schedulefree_does(kind, weight_decay, monkeypatch):
    """With x in the place of y, three times as many runs miss schedulefree's by more than its own tests allow."""
    monkeypatch.setattr(torch_ops, "_CACHED_ELEMENTS", 50)
    numbers = numbers_for(kind, weight_decay)
    results = []
    for step in (torch_ops.fused_, torch_ops.foreach_):
        groups = tensors(SHAPES, torch.float32)
        step(*groups[:2], groups[2] if numbers.direction.beta2 else [], groups[3], numbers)
        results.append(groups[:3])
    for some, others in zip(*results, strict=True):
        assert all(map(torch.equal, some, others))


# The switch


@needs_numba
@pytest.mark.parametrize("beta", [0.9, 0.98, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_one_pass_switch_gives_the_bits_of_averaging(dtype, beta):
    switch = kernels.switch_kernel()
    y, z, _, p = tensors([*SHAPES, (300_001,)], dtype)
    y[0][0, :4] = torch.tensor([0.0, float("nan"), float("inf"), 1e-40])
    wanted = [averaging.x_from_y(a, b, beta) for a, b in zip(y, z, strict=True)]
    assert not switch.holds_x(p, y, z, beta)
    for threads in (1, 3):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            switch.show_x_(p, y, z, beta)
            assert switch.holds_x(p, y, z, beta)
        finally:
            torch.set_num_threads(before)
        for a, b in zip(p, wanted, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    for index in (0, 5, 300_000):  # one unit in the last place, anywhere
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[p[-1].element_size()]
        p[-1].view(whole)[index] += 1
        assert not switch.holds_x(p, y, z, beta)
        p[-1].view(whole)[index] -= 1
    assert switch.holds_x(p, y, z, beta)
    zero = torch.zeros(3, dtype=dtype)
    assert switch.holds_x([zero], [zero], [zero], beta) and not switch.holds_x([-zero], [zero], [zero], beta)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_both_ways_of_switching_agree(dtype):
    shown = []
    for implementation in ("for-loop", None):
        params = [nn.Parameter(t) for t in tensors(SHAPES, dtype)[0]]
        optimizer = AdamWScheduleFree(params, lr=0.01, implementation="for-loop")
        optimizer.train()
        for seed in range(5):
            for p, g in zip(params, tensors(SHAPES, dtype, seed)[3], strict=True):
                p.grad = g
            optimizer.step()
        optimizer.implementation = implementation
        optimizer.eval()
        assert not optimizer.weights_replaced()
        shown.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))


# Which implementation runs


def rows_of(groups):
    return list(zip(*groups, strict=True))


@pytest.fixture
def without_numba(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "numba" else find_spec(name, *a))
    kernels.one_pass_kernel.cache_clear()
    yield
    kernels.one_pass_kernel.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The backends in the order in which they are called, with the number of tensors."""
    made = []

    def recorded(name, function):
        return lambda some, *args: (made.append((name, len(some))), function(some, *args))[1]

    numba = kernels.one_pass_kernel("cpu")
    monkeypatch.setattr(torch_ops, "foreach_", recorded("foreach", torch_ops.foreach_))
    monkeypatch.setattr(torch_ops, "fused_", recorded("torch fused", torch_ops.fused_))
    if numba is not None:
        monkeypatch.setattr(kernels, "one_pass_kernel", lambda device: recorded("one pass", numba))
    return made


@needs_numba
@pytest.mark.parametrize("implementation", ["fused", None])
def test_one_pass_is_taken_where_it_can(calls, implementation):
    kernels.step_(rows_of(tensors(SHAPES, torch.float32)), numbers_for("adam"), implementation)
    assert calls == [("one pass", len(SHAPES))]


@pytest.mark.parametrize("implementation", ["fused", None])
def test_torch_is_taken_where_numba_is_missing(without_numba, calls, implementation):
    groups = tensors(SHAPES, torch.float32)
    run_and_compare(lambda *g: kernels.step_(rows_of(g[:4]), g[4], implementation), *groups, numbers_for("adam"))
    assert calls == [("torch fused", len(SHAPES))]
    kernels.step_(rows_of(tensors(SHAPES, torch.bfloat16)), numbers_for("adam"), implementation)
    assert calls[1:] == [("foreach", len(SHAPES))]


def test_a_broken_numba_counts_as_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object())
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))  # nothing was compiled before
    for name in [name for name in sys.modules if name.startswith(f"{kernels.__name__}.sources")]:
        monkeypatch.delitem(sys.modules, name)
    kernels.one_pass_kernel.cache_clear()
    try:
        assert kernels.one_pass_kernel("cpu") is None
    finally:
        kernels.one_pass_kernel.cache_clear()


@needs_numba
@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_numba_that_refuses_its_settings_counts_as_missing(compiled_before, tmp_path):
    """If it is needed for what was not compiled before, the message says what to do."""
    code = (
        "import torch, sys\n"
        "from hf_schedulefree.optim import SGDScheduleFree, kernels\n"
        "p = torch.nn.Parameter(torch.ones(3, dtype=getattr(torch, sys.argv[1]))); p.grad = torch.ones_like(p)\n"
        "optimizer = SGDScheduleFree([p], lr=0.5, implementation='fused')\n"
        "optimizer.train(); optimizer.step()\n"
        "print(p[0].item(), kernels.one_pass_kernel('cpu') is not None)\n"
    )

    def run(dtype, **environment):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), **environment}
        command = [sys.executable, "-c", code, dtype]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])

    if compiled_before and machine_code.AVAILABLE:
        assert run("float32").stdout.split() == ["0.5", "True"]
        assert run("float32", NUMBA_NUM_THREADS="0").stdout.split() == ["0.5", "True"]
        result = run("float64", NUMBA_NUM_THREADS="0")
        assert "RuntimeError: The kernel step.step has to be compiled by numba" in result.stderr
        assert "NUMBA_DISABLE_JIT=1" in result.stderr
        assert run("float64", NUMBA_NUM_THREADS="0", NUMBA_DISABLE_JIT="1").stdout.split() == ["0.5", "False"]
    else:
        result = run("float32", NUMBA_NUM_THREADS="0")
        assert result.stdout.split() == ["0.5", "False"], result.stderr


@needs_numba
def test_compiles_where_no_cache_can_be_written(tmp_path):
    """A copy of the package in a folder that nobody may write to, and no home: one step in a fresh process."""
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"  # as on a read-only file system
        "import torch\n"
        "from hf_schedulefree.optim import SGDScheduleFree, kernels\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "optimizer = SGDScheduleFree([p], lr=0.5)\n"
        "optimizer.train(); optimizer.step()\n"
        "assert kernels.one_pass_kernel('cpu') is not None\n"
        "print(p[0].item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.5"


def test_other_devices_take_torchs_operations():
    assert kernels.one_pass_kernel("mps") is None and kernels.kernel_for(torch.device("mps"), torch.float32) is None


def test_the_other_choices(calls):
    for implementation, wanted in (("foreach", [("foreach", 3)]), ("for-loop", [("foreach", 1)] * 3)):
        calls.clear()
        kernels.step_(rows_of(tensors([(3,), (4,), ()], torch.float32)), numbers_for("adam"), implementation)
        assert calls == wanted


def test_chunks_bound_the_temporaries(calls, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_ELEMENTS", 10)
    kernels.step_(rows_of(tensors([(4,), (6,), (1,), (30,), (2,)], torch.float32)), numbers_for("adam"), "foreach")
    assert calls == [("foreach", 2), ("foreach", 1), ("foreach", 1), ("foreach", 1)]


def odd_rows(dtype=torch.float32):
    """Tensors that no kernel may treat as one flat piece of memory."""
    transposed = [[t.t() for t in group] for group in tensors([(6, 4)], dtype)]
    last = [
        [t.contiguous(memory_format=torch.channels_last) for t in group] for group in tensors([(2, 3, 4, 5)], dtype)
    ]
    every_second = [[t[::2] for t in group] for group in tensors([(20,)], dtype)]
    grad_only = tensors([(6, 4)], dtype, seed=3)
    grad_only[3] = [grad_only[3][0].t().contiguous().t()]
    expanded = tensors([(5, 4)], dtype, seed=4)
    expanded[3] = [torch.full((1,), 0.1, dtype=dtype).expand(5, 4)]
    return [row for groups in (transposed, last, every_second, grad_only, expanded) for row in rows_of(groups)]


@pytest.mark.parametrize("implementation", [*kernels.IMPLEMENTATIONS, None])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_tensors_of_every_layout_and_dtype_together(implementation, kind):
    rows = [
        *odd_rows(),
        *rows_of(tensors(SHAPES, torch.float32)),
        *odd_rows(torch.float64),
        *rows_of(tensors(SHAPES, torch.float64, seed=1)),
    ]
    numbers = numbers_for(kind, 0.1)
    if numbers.direction.beta2 is None:
        rows = [(y, z, None, g) for y, z, _, g in rows]
    wanted = [expected(*([t] if t is not None else [] for t in row), numbers) for row in rows]
    grads = [row[3].clone() for row in rows]
    kernels.step_(rows, numbers, implementation)
    for (y, z, v, g), (want_y, want_z, want_v), grad in zip(rows, wanted, grads, strict=True):
        tolerance = TOLERANCE[y.dtype]
        assert_close([y, z], [want_y[0], want_z[0]], tolerance)
        if v is not None:
            assert_close([v], want_v, tolerance)
        assert torch.equal(g, grad)


class Labelled(torch.Tensor):
    """A tensor subclass whose memory is nobody's business."""


@pytest.mark.parametrize("implementation", ["fused", None])
def test_tensor_subclasses_are_stepped_by_torch(calls, implementation):
    rows = rows_of(tensors([(4,)], torch.float32))
    kernels.step_([tuple(t.as_subclass(Labelled) for t in rows[0])], numbers_for("adam"), implementation)
    assert calls == [("foreach", 1)]


@pytest.mark.parametrize("implementation", [*kernels.IMPLEMENTATIONS, None])
def test_autograd_notices_the_step(implementation):
    p = nn.Parameter(torch.ones(4))
    optimizer = AdamWScheduleFree([p], lr=0.1, implementation=implementation)
    optimizer.train()
    loss = (p * p).sum()
    p.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_numba
@pytest.mark.parametrize("state_precision", ["split", "full", "stochastic", "parameter"])
def test_the_one_pass_switch_of_half_precision_gives_the_bits_of_torchs_operations(state_precision, monkeypatch):
    params = [nn.Parameter(t) for t in tensors([(300_001,), (3,), (50, 9)], torch.bfloat16)[0]]
    optimizer = AdamWScheduleFree(params, lr=0.01, state_precision=state_precision)
    optimizer.train()
    for seed in range(3):
        for p, g in zip(params, tensors([(300_001,), (3,), (50, 9)], torch.bfloat16, seed)[3], strict=True):
            p.grad = g
        optimizer.step()
    started = [(p, {**optimizer.state[p], "y": p.detach().clone()}) for p in params]
    started[0][1]["y"][:3] = torch.tensor([float("inf"), -0.0, 1e-40])
    started[0][1].get("y_low", torch.zeros(3))[:3] = 0  # as `split` leaves it
    calls, kernel = [], kernels.switch_kernel()
    run = kernel._run
    monkeypatch.setattr(kernel, "_run", lambda *args, **options: calls.append(1) or run(*args, **options))
    with torch.no_grad():
        switching.show_x(started, 0.9)
        assert calls and switching.holds_x(started, 0.9, one_pass=False) and switching.holds_x(started, 0.9)
        params[2][7, 3] += 0.5
        assert not switching.holds_x(started, 0.9)


def compiled_steps(monkeypatch, elements, dtype=torch.float32, **options):
    """Whether the step and the switch of an optimizer of two groups ask for the compiled kernels."""
    asked = []
    monkeypatch.setattr(kernels, "COMPILED_FROM", 1000)
    monkeypatch.setattr(kernels, "switch_kernel", lambda: asked.append("switch"))
    monkeypatch.setattr(kernels, "one_pass_kernel", lambda device_type: asked.append("step"))
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (elements - 10, 10)]
    optimizer = AdamWScheduleFree([{"params": [p]} for p in params], **options)
    optimizer.train()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.eval()
    optimizer.train()
    return sorted(set(asked))


def test_small_models_do_without_numba(monkeypatch):
    assert compiled_steps(monkeypatch, 999) == []
    assert compiled_steps(monkeypatch, 999, implementation="fused") == ["step", "switch"]
    assert compiled_steps(monkeypatch, 1000) == ["step", "switch"]
    assert compiled_steps(monkeypatch, 1000, implementation="foreach") == []


def test_the_default_bound_keeps_numba_out_of_a_small_run():
    code = """
import sys, torch
from hf_schedulefree.optim import AdamWScheduleFree
p = torch.nn.Parameter(torch.zeros(1000))
optimizer = AdamWScheduleFree([p])
optimizer.train()
p.grad = torch.ones_like(p)
optimizer.step()
optimizer.eval()
optimizer.train()
assert "hf_schedulefree.optim.kernels.one_pass_cpu" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("implementation", [*kernels.IMPLEMENTATIONS, None])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_default_dtype_changes_nothing(implementation, compiled, monkeypatch):
    """torch's fused Adam was given the number of the step in that dtype; 301 is 300 in bfloat16."""
    if not compiled:
        monkeypatch.setattr(kernels, "one_pass_kernel", lambda device_type: None)
    ends = []
    for default in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = AdamWScheduleFree([p], lr=0.1, implementation=implementation)
        optimizer.train()
        optimizer.param_groups[0]["k"] = 300
        torch.set_default_dtype(default)
        try:
            for _ in range(3):
                p.grad = torch.cos(p.detach())
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(p.detach())
    assert torch.equal(*ends)
