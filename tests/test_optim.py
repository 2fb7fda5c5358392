"""Every optimizer against the literal reference and `schedulefree` 1.4.1; states in both directions; options."""

import copy
import functools
import io
import pickle

import pytest
import pytorch_optimizer
import torch
from cases import ALL_SETTINGS, CASES
from reference import reference_for
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, averaging
from hf_schedulefree.optim.base import IMPLEMENTATIONS

STEPS = 300
# Largest difference allowed after hundreds of steps, relative to the largest weight.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Net(nn.Module):
    """Two layers, a scalar, a tensor that never gets a gradient and one that gets its first at step 20."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.second = nn.Linear(8, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.late = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, x, late):
        out = self.second(torch.tanh(self.first(x))) * self.scale
        return out + self.late if late else out

    def groups(self, **second_group):
        names = dict(self.named_parameters())
        second = [names.pop("second.weight"), names.pop("late")]
        return [{"params": list(names.values())}, {"params": second, **second_group}]


def make_net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net(dtype)


def backward(net, step):
    """A gradient at the weights that `net` holds. Every seventh step, the late parameter has none again."""
    generator = torch.Generator().manual_seed(step)
    dtype = net.scale.dtype
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.sin(x[:, :3] * 2) + 0.1 * torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)
    net.zero_grad(set_to_none=True)
    ((net(x, late=step >= 20 and step % 7 != 0) - target) ** 2).mean().backward()


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_close(ours, theirs, tolerance):
    for name, value in theirs.items():
        scale = max(value.abs().max().item(), 0.1)
        assert (ours[name] - value).abs().max().item() <= tolerance * scale, name


def run(net, optimizer, steps=range(STEPS)):
    optimizer.train()
    for step in steps:
        backward(net, step)
        optimizer.step()


def trajectory(cls, case, setting, dtype, **options):
    """y after 100, 200 and 300 steps, then x; and the optimizer, with two groups of different options."""
    options = {**case.options(setting), **options}
    net = make_net(dtype)
    optimizer = cls(net.groups(lr=options["lr"] / 2, **case.beta_option), **options)
    path = []
    for first in range(0, STEPS, 100):
        run(net, optimizer, range(first, first + 100))
        path.append(weights(net))
    optimizer.eval()
    return [*path, weights(net)], optimizer


@functools.cache
def their_trajectory(kind, setting, dtype):
    return trajectory(CASES[kind].theirs, CASES[kind], setting, dtype)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind, setting", ALL_SETTINGS)
def test_follows_schedulefree(kind, setting, dtype, implementation):
    case = CASES[kind]
    their_path, theirs = their_trajectory(kind, setting, dtype)
    our_path, ours = trajectory(case.ours, case, setting, dtype, implementation=implementation)
    for our_weights, their_weights in zip(our_path, their_path, strict=True):
        assert_close(our_weights, their_weights, TOLERANCE[dtype])
    for key in ("k", "weight_sum", "lr_max", "scheduled_lr"):
        assert [group[key] for group in ours.param_groups] == [group[key] for group in theirs.param_groups], key
    assert (their_path[0]["first.weight"] - make_net(dtype).first.weight).abs().max() > 0.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind, setting", ALL_SETTINGS)
def test_follows_the_three_sequences(kind, setting, implementation):
    case = CASES[kind]
    net = make_net(torch.float64)
    params = list(net.parameters())
    reference = reference_for(kind, case.options(setting), params)
    optimizer = case.ours(params, **case.options(setting), implementation=implementation)
    optimizer.train()
    for step in range(60):
        backward(net, step)
        reference.step([p.grad for p in params])
        optimizer.step()
    for p, expected in zip(params, reference.parameters, strict=True):
        torch.testing.assert_close(p.detach(), expected.y, rtol=1e-10, atol=1e-10)
    optimizer.eval()
    for p, expected in zip(params, reference.parameters, strict=True):
        torch.testing.assert_close(p.detach(), expected.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("kind, setting", ALL_SETTINGS)
def test_gradients_are_left_alone(kind, setting, implementation):
    case = CASES[kind]
    net = make_net()
    optimizer = case.ours(net.parameters(), **case.options(setting), implementation=implementation)
    optimizer.train()
    for step in range(20, 30):
        backward(net, step)
        before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        optimizer.step()
        for p, grad in zip(net.parameters(), before, strict=True):
            assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)


@pytest.mark.parametrize("kind", CASES)
def test_closure(kind):
    case = CASES[kind]
    nets = make_net(), make_net()
    optimizers = [case.ours(net.parameters(), lr=case.lr) for net in nets]
    for optimizer in optimizers:
        optimizer.train()

    def closure():
        backward(nets[1], 3)
        return 7.0

    backward(nets[0], 3)
    assert optimizers[0].step() is None
    assert optimizers[1].step(closure) == 7.0
    assert_close(weights(nets[1]), weights(nets[0]), 0.0)


# States


def copied(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def continued(path, case, setting, mode):
    """Train 60 steps; after each 20 the state moves into a new optimizer of the next class in `path`."""
    net, optimizer = make_net(torch.float64), None
    for part, cls in enumerate(path):
        old, optimizer = optimizer, cls(net.parameters(), **case.options(setting))
        if old is not None:
            getattr(old, mode)()
            optimizer.load_state_dict(copied(old))
        run(net, optimizer, range(part * 20, part * 20 + 20))
    optimizer.eval()
    return weights(net)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind, setting", ALL_SETTINGS)
def test_states_interchange_with_schedulefree(kind, setting, mode):
    case = CASES[kind]
    ours, theirs = case.ours, case.theirs
    expected = continued([theirs, theirs, theirs], case, setting, "train")
    for path in ([ours, theirs, ours], [theirs, ours, theirs], [ours, ours, theirs]):
        assert_close(continued(path, case, setting, mode), expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RAdam"])
def test_states_without_the_counter_are_refused(name):
    other, own = Net(), Net()
    theirs = getattr(pytorch_optimizer, f"ScheduleFree{name}")(other.parameters())
    optimizer = CASES[name.lower()].ours(own.parameters())
    run(other, theirs, range(2))
    run(own, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="no counter k"):
        optimizer.load_state_dict(theirs.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["param_groups"][0]["k"] == 3
    for i, state in before["state"].items():
        assert all(torch.equal(tensor, after["state"][i][key]) for key, tensor in state.items())


@pytest.mark.parametrize(
    "kind, other, options", [("adamw", torch.optim.AdamW, {}), ("sgd", torch.optim.SGD, {"momentum": 0.9})]
)
def test_states_of_other_kinds_of_optimizers_are_refused(kind, other, options):
    """They were dropped without a word, and their learning rate, the end of a schedule, was kept."""
    net = make_net()
    theirs = other(net.parameters(), lr=1e-9, **options)
    backward(net, 20)
    theirs.step()
    optimizer = CASES[kind].ours(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no counter k"):
        optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_beta_at_which_x_is_lost_is_refused_when_it_is_loaded():
    """torch's SGD has momentum 0: eval() divided by it, after the training."""
    net = make_net()
    optimizer = CASES["sgd"].ours(net.parameters())
    with pytest.raises(ValueError, match="momentum=0 is out of range"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters()).state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_a_momentum_that_there_is_not_here_is_refused():
    """Later versions of `schedulefree` can average the gradients, too, in AdamW."""
    net = make_net()
    optimizer = CASES["adamw"].ours(net.parameters())
    run(net, optimizer, range(20, 22))
    state_dict = copy.deepcopy(optimizer.state_dict())
    for momentum in (0.9, 0.0):
        state_dict["param_groups"][0]["inner_momentum"] = momentum
        if momentum:
            with pytest.raises(ValueError, match="inner_momentum="):
                optimizer.load_state_dict(state_dict)
    optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("kind", CASES)
