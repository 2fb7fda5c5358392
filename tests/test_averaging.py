"""averaging.py against the literal three sequences of tests/reference.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Reference, Sequences

from hf_schedulefree.optim import averaging

unit = st.floats(0.01, 0.99)


def test_warm_up_is_linear_and_then_over():
    assert [averaging.warmup_factor(k, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert averaging.warmup_factor(0, 0) == 1.0


def test_equal_weights_make_x_the_mean_of_z():
    weight_sum, cs = 0.0, []
    for k in range(5):
        c, weight_sum = averaging.averaging_weight(k, 0.1, 0.0, 2.0, weight_sum)
        cs.append(c)
    assert cs == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_weights_grow_with_r_and_with_the_rate():
    c, _ = averaging.averaging_weight(4, 0.5, 2.0, 3.0, 10.0)
    assert c == pytest.approx(5**2 * 0.5**3 / (10 + 5**2 * 0.5**3))


def test_a_rate_of_zero_leaves_x_where_it_is():
    assert averaging.averaging_weight(0, 0.0, 0.0, 2.0, 0.0) == (0.0, 0.0)


@given(beta=unit, scale=st.floats(1e-3, 1e3))
def test_x_and_y_are_inverse_in_float64(beta, scale):
    y, z = torch.randn(2, 50, dtype=torch.float64) * scale
    x = averaging.x_from_y(y, z, beta)
    torch.testing.assert_close((1 - beta) * z + beta * x, y)
    torch.testing.assert_close(averaging.y_from_x(x, z, beta), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    y, z = torch.randn(2, 1000).to(dtype)
    expected = (y.float() + (z.float() - y.float()) * (1 - 1 / 0.9)).to(dtype)
    assert torch.equal(averaging.x_from_y(y, z, 0.9), expected)


def test_x_uses_no_fused_multiply_add():
    y, z = torch.randn(2, 10_000)
    separate = torch.tensor([])
    weight = torch.tensor(1 - 1 / 0.9)
    for part_y, part_z in zip(y.split(100), z.split(100), strict=True):
        separate = torch.cat([separate, part_y + (part_z - part_y) * weight])
    assert torch.equal(averaging.x_from_y(y, z, 0.9), separate)


@given(beta=unit, lr=st.floats(0.0, 2.0), r=st.floats(0, 2), power=st.floats(0, 3), warmup=st.integers(0, 6))
def test_updates_follow_the_three_sequences(beta, lr, r, power, warmup):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, dtype=torch.float64, generator=generator)
    reference = Reference("sgd", [Sequences(start)], lr, beta, warmup_steps=warmup, r=r, weight_lr_power=power)
    y, z = start.clone(), start.clone()
    lr_max, weight_sum = -1.0, 0.0
    for k in range(10):
        g = torch.randn(7, dtype=torch.float64, generator=generator)
        rate = lr * averaging.warmup_factor(k, warmup)
        lr_max = max(lr_max, rate)
        c, weight_sum = averaging.averaging_weight(k, lr_max, r, power, weight_sum)
        averaging.update_([y], [z], [g], lr=rate, beta=beta, c=c)
        reference.step([g])
    expected = reference.parameters[0]
    torch.testing.assert_close(y, expected.y)
    torch.testing.assert_close(z, expected.z)
    torch.testing.assert_close(averaging.x_from_y(y, z, beta), expected.x, rtol=1e-6, atol=1e-6 / beta)
    assert math.isfinite(weight_sum)
