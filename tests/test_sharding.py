"""The optimizer among torch's distributed tools: groups stepped in parts, state-dict functions, sharded parameters."""

import copy

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_schedulefree.optim import AdamWScheduleFree, sharding

OPTIONS = {"lr": 0.1, "warmup_steps": 4, "weight_decay": 0.01, "r": 0.5}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(5)]


def optimizer_of(params):
    """Two groups: parameters 0 to 2 and 3 to 4."""
    return AdamWScheduleFree([{"params": params[:3]}, {"params": params[3:], "lr": 0.05}], **OPTIONS)


def give_gradients(step, *lists):
    generator = torch.Generator().manual_seed(100 + step)
    for together in zip(*lists, strict=True):
        grad = torch.randn(3, 4, generator=generator)
        for p in together:
            p.grad = grad.clone()


class InParts:
    """Steps an optimizer as DeepSpeed ZeRO-3 does: one sub-group in one group's `params`, all others empty."""

    def __init__(self, params):
        self.parts = [(0, [params[0]]), (0, params[1:3]), (1, [params[3]]), (1, [params[4]])]
        self.optimizer = optimizer_of(params)
        self.clear()

    def clear(self):
        for group in self.optimizer.param_groups:
            group["params"] = []

    def fill(self):
        for index, part in self.parts:
            self.optimizer.param_groups[index]["params"] += part

    def step(self):
        for index, part in self.parts:
            self.optimizer.param_groups[index]["params"] = list(part)
            self.optimizer.step()
            self.optimizer.param_groups[index]["params"] = []


def test_a_group_stepped_in_parts_follows_the_whole_one_bit_for_bit():
    whole, parted = parameters(), parameters()
    optimizer, in_parts = optimizer_of(whole), InParts(parted)
    optimizer.train()
    in_parts.optimizer.train()
    for step in range(7):
        give_gradients(step, whole, parted)
        optimizer.step()
        in_parts.step()
        assert all(torch.equal(p, q) for p, q in zip(whole, parted, strict=True))
    for group, parted_group in zip(optimizer.param_groups, in_parts.optimizer.param_groups, strict=True):
        assert all(group[name] == parted_group[name] for name in ("k", "weight_sum", "lr_max", "scheduled_lr"))


def test_a_group_in_the_place_of_a_removed_one_begins_at_its_own_first_step():
    params = parameters()
    former = optimizer_of(params)
    former.train()
    for step in range(3):
        give_gradients(step, params)
        former.step()
    optimizer = optimizer_of(params)
    optimizer.load_state_dict(former.state_dict())
    optimizer.step()
    place = id(optimizer.param_groups.pop())
    late = torch.nn.Parameter(torch.ones(3, 4))
    group = {"params": [late], "lr": 0.05}
    for _ in range(100):  # Python gives out the same memory again
        if id(group) == place:
            break
        group = [group, dict(group)][1]
    optimizer.add_param_group(group)
    for step in range(2):
        give_gradients(step, [late])
        optimizer.step()
    assert optimizer.param_groups[1]["k"] == 2 and "counters" not in optimizer.state[late]


def test_the_counts_of_the_parts_survive_a_checkpoint():
    whole, parted = parameters(), parameters()
    optimizer, in_parts = optimizer_of(whole), InParts(parted)
    optimizer.train()
    in_parts.optimizer.train()
    for step in range(3):
        give_gradients(step, whole, parted)
        optimizer.step()
        in_parts.step()
    in_parts.fill()
    in_parts.optimizer.eval()
    saved = copy.deepcopy(in_parts.optimizer.state_dict())
    resumed = InParts(parted)
    resumed.fill()
    resumed.optimizer.load_state_dict(saved)
    resumed.optimizer.train()
    resumed.clear()
    for step in range(3, 6):
        give_gradients(step, whole, parted)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(whole, parted, strict=True))


def test_a_group_saved_whole_can_go_on_in_parts():
    whole, parted = parameters(), parameters()
    optimizer, other = optimizer_of(whole), optimizer_of(parted)
    for each in (optimizer, other):
        each.train()
    for step in range(3):
        give_gradients(step, whole, parted)
        optimizer.step()
        other.step()
    in_parts = InParts(parted)
    in_parts.fill()
    in_parts.optimizer.load_state_dict(other.state_dict())
    in_parts.clear()
    for step in range(3, 6):
        give_gradients(step, whole, parted)
        optimizer.step()
        in_parts.step()
    assert all(torch.equal(p, q) for p, q in zip(whole, parted, strict=True))