def test_to_load_a_state_adds_no_option(kind):
    net = make_net()
    optimizer = CASES[kind].ours(net.parameters())
    options = set(optimizer.state_dict()["param_groups"][0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.state_dict()["param_groups"][0]) == options


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_own_states_continue_bit_for_bit(kind, mode, how):
    case = CASES[kind]
    setting = case.options("decay")
    net = make_net()
    straight = case.ours(net.parameters(), **setting)
    run(net, straight, range(20, 30))
    if mode == "eval":
        straight.eval()
    if how == "state_dict":
        other_net = copy.deepcopy(net)
        other = case.ours(other_net.parameters(), **setting)
        other.load_state_dict(copied(straight))
    else:
        twin = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}[how]
        other_net, other = twin((net, straight))
    run(net, straight, range(30, 40))
    run(other_net, other, range(30, 40))
    for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_y_that_schedulefree_left_behind_is_not_taken_for_the_present_one():
    # ours, in eval mode, into theirs: they keep the unknown entry `y`, train on, and give it back.
    case = CASES["adamw"]
    net = make_net(torch.float64)
    ours = case.ours(net.parameters(), lr=0.01)
    run(net, ours, range(20))
    ours.eval()
    theirs = case.theirs(net.parameters(), lr=0.01)
    theirs.load_state_dict(copied(ours))
    run(net, theirs, range(20, 40))
    y = weights(net)
    theirs.eval()
    ours = case.ours(net.parameters(), lr=0.01)
    ours.load_state_dict(copied(theirs))
    ours.train()
    assert_close(weights(net), y, 1e-14)


# Options

