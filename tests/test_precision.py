"""Half-precision parameters: what is stored, how it is rounded, and that every promise holds in each precision."""

import copy
import io
import itertools
import logging
import warnings

import pytest
import schedulefree
import torch
from cases import CASES
from torch import nn

from hf_schedulefree import registry
from hf_schedulefree.optim import AdamWScheduleFree, averaging, directions, precision, precision_step, sharding
from hf_schedulefree.optim.kernels import one_pass_half_cpu
from hf_schedulefree.optim.kernels.numbers import DenseRow, StepNumbers
from hf_schedulefree.optim.stored import read_sequences

HALF = [torch.bfloat16, torch.float16]
KEEPING = ["split", "stochastic", "full"]
ALL = [*KEEPING, "parameter"]


def float32_bits(count: int) -> torch.Tensor:
    """Random bit patterns, the edges of the format among them; NaN left out."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = [0.0, -0.0, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, float("inf"), -float("inf")]
    values = torch.cat([bits.view(torch.float32), torch.tensor(edges)])
    return values[~values.isnan()]


def make_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator) for shape in ((9, 7), (301,), (6, 4), ())]
    tensors[2] = tensors[2].t()  # not contiguous
    return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def make(dtype=torch.bfloat16, state_precision=None, kind="adamw", **options):
    params = make_parameters(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = CASES[kind].ours(params, lr=CASES[kind].lr, state_precision=state_precision, **options)
    optimizer.train()
    return params, optimizer


def take_steps(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = (p.detach().float() + torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def tensors_of(params, optimizer):
    found = {f"p{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"{name}{i}": value.clone() for name, value in optimizer.state[p].items()}
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# Low bits


def test_bfloat16_and_its_low_bits_are_the_float32():
    y = float32_bits(300_000)
    high, low = precision.split(y, torch.bfloat16)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert averaging.same_bits(precision.join(high, low), y)
    finite = high.isfinite()
    nearest = y.to(torch.bfloat16)
    assert torch.equal((high.float() - y).abs()[finite], (nearest.float() - y).abs()[finite])
    assert torch.equal(finite, nearest.isfinite())


def test_the_low_bits_of_another_value_make_no_nan_of_a_bfloat16():
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.3895e38, 1.0]).bfloat16()
    low = torch.arange(-(2**15), 2**15).to(torch.int16)[:, None].expand(-1, len(edges))
    joined = precision.join(edges.expand(len(low), -1), low)
    assert not joined.isnan().any()
    assert averaging.same_bits(joined[: 2**15, :2], edges[:2].float().expand(2**15, -1))
    assert (joined[:, 6] - 1).abs().max() <= 2**-8


@pytest.mark.parametrize("mode", ["a step", "x"])
@pytest.mark.parametrize("implementation", ["for-loop", "fused"])
@pytest.mark.parametrize("dtype", HALF)
def test_masked_weights_stay_finite(dtype, implementation, mode):
    """Zeros written into parameters in train mode, whose low bits are those of other values."""
    params, optimizer = make(dtype, implementation=implementation)
    generator = torch.Generator().manual_seed(5)
    masks = [(torch.rand(p.shape, generator=generator) < 0.5) for p in params]
    for step in range(4):
        take_steps(params, optimizer, [step])
        with torch.no_grad():
            for p, mask in zip(params, masks, strict=True):
                p.mul_(mask)
        if mode == "x":
            optimizer.eval()
            assert all(p.isfinite().all() for p in params)
            optimizer.train()
        assert all((p[~mask] == 0).all() for p, mask in zip(params, masks, strict=True))
    assert all(precision.wide(p, optimizer.state[p]).isfinite().all() for p in params)


@pytest.mark.parametrize("dtype", HALF)
def test_nan_is_shown_as_nan(dtype):
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    high, low = precision.split(nan, dtype)
    assert high.isnan().all() and precision.join(high, low).isnan().all()


def test_float16_and_its_low_bits_are_the_float32_where_float16_is_normal():
    generator = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.arange(-16, 16).float()
    y = torch.cat([torch.randn(200_000, generator=generator) * scale for scale in (1e4, 1.0, 1e-3)])
    y = torch.cat([y, powers, -powers, torch.nextafter(powers, torch.tensor(0.0))])
    y = y[(y.abs() >= 2**-16) & (y.abs() < 65520)]
    assert averaging.same_bits(precision.join(*precision.split(y, torch.float16)), y)
    small = torch.randn(100_000, generator=generator) * 1e-6
    joined = precision.join(*precision.split(small, torch.float16))
    assert (joined - small).abs().max() <= 2**-40
    assert averaging.same_bits(precision.join(*precision.split(joined, torch.float16)), joined)
    assert precision.join(*precision.split(torch.tensor([7e4, -7e4]), torch.float16)).isinf().all()


# Stochastic rounding


def reference_bits(key: tuple[int, int], element: int) -> int:
    """The formula of `random_bits`, in Python's whole numbers."""
    h = ((element % 2**32) * 0x9E3779B9 + (element >> 32) * 0x85EBCA6B + key[0]) % 2**32
    h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
    h = (h ^ (h >> 15) ^ key[1]) * 0x846CA68B % 2**32
    return h ^ (h >> 16)


