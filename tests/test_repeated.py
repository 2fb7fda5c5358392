"""The step that trusts the tensors of the step before: always what the step that looks at all of them does."""

import gc
import importlib.util
import weakref

import pytest
import torch
from cases import CASES
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, base, kernels
from hf_schedulefree.optim.repeated import RepeatedStep

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba (the extra `fast`)")

SHAPES = [(33, 3), (7,), (), (20_000,), (0,), (5, 4)]


class Run:
    """An optimizer of two groups, whose gradients are those of the number of the step."""

    def __init__(self, kind="adamw", dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
        self.extra = nn.Parameter(torch.randn(9).to(dtype))
        groups = [{"params": self.params[:4]}, {"params": self.params[4:], "lr": 0.02}]
        self.optimizer = CASES[kind].ours(groups, lr=0.05, **options)
        self.optimizer.train()
        self.count = 0

    def step(self, *, without=()):
        torch.manual_seed(100 + self.count)
        for i, p in enumerate([*self.params, self.extra]):
            p.grad = None if i in without else torch.randn(p.shape).to(p.dtype)
        self.optimizer.step()
        self.count += 1

    def tensors(self):
        states = (self.optimizer.state[p] for p in [*self.params, self.extra] if p in self.optimizer.state)
        return [*self.params, self.extra, *(t for state in states for t in state.values())]


def nothing(run):
    pass


def moved_parameter(run):
    run.params[0].data = run.params[0].data.clone()


def transposed_parameter(run):
    """The same object at the same address."""
    p = run.params[0]
    for t in (p, *run.optimizer.state[p].values()):
        t.data = t.data.t()


def moved_state(run):
    for t in run.optimizer.state[run.params[3]].values():
        t.data = t.data.clone()


def other_state(run):
    state = run.optimizer.state[run.params[1]]
    for key, t in state.items():
        state[key] = (t.float() + 1).to(t.dtype)


def other_strides(run):
    """Other objects at the same addresses."""
    state = run.optimizer.state[run.params[0]]
    for key, t in state.items():
        state[key] = torch.as_strided(t, (33, 3), (1, 33))


def other_states(run):
    run.optimizer.state[run.params[1]] = {key: t + 1 for key, t in run.optimizer.state[run.params[1]].items()}


def lost_state(run):
    del run.optimizer.state[run.params[3]]


def loaded(run):
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def switched(run):
    run.optimizer.eval()
    run.optimizer.train()


def restarted(run):
    run.optimizer.eval()
    with torch.no_grad():
        run.params[3].add_(1)
    run.optimizer.train()


def more_parameters(run):
    run.optimizer.add_param_group({"params": [run.extra]})


def one_by_one(run):
    run.optimizer.implementation = "for-loop"


def other_seed(run):
    run.optimizer.param_groups[0]["rounding_seed"] = 5


def frozen_for_good(run):
    run.params[2].requires_grad_(False)
    del run.optimizer.param_groups[0]["params"][2]


EVENTS = (
    *(nothing, moved_parameter, transposed_parameter, moved_state, other_state, other_strides, other_states),
    *(lost_state, loaded, switched, restarted, more_parameters, one_by_one, other_seed, frozen_for_good),
)
KINDS = [
    pytest.param("adamw", torch.float32, {}, id="float32"),
    pytest.param("adamw", torch.float64, {"weight_decay": 0.1}, id="float64"),
    pytest.param("adamw", torch.bfloat16, {}, id="split"),
    pytest.param("adamw", torch.bfloat16, {"state_precision": "stochastic"}, id="stochastic"),
    pytest.param("adamw", torch.bfloat16, {"state_precision": "parameter"}, id="parameter"),
    pytest.param("sgd", torch.float32, {}, id="sgd"),
    pytest.param("sgd", torch.bfloat16, {"state_precision": "full"}, id="sgd, full"),
    pytest.param("radam", torch.float32, {}, id="radam"),
]


@pytest.fixture(params=[pytest.param("numba", marks=needs_numba), "torch"])
def compiler(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "one_pass_kernel", lambda device_type: None)


@pytest.fixture
def rows(monkeypatch):
    """How many groups were stepped in the way that looks at all tensors."""
    made, step_rows = [], base.ScheduleFreeOptimizer._step_rows

    def counted(self, *args):
        made.append(1)
        step_rows(self, *args)

    monkeypatch.setattr(base.ScheduleFreeOptimizer, "_step_rows", counted)
    return made


@pytest.mark.filterwarnings("ignore:.*small updates are rounded away")
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize(("kind", "dtype", "options"), KINDS)
def test_whatever_happens_between_two_steps(kind, dtype, options, event, compiler, monkeypatch):
    found = []
    for repeats in (True, False):
        if not repeats:
            monkeypatch.setattr(RepeatedStep, "of", lambda *args, **options: None)
        run = Run(kind, dtype, **options)
        for _ in range(3):
            run.step()
        run.step(without={1, 3})
        run.step(without={1, 3})
        run.step()
        event(run)
        for _ in range(2):
            run.step()
        found.append(run.tensors())
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_second_step_repeats_the_first(rows):
    run = Run()
    for count in range(4):
        run.step()
        assert len(rows) == 2, count
    run.step(without={0})
    run.step(without={0})
    assert len(rows) == 3
    run.optimizer.zero_grad(set_to_none=False)
    run.step()
    assert len(rows) == 4


@pytest.mark.parametrize(
    "change", [moved_parameter, transposed_parameter, moved_state, other_state, loaded, one_by_one]
)
def test_what_is_noticed(change, rows):
    run = Run()
    run.step()
    run.step()
    assert len(rows) == 2
    change(run)
    run.step()
    assert len(rows) > 2


class Labelled(torch.Tensor):
    pass


KINDS_OF_GRADIENTS = {
    "not contiguous": lambda grad: torch.stack([grad, grad], dim=-1)[..., 0],
    "a subclass": lambda grad: grad.as_subclass(Labelled),
}


@pytest.mark.parametrize("kind", KINDS_OF_GRADIENTS)
def test_gradients_of_another_kind(kind, rows):
    run, plain = Run(), Run()
    for one in (run, plain):
        one.step()
        one.step()
        torch.manual_seed(7)
        for p in one.params:
            p.grad = torch.randn_like(p)
    p = run.params[3]
    p.grad = KINDS_OF_GRADIENTS[kind](p.grad)
    assert len(rows) == 4
    for one in (run, plain):
        one.optimizer.step()
    assert len(rows) == 5
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(run.tensors(), plain.tensors(), strict=True))


def test_sparse_gradients_are_refused_at_any_step():
    run = Run()
    run.step()
    run.step()
    run.params[3].grad = run.params[3].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        run.optimizer.step()


def test_state_that_was_moved_elsewhere_is_freed():
    p = nn.Parameter(torch.zeros(10))
    optimizer = AdamWScheduleFree([p])
    optimizer.train()
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    state = optimizer.state[p]
    gone = [weakref.ref(t) for t in state.values()] + [weakref.ref(p.grad)]
    for key, t in state.items():
        state[key] = t.clone()
    p.grad = None
    del t
    gc.collect()
    assert not any(tensor() is not None for tensor in gone)


def test_parameters_that_a_group_shows_no_longer_are_freed():
    """DeepSpeed puts others into the same group, step by step."""
    optimizer = AdamWScheduleFree([nn.Parameter(torch.zeros(10))])
    optimizer.train()
    gone = []
    for _ in range(4):
        p = nn.Parameter(torch.zeros(10))
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = [p]
        p.grad = torch.ones_like(p)
        optimizer.step()
        gone.append(weakref.ref(p))
    del p
    gc.collect()
    assert [tensor() is None for tensor in gone] == [True] * 3 + [False]
