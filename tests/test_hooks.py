"""The step goes directly where nobody watches it, and else as torch leads it: hooks, profilers, schedulers."""

import copy
import inspect
import pickle
import threading
import warnings

import pytest
import torch
from cases import CASES
from torch import nn
from torch.autograd import profiler_legacy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_schedulefree.optim import AdamWScheduleFree, SGDScheduleFree


def build(kind=AdamWScheduleFree, **options):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = kind([p], **options)
    optimizer.train()
    return optimizer


@pytest.fixture
def calls(monkeypatch):
    """What the wrapper that torch makes was called with; the classes of this package are wrapped anew."""
    made, wrap = [], Optimizer.profile_hook_step

    def counted(step):
        whole = wrap(step)

        def around(*args, **options):
            made.append((args, options))
            return whole(*args, **options)

        return around

    monkeypatch.setattr(Optimizer, "profile_hook_step", staticmethod(counted))
    for kind in (AdamWScheduleFree, SGDScheduleFree):
        if "step" in vars(kind):
            monkeypatch.delattr(kind, "step")
    yield made
    for kind in (AdamWScheduleFree, SGDScheduleFree):
        if "step" in vars(kind):
            del kind.step


def test_nobody_watches(calls):
    optimizer = build()
    optimizer.step()
    optimizer.step()
    assert not calls and optimizer.param_groups[0]["k"] == 2


def test_a_closure_may_register_hooks(calls):
    optimizer, seen = build(), []

    def closure():
        optimizer.register_step_post_hook(lambda own, args, options: seen.append((args, options)))
        return 5

    assert optimizer.step(closure) == 5
    assert seen == [((optimizer, closure), {})] and len(calls) == 1
    assert build().step(closure=lambda: 6) == 6
    assert len(calls) == 2


