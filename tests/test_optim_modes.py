"""The switch between x and y: exact, any number of times, and robust against what happens around it."""

import copy

import pytest
import torch
from cases import CASES
from test_optim import backward, copied, make_net, run, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_schedulefree.optim import AdamWScheduleFree, averaging, pieces, precision

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def trained(kind="adamw", dtype=torch.float32, steps=6, **options):
    net = make_net(dtype)
    if dtype == torch.float16:
        options["eps"] = 1e-4  # 1e-8 is zero there
    optimizer = CASES[kind].ours(net.parameters(), lr=CASES[kind].lr, **options)
    run(net, optimizer, range(20, 20 + steps))
    return net, optimizer


def assert_same(net, expected):
    for name, p in net.named_parameters():
        assert torch.equal(p, expected[name]), name


@pytest.mark.parametrize(
    "kind, dtype", [*(("adamw", dtype) for dtype in DTYPES), ("sgd", DTYPES[0]), ("radam", DTYPES[1])]
)
def test_a_thousand_round_trips_change_no_bit(kind, dtype):
    net, optimizer = trained(kind, dtype, steps=20)
    y = weights(net)
    optimizer.eval()
    x = weights(net)
    for _ in range(1000):
        optimizer.train()
        optimizer.eval()
    assert_same(net, x)
    optimizer.train()
    assert_same(net, y)
    assert not torch.equal(x["first.weight"], y["first.weight"])


@pytest.mark.parametrize("kind", CASES)
def test_reading_does_not_change_the_training(kind):
    read, plain = make_net(), make_net()
    for net in (read, plain):
        optimizer = CASES[kind].ours(net.parameters(), lr=CASES[kind].lr)
        optimizer.train()
        for step in range(30):
            if net is read:
                optimizer.eval()
                optimizer.eval()
                optimizer.state_dict()
                optimizer.train()
                optimizer.train()
            backward(net, step)
            optimizer.step()
    assert_same(read, weights(plain))


def test_extreme_values_survive():
    p = nn.Parameter(torch.tensor([0.0, -0.0, 1e-42, 3e38, -3e38, float("inf"), float("nan"), 1.0]))
    optimizer = AdamWScheduleFree([p], lr=0.1)
    optimizer.train()
    p.grad = torch.linspace(-1, 1, 8)
    optimizer.step()
    y = p.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert torch.equal(p.view(torch.int32), y.view(torch.int32))


def test_switching_creates_no_state_and_a_new_optimizer_is_in_eval_mode():
    net = make_net()
    optimizer = AdamWScheduleFree(net.parameters())
    assert optimizer.mode == "eval"
    optimizer.train()
    assert optimizer.mode == "train"
    optimizer.eval()
    assert not optimizer.state
    backward(net, 0)  # `unused` and `late` have no gradient
    optimizer.train()
    optimizer.step()
    optimizer.eval()
    optimizer.train()
    assert not any(net.unused is p or net.late is p for p in optimizer.state)
    assert all("y" not in state for state in optimizer.state.values())


def test_step_in_eval_mode_says_what_to_do():
    net, optimizer = trained()
    optimizer.eval()
    before = weights(net)
    backward(net, 30)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    assert_same(net, before)
    assert optimizer.param_groups[0]["k"] == 6


@pytest.mark.parametrize("after", range(1, 5))
@pytest.mark.parametrize("first, then", [("eval", "eval"), ("eval", "train"), ("train", "train"), ("train", "eval")])
def test_an_interrupted_switch_is_completed(first, then, after, monkeypatch):
    net, optimizer = trained(implementation="foreach")  # in it, every write is a copy_
    shown = {"train": weights(net)}
    optimizer.eval()
    shown["eval"] = weights(net)
    if first == "eval":
        optimizer.train()
    copy_, calls = torch.Tensor.copy_, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(optimizer, first)()
    getattr(optimizer, then)()
    assert_same(net, shown[then])
    optimizer.eval()
    assert_same(net, shown["eval"])
    optimizer.train()
    assert_same(net, shown["train"])


