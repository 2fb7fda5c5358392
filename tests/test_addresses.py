"""What the compiled kernels do through addresses, when tensors change between two calls or a call is interrupted."""

import ctypes
import gc
import logging
import threading
import weakref

import pytest
import torch
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, SGDScheduleFree

pytest.importorskip("numba", reason="only compiled kernels take addresses")

from hf_schedulefree.optim.kernels import jobs, threads
from hf_schedulefree.optim.kernels.residual_cpu import ParkedResidual

SIZE = 40_000


def stepped(dtype=torch.float32, count=2, size=SIZE, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size).to(dtype)) for _ in range(count)]
    optimizer = AdamWScheduleFree(params, lr=0.01, implementation="fused", **options)
    optimizer.train()
    for _ in range(3):
        step(params, optimizer)
    return params, optimizer


def step(params, optimizer):
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()


def clones(tensors):
    return [t.detach().clone() for t in tensors]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def restarts(caplog):
    return sum("starts anew" in record.message for record in caplog.records)


# z while y is parked as a residual


@pytest.mark.parametrize("then", ["train", "state_dict", "weights_replaced"])
@pytest.mark.parametrize("park", ["residual", "copy"])
def test_z_that_moved_while_x_is_shown_is_read_where_it_is(park, then, caplog):
    params, optimizer = stepped(park=park)
    y = clones(params)
    optimizer.eval()
    z = optimizer.state[params[0]]["z"]
    former = z.data  # lives on, so that a read of it is seen and no crash
    z.data = former.clone()
    former.fill_(float("nan"))
    if then != "train":
        assert not getattr(optimizer, then)() or then == "state_dict"
    optimizer.train()
    assert same(params, y) and not restarts(caplog)


def smaller(tensor):
    tensor.data = tensor.data[:5]


def of_another_dtype(tensor):
    tensor.data = tensor.data.to(torch.float16)


@pytest.mark.parametrize("change", [smaller, of_another_dtype])
def test_z_that_is_another_one_while_x_is_shown_ends_in_a_new_start(change, caplog):
    params, optimizer = stepped(park="residual")
    optimizer.eval()
    x = clones(params)
    z = optimizer.state[params[0]]["z"]
    former = z.data
    change(z)
    former.fill_(float("nan"))
    assert optimizer.weights_replaced()
    optimizer.train()
    assert same(params, x) and restarts(caplog)
    step(params, optimizer)


def test_a_parameter_without_memory_does_not_hold_x(caplog):
    params, optimizer = stepped(park="residual")
    optimizer.eval()
    params[0].data = torch._efficientzerotensor(SIZE)
    optimizer.train()
    assert restarts(caplog)


# What a switch has prepared, at the next one


class Subclass(torch.Tensor):
    pass


def of_first(change):
    def changed(params, optimizer):
        state = optimizer.state[params[0]]
        params[0].data, state["z"] = change(params[0].data, state["z"])

    return changed


def with_grads(params, optimizer):
    for p in params:
        p.grad = torch.zeros_like(p)