def test_random_bits_depend_on_the_key_and_the_element_alone():
    elements = [0, 1, 2, 77, 2**31 + 5, 2**32 - 1, 2**32, 2**40 + 3]
    for words in ((0, 0, 0), (42, 7, 3), (2**63 + 11, 10**6, 148), (-1, 1, 0)):
        key = precision.rounding_key(*words)
        bits = precision.random_bits(key, torch.tensor(elements))
        assert [value % 2**32 for value in bits.tolist()] == [reference_bits(key, element) for element in elements]
        for name, part in (("z", bits % 2**16), ("exp_avg_sq", (bits.long() % 2**32) >> 16)):
            assert torch.equal(precision.bits_for(name, bits).long(), part.long())


def test_each_word_of_the_key_counts():
    # SplitMix64 seeded with 0 begins with this number, as its reference implementations publish.
    first, absorbed = 0xE220A8397B1DCDAF, 0x9E3779B97F4A7C15
    assert precision.rounding_key(-absorbed, -absorbed, 0) == (first % 2**32, first >> 32)
    keys = {precision.rounding_key(*words) for words in itertools.product(range(5), repeat=3)}
    assert len(keys) == 125


def test_random_bits_are_uniform_and_independent():
    count = 2**18
    streams = []
    for words in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)):
        bits = precision.random_bits(precision.rounding_key(*words), torch.arange(count))
        streams += [precision.bits_for(name, bits).double() / 2**16 for name in ("z", "exp_avg_sq", "y")]
    uniform = torch.stack(streams)
    assert (uniform.min(), uniform.max() < 1) == (0, True)
    for value in uniform:
        expected = count / 64
        counts = torch.histc(value, 64, 0, 1)
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
    # neighbours in element, and all pairs of stream, step, parameter and seed
    together = torch.cat([uniform, uniform[:1].roll(1), uniform[:1].roll(64)])
    correlation = torch.corrcoef(together) - torch.eye(len(together))
    assert correlation.abs().max() < 5 / count**0.5


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_is_right_on_average(dtype):
    generator = torch.Generator().manual_seed(3)
    values = torch.cat([torch.randn(40, generator=generator) * scale for scale in (1.0, 1e-3, 1e-5, 1e-7)])
    if dtype == torch.bfloat16:
        values = torch.cat([values, values * 1e-32, values * 1e37])
    samples = 2**14
    index = torch.arange(values.numel() * samples).view(values.numel(), samples)
    random = precision.bits_for("z", precision.random_bits(precision.rounding_key(5, 0, 0), index))
    rounded = precision.round_stochastically(values[:, None].expand_as(index).contiguous(), dtype, random).double()
    low, high = rounded.amin(1), rounded.amax(1)
    exact = values.double()
    assert ((low <= exact) & (exact <= high)).all()
    assert all(len(row.unique()) <= 2 for row in rounded)
    step = (high - low).clamp_min(1e-300)
    error = (rounded.mean(1) - exact) / step
    assert error.abs().max() < 5 * 0.5 / samples**0.5
    assert error.mean().abs() < 4 * 0.5 / (samples * len(values)) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_leaves_what_needs_none(dtype):
    kept = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    kept = torch.cat([kept, kept * 2**-14, torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    kept = kept[kept.to(dtype).float() == kept]
    for random in (0, 1, 0xFFFF):
        rounded = precision.round_stochastically(kept, dtype, torch.full(kept.shape, random, dtype=torch.int32))
        assert averaging.same_bits(rounded, kept.to(dtype))
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert precision.round_stochastically(nan, dtype, torch.full((3,), 0xFFFF, dtype=torch.int32)).isnan().all()


# What is stored


def test_the_default_splits_half_precision_and_leaves_the_rest_alone():
    for dtype in HALF:
        assert precision.storage_for(dtype, None) == precision.storage_for(dtype, "split") is not None
    for name in (None, *ALL):
        assert precision.storage_for(torch.float32, name) is precision.storage_for(torch.float64, name) is None


@pytest.mark.parametrize(
    "state_precision, size", [(None, 8), ("split", 8), ("stochastic", 6), ("full", 12), ("parameter", 6)]
)
@pytest.mark.parametrize("dtype", HALF)
def test_bytes_per_parameter(dtype, state_precision, size):
    params, optimizer = make(dtype, state_precision, eps=1e-4)
    take_steps(params, optimizer, range(2))
    for p in params:
        tensors = [p, *optimizer.state[p].values()]
        assert sum(t.untyped_storage().nbytes() for t in tensors) == size * p.numel()


def test_float32_adapters_on_a_half_precision_base():
    base, adapter = nn.Parameter(torch.randn(4).bfloat16()), nn.Parameter(torch.randn(4))
    optimizer = AdamWScheduleFree([base, adapter])
    optimizer.train()
    take_steps([base, adapter], optimizer, range(3))
    assert {name: t.dtype for name, t in optimizer.state[adapter].items()} == {
        "z": torch.float32,
        "exp_avg_sq": torch.float32,
    }
    alone = nn.Parameter(torch.zeros(4))
    assert "y_low" in optimizer.state[base] and "y_low" not in optimizer.state.get(alone, {})


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", HALF)
def test_the_average_is_that_of_float32(kind, dtype):
    """Small steps for long: to nearest, they round to nothing; stochastically or with low bits, they add up."""
    errors = {}
    for name in ("float32", *ALL):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(20_000, generator=generator).to(dtype)
        p = nn.Parameter(start.float() if name == "float32" else start.clone())
        lr = 1e-3 if dtype == torch.bfloat16 else 1e-3 / 8  # an eighth of the unit in the last place
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = CASES[kind].ours([p], lr=lr, state_precision=None if name == "float32" else name)
        optimizer.param_groups[0]["eps"] = 1e-4
        optimizer.train()
        for _ in range(200):
            p.grad = torch.sign(torch.randn(20_000, generator=generator) + 0.3).to(p.dtype)
            optimizer.step()
        optimizer.eval()
        state = optimizer.state_dict()["state"][0]
        x = precision.wide_x(state["y"], state, 0.9)
        if name == "float32":
            expected = x
        errors[name] = ((x - expected).mean() / (expected - start.float()).mean()).abs().item()
    assert errors["full"] < 1e-3
    assert errors["split"] < 0.02 and errors["stochastic"] < 0.02, errors
    assert errors["parameter"] > 0.5, errors


def test_full_is_the_float32_run():
    params, optimizer = make(torch.bfloat16, "full", weight_decay=0.1)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    plain = AdamWScheduleFree(wide, lr=CASES["adamw"].lr, weight_decay=0.1)
    plain.train()
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(params, wide, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
    for p, q in zip(params, wide, strict=True):
        torch.testing.assert_close(precision.wide(p, optimizer.state[p]), q, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(optimizer.state[p]["z"], plain.state[q]["z"], rtol=1e-6, atol=1e-7)


def test_parameter_is_upstream_and_warns():
    params = make_parameters(torch.bfloat16)
    with pytest.warns(UserWarning, match="state_precision='parameter'"):
        optimizer = AdamWScheduleFree(params, lr=0.01, state_precision="parameter", implementation="for-loop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamWScheduleFree(make_parameters(torch.float32), state_precision="parameter")
        AdamWScheduleFree(params)
    theirs = make_parameters(torch.bfloat16)
    upstream = schedulefree.AdamWScheduleFree(theirs, lr=0.01, foreach=False)
    optimizer.train()
    upstream.train()
    take_steps(params, optimizer, range(5))
    take_steps(theirs, upstream, range(5))
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-2)
        assert optimizer.state[p]["z"].dtype == torch.bfloat16 and "y_low" not in optimizer.state[p]


@pytest.mark.parametrize("wrong", ["double", "", 3, True])
def test_an_unknown_precision_is_refused(wrong):
    with pytest.raises(ValueError, match="state_precision"):
        AdamWScheduleFree([nn.Parameter(torch.zeros(1))], state_precision=wrong)
    with pytest.raises(ValueError, match="rounding_seed"):
        AdamWScheduleFree([nn.Parameter(torch.zeros(1))], rounding_seed=0.5)


# No reader changes the training


@pytest.mark.parametrize("state_precision", ALL)
@pytest.mark.parametrize("kind", CASES)
def test_the_switch_changes_no_bit_and_draws_nothing(kind, state_precision):
    params, optimizer = make(torch.bfloat16, state_precision, kind)
    quiet, undisturbed = make(torch.bfloat16, state_precision, kind)
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    for step in range(12):
        take_steps(params, optimizer, [step])
        take_steps(quiet, undisturbed, [step])
        before = tensors_of(params, optimizer)
        for _ in range(3):
            optimizer.eval()
            for p in params:
                state = optimizer.state[p]
                x = averaging.x_from_y(precision.wide(state["y"], state), state["z"].float(), 0.9)
                assert torch.equal(p, x.bfloat16())
            assert not optimizer.weights_replaced()
            optimizer.train()
        assert_same(tensors_of(params, optimizer), before)
    assert_same(tensors_of(params, optimizer), tensors_of(quiet, undisturbed))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("state_precision", ALL)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", HALF)
def test_resume_is_bit_for_bit(dtype, mode, state_precision):
    params, optimizer = make(dtype, state_precision, rounding_seed=7, eps=1e-4)
    take_steps(params, optimizer, range(6))
    if mode == "eval":
        optimizer.eval()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), file)
    state, saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    others, resumed = make(dtype, state_precision, rounding_seed=1, eps=1e-4)
    with torch.no_grad():
        for p, value in zip(others, saved, strict=True):
            p.copy_(value)
    resumed.load_state_dict(state)
    assert_same(tensors_of(others, resumed), tensors_of(params, optimizer))
    assert resumed.mode == mode and not resumed.weights_replaced()
    for params_, optimizer_ in ((params, optimizer), (others, resumed)):
        optimizer_.train()
        take_steps(params_, optimizer_, range(6, 12))
    assert_same(tensors_of(others, resumed), tensors_of(params, optimizer))


def test_the_seed_decides_the_rounding_and_nothing_else_does():
    runs = {}
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))
        params, optimizer = make(torch.bfloat16, "stochastic", rounding_seed=seed)
        take_steps(params, optimizer, range(5))
        found = tensors_of(params, optimizer)
        if seed in runs:
            assert_same(found, runs[seed])
        runs[seed] = found
    assert not torch.equal(runs[0]["z1"], runs[1]["z1"])


