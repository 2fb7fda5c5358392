"""capturable=True: the same trajectory, and a step whose operations alone, without its Python, make the next ones."""

import copy
import io

import pytest
import schedulefree
import torch
from cases import ALL_SETTINGS, CASES
from tape import Tape
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, RAdamScheduleFree, precision
from hf_schedulefree.optim.kernels import IMPLEMENTATIONS, one_pass_kernel
from hf_schedulefree.optim.kernels.numbers import StepNumbers
from hf_schedulefree.progress import averaging_weight

SHAPES = [(7, 5), (), (33,)]
COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr")
# Of a trajectory, relative to the largest value: c and the like differ in the last place of float64.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def make(kind, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = CASES[kind].ours(params, **{"lr": CASES[kind].lr, **options})
    optimizer.train()
    return params, optimizer


def give_gradients(params, step):
    """In place from the second time on, as a captured backward pass does."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        g = (torch.randn(p.shape, generator=generator) * 0.1).to(p.dtype)
        p.grad = g if p.grad is None else p.grad.copy_(g)


def run(params, optimizer, steps):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def assert_close(one, other):
    """Parameters, state and counters of two (params, optimizer)."""
    for p, q in zip(one[0], other[0], strict=True):
        pairs = [(p, q), *((one[1].state[p][name], other[1].state[q][name]) for name in one[1].state[p])]
        if "y_low" in one[1].state[p]:
            pairs = [(t, u) for t, u in pairs if t.dtype != torch.int16]
        for t, u in pairs:
            assert (t - u).abs().max() <= TOLERANCE[t.dtype] * u.abs().max().clamp(min=0.1)
    for group, wanted in zip(one[1].param_groups, other[1].param_groups, strict=True):
        assert {name: float(group[name]) for name in COUNTERS} == pytest.approx(
            {name: float(wanted[name]) for name in COUNTERS}, rel=1e-12
        )


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize(("kind", "setting"), ALL_SETTINGS)
def test_the_trajectory_is_the_same(kind, setting, implementation):
    options = {**CASES[kind].options(setting), "implementation": implementation}
    plain, capturable = make(kind, **options), make(kind, capturable=True, **options)
    run(*plain, range(60))
    run(*capturable, range(60))
    assert_close(capturable, plain)
    assert all(isinstance(capturable[1].param_groups[0][name], torch.Tensor) for name in COUNTERS)


HALF = [
    *((torch.bfloat16, state_precision) for state_precision in precision.STATE_PRECISIONS),
    *((torch.float16, state_precision) for state_precision in ("split", "stochastic", "full")),
]


@pytest.mark.parametrize(("dtype", "state_precision"), HALF, ids=str)
@pytest.mark.filterwarnings("ignore:.*state_precision='parameter':UserWarning")
def test_the_trajectory_is_the_same_in_half_precision(dtype, state_precision):
    found = [make("adamw", dtype, state_precision=state_precision, capturable=flag) for flag in (True, False)]
    for one in found:
        run(*one, range(30))
    assert_close(*found)


@pytest.fixture
def numbers_stay_tensors(monkeypatch):
    """As on a GPU; on a CPU, steps take Python's numbers, as these cost nothing there."""
    monkeypatch.setattr(StepNumbers, "on", lambda self, device: self)
    monkeypatch.setattr("hf_schedulefree.optim.kernels.one_pass_kernel", lambda device_type: None)


CAPTURED = [
    *((kind, setting, torch.float32, None) for kind, setting in ALL_SETTINGS),
    *((kind, "everything" if kind != "radam" else "decay", torch.float64, None) for kind in CASES),
    *(
        (kind, "plain", dtype, state_precision)
        for kind in CASES
        for dtype in precision.HALF_DTYPES
        for state_precision in ("split", "stochastic", "full")
    ),
]


@pytest.mark.parametrize(("kind", "setting", "dtype", "state_precision"), CAPTURED, ids=str)
def test_a_captured_step_makes_the_next_ones(kind, setting, dtype, state_precision, numbers_stay_tensors):
    options = {**CASES[kind].options(setting), "state_precision": state_precision, "capturable": True}
    captured, plain = make(kind, dtype, **options), make(kind, dtype, **options)
    run(*captured, range(2))
    give_gradients(captured[0], 2)
    with Tape() as tape:
        captured[1].step()
    for step in range(3, 45):
        give_gradients(captured[0], step)
        tape.replay()
    run(*plain, range(45))
    assert captured[1].param_groups[0]["k"] == 45
    assert_close(captured, plain)
    captured[1].eval()
    assert captured[1].param_groups[0]["parked_k"] == 45 and not captured[1].weights_replaced()


def test_a_captured_step_without_capturable_reads_stale_numbers(numbers_stay_tensors):
    """The tape can tell: this is what capturable is for."""
    captured, plain = make("adamw"), make("adamw")
    run(*captured, range(2))
    give_gradients(captured[0], 2)
    with Tape() as tape:
        captured[1].step()
    for step in range(3, 10):
        give_gradients(captured[0], step)
        tape.replay()
    run(*plain, range(10))
    with pytest.raises(AssertionError):
        assert_close(captured, plain)


