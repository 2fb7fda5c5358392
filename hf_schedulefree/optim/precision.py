"""How y, z and the moments of half-precision parameters are stored, so that small updates are not lost.

Schedule-free training adds c = 1/k of a small difference to y, and late in a run that is less than half a unit in the
last place of a bfloat16: rounded to nearest, y stands still and x = y + (1 - 1/beta)(z - y) is not the average any
more. Two things help, and this file holds both as pure functions:

- *low bits*: y is the parameter plus 16 further bits in the state (`y_low`), together an exact float32;
- *stochastic rounding*: a value is rounded up or down with the probability that makes it right on average.

All arithmetic of a step is done in float32, whatever the storage. The random numbers are a function of (seed, step,
parameter, element) alone, computed in wrapping 32-bit integers: the same on every device and for every sharding, and
without a draw from any of torch's generators.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, sharding
from hf_schedulefree.optim.averaging import Scalar

StatePrecision = Literal["split", "stochastic", "full", "parameter"]
STATE_PRECISIONS: tuple[StatePrecision, ...] = ("split", "stochastic", "full", "parameter")

# The state key of the 16 bits that continue the parameter.
Y_LOW = "y_low"

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Storage:
    """Where the state of one parameter is kept, if not all of it simply in the parameter's dtype.

    Args:
        low_bits: y is the parameter and `y_low`; otherwise it is the parameter, stochastically rounded.
        z: the dtype of z. A half-precision dtype is rounded stochastically.
        moments: as `z`, for the optimizer's other tensors.
    """

    low_bits: bool
    z: torch.dtype
    moments: torch.dtype

    @property
    def is_random(self) -> bool:
        """Whether anything is rounded stochastically."""
        return not self.low_bits or self.z in HALF_DTYPES or self.moments in HALF_DTYPES

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the state tensor `key`."""
        return torch.int16 if key == Y_LOW else self.z if key == "z" else self.moments


def storage_for(dtype: torch.dtype, state_precision: StatePrecision | None) -> Storage | None:
    """The storage for parameters of `dtype`; None: everything is kept, and computed, in the parameter's own dtype.

    The choice concerns half precision: float32 and float64 parameters always keep their own. The moments of float16
    parameters are kept in bfloat16, as squares of gradients leave the range of float16.
    """
    if dtype not in HALF_DTYPES or state_precision == "parameter":
        return None
    if state_precision == "full":
        return Storage(low_bits=True, z=torch.float32, moments=torch.float32)
    return Storage(low_bits=state_precision != "stochastic", z=dtype, moments=torch.bfloat16)


# Low bits