def test_slices_do_not_change_the_rounding(monkeypatch):
    whole = make(torch.bfloat16, "stochastic", implementation="for-loop")
    take_steps(*whole, range(3))
    monkeypatch.setattr(precision_step, "_SLICE_ELEMENTS", {"cpu": 10})
    sliced = make(torch.bfloat16, "stochastic", implementation="for-loop")
    take_steps(*sliced, range(3))
    assert_same(tensors_of(*sliced), tensors_of(*whole))


DIRECTIONS = {
    "plain": directions.Direction(),
    "collects": directions.adaptive(0.99, 1e-8, 3, normalizes=False),
    "normalizes": directions.adaptive(0.99, 1e-8, 3),
}


NAN_BITS = {torch.float32: [0x7FFFFFFF, 0x7FFF8000, 0x7F800001, -1], torch.bfloat16: [0x7FFF, 0x7FC0, 0x7F81, -1]}


@pytest.mark.parametrize("implementation", ["for-loop", None])
@pytest.mark.parametrize("state_precision", KEEPING)
@pytest.mark.parametrize("where", ["p", "z", "exp_avg_sq", "grad"])
def test_every_nan_stays_one_in_what_is_shown_and_what_is_kept(where, state_precision, implementation):
    storage, count = precision.storage_for(torch.bfloat16, state_precision), 67
    torch.manual_seed(0)
    p, grad = torch.randn(count).bfloat16(), torch.randn(count).bfloat16()
    state = {"z": torch.randn(count).to(storage.z), "exp_avg_sq": torch.rand(count).to(storage.moments)}
    if storage.low_bits:
        state["y_low"] = torch.randint(-(2**15), 2**15, (count,)).to(torch.int16)
    target = {"p": p, "grad": grad, **state}[where]
    bits = torch.tensor(NAN_BITS[target.dtype], dtype={2: torch.int16, 4: torch.int32}[target.itemsize])
    target[:4] = target[-4:] = bits.view(target.dtype)
    if where == "p" and storage.low_bits:
        state["y_low"][:] = 0  # as it is where y is NaN
    row = precision_step.HalfRow(p, grad, state, storage, precision.RandomKey(7, 1))
    numbers = StepNumbers(0.01, 0.9, 0.2, 0.1, directions.adaptive(0.99, 1e-8, 5), k=5)
    precision_step.step_([row], numbers, implementation)
    for shown in (p, precision.wide(p, state), state["z"]):
        nan = shown.isnan()
        assert nan[:4].all() and nan[-4:].all() and not nan[4:-4].any()


