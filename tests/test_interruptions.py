"""A call that is interrupted (Ctrl-C, no memory) leaves an optimizer as it was, or one that the next call completes."""

import copy
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import CASES

from hf_schedulefree.optim import ScheduleFreeOptimizer, conversion, pages
from hf_schedulefree.optim.modes import Modes


def _optimizer(dtype=torch.float32, kind="adamw", **options):
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 3), (5,)]
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]
    options = {"lr": CASES[kind].lr, "implementation": "foreach", **options}
    return CASES[kind].ours(params, **options)


def _params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _give_gradients(optimizer, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in _params(optimizer):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _train(optimizer, steps):
    optimizer.train()
    for step in steps:
        _give_gradients(optimizer, step)
        optimizer.step()


def _all_of(optimizer):
    """Everything that an optimizer and its parameters hold, for `==`."""

    def plain(value):
        return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value

    state_dict = optimizer.state_dict()
    states = {i: {k: plain(v) for k, v in state.items()} for i, state in state_dict["state"].items()}
    return [plain(p.detach()) for p in _params(optimizer)], states, state_dict["param_groups"]


def _interrupted(
    make: Callable[[], ScheduleFreeOptimizer], call: Callable[[ScheduleFreeOptimizer], object], *functions: Callable
) -> Iterator[ScheduleFreeOptimizer]:
    """Optimizers on which a call was interrupted: each before another line of these functions, up to the last one."""
    codes = {inspect.unwrap(function).__code__ for function in functions}
    for line in itertools.count(1):
        optimizer = make()
        seen = 0

        def trace(frame, event, arg, last=line):
            nonlocal seen
            if frame.f_code not in codes:
                return None
            if event == "line":
                seen += 1
                if seen == last:
                    raise KeyboardInterrupt
            return trace

        former = sys.gettrace()
        sys.settrace(trace)
        try:
            call(optimizer)
            return
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(former)
        yield optimizer


@pytest.mark.parametrize(
    ("dtype", "call"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.bfloat16, 2)]
)
def test_a_first_step_without_memory_can_be_made_again(call, dtype, monkeypatch):
    optimizer, twin = _optimizer(dtype), _optimizer(dtype)
    calls = 0
    zeros_like = pages.zeros_like

    def scarce(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError
        return zeros_like(*args)

    monkeypatch.setattr(pages, "zeros_like", scarce)
    optimizer.train()
    _give_gradients(optimizer, 0)
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.step()
    _train(optimizer, range(1, 4))
    _train(twin, range(4))
    assert _all_of(optimizer) == _all_of(twin)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_step_that_was_refused_does_not_count(steps, kind):
    optimizer, twin = _optimizer(kind=kind), _optimizer(kind=kind)
    _train(optimizer, range(steps))
    optimizer.train()
    before = _all_of(optimizer)
    for p in _params(optimizer):
        p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert _all_of(optimizer) == before
    for p in _params(optimizer):
        p.grad = None
    _train(optimizer, range(steps, 6))
    _train(twin, range(6))
    assert _all_of(optimizer) == _all_of(twin)


@pytest.mark.parametrize("park", ["copy", "residual"])
def test_an_interrupted_new_start_is_made_by_the_next_switch(park, caplog):
    caplog.set_level(logging.ERROR)
    trained = _optimizer(park=park, implementation="fused")
    _train(trained, range(5))

    def replaced():
        optimizer = copy.deepcopy(trained)
        optimizer.eval()
        for p in _params(optimizer):
            p.data.mul_(2)
        return optimizer

    twin = replaced()
    _train(twin, range(5, 8))
    lines = 0
    for optimizer in _interrupted(replaced, type(twin).train, Modes.restart):
        lines += 1
        _train(optimizer, range(5, 8))
        assert _all_of(optimizer) == _all_of(twin)
    assert lines > 4


@pytest.mark.parametrize("then", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interrupted_return_from_a_state_without_y_is_completed(dtype, then):
    """As `schedulefree` saves it: from the y that follows from x, x follows but for rounding."""
    trained = _optimizer(dtype)
    _train(trained, range(5))
    trained.eval()

    def without_y():
        optimizer = copy.deepcopy(trained)
        for state in optimizer.state.values():
            del state["y"]
        return optimizer

    def completed(optimizer):
        getattr(optimizer, then)()
        optimizer.train()
        return _all_of(optimizer)

    twin = without_y()
    twin.train()
    wanted = _all_of(twin)
    lines = 0
    functions = (Modes.train, Modes._park_what_follows_from_x)
    for optimizer in _interrupted(without_y, type(twin).train, *functions):
        lines += 1
        assert completed(copy.deepcopy(optimizer)) == wanted
        assert completed(optimizer) == wanted
    assert lines > 30


@pytest.mark.parametrize("park", ["copy", "residual"])
@pytest.mark.parametrize("then", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copy_that_is_made_in_the_middle_of_a_switch_can_complete_it(dtype, then, park, caplog):
    def trained():
        optimizer = _optimizer(dtype, park=park, implementation="fused")
        _train(optimizer, range(5))
        return copy.deepcopy(optimizer)  # to which torch adds an option

    twin = trained()
    wanted = _all_of(twin)
    lines = 0
    for optimizer in _interrupted(trained, type(twin).eval, Modes.eval):
        lines += 1
        # What somebody does meanwhile to beta does not concern the x that is shown.
        optimizer.param_groups[0]["betas"] = (0.5, 0.999)
        another = copy.deepcopy(optimizer)
        for one in (optimizer, another):
            getattr(one, then)()
            one.state_dict()
            one.train()
            one.param_groups[0]["betas"] = twin.param_groups[0]["betas"]
            assert _all_of(one) == wanted
    assert lines > 10 and "starts anew" not in caplog.text


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("saved", ["full", "split", "parameter"])
@pytest.mark.filterwarnings("ignore:.*state_precision='parameter'")
def test_an_interrupted_load_leaves_the_optimizer_as_it_was(saved, mode, caplog):
    caplog.set_level(logging.ERROR)
    source = _optimizer(torch.bfloat16, state_precision=saved, lr=0.02)
    _train(source, range(4))
    getattr(source, mode)()
    state_dict = source.state_dict()
    trained = _optimizer(torch.bfloat16)
    _train(trained, range(2))
    for own, theirs in zip(_params(trained), _params(source), strict=True):
        own.data.copy_(theirs)
        own.grad = None
    before = _all_of(copy.deepcopy(trained))

    def load(optimizer):
        optimizer.load_state_dict(state_dict)

    twin = copy.deepcopy(trained)
    load(twin)
    loaded = _all_of(twin)
    twin.train()
    back = _all_of(twin)
    functions = (
        ScheduleFreeOptimizer.load_state_dict,
        ScheduleFreeOptimizer.__setstate__,
        conversion.undo_casts,
        conversion.convert,
        conversion.convert_loaded,
    )
    lines = 0
    for optimizer in _interrupted(lambda: copy.deepcopy(trained), load, *functions):
        lines += 1
        now = _all_of(optimizer)
        if now == before:
            load(optimizer)
            assert _all_of(optimizer) == loaded
        else:  # it is loaded, but for parameters that do not show the converted x yet
            optimizer.train()
            assert _all_of(optimizer) == back
    assert lines > 40
