"""The code that `one_pass_cuda` launches, in Triton: one pass over y, z, v and the gradient, nothing allocated.

The arithmetic is that of `one_pass_cpu` and `one_pass_half_cpu`, operation by operation, each correctly rounded (square
root and division, too; the host forbids fused multiply-adds). So a GPU gives the bits that a CPU gives. The storage of
half-precision state and the random numbers are those of `precision`.

`table`, int64, holds what changes with the tensors: the number of rows, then `COLUMNS` one after the other. `numbers`,
float64, holds what changes from step to step, in the order of `NUMBERS`. No other argument does, so that nothing is
compiled anew, and a captured launch follows the two tensors.
"""

import triton
import triton.language as tl

from hf_schedulefree.optim import precision

COLUMNS = ("chunks", "elements", "aligned", "y", "y_low", "z", "v", "gradient", "first", "seed", "parameter")
NUMBERS = ("lr", "a", "c", "weight_decay", "beta2", "rest2", "scale", "eps", "normalizes", "k")

_INDEX_LOWER, _INDEX_UPPER = map(tl.constexpr, precision.INDEX_MULTIPLIERS)
_FIRST, _SECOND, _THIRD, _FOURTH = map(tl.constexpr, precision.MULTIPLIERS)
_SPLITMIX_0, _SPLITMIX_1, _SPLITMIX_2 = map(tl.constexpr, precision.SPLITMIX)

# 1.5 * 2^23: added and taken away again, it rounds a float32 below 2^22 to a whole number, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


# Random numbers: as `precision.rounding_key`, `random_bits` and `bits_for`.


@triton.jit
def _absorb(key, word):
    key = key + word.to(tl.uint64) + tl.full((), _SPLITMIX_0, tl.uint64)
    key = (key ^ (key >> 30)) * tl.full((), _SPLITMIX_1, tl.uint64)
    key = (key ^ (key >> 27)) * tl.full((), _SPLITMIX_2, tl.uint64)
    return key ^ (key >> 31)