@pytest.mark.parametrize("state_precision", KEEPING)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_compiled_step_is_that_of_torchs_operations(direction, state_precision):
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    storage, count = precision.storage_for(torch.bfloat16, state_precision), 300_007

    def rows():
        generator.manual_seed(1)
        for size, seed in ((count, 1), (5, 2), (0, 3)):
            y, g, z = (torch.randn(size, generator=generator) for _ in range(3))
            state = {"z": z.to(storage.z), "exp_avg_sq": torch.rand(size, generator=generator).to(storage.moments)}
            if storage.low_bits:
                low = torch.randint(-(2**15), 2**15, (size,), generator=generator)
                state["y_low"] = low.to(torch.int16)
            if size > 5:
                infinity = float("inf")
                y[:7] = torch.tensor([float("nan"), 3.4028235e38, -0.0, 0.0, infinity, -infinity, 1.0])
                state.get("y_low", torch.zeros(7))[:7] = -7
            key = precision.RandomKey(7, seed)
            yield precision_step.HalfRow(y.bfloat16(), g.bfloat16(), state, storage, key)

    numbers = StepNumbers(0.01, 0.9, 0.2, 0.1, DIRECTIONS[direction], k=5)
    compiled, by_torch = list(rows()), list(rows())
    precision_step.step_(compiled, numbers)
    precision_step.step_(by_torch, numbers, "for-loop")
    for ours, expected in zip(compiled, by_torch, strict=True):
        pairs = {name: (ours.state[name], expected.state[name]) for name in ("z", "exp_avg_sq")}
        pairs["y"] = (precision.wide(ours.p, ours.state), precision.wide(expected.p, expected.state))
        for name, (a, b) in pairs.items():
            # a difference in the last place of float32 rarely crosses a boundary of bfloat16
            assert (a != b).sum() - a.isnan().sum() <= 3e-4 * len(a) or a.dtype == torch.float32
            rough = name == "y" and not storage.low_bits
            tolerance = 1e-6 if a.dtype == torch.float32 and not rough else 2**-7
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert torch.equal(ours.grad, expected.grad)


