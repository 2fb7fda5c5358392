"""The step that trusts the tensors of the step before: always what the step that looks at all of them does."""

import contextlib
import gc
import importlib.util
import subprocess
import sys
import time
import weakref

import pytest
import torch
from cases import CASES
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, base, kernels, repeated
from hf_schedulefree.optim.kernels import jobs, threads
from hf_schedulefree.optim.kernels.one_pass_cpu import OnePass
from hf_schedulefree.optim.repeated import RepeatedStep

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba (the extra `fast`)")

SHAPES = [(33, 3), (7,), (), (20_000,), (0,), (5, 4), (6, 6), (6, 6)]


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


@pytest.fixture(autouse=True)
def overlapping(monkeypatch):
    """Other threads begin when two tensors have been looked at, however small they are."""
    monkeypatch.setattr(repeated, "_FIRST", 2)
    monkeypatch.setattr(repeated, "_AT_ONCE", 2)
    monkeypatch.setattr(jobs, "_ELEMENTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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


def transposed_state(run):
    """The same objects, addresses and sizes."""
    for t in run.optimizer.state[run.params[6]].values():
        t.t_()


def transposed_z(run):
    z = run.optimizer.state[run.params[6]]["z"]
    z.data = z.data.t()


def other_states(run):
    run.optimizer.state[run.params[1]] = {key: t + 1 for key, t in run.optimizer.state[run.params[1]].items()}


def swapped_states(run):
    state, (*_, a, b) = run.optimizer.state, run.params
    state[a], state[b] = state[b], state[a]


def swapped_keys(run):
    """The states in the same order, but for other parameters."""
    state = run.optimizer.state
    (*keys, a, b), values = state.keys(), list(state.values())
    state.clear()
    state.update(zip([*keys, b, a], values, strict=True))


def reordered_states(run):
    state = run.optimizer.state
    items = list(state.items())
    state.clear()
    state.update(reversed(items))


def reordered_parameters(run):
    run.optimizer.param_groups[1]["params"].reverse()


def replaced_parameter(run):
    """Another object at the same address."""
    p = run.params[1]
    run.params[1] = run.optimizer.param_groups[0]["params"][1] = nn.Parameter(p.detach())
    run.optimizer.state[run.params[1]] = run.optimizer.state.pop(p)


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
    *(transposed_state, transposed_z, swapped_states, swapped_keys, reordered_states, reordered_parameters),
    replaced_parameter,
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
    compare(kind, dtype, options, event, monkeypatch)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_whatever_happens_where_a_group_has_few_of_all_states(event, monkeypatch):
    monkeypatch.setattr(repeated, "_MANY", 0)
    compare("adamw", torch.float32, {}, event, monkeypatch)


def compare(kind, dtype, options, event, monkeypatch):
    """The same bits with and without steps that are repeated."""
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


@pytest.mark.parametrize("many", [0, 8])
def test_the_second_step_repeats_the_first(rows, many, monkeypatch):
    monkeypatch.setattr(repeated, "_MANY", many)
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


def test_more_parameters_may_change_how_the_earlier_ones_are_stepped(rows, monkeypatch):
    monkeypatch.setattr(kernels, "COMPILED_FROM", 25_000)
    asked, find = [], kernels.one_pass_kernel
    monkeypatch.setattr(kernels, "one_pass_kernel", lambda device_type: asked.append(1) or find(device_type))
    run = Run()
    run.step()
    run.step()
    assert len(rows) == 2 and not asked
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(10_000))]})
    run.step()
    assert len(rows) == 5 and asked