@pytest.mark.parametrize("kind", CASES)
def test_hooks_of_an_optimizer_and_of_all(kind):
    optimizer, other = build(CASES[kind].ours), build(SGDScheduleFree)
    seen = []

    def hook(name):
        return lambda own, args, options: seen.append((name, own, args, options, own.param_groups[0]["k"]))

    handles = [
        optimizer.register_step_post_hook(hook("after")),
        register_optimizer_step_post_hook(hook("after all")),
        optimizer.register_step_pre_hook(hook("before")),
        register_optimizer_step_pre_hook(hook("before all")),
    ]
    closure = lambda: 7.0  # noqa: E731
    try:
        assert optimizer.step(closure) == 7.0
        names = ["before all", "before", "after", "after all"]
        assert seen == [(name, optimizer, (optimizer, closure), {}, i // 2) for i, name in enumerate(names)]
        seen.clear()
        other.step(closure=closure)
        assert [(name, own, options) for name, own, _, options, _ in seen] == [
            ("before all", other, {"closure": closure}),
            ("after all", other, {"closure": closure}),
        ]
    finally:
        for handle in handles:
            handle.remove()
    seen.clear()
    optimizer.step()
    assert not seen


@pytest.mark.parametrize("place", range(4))
def test_each_kind_of_hook_alone_is_called(place):
    optimizer, seen = build(), []
    optimizer.step()
    register = (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    )[place]
    handle = register(lambda *args: seen.append(1))
    try:
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert seen == [1]


def test_a_hook_may_replace_the_arguments():
    optimizer = build()
    handle = optimizer.register_step_pre_hook(lambda own, args, options: ((own, lambda: "replaced"), {}))
    assert optimizer.step(lambda: "mine") == "replaced"
    handle.remove()
    optimizer.register_step_pre_hook(lambda *args: "nonsense")
    with pytest.raises(RuntimeError, match="tuple"):
        optimizer.step()


def test_profilers_see_the_step():
    optimizer = build()
    optimizer.step()
    with torch.profiler.profile() as profiler:
        optimizer.step()
    assert "Optimizer.step#AdamWScheduleFree.step" in {event.name for event in profiler.events()}
    with torch.autograd.profiler.profile() as profiler:
        optimizer.step()
    assert "Optimizer.step#AdamWScheduleFree.step" in {event.name for event in profiler.function_events}


def test_the_legacy_profiler_counts(calls):
    optimizer = build()
    with profiler_legacy.profile():
        optimizer.step()
    assert len(calls) == 1


def test_a_profiler_in_another_thread_counts(calls):
    optimizer = build()
    with torch.profiler.profile():
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
    assert len(calls) == 1


class Overridden(AdamWScheduleFree):
    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)


def test_a_subclass_with_a_step_of_its_own():
    optimizer = build(Overridden)
    optimizer.step()
    seen = []
    optimizer.register_step_pre_hook(lambda own, args, options: seen.append(args))
    optimizer.step()
    assert seen[0] == (optimizer,) and optimizer.steps == 2 and optimizer.param_groups[0]["k"] == 2


def test_a_scheduler_sees_that_a_step_was_made():
    optimizer = build(lr=1.0)
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    late = build(lr=1.0)
    scheduler = LambdaLR(late, lambda epoch: 1.0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_have_hooks_too(copied):
    optimizer = build()
    optimizer.step()
    again, seen = copied(optimizer), []
    again.register_step_post_hook(lambda *args: seen.append(1))
    again.step()
    assert seen == [1] and again.param_groups[0]["k"] == 2 and optimizer.param_groups[0]["k"] == 1


def test_the_signature_stays():
    optimizer = build()
    assert list(inspect.signature(optimizer.step).parameters) == ["closure"]
    assert optimizer.step.__name__ == "step" and "closure" in optimizer.step.__doc__


@pytest.mark.parametrize("former", [True, False])
def test_gradients_are_recorded_in_the_closure_alone(former):
    optimizer, seen = build(), []
    with torch.set_grad_enabled(former):
        optimizer.step(lambda: seen.append(torch.is_grad_enabled()))
        assert torch.is_grad_enabled() == former
        optimizer.eval()
        with pytest.raises(RuntimeError, match="eval mode"):
            optimizer.step()
        assert torch.is_grad_enabled() == former
    (p,) = optimizer.param_groups[0]["params"]
    assert seen == [True] and all(t.grad_fn is None for t in (p, *optimizer.state[p].values()))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("where", ["method", "in a function"])
@pytest.mark.parametrize("implementation", ["for-loop", "fused"])
def test_inside_what_torch_compiles_all_runs_as_it_is(implementation, where, hooked):
    """The compiler traced into the kernels with tensors that have no memory: an error, or a segmentation fault."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(9, 5))]
    others = [torch.nn.Parameter(params[0].detach().clone())]
    optimizer = AdamWScheduleFree(params, implementation=implementation)
    plain = AdamWScheduleFree(others, implementation=implementation)
    seen = []
    if hooked:
        optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def everything():
        twice = params[0].grad * 2
        optimizer.step()
        optimizer.eval()
        assert not optimizer.weights_replaced()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.train()
        return twice + 1

    step = torch.compile(optimizer.step if where == "method" else everything, backend="aot_eager")
    optimizer.train()
    plain.train()
    for _ in range(4):
        params[0].grad, others[0].grad = (torch.randn(9, 5),) * 2
        step()
        plain.step()
    assert torch.equal(params[0], others[0]) and optimizer.param_groups[0]["k"] == 4
    assert len(seen) == 4 * hooked
    torch._dynamo.reset()


def _mark(optimizer):
    optimizer.state["mark"] = 1


def _only_z(optimizer, state_dict):
    assert state_dict["param_groups"][0]["foreach"] is True
    return {i: state["z"] for i, state in state_dict["state"].items() if i != "mark"}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hooks_of_a_state_dict_may_add_and_return_anything(mode):
    optimizer = build()
    optimizer.step()
    getattr(optimizer, mode)()
    optimizer.register_state_dict_pre_hook(_mark)
    state_dict = optimizer.state_dict()
    assert state_dict["state"]["mark"] == 1 and optimizer.parked_bytes >= 0
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    optimizer.train()
    optimizer.step()
    assert copy.deepcopy(optimizer).state["mark"] == 1
    optimizer.register_state_dict_post_hook(_only_z)
    assert list(optimizer.state_dict()) == [0]


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_a_hook_may_show_x_before_each_state_dict(implementation):
    """What it parked was not in the state dict, where it is parked as a residual."""
    optimizer = build(implementation=implementation)
    optimizer.step()
    (p,) = optimizer.param_groups[0]["params"]
    y = p.detach().clone()
    optimizer.register_state_dict_pre_hook(lambda own: own.eval())
    state_dict = optimizer.state_dict()
    assert state_dict["param_groups"][0]["train_mode"] is False and torch.equal(state_dict["state"][0]["y"], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", ["split", "full"])
def test_a_hook_may_use_what_is_loaded(dtype, saved):
    """It was called before the casts that torch makes were undone: the weights seemed to be others."""

    def trained(state_precision):
        p = nn.Parameter(torch.linspace(-1, 1, 40).to(dtype))
        optimizer = AdamWScheduleFree([p], lr=0.1, state_precision=state_precision)
        optimizer.train()
        for step in range(4):
            p.grad = torch.cos(p.detach() + step)
            optimizer.step()
        return p, optimizer

    p, source = trained(saved)
    y = p.detach().clone()
    source.eval()
    q, optimizer = trained("split")
    q.data.copy_(p)
    q.grad = None
    optimizer.register_load_state_dict_post_hook(lambda own: own.train())
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    assert optimizer.mode == "train" and optimizer.param_groups[0]["k"] == 4
    assert torch.equal(q, y)