@pytest.mark.parametrize("first", [0, 2**31 - 20, 2**32 - 301, 5 * 2**32, 2**40 + 7])
@pytest.mark.parametrize("seed", [-3, 2**70 + 11])
def test_the_compiled_step_takes_random_bits_by_the_global_index(seed, first):
    pytest.importorskip("numba")
    y, z, g = torch.randn(3, 301, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    wanted = z.float() - torch.tensor(0.01) * g.float()
    bits = precision.random_bits(precision.rounding_key(seed, 5, 17), torch.arange(first, first + 301))
    wanted = precision.round_stochastically(wanted, torch.bfloat16, precision.bits_for("z", bits))
    row = DenseRow(y, torch.zeros(301, dtype=torch.int16), z, None, first, precision.RandomKey(seed, 17))
    one_pass_half_cpu.prepare([row])([[g.data_ptr()]], StepNumbers(0.01, 0.9, 0.2, 0.0, directions.Direction(), k=5))
    assert torch.equal(z, wanted)


def test_threads_do_not_change_the_compiled_step():
    pytest.importorskip("numba")
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            p = nn.Parameter(torch.linspace(-2, 2, 700_001).bfloat16())
            optimizer = AdamWScheduleFree([p, nn.Parameter(torch.ones(3).bfloat16())], lr=0.01)
            optimizer.train()
            take_steps(optimizer.param_groups[0]["params"], optimizer, range(2))
            found.append(tensors_of([p], optimizer))
    finally:
        torch.set_num_threads(threads)
    assert_same(*found)


def test_the_position_of_an_element_does_not_depend_on_the_shards(monkeypatch):
    from torch.distributed.tensor import _utils

    whole = torch.arange(7 * 5 * 4).view(7, 5, 4)
    monkeypatch.setattr(sharding, "is_sharded", lambda tensor: hasattr(tensor, "device_mesh"))
    for piece in ((slice(2, 4), slice(0, 5), slice(0, 4)), (slice(0, 7), slice(3, 5), slice(0, 4))):
        shard = whole[piece].contiguous()
        fake = type("Shard", (), {"detach": lambda self: self, "to_local": lambda self, shard=shard: shard})()
        fake.shape, fake.device_mesh, fake.placements = whole.shape, None, None
        placed = (tuple(shard.shape), tuple(s.start for s in piece))
        monkeypatch.setattr(_utils, "compute_local_shape_and_global_offset", lambda *_, placed=placed: placed)
        index = sharding.global_index(fake, 3, shard.numel())
        assert torch.equal(index, shard.flatten()[3:])
        assert sharding.first_index(fake) == (40 if piece[0].start else None)


def test_gradients_are_left_alone_and_other_dtypes_of_them_are_taken():
    params, optimizer = make(torch.bfloat16)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p.grad == 1).all() for p in params)