def test_groups_shown_one_at_a_time_keep_their_counters():
    """As DeepSpeed ZeRO-1 and -2 step them."""
    whole, shown = parameters(), parameters()
    optimizer, other = optimizer_of(whole), optimizer_of(shown)
    optimizer.train()
    other.train()
    for step in range(5):
        give_gradients(step, whole, shown)
        optimizer.step()
        groups = other.param_groups
        for group in groups:
            other.param_groups = [group]
            other.step()
        other.param_groups = groups
    assert all(torch.equal(p, q) for p, q in zip(whole, shown, strict=True))
    assert [group["k"] for group in other.param_groups] == [5, 5]


def test_an_empty_group_counts_no_step():
    params = parameters()
    optimizer = optimizer_of(params)
    optimizer.train()
    optimizer.param_groups[1]["params"] = []
    give_gradients(0, params)
    optimizer.step()
    assert [group["k"] for group in optimizer.param_groups] == [1, 0]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def model_and_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    return model, AdamWScheduleFree(model.parameters(), **OPTIONS)


def train_steps(model, optimizer, steps):
    optimizer.train()
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_dry_step_of_the_state_dict_functions_changes_nothing(mode, process_group):
    model, optimizer = model_and_optimizer()
    getattr(optimizer, mode)()
    before = copy.deepcopy(model.state_dict())
    counters = [{k: v for k, v in group.items() if k not in ("params", "parked_k")} for group in optimizer.param_groups]
    state = get_optimizer_state_dict(model, optimizer)
    assert {name for entry in state["state"].values() for name in entry} >= {"z", "exp_avg_sq"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert counters == [
        {k: v for k, v in group.items() if k not in ("params", "parked_k")} for group in optimizer.param_groups
    ]
    # and the run that follows is the one without it
    train_steps(model, optimizer, range(4))
    model2, optimizer2 = model_and_optimizer()
    train_steps(model2, optimizer2, range(4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), model2.parameters(), strict=True))


@pytest.mark.parametrize("steps_before_loading", [0, 2])
def test_state_loads_before_and_after_the_first_step(steps_before_loading, process_group):
    model, optimizer = model_and_optimizer()
    train_steps(model, optimizer, range(3))
    optimizer.eval()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    train_steps(model, optimizer, range(3, 6))

    other, other_optimizer = model_and_optimizer()
    if steps_before_loading:
        train_steps(other, other_optimizer, range(10, 10 + steps_before_loading))
        other_optimizer.eval()
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, other_optimizer, state)
    train_steps(other, other_optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_switching_creates_no_state():
    _, optimizer = model_and_optimizer()
    optimizer.train()
    optimizer.eval()
    optimizer.train()
    assert not optimizer.state


def test_sharded_parameters_step_switch_and_notice_other_weights(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, plain_optimizer = model_and_optimizer()
    model, _ = model_and_optimizer()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = AdamWScheduleFree(model.parameters(), **OPTIONS)
    train_steps(plain, plain_optimizer, range(4))
    train_steps(model, optimizer, range(4))
    plain_optimizer.eval()
    optimizer.eval()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q.full_tensor())
        assert sharding.local(q).data_ptr() == q.to_local().data_ptr()
    assert not optimizer.weights_replaced()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert optimizer.weights_replaced()


def test_a_step_that_the_gradient_scaler_skips_leaves_no_trace():
    whole, scaled = model_and_optimizer(), model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _, optimizer in (whole, scaled):
        optimizer.train()
    for step in range(4):
        for model, optimizer in (whole, scaled):
            torch.manual_seed(step)
            loss = model(torch.randn(5, 4)).square().mean()
            if model is whole[0]:
                loss.backward()
                optimizer.step()
            else:
                if step == 2:  # an overflow, after which the same batch comes again
                    scaler.scale(loss * float("inf")).backward(retain_graph=True)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    assert [group["k"] for group in scaled[1].param_groups] == [4]
    assert all(torch.equal(p, q) for p, q in zip(whole[0].parameters(), scaled[0].parameters(), strict=True))