@triton.jit
def _random(h, key):
    h = (h ^ (h >> 16)) * tl.full((), _FIRST, tl.uint32)
    h = (h ^ (h >> 15) ^ key) * tl.full((), _SECOND, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _bits_for_y(random):
    random = random * tl.full((), _THIRD, tl.uint32)
    return ((random ^ (random >> 15)) * tl.full((), _FOURTH, tl.uint32)) >> 16


# Storage. `value` is float32; `bits` are 16 random ones; a `kind` is the dtype in which something is kept.


@triton.jit
def _half_unit_exponent(value):
    """The exponent of a float16's unit in the last place, + 150, for the float16 in `value`."""
    exponent = (value.to(tl.uint32, bitcast=True) >> 23) & 0xFF
    return tl.minimum(tl.maximum(exponent, 113), 142)


@triton.jit
def _join(high, low, kind: tl.constexpr):
    """As `precision.join`: `high` as it is kept, `low` int16."""
    if kind == tl.bfloat16:
        bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
        value = (bits + low.to(tl.int32)).to(tl.float32, bitcast=True)
        return tl.where(value == value, value, bits.to(tl.float32, bitcast=True))
    else:
        value = high.to(tl.float32)
        unit = ((_half_unit_exponent(value) - 25) << 23).to(tl.float32, bitcast=True)
        return low.to(tl.float32) * unit + value


@triton.jit
def _split(value, kind: tl.constexpr):
    """As `precision.split`."""
    number = value == value
    if kind == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        high = ((bits + 0x8000) >> 16).to(tl.int16)
        high = tl.where(number, high, tl.full((), 0x7FC0, tl.int16)).to(tl.bfloat16, bitcast=True)
        return high, tl.where(number, bits, 0).to(tl.int16)
    else:
        high = value.to(tl.float16)
        shown = high.to(tl.float32)
        per_unit = ((279 - _half_unit_exponent(shown)) << 23).to(tl.float32, bitcast=True)
        low = (value - shown) * per_unit
        low = tl.where(tl.abs(shown) < float("inf"), low, 0.0)
        return high, ((low + _ROUNDER) - _ROUNDER).to(tl.int16)


@triton.jit
def _round_stochastically(value, kind: tl.constexpr, random):
    """As `precision.round_stochastically`."""
    bits = value.to(tl.uint32, bitcast=True)
    if kind == tl.bfloat16:
        # An infinity has no bits below the cut, and keeps its own.
        cut = ((bits + random) >> 16).to(tl.uint16)
        return tl.where(value == value, cut, tl.full((), 0x7FC0, tl.uint16)).to(tl.bfloat16, bitcast=True)
    else:
        exponent = ((bits >> 23) & 0xFF).to(tl.int32)
        significand = (bits & 0x7FFFFF) + tl.where(exponent > 0, 0x800000, 0).to(tl.uint32)
        unit = tl.maximum(exponent, 113)
        cut = (tl.minimum(unit - exponent, 27) + 13).to(tl.uint64)
        whole = (significand.to(tl.uint64) + ((random.to(tl.uint64) << cut) >> 16)) >> cut
        unit_value = (tl.minimum(unit - 10, 254) << 23).to(tl.float32, bitcast=True)
        rounded = whole.to(tl.int32).to(tl.float32) * unit_value
        rounded = (rounded.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(value) < float("inf"), rounded, value).to(tl.float16)


@triton.jit
def _kept(value, kind: tl.constexpr, random, STOCHASTIC: tl.constexpr):
    if STOCHASTIC and (kind == tl.bfloat16 or kind == tl.float16):
        return _round_stochastically(value, kind, random)
    elif kind == tl.bfloat16:  # to nearest, ties to even; a NaN as on CPU
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(value == value, rounded, tl.full((), 0x7FC0, tl.uint16)).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(kind)


# Memory


@triton.jit
def _load(pointer, offset, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + offset, mask=inside, other=0)
    else:
        return tl.load(pointer + offset)


@triton.jit
def _store(pointer, offset, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offset, value, mask=inside)
    else:
        tl.store(pointer + offset, value)


@triton.jit
def _pointer(address, start, kind: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(kind)) + start
    if ALIGNED:  # without this promise, loads would take one element at a time
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _square_root(value, REAL: tl.constexpr):
    if REAL == tl.float32:
        return tl.sqrt_rn(value)
    else:
        return tl.sqrt(value)


@triton.jit
def _quotient(a, b, REAL: tl.constexpr):
    if REAL == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _elements(
    y_address,
    y_low_address,
    z_address,
    v_address,
    gradient_address,
    start,
    low,
    high,
    first,
    key,
    numbers,
    P: tl.constexpr,
    Z: tl.constexpr,
    V: tl.constexpr,
    REAL: tl.constexpr,
    LOW_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_V: tl.constexpr,
    STEP: tl.constexpr,
    FAST: tl.constexpr,
):
    """Elements start + low to start + high of one row. FAST: whole blocks, aligned, hence moved 16 bytes at a time."""
    lr = tl.load(numbers).to(REAL)
    a = tl.load(numbers + 1).to(REAL)
    c = tl.load(numbers + 2).to(REAL)
    weight_decay = tl.load(numbers + 3).to(REAL)
    beta2 = tl.load(numbers + 4).to(REAL)
    rest2 = tl.load(numbers + 5).to(REAL)
    scale = tl.load(numbers + 6).to(REAL)
    eps = tl.load(numbers + 7).to(REAL)
    normalizes = tl.load(numbers + 8) != 0
    y_pointer = _pointer(y_address, start, P, FAST)
    y_low_pointer = _pointer(y_low_address, start, tl.int16, FAST)
    z_pointer = _pointer(z_address, start, Z, FAST)
    v_pointer = _pointer(v_address, start, V, FAST)
    gradient_pointer = _pointer(gradient_address, start, P, FAST)
    lanes = tl.arange(0, STEP)
    for begin in range(low, high, STEP):
        offset = begin + lanes
        inside = offset < high
        y_kept = _load(y_pointer, offset, inside, not FAST)
        z = _load(z_pointer, offset, inside, not FAST).to(REAL)
        d = _load(gradient_pointer, offset, inside, not FAST).to(REAL)
        if LOW_BITS:
            y = _join(y_kept, _load(y_low_pointer, offset, inside, not FAST), P)
        else:
            y = y_kept.to(REAL)
        random = tl.zeros((STEP,), tl.uint32)
        if STOCHASTIC:
            index = (first + start + begin).to(tl.uint64)
            lower = index.to(tl.uint32)
            lanes_lower = lower + lanes.to(tl.uint32)
            upper = (index >> 32).to(tl.uint32) + (lanes_lower < lower).to(tl.uint32)
            h = lanes_lower * tl.full((), _INDEX_LOWER, tl.uint32) + upper * tl.full((), _INDEX_UPPER, tl.uint32)
            random = _random(h + key.to(tl.uint32), (key >> 32).to(tl.uint32))
        if HAS_V:
            v = beta2 * _load(v_pointer, offset, inside, not FAST).to(REAL) + rest2 * (d * d)
            _store(v_pointer, offset, _kept(v, V, random >> 16, STOCHASTIC), inside, not FAST)
            d = tl.where(normalizes, _quotient(d, _square_root(v * scale, REAL) + eps, REAL), d)
        d = d + weight_decay * y
        _store(z_pointer, offset, _kept(z - lr * d, Z, random & 0xFFFF, STOCHASTIC), inside, not FAST)
        y = y + c * (z - y) + a * d
        if LOW_BITS:
            y_kept, y_low = _split(y, P)
            _store(y_low_pointer, offset, y_low, inside, not FAST)
        else:
            y_kept = _kept(y, P, _bits_for_y(random), STOCHASTIC)
        _store(y_pointer, offset, y_kept, inside, not FAST)


@triton.jit
def step(
    table,
    numbers,
    P: tl.constexpr,
    Z: tl.constexpr,
    V: tl.constexpr,
    REAL: tl.constexpr,
    LOW_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_V: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
):
    """One chunk of one row of the table.

    Args:
        table: see the head of this file. `chunks`: those of this row and of all rows before it; `aligned`: whether all
            addresses are multiples of 16; `first`: the global index of a row's first element; `seed`, `parameter`: of
            `precision.rounding_key`.
        numbers: see the head of this file.
        P: the dtype of the parameters and gradients.
        Z: the dtype of z.
        V: the dtype of v.
        REAL: the dtype of the arithmetic.
        LOW_BITS: whether y is continued in `y_low`.
        STOCHASTIC: whether half precision without low bits is rounded stochastically.
        HAS_V: whether there is a v.
        PART: the elements of a chunk.
        STEP: the elements that are computed at a time.
    """
    chunk = tl.program_id(0).to(tl.int64)
    rows = tl.load(table)
    columns = table + 1
    row = rows * 0
    last = rows - 1
    while row < last:  # the first row with more chunks than this one's number
        middle = (row + last) // 2
        is_later = tl.load(columns + middle) <= chunk
        row = tl.where(is_later, middle + 1, row)
        last = tl.where(is_later, last, middle)
    column = columns + row
    elements = tl.load(column + rows)
    aligned = tl.load(column + 2 * rows)
    y = tl.load(column + 3 * rows)
    y_low = tl.load(column + 4 * rows)
    z = tl.load(column + 5 * rows)
    v = tl.load(column + 6 * rows)
    gradient = tl.load(column + 7 * rows)
    first = tl.load(column + 8 * rows)
    key = tl.zeros((), tl.uint64)
    if STOCHASTIC:
        key = _absorb(key, tl.load(column + 9 * rows))
        key = _absorb(key, tl.load(numbers + 9).to(tl.int64))
        key = _absorb(key, tl.load(column + 10 * rows))
    start = (chunk - tl.load(column) + (elements + PART - 1) // PART) * PART
    count = tl.minimum(elements - start, PART).to(tl.int32)
    whole = tl.where(aligned != 0, count // STEP * STEP, 0)
    _elements(
        y, y_low, z, v, gradient, start, 0, whole, first, key, numbers, P, Z, V, REAL, LOW_BITS, STOCHASTIC, HAS_V,
        STEP, True,
    )  # fmt: skip
    _elements(
        y, y_low, z, v, gradient, start, whole, count, first, key, numbers, P, Z, V, REAL, LOW_BITS, STOCHASTIC, HAS_V,
        STEP, False,
    )  # fmt: skip