def test_a_copy_continues_alike():
    params, optimizer = make(torch.bfloat16, "stochastic")
    take_steps(params, optimizer, range(3))
    both = copy.deepcopy((params, optimizer))
    take_steps(params, optimizer, range(3, 6))
    take_steps(*both, range(3, 6))
    assert_same(tensors_of(*both), tensors_of(params, optimizer))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("state_precision", KEEPING)
def test_a_negative_zero_without_a_state_is_not_another_weight(state_precision, dtype):
    """As in pruned weights, w * mask."""
    (p, *_), optimizer = make(dtype, state_precision)
    take_steps([p], optimizer, range(5))
    pruned = nn.Parameter(torch.tensor([1.0, -0.0, 0.0, -2.0], dtype=dtype))
    optimizer.param_groups[0]["params"].append(pruned)
    optimizer.eval()
    optimizer.init_state()
    assert not optimizer.weights_replaced()
    optimizer.train()
    assert optimizer.param_groups[0]["k"] == 5 and str(pruned[1].item()) == "-0.0"


# Loading what was kept in another precision


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("state_precision", ALL)
def test_a_state_of_schedulefree_is_converted(state_precision, mode, caplog):
    theirs = make_parameters(torch.bfloat16)
    upstream = schedulefree.AdamWScheduleFree(theirs, lr=0.01)
    upstream.train()
    take_steps(theirs, upstream, range(5))
    getattr(upstream, mode)()
    params, optimizer = make(torch.bfloat16, state_precision)
    with torch.no_grad():
        for p, q in zip(params, theirs, strict=True):
            p.copy_(q)
    with caplog.at_level(logging.WARNING, logger="hf_schedulefree"):
        optimizer.load_state_dict(copy.deepcopy(upstream.state_dict()))
    assert ("converted" in caplog.text) == (state_precision in ("split", "full"))
    assert optimizer.mode == mode and optimizer.param_groups[0]["k"] == 5
    assert optimizer.param_groups[0]["state_precision"] == state_precision
    for p, q in zip(params, theirs, strict=True):
        storage = precision.storage_for(p.dtype, state_precision)
        assert torch.equal(optimizer.state[p]["z"].bfloat16(), upstream.state[q]["z"])
        if storage is not None:
            assert all(t.dtype == storage.dtype(name) for name, t in optimizer.state[p].items() if name != "y")
    optimizer.train()
    upstream.train()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=2e-3)
    take_steps(params, optimizer, range(5, 8))
    optimizer.eval()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("state_precision", ALL)