def test_guards_that_are_others_are_done_without():
    code = """
import torch._C._dynamo.guards as guards
class Others:
    def __init__(self, tensors): pass
guards.TensorGuards = Others
from hf_schedulefree.optim import repeated
assert repeated.TensorGuards is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("count", [1, 4])
def test_states_are_found_in_any_order(count, rows):
    run = Run()
    for group in run.optimizer.param_groups:
        del group["params"][count:]
    run.step()
    reordered_states(run)
    before = len(rows)
    run.step()
    assert len(rows) == before + 2
    run.step()
    run.step()
    assert len(rows) == before + 2


@pytest.fixture(params=["torch's guards", "none"])
def guards(request, monkeypatch):
    if request.param == "none":
        monkeypatch.setattr(repeated, "TensorGuards", None)
    else:
        assert repeated.TensorGuards is not None


KEPT = ("y", "z", "exp_avg_sq")


def smaller(tensor):
    tensor.data = tensor.data[:5]


def resized(tensor):
    tensor.resize_(5)


def of_another_dtype(tensor):
    tensor.data = tensor.data.view(torch.bfloat16)[: len(tensor)]


def of_another_class(tensor):
    tensor.__class__ = Labelled


def moved(tensor):
    tensor.data = tensor.data.clone()


@pytest.mark.parametrize(
    ("of", "change"),
    [
        *((of, change) for of in KEPT for change in (smaller, of_another_dtype, of_another_class, moved)),
        *(("gradient", change) for change in (smaller, resized, of_another_dtype, of_another_class)),
        *(("z", resized), ("exp_avg_sq", resized)),  # torch resizes no parameters
    ],
)
def test_a_tensor_that_was_changed_in_place_is_noticed(of, change, guards, rows):
    """The same object, and but for the last change at the same address."""
    run = Run()
    run.step()
    run.step()
    p = run.params[3]
    tensor = p if of == "y" else p.grad if of == "gradient" else run.optimizer.state[p][of]
    address = tensor.data_ptr()
    change(tensor)
    assert (tensor.data_ptr() == address) == (change is not moved)
    assert not of_all_groups(run)[0]


def of_all_groups(run):
    """Whether the repeated step of each group takes all that there is now; a step that does is made."""
    optimizer = run.optimizer
    taken, first = [], 0
    for group in optimizer.param_groups:
        step = optimizer._repeated[id(group)]
        with torch.no_grad():
            numbers, _ = optimizer._step_numbers(group)
            made = step(group["params"], optimizer.state, step._choices._replace(first=first), numbers)
            taken.append(len(made.stepped) == step.count)
        first += len(group["params"])
    return taken


@pytest.mark.parametrize("of", [*KEPT, "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_goes_beyond_the_smallest_tensor(dtype, of, compiler):
    run = Run(dtype=dtype)
    run.step()
    p = run.params[3]
    tensor = p if of == "y" else p.grad if of == "gradient" else run.optimizer.state[p][of]
    beyond = tensor.data[5:]
    expected = beyond.clone()
    smaller(tensor)
    with pytest.raises(RuntimeError, match="size"):
        run.optimizer.step()
    assert torch.equal(beyond, expected)


def test_what_did_not_change_is_taken(guards, rows):
    run = Run()
    run.step()
    assert of_all_groups(run) == [True, True]
    run.params[3].grad = run.params[3].grad.clone()
    assert of_all_groups(run) == [True, True]


@pytest.mark.parametrize(
    "change", [moved_parameter, transposed_parameter, transposed_z, moved_state, other_state, loaded, one_by_one]
)
def test_what_is_noticed(change, guards, rows):
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
    "negated when it is read": lambda grad: torch._neg_view(-grad),
    "zeros without memory": lambda grad: torch._efficientzerotensor(grad.shape, dtype=grad.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS_OF_GRADIENTS)
def test_gradients_of_another_kind(kind, dtype, guards, compiler, rows):
    run, plain = Run(dtype=dtype), Run(dtype=dtype)
    for one in (run, plain):
        one.step()
        one.step()
        torch.manual_seed(7)
        for p in one.params:
            p.grad = torch.randn_like(p)
    p = run.params[3]
    p.grad = KINDS_OF_GRADIENTS[kind](p.grad)
    plain.params[3].grad = torch.zeros_like(p) if kind == "zeros without memory" else plain.params[3].grad
    before = len(rows)
    run.optimizer.step()
    assert len(rows) > before
    plain.optimizer.step()
    run.optimizer.step()  # and once more, as what follows such a step
    plain.optimizer.step()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.int16: float("inf")}
    for a, b in zip(run.tensors(), plain.tensors(), strict=True):
        assert torch.allclose(a, b, rtol=tolerance[a.dtype], atol=tolerance[a.dtype] / 10)


def test_sparse_gradients_are_refused_at_any_step():
    run = Run()
    run.step()
    run.step()
    run.params[3].grad = run.params[3].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        run.optimizer.step()


# Other threads work while the calling one looks at the tensors


def twins(steps=3, **options):
    """Two runs that are the same, after some steps."""
    runs = Run(**options), Run(**options)
    for run in runs:
        for _ in range(steps):
            run.step()
    return runs


def same(run, other):
    counters = [[group["k"], group["weight_sum"]] for one in (run, other) for group in one.optimizer.param_groups]
    return counters[:2] == counters[2:] and all(map(torch.equal, run.tensors(), other.tensors()))


def looks(monkeypatch, at, action):
    """Do something when so many gradients of a step have been looked at."""
    count = 0

    def gradient(p):
        nonlocal count
        count += 1
        if count == at:
            action()
        return p.grad

    monkeypatch.setattr(repeated, "_gradient", gradient)


def step_groups(run, made):
    """The step of those groups for which it was not made yet."""
    first = 0
    for group, is_made in zip(run.optimizer.param_groups, made, strict=True):
        if not is_made:
            with torch.no_grad():
                run.optimizer._step_group(group, first)
        first += len(group["params"])
    run.count = 4


@pytest.mark.parametrize("at", range(1, len(SHAPES) + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_interrupted_in_the_middle_is_made_as_a_whole(dtype, at, compiler, monkeypatch):
    """Nothing or all of a group, whenever Ctrl-C comes; what follows is as if it had not come."""
    run, other = twins(dtype=dtype)

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        looks(patch, at, interrupt)
        run.step()
    if kernels.one_pass_kernel("cpu") is not None:
        made = [at > 2, at > 6]
    else:
        made = [at > 4 or dtype == torch.bfloat16, False]  # that is not repeated by torch's operations, but looked at
        made[1] = made[0] and at > 4 and dtype == torch.bfloat16
    assert [group["k"] for group in run.optimizer.param_groups] == [3 + one for one in made]
    step_groups(run, made)
    other.step()
    assert same(run, other)
    for one in (run, other):
        one.step()
    assert same(run, other)


@pytest.mark.parametrize("interrupted", ["begin", "function", "end"])
@needs_numba
def test_whatever_is_interrupted_all_threads_end(interrupted, monkeypatch):
    """As Python does it: the exception is raised when the C function has returned."""
    run, other = twins()
    calls = []

    def after(name, call):
        def called(*args):
            call(*args)
            calls.append(name)
            if name == interrupted and calls.count(name) == 1:
                raise KeyboardInterrupt

        return called

    function, region = threads._function, threads._openmp_region()
    if region is None:
        pytest.skip("torch's OpenMP cannot be called here")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs.Job, "_is_left", lambda self: False)  # though this machine may be a busy one
        patch.setattr(threads, "_function", lambda address: after("function", function(address)))
        patch.setattr(threads, "_openmp_region", lambda: tuple(map(after, ("begin", "end"), region)))
        run.step()
    assert calls.count("begin") == calls.count("end") == 1
    step_groups(run, [interrupted != "begin", False])
    other.step()
    assert same(run, other)


@needs_numba
@pytest.mark.parametrize("at", [1, 3, 4, 8])
def test_threads_that_have_waited_too_long_are_called_again(at, monkeypatch):
    run, other = twins()
    begun, parallel = [], threads.run

    def counted(work, argument, count):
        begun.append(count)
        parallel(work, argument, count)

    with monkeypatch.context() as patch:
        patch.setattr(threads, "run", counted)
        looks(patch, at, lambda: time.sleep(0.3))
        run.step()
    other.step()
    assert same(run, other)
    if threads._openmp_region() is not None:
        assert 3 in begun


@needs_numba
def test_without_a_region_the_same(monkeypatch):
    run, other = twins()
    monkeypatch.setattr(threads, "_openmp_region", lambda: None)
    run.step()
    monkeypatch.undo()
    other.step()
    assert same(run, other)


@needs_numba
def test_a_change_in_the_middle_leaves_what_was_stepped_alone(rows):
    run, other = twins()
    assert len(rows) == 4
    for one in (run, other):
        one.params[3].data = one.params[3].data.clone()
    run.step()
    other.optimizer._repeated.clear()
    other.step()
    assert same(run, other) and len(rows) == 7


@needs_numba
def test_what_was_stepped_before_a_refusal_is_not_stepped_again():
    run, other = twins()
    gradient = torch.randn(20_000)
    for one in (run, other):
        one.optimizer.zero_grad()
        for p in one.params:
            p.grad = torch.ones_like(p)
    run.params[3].grad = gradient.to_sparse()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse"):
            run.optimizer.step()
    run.params[3].grad, other.params[3].grad = gradient.clone(), gradient.clone()
    for one in (run, other):
        one.optimizer.step()
    assert same(run, other)


@needs_numba
@pytest.mark.parametrize(("of", "name"), [(OnePass, "stepped"), (base.capturable, "set_counters")])
def test_a_step_that_was_made_counts(of, name, monkeypatch):
    """Whatever is interrupted between the kernel and the counters, it counts."""
    run, other = twins()
    function, calls = getattr(of, name), []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(of, name, interrupt)
        run.step()
    step_groups(run, [True, False])
    other.step()
    assert same(run, other)
    for one in (run, other):
        one.step()
    assert same(run, other)


@needs_numba
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_left_to_do_is_done_if_that_is_interrupted(count, monkeypatch):
    torch.set_num_threads(count)
    run, other = twins()
    called, parallel = [], threads.run

    def interrupted(*args):
        called.append(args)
        if len(called) == 1:
            raise KeyboardInterrupt
        parallel(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threads, "run", interrupted)
        looks(patch, 4, lambda: time.sleep(0.3))
        run.step()
    step_groups(run, [True, False])
    other.step()
    assert same(run, other)


@needs_numba
@pytest.mark.parametrize("count", [1, 3])
def test_all_tensors_are_looked_at_first_where_one_thread_steps_them(count, monkeypatch):
    """In parts that costs a twentieth of the step, and nobody works meanwhile."""
    torch.set_num_threads(count)
    run, _ = twins()
    batches, make = [], OnePass.__call__

    def counted(step, some, numbers):
        make(step, (batches.append(batch) or batch for batch in some), numbers)

    monkeypatch.setattr(OnePass, "__call__", counted)
    run.step()
    assert (len(batches) == len(run.optimizer.param_groups)) == (count == 1)


@needs_numba
def test_gradients_stay_in_memory_while_threads_read_them(monkeypatch):
    """Also if a finalizer or another thread lets go of them meanwhile."""
    monkeypatch.setattr(repeated, "_FIRST", 1)
    monkeypatch.setattr(repeated, "_AT_ONCE", 1)
    run, other = twins()
    kept = []

    def let_go():
        gradient = weakref.ref(run.params[4].grad)
        run.params[4].grad = None
        kept.append(gradient())

    with monkeypatch.context() as patch:
        looks(patch, len(SHAPES), let_go)
        run.step()
    other.step()
    assert kept[0] is not None and same(run, other)


def test_a_region_that_was_not_begun_is_not_ended(monkeypatch):
    ended = []

    class Interrupted:
        asked = 0

        @property
        def address(self):
            self.asked += 1
            if self.asked == 2:
                raise KeyboardInterrupt
            return id(self)

    monkeypatch.setattr(threads, "_openmp_region", lambda: (lambda *args: None, lambda: ended.append(1)))
    monkeypatch.setattr(threads, "_function", lambda address: lambda argument: None)
    with contextlib.suppress(KeyboardInterrupt):
        threads.run_meanwhile(Interrupted(), 0, 2, lambda: ended.append(0), lambda: False)
    assert ended in ([], [0, 1])


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