BETWEEN = {
    "nothing": lambda params, optimizer: None,
    "gradients": with_grads,
    "a step": step,
    "moved": of_first(lambda p, z: (p.clone(), z.clone())),
    "z of another dtype": of_first(lambda p, z: (p, z.double())),
    "z moved": of_first(lambda p, z: (p, z.clone())),
    "exchanged": of_first(lambda p, z: (z, p)),
    "apart": of_first(lambda p, z: (torch.stack([p, p], 1)[:, 0], torch.stack([z, z], 1)[:, 0])),
    "shorter": of_first(lambda p, z: (p[:7], z[:7])),
    "of another shape": of_first(lambda p, z: (p.view(100, -1), z.view(100, -1))),
    "negated": of_first(lambda p, z: (p, torch._neg_view(z))),
    "of a subclass": of_first(lambda p, z: (p, z.as_subclass(Subclass))),
    "of another dtype": of_first(lambda p, z: (p.double(), z.double())),
    "half": of_first(lambda p, z: (p.bfloat16(), z.bfloat16())),
    "without state": lambda params, optimizer: optimizer.state.pop(params[0]),
    "another beta": lambda params, optimizer: optimizer.param_groups[0].update(betas=(0.8, 0.999)),
    "other order": lambda params, optimizer: optimizer.param_groups[0]["params"].reverse(),
    "two groups": lambda params, optimizer: optimizer.param_groups.append(
        {**optimizer.param_groups[0], "params": [optimizer.param_groups[0]["params"].pop()]}
    ),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_what_one_switch_has_prepared_fits_the_next_one_or_is_made_anew(change, caplog):
    params, optimizer = stepped(park="residual")
    others, plain = stepped(park="copy")
    for tensors, one in ((params, optimizer), (others, plain)):
        one.eval()
        one.train()
        torch.manual_seed(1)
        change(tensors, one)
    y = clones(params)
    assert same(y, others)
    for _ in range(2):
        optimizer.eval()
        plain.eval()
        assert same(params, others) and not optimizer.weights_replaced()
        optimizer.train()
        plain.train()
        assert same(params, y) and same(others, y)
    assert not restarts(caplog)


def test_what_a_switch_has_prepared_is_used_again_and_holds_no_tensors(monkeypatch):
    params, optimizer = stepped(park="residual")
    optimizer.eval()
    optimizer.train()
    with monkeypatch.context() as patch:
        patch.setattr(ParkedResidual, "__init__", interrupt)
        optimizer.eval()
        optimizer.train()
    params.append(nn.Parameter(torch.randn(SIZE)))
    optimizer.param_groups[0]["params"].append(params[-1])
    step(params, optimizer)
    optimizer.eval()
    assert not any("y" in optimizer.state[p] for p in params)
    optimizer.train()
    z = weakref.ref(optimizer.state[params[0]]["z"])
    optimizer.state.clear()
    gc.collect()
    assert z() is None


# Interruptions


@pytest.mark.parametrize("done", ["made", "parked and brought back"])
def test_an_interrupted_switch_does_not_go_beyond_smaller_data(done, monkeypatch, caplog):
    params, optimizer = stepped(park="residual")
    if done == "parked and brought back":
        optimizer.eval()
    method = "park" if done == "made" else "forget"
    owner = ParkedResidual if done == "made" else type(optimizer._residuals)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, interrupt)
        optimizer.eval() if done == "made" else optimizer.train()
    whole = params[0].data
    beyond = whole[5:]
    expected = beyond.clone()
    params[0].data = whole[:5]
    with pytest.raises(RuntimeError, match="Call train"):
        optimizer.eval()
    assert torch.equal(beyond, expected)
    optimizer.train()
    assert torch.equal(beyond, expected) and restarts(caplog) and params[0].shape == (5,)
    step(params, optimizer)


def interrupt(*_):
    raise KeyboardInterrupt


def test_y_survives_an_interrupted_state_dict(monkeypatch):
    """A Ctrl-C while the kernel runs is raised as soon as it has returned."""
    params, optimizer = stepped(park="residual")
    y = clones(params)
    optimizer.eval()
    run = jobs.Job.run

    def interrupted(*args, **options):
        run(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs.Job, "run", interrupted)
        optimizer.state_dict()
    optimizer.train()
    assert same(params, y)


def test_after_an_interruption_gradients_are_looked_up_again():
    params, optimizer = stepped(count=1)
    step(params, optimizer)
    former = params[0].grad
    other = params[0].grad = torch.full_like(former, 0.1)
    column = gradients_of(optimizer)
    column._shown = Forgetful(column._shown)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    column._shown = dict(column._shown)
    params[0].grad = former
    other.fill_(float("nan"))
    optimizer.step()
    assert params[0].isfinite().all()


def gradients_of(optimizer):
    return optimizer._repeated[id(optimizer.param_groups[0])]._step._gradients


class Forgetful(dict):
    """Interrupted when a list of addresses has been written to the table, and is about to be kept."""

    def __setitem__(self, key, value):
        raise KeyboardInterrupt


# Threads of Python's, where torch's cannot be used


class Worker:
    """A worker that takes its time in all threads but the calling one."""

    def __init__(self):
        self.caller, self.release = threading.get_ident(), threading.Event()
        self.begun, self.running = threading.Event(), 0
        self.function = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(self.work)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def work(self, _):
        if threading.get_ident() != self.caller:
            self.running += 1
            self.begun.set()
            self.release.wait(60)
            self.running -= 1


