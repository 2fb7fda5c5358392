"""y parked as a residual: back to the very same bits, whatever they are and whatever happens meanwhile."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn

from hf_schedulefree.optim import AdamWScheduleFree, averaging, kernels, pages
from hf_schedulefree.optim.pages import Reserve

pytest.importorskip("numba", reason="residuals need numba")

from hf_schedulefree.optim.kernels import jobs, residual_cpu
from hf_schedulefree.optim.kernels.residual_cpu import ParkedResidual

WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}
DTYPES = pytest.mark.parametrize("dtype", residual_cpu.DTYPES, ids=str)
BLOCK = residual_cpu.BLOCK


def sequences(dtype, sizes=(1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3, 0, 300_001), seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = [torch.randn(size, generator=generator, dtype=dtype) * 0.02 for size in sizes]
    z = [t + torch.randn(t.shape, generator=generator, dtype=dtype) * 0.002 for t in y]
    return y, z


def same(a, b):
    return all(torch.equal(s.view(WHOLE[s.dtype]), t.view(WHOLE[t.dtype])) for s, t in zip(a, b, strict=True))


def clones(tensors):
    return [t.clone() for t in tensors]


def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return before


@pytest.fixture(autouse=True, params=[0, 2**62], ids=["past caches", "through caches"])
def both_ways_to_write(request, monkeypatch):
    monkeypatch.setattr(residual_cpu, "_BEYOND_CACHES", request.param)


@DTYPES
@pytest.mark.parametrize("beta", [0.9, 0.98, 0.5, 0.1])
@pytest.mark.parametrize("count", [1, 3])
def test_there_and_back(dtype, beta, count):
    y, z = sequences(dtype)
    p = clones(y)
    wanted = [averaging.x_from_y(a, b, beta) for a, b in zip(y, z, strict=True)]
    before = threads(count)
    try:
        parked = ParkedResidual(p, z, beta)
        for _ in range(3):
            parked.park()
            assert same(p, wanted) and parked.intact()
            assert same(parked.y(), y) and same(p, wanted) and parked.intact()
            assert parked.restore() and same(p, y)
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_all_kinds_of_values(dtype):
    """Any bits at all, NaN with their payloads included; nearly all of them have to be kept whole."""
    size = 3 * BLOCK + 5
    generator = torch.Generator().manual_seed(0)
    bits = [torch.randint(-(2**31), 2**31, (2 * size,), generator=generator).to(torch.int32) for _ in range(2)]
    y, z = ([b.view(dtype)[:size].clone()] for b in bits)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3e38], dtype=dtype)
    y[0][:64], z[0][:64] = special.repeat(8), special.repeat_interleave(8)
    assert y[0].isnan().any() and (y[0] == 0).any()
    p = clones(y)
    parked = ParkedResidual(p, z, 0.9)
    parked.park()
    assert parked.intact() and same(parked.y(), y)
    assert parked.restore() and same(p, y)


@DTYPES
def test_it_takes_one_byte(dtype):
    y, z = sequences(dtype, (2_000_000,))
    parked = ParkedResidual(clones(y), z, 0.9)
    parked.park()
    assert parked.nbytes / 2_000_000 <= 1.05


@DTYPES
def test_one_bit_of_other_weights_is_noticed_and_nothing_changes(dtype):
    y, z = sequences(dtype)
    p = clones(y)
    parked = ParkedResidual(p, z, 0.9)
    parked.park()
    x = clones(p)
    for tensor, index in ((0, 0), (3, BLOCK - 1), (4, BLOCK), (7, 300_000), (7, 123_456)):
        p[tensor].view(WHOLE[dtype])[index] ^= 1
        changed = clones(p)
        assert not parked.intact() and not parked.restore() and same(p, changed)
        p[tensor].view(WHOLE[dtype])[index] ^= 1
    assert same(p, x) and parked.restore() and same(p, y)


@pytest.mark.parametrize("change", ["negated", "scaled", "swapped", "shifted", "two signs", "zeroed"])
def test_other_weights_are_noticed(change):
    y, z = sequences(torch.float32, (BLOCK,))
    p = clones(y)
    parked = ParkedResidual(p, z, 0.9)
    parked.park()
    x = p[0]
    if change == "two signs":
        x[10:12] *= -1
    elif change == "swapped":
        x[[3, 99]] = x[[99, 3]]
    else:
        x.copy_({"negated": -x, "scaled": x * 2, "shifted": x.roll(1), "zeroed": torch.zeros_like(x)}[change])
    assert not parked.intact()


@DTYPES
@pytest.mark.parametrize("change", ["signs", "doubled"])
def test_no_pair_of_like_changes_cancels_out(change, dtype):
    """One in 2^16 pairs of signs did, with a checksum that took no bit downward: in float32, (46, 814) here."""
    y = [((torch.arange(BLOCK) * 7919 % 4096 - 2048).to(dtype) + 0.5) / 4096]
    p, z = clones(y), [y[0] * 1.0625]
    parked = ParkedResidual(p, z, 0.5)
    parked.park()
    (x,) = clones(p)
    other = -x if change == "signs" else 2 * x
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(BLOCK, (1000, 2), generator=generator).tolist()
    for a, b in [(46, 814), *pairs]:
        p[0][a], p[0][b] = other[a], other[b]
        assert not parked.intact(), (a, b)
        p[0][a], p[0][b] = x[a], x[b]
    assert parked.restore() and same(p, y)


@pytest.mark.parametrize("done", [0, 1, 40, 10_000])
@pytest.mark.parametrize("first", ["park", "restore"])
@pytest.mark.parametrize("then", ["park", "restore"])
def test_an_interrupted_switch_can_be_completed_in_both_directions(monkeypatch, done, first, then):
    y, z = sequences(torch.float32)
    p = clones(y)
    parked = ParkedResidual(p, z, 0.9)
    if first == "restore":
        parked.park()
    run = jobs.Job.run

    def interrupted(job, *args, **options):
        whole, job.table = job.table, job.table[:done]
        try:
            run(job, *args, **options)
        finally:
            job.table = whole
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Job, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(parked, first)()
    parked.park() if then == "park" else parked.restore()
    if then == "park":
        assert same(p, [averaging.x_from_y(a, b, 0.9) for a, b in zip(y, z, strict=True)])
        assert parked.restore()
    assert same(p, y)


# In the optimizer


def trained(park=None, dtype=torch.float32, steps=3):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((40, 30), (7,), (3000,))]
    optimizer = AdamWScheduleFree([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], park=park)
    optimizer.train()
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params, optimizer


@DTYPES
def test_both_ways_to_park_show_the_same_x_and_save_the_same_state(dtype):
    (one, by_residual), (other, by_copy) = trained(dtype=dtype), trained("copy", dtype)
    y = clones(one)
    by_residual.eval()
    by_copy.eval()
    assert all("y" not in state for state in by_residual.state.values())
    assert all("y" in state for state in by_copy.state.values())
    assert same(one, other)
    saved, wanted = by_residual.state_dict(), by_copy.state_dict()
    assert saved["param_groups"] == wanted["param_groups"]
    for i, state in wanted["state"].items():
        assert saved["state"][i].keys() == state.keys()
        assert all(torch.equal(saved["state"][i][name], value) for name, value in state.items())
    assert not by_residual.weights_replaced()
    by_residual.train()
    by_copy.train()
    assert same(one, y) and same(other, y)


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy", "torch.save"])
def test_a_copy_of_the_optimizer_finds_back_to_y(how):
    params, optimizer = trained()
    y = clones(params)
    optimizer.eval()
    if how == "state_dict":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = AdamWScheduleFree([{"params": others[:1]}, {"params": others[1:]}])
        other.load_state_dict(optimizer.state_dict())
    elif how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert not other.weights_replaced() and other.mode == "eval"
    other.train()
    assert same([p for group in other.param_groups for p in group["params"]], y)
    optimizer.train()
    assert same(params, y)


@pytest.mark.parametrize("replace", ["one element", "all", "another dtype", "freed and loaded"])
def test_replaced_weights_are_kept_and_the_optimizer_starts_anew(replace, caplog):
    params, optimizer = trained()
    optimizer.eval()
    with torch.no_grad():
        if replace == "one element":
            params[2].data[17] += 1e-3  # not seen by the tensor's version
        elif replace == "all":
            for p in params:
                p.copy_(torch.randn_like(p))
        elif replace == "another dtype":
            params[1].data = params[1].data.double()
        else:
            params[0].data = torch.randn_like(params[0])
    loaded = clones(params)
    assert optimizer.weights_replaced()
    optimizer.train()
    assert "replaced" in caplog.text and not optimizer.state and optimizer.mode == "train"
    assert all(torch.equal(a, b) for a, b in zip(params, loaded, strict=True))


def test_weights_that_were_moved_and_came_back_are_x():
    params, optimizer = trained()
    y = clones(params)
    optimizer.eval()
    for p in params:
        p.data = p.data.clone()
    assert not optimizer.weights_replaced()
    optimizer.train()
    assert same(params, y)


def test_an_interrupted_switch_of_the_optimizer(monkeypatch):
    params, optimizer = trained()
    y = clones(params)
    for method in ("eval", "train"):
        with monkeypatch.context() as patch:
            patch.setattr(ParkedResidual, {"eval": "park", "train": "restore"}[method], _interrupt)
            with pytest.raises(KeyboardInterrupt):
                getattr(optimizer, method)()
        assert optimizer.mode == "train"  # not settled: an eval() is needed, and works
        optimizer.eval()
        assert same(
            params, [averaging.x_from_y(a, optimizer.state[p]["z"], 0.9) for a, p in zip(y, params, strict=True)]
        )
    optimizer.train()
    assert same(params, y)


def _interrupt(parked):
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform != "linux", reason="memory is put back on Linux only")
def test_beside_gradients_the_next_residual_takes_the_same_memory_whatever_is_in_it(monkeypatch):
    used, take = [], Reserve.take
    monkeypatch.setattr(Reserve, "take", lambda *args: used.append(take(*args)) or used[-1])
    params, optimizer = trained()
    for _ in range(3):
        for _ in range(2):
            y = clones(params)
            optimizer.eval()
            optimizer.train()
            assert same(params, y)
            for memory in used:
                memory.fill_(-77)  # as the system may do, which gives it to others and clears it
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert len(used) == 2 * 6 and len({memory.data_ptr() for memory in used}) == 2  # two groups
    assert len(optimizer._residuals._reserves) == 2
    optimizer.zero_grad()
    optimizer.eval()
    assert len(used) == 2 * 6 and not optimizer._residuals._reserves  # it needs the memory of the gradients
    optimizer.train()
    assert optimizer.parked_bytes == 0


def test_what_cannot_do_with_a_residual_is_copied():
    base = torch.randn(8, 8)
    params = [nn.Parameter(base.t()), nn.Parameter(torch.randn(5).bfloat16()), nn.Parameter(torch.randn(4))]
    optimizer = AdamWScheduleFree(params, park="residual")
    optimizer.train()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    y = clones(params)
    optimizer.eval()
    assert ["y" in optimizer.state[p] for p in params] == [True, True, False]
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(params, y, strict=True))


def test_without_numba_y_is_copied(monkeypatch):
    monkeypatch.setattr(kernels, "switch_kernel", lambda: None)
    params, optimizer = trained("residual")
    y = clones(params)
    optimizer.eval()
    assert all("y" in state for state in optimizer.state.values())
    optimizer.train()
    assert same(params, y)


def test_an_unknown_way_to_park_is_refused():
    with pytest.raises(ValueError, match="park='swap' is unknown"):
        AdamWScheduleFree([nn.Parameter(torch.zeros(1))], park="swap")


def test_the_default_device_is_not_that_of_the_residual():
    """The compiled code was given an address of the other device: a segmentation fault."""
    with torch.device("meta"):
        assert pages.new_bytes(10).is_cpu
    p = nn.Parameter(torch.randn(1000))
    optimizer = AdamWScheduleFree([p], implementation="fused")
    optimizer.train()
    for gradient in (torch.ones(1000), torch.randn(1000)):
        p.grad = gradient
        optimizer.step()
    optimizer.zero_grad()  # so that the memory comes from `new_bytes`
    y = p.detach().clone()
    with torch.device("meta"):
        optimizer.eval()
        assert not torch.equal(p, y) and not optimizer.weights_replaced()
        optimizer.train()
    assert torch.equal(p, y)