def test_a_rate_in_a_tensor_is_read_at_each_replay(numbers_stay_tensors):
    lr = torch.tensor(0.01)
    captured, plain = make("adamw", lr=lr, capturable=True), make("adamw", lr=lr.item())
    run(*captured, range(2))
    give_gradients(captured[0], 2)
    with Tape() as tape:
        captured[1].step()
    for step in range(3, 6):
        lr.fill_(0.03)
        give_gradients(captured[0], step)
        tape.replay()
    run(*plain, range(3))
    plain[1].param_groups[0]["lr"] = torch.tensor(0.03).item()
    run(*plain, range(3, 6))
    assert_close(captured, plain)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_step_reads_a_value(kind, dtype):
    """On the meta device, which has no values."""
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in SHAPES]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer = CASES[kind].ours(params, lr=0.1, capturable=True)
    optimizer.train()
    optimizer.init_state()
    for _ in range(2):
        optimizer.step()
    assert optimizer.param_groups[0]["k"].device.type == "meta"


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(("saved_as", "loaded_as"), [(True, False), (False, True), (True, True)])
def test_checkpoints_hold_plain_numbers_and_load_both_ways(kind, saved_as, loaded_as):
    one, whole = make(kind, capturable=saved_as), make(kind, capturable=loaded_as)
    run(*one, range(5))
    run(*whole, range(9))
    file = io.BytesIO()
    torch.save(one[1].state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for group in saved["param_groups"]:
        assert all(type(group[name]) is (int if name == "k" else float) for name in COUNTERS)
    other = make(kind, capturable=loaded_as)
    for p, q in zip(other[0], one[0], strict=True):
        p.data.copy_(q)
    other[1].load_state_dict(saved)
    assert other[1].param_groups[0]["capturable"] is loaded_as
    run(*other, range(5, 9))
    assert_close(other, whole)
    assert isinstance(other[1].param_groups[0]["k"], torch.Tensor) == loaded_as


def test_interchanges_with_schedulefree():
    params, ours = make("adamw", capturable=True)
    theirs = schedulefree.AdamWScheduleFree([nn.Parameter(p.detach().clone()) for p in params], lr=0.01)
    theirs.train()
    run(theirs.param_groups[0]["params"], theirs, range(4))
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    run(params, ours, range(4, 7))
    run(theirs.param_groups[0]["params"], theirs, range(4, 7))
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.param_groups[0]["k"] == 7


def test_switching_is_exact_and_restarting_forgets():
    params, optimizer = make("adamw", capturable=True)
    run(params, optimizer, range(3))
    y = [p.detach().clone() for p in params]
    optimizer.eval()
    assert not torch.equal(params[0], y[0])
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(params, y, strict=True))
    optimizer.restart()
    run(params, optimizer, range(1))
    assert optimizer.param_groups[0]["k"] == 1 and not optimizer.param_groups[0]["weight_sum"] == 0


def test_what_is_logged_is_a_number():
    params, optimizer = make("adamw", capturable=True)
    assert averaging_weight(optimizer.param_groups[0]) is None
    run(params, optimizer, range(4))
    c = averaging_weight(optimizer.param_groups[0])
    assert type(c) is float and c == pytest.approx(0.25)


def test_counters_follow_the_option():
    params, optimizer = make("radam", capturable=True)
    run(params, optimizer, range(6))
    optimizer.param_groups[0]["capturable"] = False
    run(params, optimizer, range(1))
    assert type(optimizer.param_groups[0]["k"]) is int and type(optimizer.param_groups[0]["lr_max"]) is float


def test_a_rectification_that_never_comes():
    found = [make("radam", betas=(0.9, 0.3), silent_sgd_phase=False, capturable=flag) for flag in (True, False)]
    for one in found:
        run(*one, range(12))
    assert_close(*found)
    assert isinstance(found[0][1], RAdamScheduleFree)


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_capture_is_refused_without_the_option(capturing):
    params, optimizer = make("adamw")
    optimizer.init_state()
    with pytest.raises(RuntimeError, match="capturable=True"):
        run(params, optimizer, range(1))


def test_a_capture_is_refused_before_the_state_exists(capturing):
    params, optimizer = make("adamw", capturable=True)
    with pytest.raises(RuntimeError, match=r"init_state\(\)"):
        run(params, optimizer, range(1))
    optimizer.init_state()
    run(params, optimizer, range(1))


def test_the_option_is_checked():
    with pytest.raises(ValueError, match="capturable='yes' is out of range; expected True or False"):
        AdamWScheduleFree([torch.zeros(1)], capturable="yes")


@pytest.mark.parametrize("step", [0, 1, 12345, 2**40])
@pytest.mark.parametrize("seed", [0, -7, 2**63, 2**80 + 3])
def test_random_keys_of_a_step_in_a_tensor(step, seed):
    wanted = precision.rounding_key(seed, step, 17)
    first, second = precision.rounding_key(seed, torch.tensor(float(step), dtype=torch.float64), 17)
    assert (first.item(), second.item()) == wanted
    index = torch.arange(2**32 - 5, 2**32 + 5)
    assert torch.equal(precision.random_bits((first, second), index), precision.random_bits(wanted, index))


def test_numba_is_used_here():
    """The trajectories above were those of the one-pass kernel, where it is installed."""
    pytest.importorskip("numba")
    assert one_pass_kernel("cpu") is not None