@pytest.fixture
def python_threads(monkeypatch):
    monkeypatch.setattr(threads, "_forked", True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_all_threads_are_done_when_a_run_ends_by_an_interruption(python_threads, monkeypatch):
    worker, wait = Worker(), threading.Event.wait
    interrupted = []

    def wait_interrupted(event, timeout=None):
        if threading.get_ident() == worker.caller and worker.begun.is_set() and len(interrupted) < 3:
            interrupted.append(True)
            if len(interrupted) == 3:
                worker.release.set()
            raise KeyboardInterrupt
        return wait(event, timeout)

    function = threads._function(worker.address)

    def begun_first(argument):
        function(argument)
        if threading.get_ident() == worker.caller:
            assert wait(worker.begun, 60)

    monkeypatch.setattr(threads, "_function", lambda address: begun_first)
    monkeypatch.setattr(threading.Event, "wait", wait_interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.run(worker, 0, 2)
    assert worker.running == 0 and len(interrupted) == 3


def test_without_a_thread_to_be_had_the_calling_one_does_all(python_threads, monkeypatch):
    class Pool:
        def submit(self, *args):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_threads", lambda count: Pool())
    params, optimizer = stepped()
    optimizer.eval()
    optimizer.train()
    assert all(p.isfinite().all() for p in params)


# x in pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_follow_storage_that_moves(dtype):
    _, optimizer = stepped(dtype, count=1)
    ((p, pieces),) = optimizer.x_in_pieces()
    address = p.data_ptr()
    p.share_memory_()
    assert p.data_ptr() != address
    gc.collect()
    with torch.no_grad():
        p.add_(1)  # only where it is now
    piece = torch.empty(100, dtype=dtype)
    pieces.read(SIZE - 100, piece)
    optimizer.eval()
    assert torch.equal(piece, p.detach()[-100:])


@pytest.mark.parametrize("implementation", ["fused", "for-loop"])
@pytest.mark.parametrize(
    ("first", "into"),
    [
        (SIZE - 99, torch.empty(100)),
        (-1, torch.empty(100)),
        (SIZE + 1, torch.empty(0)),
        (0, torch.empty(100, dtype=torch.bfloat16)),
        (0, torch.empty(100)[::2]),
        (0, torch.empty(100, device="meta")),
    ],
)
def test_pieces_of_another_kind_are_refused(implementation, first, into):
    _, optimizer = stepped(count=1)
    optimizer.implementation = implementation
    ((_, pieces),) = optimizer.x_in_pieces()
    with pytest.raises(ValueError, match=r"elements|into"):
        pieces.read(first, into)


# What one tensor is taken for


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_other_tensor_is_taken_for_a_missing_second_moment(dtype, implementation):
    p = nn.Parameter(torch.ones(SIZE, dtype=dtype))
    other = SGDScheduleFree([p], lr=0.01, implementation=implementation)
    other.train()
    step([p], other)
    optimizer = AdamWScheduleFree([p], lr=0.01, implementation=implementation)
    optimizer.load_state_dict(other.state_dict())
    optimizer.train()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="exp_avg_sq"):
        step([p], optimizer)
    assert torch.equal(p, before)


def test_without_use_for_a_second_moment_it_may_be_there_or_not():
    params, optimizer = stepped()
    other = SGDScheduleFree(params, lr=0.01, implementation="fused")
    other.load_state_dict(optimizer.state_dict())
    del other.state[params[1]]["exp_avg_sq"]
    other.train()
    step(params, other)
    step(params, other)
    assert all(p.isfinite().all() for p in params)


# Whether x is shown


@pytest.mark.parametrize("park", ["residual", "copy"])
def test_groups_that_were_replaced_come_back_to_y(park, caplog):
    params, optimizer = stepped(park=park)
    y = clones(params)
    optimizer.eval()
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    gc.collect()
    optimizer.train()
    assert same(params, y) and not restarts(caplog)
    optimizer.eval()
    x = clones(params)
    optimizer.train()
    assert same(params, y) and not same(x, y)


@pytest.mark.parametrize("then", ["state_dict", "cast"])
def test_groups_that_were_replaced_leave_nothing_parked(then, caplog):
    ends = []
    for park in ("residual", "copy"):
        params, optimizer = stepped(park=park)
        optimizer.eval()
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        optimizer.train()
        assert optimizer.parked_bytes == 0
        if then == "state_dict":
            assert not any("y" in state for state in optimizer.state_dict()["state"].values())
        for p in params:
            p.grad = None
            p.data = p.data.double() if then == "cast" else p.data
        step(params, optimizer)
        optimizer.eval()
        x = clones(params)
        optimizer.train()
        ends.append((*x, *clones(params)))
    assert same(*ends) and not restarts(caplog)


@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_parameters_that_were_cast_while_x_is_shown_do_not_hold_it(dtype, other, caplog):
    caplog.set_level(logging.WARNING)
    params, optimizer = stepped(dtype, size=SIZE - 1, park="copy")  # odd: no view of it in a wider dtype
    optimizer.eval()
    for p in params:
        p.data = p.data.to(other)
    assert optimizer.weights_replaced()
    optimizer.train()
    assert restarts(caplog)


def test_an_interrupted_return_to_y_of_groups_that_were_replaced_is_completed(monkeypatch, caplog):
    params, optimizer = stepped(park="residual")
    y = clones(params)
    optimizer.eval()
    x = clones(params)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "clear_autocast_cache", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.train()
    optimizer.eval()
    assert same(params, x) and not optimizer.weights_replaced()
    optimizer.train()
    assert same(params, y) and not restarts(caplog)