@pytest.mark.parametrize("how", ["load_state_dict", "data", "one element", "sign of zero"])
def test_replaced_weights_are_kept_and_training_starts_anew(how, caplog):
    net, optimizer = trained()
    optimizer.eval()
    assert not optimizer.weights_replaced()
    if how == "load_state_dict":
        net.load_state_dict(make_net(seed=1).state_dict())
    elif how == "data":
        net.second.weight.data.mul_(0.5)
    elif how == "one element":
        net.second.bias.data[1] = torch.nextafter(net.second.bias.data[1], torch.tensor(9.0))
    else:
        with torch.no_grad():
            net.scale.fill_(0.0)
    loaded = weights(net)
    assert optimizer.weights_replaced()
    optimizer.train()
    assert "replaced" in caplog.text
    assert_same(net, loaded)
    assert not optimizer.state and optimizer.param_groups[0]["k"] == 0
    fresh_net = copy.deepcopy(net)
    fresh = AdamWScheduleFree(fresh_net.parameters(), lr=CASES["adamw"].lr)
    run(net, optimizer, range(20, 25))
    run(fresh_net, fresh, range(20, 25))
    assert_same(net, weights(fresh_net))


def test_a_group_that_joins_in_train_mode():
    net, optimizer = trained()
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    assert optimizer.mode == "train"
    late.grad = torch.ones(3)
    backward(net, 30)
    optimizer.step()
    y = late.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert torch.equal(late, y)
    optimizer.eval()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.mode == "eval"
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", CASES)
def test_the_dry_step_of_distributed_checkpoint_creates_state_and_counts_nothing(kind, mode):
    net = make_net()
    optimizer = CASES[kind].ours(net.parameters(), lr=0.1)
    getattr(optimizer, mode)()
    before = weights(net)
    get_optimizer_state_dict(net, optimizer)
    assert_same(net, before)
    assert all("z" in optimizer.state[p] for p in net.parameters())
    assert optimizer.param_groups[0]["k"] == 0
    assert optimizer.mode == mode
    run(net, optimizer, range(20, 25))
    fresh_net = make_net()
    fresh = CASES[kind].ours(fresh_net.parameters(), lr=0.1)
    run(fresh_net, fresh, range(20, 25))
    assert_same(net, weights(fresh_net))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_saved_in_eval_mode_returns_to_the_same_y(dtype):
    net, optimizer = trained(dtype=dtype)
    y = weights(net)
    optimizer.eval()
    state, saved = copied(optimizer), copy.deepcopy(net.state_dict())
    other = make_net(dtype, seed=3)
    other.load_state_dict(saved)
    resumed = AdamWScheduleFree(other.parameters(), lr=CASES["adamw"].lr)
    resumed.load_state_dict(state)
    assert resumed.mode == "eval"
    resumed.train()
    assert_same(other, y)