def split(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 `y` as a half-precision value, rounded to nearest, and the 16 bits that are missing in it.

    bfloat16 is the upper half of a float32, so (high + low) is the bit pattern itself: high = (bits + 0x8000) >> 16 is
    rounded (half away from zero), and low = bits - (high << 16) lies in [-0x8000, 0x7fff]. `join` is exact for all
    finite values. As with torch's own cast, a y within half a unit of 2^128 shows as infinity (and still joins to y).

    float16 has another exponent: low counts 2^-15 units in the last place of the rounded value. `join` is exact for
    2^-16 <= |y| < 65520, the bounds of float16 itself, and below that true to 2^-40.

    Returns:
        The parameter's value, of `dtype`, and `y_low`, int16, in the shape of `y`.
    """
    if dtype == torch.bfloat16:
        bits = _safe_bits(y)
        low = bits.to(torch.int16)  # their lower half, as a signed number
        return bits.add_(0x8000).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16), low
    rounded = y.to(dtype)
    low = (y - rounded.float()).div_(_half_low_unit(rounded)).round_()
    return rounded, torch.where(rounded.isfinite(), low, torch.zeros_like(low)).to(torch.int16)


def join(parameter: Tensor, low: Tensor) -> Tensor:
    """The float32 that `split` took apart, as a new tensor.

    Somebody may have written to the parameter since (a mask, a clamp). The bits are then still added: less than a unit
    in its last place. But a bfloat16 zero has nothing below it in its sign, so that half of them would make a NaN of
    it: it stays a zero, as an infinity stays one.
    """
    if parameter.dtype == torch.bfloat16:
        high = parameter.float()
        joined = high.view(torch.int32).add(low).view(torch.float32)
        return torch.where(joined.isnan(), high, joined)
    return low.float().mul_(_half_low_unit(parameter)).add_(parameter)


def usable(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A stored state without low bits that another package has cast, and without the parked y that needs them.

    `schedulefree` keeps what it does not know of a state, but torch casts it there to the parameter's dtype; what such
    bits continue may have been stepped since.
    """
    if Y_LOW not in state or not state[Y_LOW].is_floating_point():
        return state
    return {name: value for name, value in state.items() if name not in (Y_LOW, "y")}


def wide(y: Tensor, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """y with all that the state knows of it, in float32 or wider; of a `DTensor`, this process's shard.

    Args:
        y: the parameter in train mode, or the parked y.
        state: of the parameter; without it, y is what `y` holds.
    """
    y = sharding.local(y)
    if state and Y_LOW in state:
        joined = join(y, sharding.local(state[Y_LOW]))
        return torch.where(joined == 0, y.float(), joined) if y.dtype == torch.float16 else joined  # -0.0 is not 0.0
    return y.to(torch.promote_types(y.dtype, torch.float32))


def wide_x(y: Tensor, state: Mapping[str, Tensor], beta: float) -> Tensor:
    """The averaged weights in float32 or wider, from the y of `wide` and the z in the state."""
    return averaging.x_from_y(wide(y, state), sharding.local(state["z"]), beta)


def rounded_x(state: Mapping[str, Tensor], beta: float) -> Tensor:
    """The averaged weights as the parameter shows them: from the parked y, rounded once to the dtype of the model."""
    return wide_x(state["y"], state, beta).to(state["y"].dtype)


def store_y(value: Tensor, y: Tensor, state: Mapping[str, Tensor]) -> None:
    """Write a y of float32 or wider into the tensor `y`, rounded to nearest, and into `y_low` if the state has it."""
    if Y_LOW not in state:
        sharding.local(y).copy_(value)
        return
    high, low = split(value.float(), y.dtype)
    sharding.local(y).copy_(high)
    sharding.local(state[Y_LOW]).copy_(low)


def _half_low_unit(parameter: Tensor) -> Tensor:
    """2^-15 units in the last place of float16 values, as float32; subnormal values have the smallest normal's unit."""
    exponent = (parameter.float().view(torch.int32) >> 23) & 0xFF
    return exponent.clamp_(113, 142).sub_(10 + 15).bitwise_left_shift_(23).view(torch.float32)


# Stochastic rounding

_MASK64 = 2**64 - 1

# Odd numbers that spread the bits of a product; the first two are those of Wellons' "lowbias32" (public domain).
MULTIPLIERS = (0x7FEB352D, 0x846CA68B, 0x2C1B3C6D, 0x297A2D39)
INDEX_MULTIPLIERS = (0x9E3779B9, 0x85EBCA6B)
# The numbers of SplitMix64 (Steele, Lea, Flood 2014).
SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class RandomKey(NamedTuple):
    """What the random numbers of one parameter follow from, besides the step: see `rounding_key`."""

    seed: int
    parameter: int


# Bits as a whole number, or those of each element of a tensor.
Words = int | Tensor


def rounding_key(seed: int, step: Scalar, parameter: int) -> tuple[Words, Words]:
    """The key of one parameter's random numbers at one step: twice 32 bits.

    Args:
        seed: of the run.
        step: finished steps, `k` of the group.
        parameter: its position among all parameters of the optimizer.

    Returns:
        The lower and the upper half; tensors if `step` is one.
    """
    # The sums and products of int64 tensors wrap by themselves.
    step = step.to(torch.int64) if isinstance(step, Tensor) else int(step)
    key = 0
    for word in (seed, step, parameter):  # SplitMix64, absorbing a word at a time
        key = wrapped(key + word + _signed(SPLITMIX[0], 64))
        key = wrapped((key ^ _shifted(key, 30, 64)) * _signed(SPLITMIX[1], 64))
        key = wrapped((key ^ _shifted(key, 27, 64)) * _signed(SPLITMIX[2], 64))
        key = key ^ _shifted(key, 31, 64)
    return key & 0xFFFFFFFF, _shifted(key, 32, 64)


def random_bits(key: tuple[int, int], index: Tensor) -> Tensor:
    """32 random bits for each element, as int32: a function of the key and the element's global index (int64).

    With i the lower and j the upper half of the index, all in wrapping 32-bit integers:

        h = i m_0 + j m_1 + key_0;   h = (h ^ h >> 16) M_0;   h = (h ^ h >> 15 ^ key_1) M_1;   h = h ^ h >> 16
    """
    first, second = map(_signed, INDEX_MULTIPLIERS)
    upper = (index >> 32).to(torch.int32)
    return _mixed(index.to(torch.int32).mul_(first).add_(upper.mul_(second)).add_(_signed(key[0])), key[1])


def random_bits_in_a_row(key: tuple[Words, Words], first: int, count: int, device: torch.device) -> Tensor:
    """The same for `count` elements whose indices follow each other, from `first` on; several times faster."""
    if first >> 32 != (first + count) >> 32:
        return random_bits(key, torch.arange(first, first + count, device=device))
    is_kept = device.type == "cpu" and count <= _KEPT_MULTIPLES
    multiples = _kept_multiples()[:count] if is_kept else _multiples(count, device)
    return _mixed(multiples + _signed(_first_hash(key, first)), key[1])


def _multiples(count: int, device: torch.device) -> Tensor:
    """Those of the index's first multiplier."""
    return torch.arange(count, dtype=torch.int32, device=device).mul_(_signed(INDEX_MULTIPLIERS[0]))


_KEPT_MULTIPLES = 2**17


@functools.cache
def _kept_multiples() -> Tensor:
    return _multiples(_KEPT_MULTIPLES, torch.device("cpu"))


def _mixed(bits: Tensor, key: Words) -> Tensor:
    bits = bits.bitwise_xor_(_shifted(bits, 16)).mul_(_signed(MULTIPLIERS[0]))
    bits = bits.bitwise_xor_(_shifted(bits, 15)).bitwise_xor_(_signed(key)).mul_(_signed(MULTIPLIERS[1]))
    return bits.bitwise_xor_(_shifted(bits, 16))


def _first_hash(key: tuple[int, int], index: int) -> int:
    """The h that `random_bits` begins with, for one element."""
    lower, upper = INDEX_MULTIPLIERS
    return ((index & 0xFFFFFFFF) * lower + (index >> 32) * upper + key[0]) & 0xFFFFFFFF


def bits_for(name: str, bits: Tensor) -> Tensor:
    """The 16 random bits that round the tensor `name`: int32 in [0, 2^16), from an element's `random_bits`.

    z takes the lower half, the moments the upper, and y the upper half of one more round.
    """
    if name == "z":
        return bits & 0xFFFF
    if name == "y":
        bits = bits * _signed(MULTIPLIERS[2])
        bits = bits.bitwise_xor_(_shifted(bits, 15)).mul_(_signed(MULTIPLIERS[3]))
    return _shifted(bits, 16)


def wrapped(number: Words) -> Words:
    """The lower 64 bits as a signed number; int64 tensors have no others."""
    return _signed(number & _MASK64, 64) if isinstance(number, int) else number


def _signed(bits: int | Tensor, width: int = 32) -> int | Tensor:
    """Unsigned bits as the signed number with the same ones."""
    if isinstance(bits, Tensor):
        return bits.to({32: torch.int32, 64: torch.int64}[width])
    return bits - 2**width if bits >= 2 ** (width - 1) else bits


def _shifted(bits: int | Tensor, by: int, width: int = 32) -> int | Tensor:
    """An unsigned shift to the right."""
    shifted = bits >> by
    shifted &= 2 ** (width - by) - 1
    return shifted


def round_stochastically(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round float32 to half precision, up with the probability that the value's distance from below has.

    Args:
        value: float32.
        dtype: bfloat16 or float16.
        random: uniform in [0, 2^16), int32, in the shape of `value`.

    Returns:
        A tensor of `dtype`, equal to `value` on average (to 2^-17 units in the last place); values that `dtype` can
        hold, infinities and NaN stay what they are.
    """
    if dtype == torch.bfloat16:  # the upper half of the bits: add below them, and cut off
        return _safe_bits(value).add_(random).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    # 13 bits are cut off, and one more for each power of two below the smallest normal value, 2^-14
    bits = value.view(torch.int32)
    exponent = ((bits >> 23) & 0xFF).to(torch.int64)
    significand = (bits & 0x7FFFFF).to(torch.int64).add_((exponent > 0) * 0x800000)
    unit = exponent.clamp(min=113)
    cut = (unit - exponent).clamp_(max=27).add_(13)
    random = (random.to(torch.int64) << cut) >> 16
    whole = ((significand + random) >> cut).float()
    unit_value = (unit - 10).clamp_(max=254).bitwise_left_shift_(23).to(torch.int32).view(torch.float32)
    rounded = (whole * unit_value).copysign_(value).to(torch.float16)
    return torch.where(value.isfinite(), rounded, value.to(dtype))


def _safe_bits(value: Tensor) -> Tensor:
    """The bits of float32 values, safe to add up to 2^16 - 1 to: every NaN is the usual one, and does not overflow."""
    return value.nan_to_num(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