WRONG = {
    "lr": [-0.1, float("nan"), float("inf"), "fast", torch.tensor([0.1, 0.2])],
    "weight_decay": [-1.0, float("nan")],
    "warmup_steps": [-1, 0.1, 2.5, float("inf")],
    "r": [-1.0],
    "weight_lr_power": [-2.0],
    "eps": [-1e-8],
    "momentum": [0.0, 1.0, -0.5, 2],
    "betas": [(0.0, 0.999), (1.0, 0.999), (0.9, 1.0), (0.9, -0.1), (0.9,), 0.9, (float("nan"), 0.9)],
    "silent_sgd_phase": [None, "yes"],
    "implementation": ["fastest", "Foreach", 3],
}
NAMES = {
    "adamw": set(WRONG) - {"momentum", "silent_sgd_phase"},
    "sgd": set(WRONG) - {"betas", "eps", "silent_sgd_phase"},
}
NAMES["radam"] = set(WRONG) - {"momentum", "warmup_steps"}


@pytest.mark.parametrize(
    "kind, name, value",
    [(kind, name, value) for kind in NAMES for name in sorted(NAMES[kind]) for value in WRONG[name]],
)
def test_options_out_of_range_are_refused(kind, name, value):
    with pytest.raises(ValueError) as error:
        CASES[kind].ours([torch.zeros(1)], **{name: value})
    assert name in str(error.value) and repr(value) in str(error.value)
    assert "expected" in str(error.value)
    if name != "implementation":
        with pytest.raises(ValueError, match=name):
            CASES[kind].ours([{"params": [torch.zeros(1)], name: value}])


def test_both_spellings_of_the_implementation():
    optimizer = CASES["adamw"].ours
    assert optimizer([torch.zeros(1)], foreach=True).implementation == "foreach"
    assert optimizer([torch.zeros(1)], foreach=False).implementation == "for-loop"
    with pytest.raises(ValueError, match="both"):
        optimizer([torch.zeros(1)], foreach=True, implementation="for-loop")


@pytest.mark.parametrize("kind", CASES)
def test_a_rate_of_zero_moves_nothing(kind):
    net = make_net()
    before = weights(net)
    optimizer = CASES[kind].ours(net.parameters(), lr=0.0)
    run(net, optimizer, range(20, 25))
    assert_close(weights(net), before, 0.0)
    assert optimizer.param_groups[0]["k"] == 5


def test_a_scheduler_and_a_tensor_rate():
    nets = make_net(torch.float64), make_net(torch.float64)
    case = CASES["adamw"]
    ours = case.ours(nets[0].parameters(), lr=torch.tensor(0.01))
    theirs = case.theirs(nets[1].parameters(), lr=0.01)
    for net, optimizer in zip(nets, (ours, theirs), strict=True):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 20)
        optimizer.train()
        for step in range(40):
            backward(net, step)
            optimizer.step()
            scheduler.step()
    # the tensor holds the rate in float32
    assert_close(weights(nets[0]), weights(nets[1]), 1e-5)


def test_complex_and_sparse_are_refused():
    case = CASES["adamw"]
    with pytest.raises(ValueError, match="complex"):
        case.ours([torch.zeros(2, dtype=torch.complex64)])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = case.ours(embedding.parameters())
    optimizer.train()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("kind", CASES)
def test_x_follows_from_y_and_z(kind):
    net = make_net()
    optimizer = CASES[kind].ours(net.parameters(), lr=CASES[kind].lr)
    run(net, optimizer, range(20, 30))
    expected = {
        p: averaging.x_from_y(p.detach().double(), optimizer.state[p]["z"].double(), 0.9)
        for p in net.parameters()
        if p.grad is not None
    }
    optimizer.eval()
    for p, x in expected.items():
        torch.testing.assert_close(p.detach().double(), x, rtol=1e-6, atol=1e-6)


def test_a_closure_is_called_at_a_rate_of_zero_with_gradients_of_zero():
    """It looks like the step by which torch.distributed.checkpoint creates state, which gives no closure."""
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamWScheduleFree([p], lr=0.0)
    optimizer.train()
    p.grad = torch.zeros(3)
    assert optimizer.step(lambda: 5.0) == 5.0
    assert optimizer.param_groups[0]["k"] == 1


def test_a_refused_group_does_not_join():
    optimizer = AdamWScheduleFree([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="real parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("joins", ["at the start", "later"])
def test_a_parameter_that_is_given_twice_is_refused(joins):
    """torch only warns. Switched twice, the weights were no x any more, or KeyError 'y'."""
    p, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"), pytest.raises(ValueError, match="several times"):
        if joins == "at the start":
            AdamWScheduleFree([p, other, p])
        else:
            optimizer = AdamWScheduleFree([other])
            optimizer.add_param_group({"params": [p, p]})
    if joins == "later":
        assert len(optimizer.param_groups) == 1


def test_a_group_that_is_none_is_refused_as_by_torch():
    optimizer = AdamWScheduleFree([nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(3))])