def test_schedulefree_loads_our_state(state_precision, mode):
    params, optimizer = make(torch.bfloat16, state_precision)
    take_steps(params, optimizer, range(5))
    getattr(optimizer, mode)()
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    upstream = schedulefree.AdamWScheduleFree(theirs, lr=0.01)
    upstream.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, theirs, strict=True):
        for name in ("z", "exp_avg_sq"):
            assert torch.equal(upstream.state[q][name], optimizer.state[p][name].bfloat16())
    upstream.train()
    take_steps(theirs, upstream, range(5, 8))
    upstream.eval()
    assert upstream.param_groups[0]["k"] == 8


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("state_precision", ["split", "full"])
def test_low_bits_that_schedulefree_has_cast_are_dropped(state_precision, dtype, mode, steps):
    """They are those of y before its steps, and not even these any more."""
    params, optimizer = make(dtype, state_precision)
    take_steps(params, optimizer, range(5))
    getattr(optimizer, mode)()
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    upstream = schedulefree.AdamWScheduleFree(theirs, lr=0.01)
    upstream.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if steps:
        upstream.train()
        take_steps(theirs, upstream, range(5, 5 + steps))
        getattr(upstream, mode)()
    back, other = make(dtype, state_precision)
    with torch.no_grad():
        for p, q in zip(back, theirs, strict=True):
            p.copy_(q)
    saved = upstream.state_dict()
    other.load_state_dict(copy.deepcopy(saved))
    for i, q in enumerate(theirs):
        sequences = read_sequences(saved["state"][i], saved["param_groups"][0], q.detach())
        assert torch.equal(sequences.y if mode == "train" else sequences.x, q.double())
    assert other.param_groups[0]["k"] == 5 + steps and not other.weights_replaced()
    other.train()
    assert other.param_groups[0]["k"] == 5 + steps
    for p, q in zip(back, theirs, strict=True):
        if mode == "train":
            assert torch.equal(precision.wide(p.detach(), other.state[p]), q.float())
        else:
            x = precision.wide_x(p.detach(), other.state[p], 0.9)
            torch.testing.assert_close(x, q.float(), rtol=1e-5, atol=1e-6)
    take_steps(back, other, range(8, 9))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("saved", ALL)
@pytest.mark.parametrize("loaded", ALL)
def test_any_precision_loads_any_other(saved, loaded, mode, caplog):
    params, optimizer = make(torch.bfloat16, saved)
    take_steps(params, optimizer, range(6))
    y = [precision.wide(p, optimizer.state[p]) for p in params]
    getattr(optimizer, mode)()
    others, other = make(torch.bfloat16, loaded)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    same_storage = saved == loaded or {saved, loaded} == {"stochastic", "parameter"}
    assert ("converted" in caplog.text) != same_storage
    assert not other.weights_replaced()
    other.train()
    for p, expected in zip(others, y, strict=True):
        if "y_low" in other.state[p]:
            assert torch.equal(precision.wide(p, other.state[p]), expected)
        else:
            assert torch.equal(p, precision.split(expected, torch.bfloat16)[0])
    take_steps(others, other, range(6, 8))
    other.eval()
    assert not other.weights_replaced()


def test_converted_state_before_its_weights():
    params, optimizer = make(torch.bfloat16, "full")
    take_steps(params, optimizer, range(6))
    y = [p.detach().clone() for p in params]
    optimizer.eval()
    others, other = make(torch.bfloat16, "stochastic")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.train()
    assert other.param_groups[0]["k"] == 6
    for p, expected in zip(others, y, strict=True):
        torch.testing.assert_close(p, expected, rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("saved", [torch.float32, torch.float64])
def test_a_wider_run_continues_in_half_precision(saved, dtype):
    params, optimizer = make(saved)
    take_steps(params, optimizer, range(6))
    y = [p.detach().clone() for p in params]
    optimizer.eval()
    others, other = make(dtype, "split")
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.train()
    assert other.param_groups[0]["k"] == 6
    for p, expected in zip(others, y, strict=True):
        torch.testing.assert_close(precision.wide(p, other.state[p]), expected.float(), rtol=1e-6, atol=1e-7)


def test_a_bfloat16_run_continues_in_float32():
    params, optimizer = make(torch.bfloat16, "split")
    take_steps(params, optimizer, range(6))
    y = [precision.wide(p, optimizer.state[p]) for p in params]
    optimizer.eval()
    others, other = make(torch.float32)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.train()
    for p, expected in zip(others, y, strict=True):
        assert torch.equal(p, expected)


# Through TrainingArguments


def test_the_trainer_reaches_it(tmp_path):
    from transformers import TrainingArguments

    registry.register_optimizers()
    for kind in ("adamw", "sgd", "radam"):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            optim=f"{kind}_schedulefree",
            optim_args="state_precision=stochastic",
            seed=11,
            use_cpu=True,
        )
        kwargs = registry.spec_for(args).kwargs(args)
        assert kwargs["state_precision"] == "stochastic" and kwargs["rounding_seed"] == 11
        assert CASES[kind].ours([nn.Parameter(torch.zeros(1))], **kwargs)
    args.optim_args = "state_precision=half"
    with pytest.raises(ValueError, match="state_precision"):
        registry.spec_for(args).kwargs(args)