def test_half_precision_x_is_rounded_once():
    net, optimizer = trained(dtype=torch.bfloat16)
    expected = {
        name: averaging.x_from_y(
            precision.join(p.detach(), optimizer.state[p]["y_low"]), optimizer.state[p]["z"].float(), 0.9
        ).bfloat16()
        for name, p in net.named_parameters()
        if p.grad is not None
    }
    optimizer.eval()
    for name, x in expected.items():
        assert torch.equal(dict(net.named_parameters())[name], x)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_x_in_pieces_is_what_eval_shows(dtype, implementation, monkeypatch):
    monkeypatch.setattr(pieces, "_AT_ONCE", 1000)
    p = nn.Parameter(torch.randn(60, 50).to(dtype))
    optimizer = AdamWScheduleFree([p], lr=0.1, implementation=implementation)
    optimizer.train()
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    ((_, in_pieces),) = optimizer.x_in_pieces()
    read = {}
    for first, count in ((0, 3000), (17, 2500), (1000, 1000), (2999, 1), (5, 0)):
        read[first, count] = torch.empty(count, dtype=dtype)
        in_pieces.read(first, read[first, count])
    optimizer.eval()
    for (first, count), x in read.items():
        assert torch.equal(x, p.detach().view(-1)[first : first + count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("park", ["copy", "residual"])
@pytest.mark.parametrize("size", [3, 30_000_000])
def test_parameters_of_another_size_are_other_weights(size, park, dtype):
    """The compiled comparison went as far as the parameter does, beyond y and z."""
    p = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = AdamWScheduleFree([p], implementation="fused", park=park)
    optimizer.train()
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.eval()
    p.data, p.grad = torch.zeros(1, dtype=dtype).expand(size).contiguous(), None
    assert optimizer.weights_replaced()
    optimizer.train()
    assert not optimizer.state and p.numel() == size


@pytest.mark.parametrize("park", ["copy", "residual"])
@pytest.mark.parametrize("size", [1, 3, 2000])
def test_parameters_of_another_size_are_other_weights_also_after_a_state_dict(size, park):
    p = torch.nn.Parameter(torch.ones(1000))
    optimizer = AdamWScheduleFree([p], implementation="fused", park=park)
    optimizer.train()
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.eval()
    p.data, p.grad = torch.zeros(size), None
    optimizer.state_dict()
    assert optimizer.weights_replaced()
    optimizer.train()
    assert not optimizer.state and p.numel() == size


@pytest.mark.parametrize("park", ["copy", "residual"])
def test_a_group_that_is_removed_with_its_state_while_x_is_shown(park):
    net, optimizer = trained(implementation="fused", park=park)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    (late,) = optimizer.param_groups[1]["params"]
    late.grad = torch.ones(2)
    optimizer.step()
    y = weights(net)
    optimizer.eval()
    optimizer.param_groups.pop()
    optimizer.state.pop(late)
    assert all("y" in state for state in copied(optimizer)["state"].values())
    optimizer.train()
    assert_same(net, y)
    assert late not in optimizer.state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("park", ["copy", "residual"])
def test_to_show_x_of_another_size_is_an_error(park, dtype):
    p = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = AdamWScheduleFree([p], implementation="fused", park=park)
    optimizer.train()
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data, p.grad = torch.zeros(30_000_000, dtype=dtype), None
    with pytest.raises(RuntimeError, match="size"):
        optimizer.eval()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("park", ["copy", "residual"])
@pytest.mark.parametrize("kind", CASES)
def test_a_beta_that_is_changed_while_x_is_shown_is_no_change_of_the_weights(kind, park, saved):
    net, optimizer = trained(kind, implementation="fused", park=park)
    k, y = optimizer.param_groups[0]["k"], weights(net)
    optimizer.eval()
    optimizer.param_groups[0].update(CASES[kind].beta_option)
    if saved:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not optimizer.weights_replaced()
    optimizer.train()
    assert_same(net, y)
    assert optimizer.param_groups[0]["k"] == k and optimizer.state


@pytest.mark.parametrize("flatten", [False, True])
def test_a_parked_y_that_is_not_loaded_is_missed(flatten, caplog):
    """torch's distributed checkpoints load no more entries than the optimizer that loads has in its mode."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    optimizer = AdamWScheduleFree(net.parameters(), lr=0.1)
    optimizer.train()
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(7, 5)).pow(2).sum().backward()
        optimizer.step()
    y = weights(net)
    optimizer.eval()
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    for mode in ("eval", "train"):
        other, state = copy.deepcopy(net), copy.deepcopy(saved)
        other_optimizer = AdamWScheduleFree(other.parameters(), lr=0.1)
        getattr(other_optimizer, mode)()
        if mode == "train" and not flatten:  # as it is after dcp.load
            for entries in state["state"].values():
                del entries["y"]
        caplog.clear()
        set_optimizer_state_dict(other, other_optimizer, state, options=options)
        assert ("parked y of 2" in caplog.text) == (mode == "train")
        other_optimizer.train()
        for name, p in other.named_parameters():
            torch.testing.assert_close(p.detach(), y[name], rtol=0 if mode == "eval" else 1e-5, atol=0)


def test_a_closure_that_leaves_x_behind_is_refused():
    """The step moved x, and the next train() started anew."""
    net, optimizer = trained()
    y, k = weights(net), optimizer.param_groups[0]["k"]

    def closure():
        backward(net, 30)
        optimizer.eval()

    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step(closure)
    optimizer.train()
    assert_same(net, y)
    assert optimizer.param_groups[0]["k"] == k
    optimizer.step(lambda: (optimizer.eval(), optimizer.train(), backward(net, 30)))
    assert optimizer.param_groups[0]["k"] == k + 1


@pytest.mark.parametrize("park", ["copy", "residual"])
def test_a_switch_takes_nothing_out_of_a_state_dict(park):
    net, optimizer = trained(park=park)
    y = weights(net)
    optimizer.eval()
    x, state_dict = copy.deepcopy(net), optimizer.state_dict()
    optimizer.train()
    resumed = AdamWScheduleFree(x.parameters(), lr=CASES["adamw"].lr)
    resumed.load_state_dict(state_dict)
    resumed.train()
    assert_same(x, y)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_state_that_is_made_in_inference_mode_can_be_stepped(dtype, implementation):
    ends = []
    for mode in (torch.inference_mode, torch.no_grad):
        net, optimizer = trained(dtype=torch.bfloat16, implementation=implementation)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})
        (late,) = optimizer.param_groups[1]["params"]
        net.zero_grad()
        net.to(dtype)
        with mode():
            optimizer.eval()  # which converts the state
            optimizer.init_state()
            optimizer.weights_replaced()
            optimizer.train()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, dtype=dtype))]})
        (later,) = optimizer.param_groups[2]["params"]
        for p in (*net.parameters(), late, later):
            p.grad = torch.ones_like(p)
        with mode():
            optimizer.step()  # which creates the state of the last one
        optimizer.step()
        ends.append([*weights(net).values(), late.detach(), later.detach()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("kind", CASES)
def test_a_lazy_layer_is_trained_from_its_first_forward_pass_on(kind):
    def build():
        torch.manual_seed(0)
        net = nn.ModuleDict({"used": nn.Linear(5, 3), "later": nn.LazyLinear(2)})
        optimizer = CASES[kind].ours(net.parameters(), lr=CASES[kind].lr)
        optimizer.train()
        optimizer.eval()
        optimizer.train()
        return net, optimizer

    def steps(net, optimizer, layers):
        for i in range(4):
            out = torch.linspace(-1, 1, 10).view(2, 5) + i
            for name in layers:
                out = net[name](out)
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer = build()
    steps(net, optimizer, ["used"])
    alone = nn.Linear(5, 3)
    alone.load_state_dict(build()[0]["used"].state_dict())
    reference = CASES[kind].ours(alone.parameters(), lr=CASES[kind].lr)
    reference.train()
    steps({"used": alone}, reference, ["used"])
    for mode in ("eval", "train"):
        getattr(optimizer, mode)()
        getattr(reference, mode)()
        assert all(map(torch.equal, net["used"].parameters(), alone.parameters()))
        assert set(optimizer.state_dict()["state"]) == {0, 1}
    optimizer.eval()
    net["later"](torch.ones(3))  # now it has a size, and a value
    optimizer.train()
    steps(net, optimizer, ["used", "later"])
    y = weights(net)
    optimizer.eval()
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}
    assert not torch.equal(net["later"].weight, y["later.weight"])
    optimizer.train()
    assert_same(net, y)