@pytest.mark.parametrize("implementation", [None, "fused", "for-loop"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("how", ["the model is cast", "another precision"])
def test_state_that_is_kept_in_two_ways_is_never_stepped_as_if_it_were_one(how, first, implementation, caplog):
    """The compiled step takes all tensors of a column to be as wide as the first, and wrote beyond the others."""
    size, rest = 3000, 5000
    dtypes = [torch.bfloat16] * 2 if how == "another precision" else [torch.float32, torch.bfloat16]
    params = [nn.Parameter(torch.randn(size).to(dtype)) for dtype in dtypes]
    optimizer = AdamWScheduleFree(params if first == 0 else params[::-1], implementation=implementation)
    optimizer.train()
    narrow = params[1]
    for _ in range(3):
        for p in params if how == "the model is cast" else [narrow]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    beyond = torch.full((size + rest,), 7.0, dtype=torch.bfloat16)
    state = optimizer.state[narrow]
    state["z"] = beyond[:size].copy_(state["z"])
    if how == "another precision":
        optimizer.param_groups[0]["state_precision"] = "full"
    else:
        nn.ParameterList(params).to(torch.bfloat16)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert (beyond[size:] == 7.0).all()
    assert len({tuple(kept.dtype for kept in optimizer.state[p].values()) for p in params}) == 1
    assert "converted" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("park", ["copy", "residual"])
@pytest.mark.parametrize("state_precision", KEEPING)
def test_a_model_that_is_cast_to_float32_comes_back_from_a_save_at_x(state_precision, park):
    params, optimizer = make(state_precision=state_precision, implementation="fused", park=park)
    take_steps(params, optimizer, range(3))
    for p in params:
        p.grad, p.data = None, p.data.float()
    y = [p.detach().clone() for p in params]
    optimizer.eval()
    x = [p.detach().clone() for p in params]
    stored = copy.deepcopy(optimizer.state_dict())
    assert not optimizer.weights_replaced()
    for i, p in enumerate(params):
        sequences = read_sequences(stored["state"][i], stored["param_groups"][0], p.detach())
        torch.testing.assert_close(sequences.x.float(), x[i])
    optimizer.train()
    assert all(map(torch.equal, params, y)) and optimizer.param_groups[0]["k"] == 3


@pytest.mark.parametrize("implementation", [None, "fused", "foreach"])
@pytest.mark.parametrize("shows", ["step", "eval", "x_in_pieces"])
@pytest.mark.parametrize(
    "before, after",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_model_that_is_cast_takes_its_state_along(before, after, shows, implementation, caplog):
    p = nn.Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)).to(before))
    optimizer = AdamWScheduleFree([p], lr=0.01, implementation=implementation)
    optimizer.train()
    take_steps([p], optimizer, range(5))
    p.grad, p.data = None, p.data.to(after)
    z = optimizer.state[p]["z"].double()
    if shows == "x_in_pieces":
        optimizer.x_in_pieces()
        assert not optimizer.state[p].get("y_low", torch.zeros(1)).any()
    if shows == "step":
        take_steps([p], optimizer, range(5, 8))
    elif shows == "eval":
        optimizer.eval()
        x = averaging.x_from_y(optimizer.state[p]["y"].double() if "y" in optimizer.state[p] else p.double(), z, 0.9)
        if "y" in optimizer.state[p]:
            torch.testing.assert_close(p.double(), x, rtol=0.01, atol=0.001)
        optimizer.train()
    else:
        ((_, averaged),) = optimizer.x_in_pieces()
        found = torch.empty_like(p)
        averaged.read(0, found)
        torch.testing.assert_close(found.double(), averaging.x_from_y(p.double(), z, 0.9), rtol=0.01, atol=0.001)
    fresh = AdamWScheduleFree([nn.Parameter(p.detach().clone())])
    fresh.init_state()
    (like,) = fresh.state.values()
    assert {k: t.dtype for k, t in optimizer.state[p].items()} == {k: t.dtype for k, t in like.items() if k != "y"}
    assert "converted" in caplog.text and p.isfinite().all()
