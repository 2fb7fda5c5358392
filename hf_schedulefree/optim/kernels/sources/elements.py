"""What all loops share: the job and its rows, arithmetic in 32 bits, bfloat16, how a number is extrapolated."""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_schedulefree.optim.kernels import machine_code
from hf_schedulefree.optim.kernels.jobs import (
    AT_ONCE,
    CACHE_LINE,
    COUNTED,
    EXTRA,
    LEFT,
    NEXT,
    NUMBERS,
    READY,
    ROWS,
    SLOTS,
    TABLE,
)

# How often a thread looks whether there are more rows before it leaves: for longer than they take to come (a
# millisecond), and not as long as the calling thread may be kept from its work by others.
_LOOKS = 2**15


@intrinsic
def pointer(typing_context, address):
    """An integer as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _fetch_add(typing_context, address, amount):
    """Add to the int64 at an address, as one operation among all threads; returns the former value."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], cgutils.intp_t.as_pointer())
        return builder.atomic_rmw("add", place, args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _read(typing_context, address):
    """The int64 at an address, which other threads write to: after it, what they wrote before it is seen."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], cgutils.intp_t.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _replace(typing_context, address, former, new):
    """Write to the int64 at an address if it is still the former one, as one operation; returns whether it was."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], cgutils.intp_t.as_pointer())
        return builder.extract_value(builder.cmpxchg(place, args[1], args[2], "monotonic"), 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def _pause(typing_context):
    """What processors are told in a loop that waits for another thread, which may share one with this."""

    def generate(context, builder, signature, args):
        if machine_code.AVAILABLE:
            pause = builder.module.declare_intrinsic("llvm.x86.sse2.pause", [], ir.FunctionType(ir.VoidType(), []))
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def stack(typing_context, elements):
    """The address of memory for so many elements (a constant) of 8 bytes, all 0, until the worker returns."""
    if not isinstance(elements, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, args):
        place = cgutils.alloca_once(builder, cgutils.intp_t, size=elements.literal_value, zfill=True)
        return builder.ptrtoint(place, cgutils.intp_t)

    return types.int64(elements), generate


_LINE = ir.VectorType(cgutils.intp_t, CACHE_LINE // 8)


@intrinsic
def write_past_caches(typing_context, source, target):
    """Copy a cache line to an address that is written to, and not read, in the near future; both are aligned.

    Other threads see it after the next atomic operation of this one: a worker ends with such, in `take_rows`.
    """

    def generate(context, builder, signature, args):
        source, target = (builder.inttoptr(address, _LINE.as_pointer()) for address in args)
        written = builder.store(builder.load(source, align=CACHE_LINE), target, align=CACHE_LINE)
        one = ir.Constant(cgutils.int32_t, 1)
        written.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@njit
def rows_and_numbers(job, columns, numbers):
    """The table (int64) and the plain numbers (float64) that a job was started with."""
    slots = carray(pointer(job), SLOTS, np.int64)
    table = carray(pointer(slots[TABLE]), (slots[ROWS], columns), np.int64)
    return table, carray(pointer(slots[NUMBERS]), numbers, np.float64)


@njit
def take_rows(job):
    """The next rows (first, last) for the calling thread; first = last when all are taken, or no more get ready."""
    at_once = carray(pointer(job), SLOTS, np.int64)[AT_ONCE]
    looks = 0
    while looks < _LOOKS:
        ready, rows, first = _read(job + 8 * READY), _read(job + 8 * ROWS), _read(job + 8 * NEXT)
        if first < ready:
            last = min(first + at_once, ready)
            if _replace(job + 8 * NEXT, first, last):
                return first, last
        elif ready >= rows:
            _fetch_add(job + 8 * NEXT, 1)
            return first, first
        else:
            looks += 1
            _pause()
    _fetch_add(job + 8 * LEFT, 1)
    return looks, looks


@njit
def count(job, amount):
    """Add to what the job counts; returns the former value."""
    return _fetch_add(job + 8 * COUNTED, amount)


@njit
def extra(job):
    """The address that the job was started with."""
    return carray(pointer(job), SLOTS, np.int64)[EXTRA]


# Arithmetic in 32 bits. numba's own operators widen to 64, and a loop then takes half as many elements at a time.


def _in_32_bits(instruction: str) -> Callable:
    @intrinsic
    def operation(typing_context, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return types.uint32(types.uint32, types.uint32), generate

    return operation


add, subtract, multiply = _in_32_bits("add"), _in_32_bits("sub"), _in_32_bits("mul")
both, either, merged = _in_32_bits("and_"), _in_32_bits("xor"), _in_32_bits("or_")
shift_left, shift_right, shift_right_signed = _in_32_bits("shl"), _in_32_bits("lshr"), _in_32_bits("ashr")


@intrinsic
def square_root(typing_context, value):
    """As IEEE 754 has it. Before 0.66, numba calls the C library for what `numpy.sqrt` says, one element at a time."""

    def generate(context, builder, signature, args):
        kind = args[0].type
        function = builder.module.declare_intrinsic("llvm.sqrt", [kind], ir.FunctionType(kind, [kind]))
        return builder.call(function, args)

    return value(value), generate


@njit(inline="always")
def bfloat16_to_float32(bits):
    return np.uint32(shift_left(bits, 16)).view(np.float32)


@njit(inline="always")
def float32_to_bfloat16(value):
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    rounded = shift_right(add(add(bits, 0x7FFF), both(shift_right(bits, 16), 1)), 16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


@njit(inline="always")
def joined(high, low):
    """As `precision.join`: a bfloat16 and the 16 bits that are missing in it, both as they are stored."""
    value = np.uint32(add(shift_left(high, 16), subtract(either(low, 0x8000), 0x8000))).view(np.float32)
    return value if value == value else bfloat16_to_float32(high)


@njit(inline="always")
def extrapolated(start, end, weight):
    """As `averaging`: x from (y, z) or y from (x, z)."""
    return (end - start) * weight + start


# The name of a dtype -> how numba sees its elements, and the type that is computed with.
TYPES = {
    "float32": (np.float32, np.float32),
    "float64": (np.float64, np.float64),
    "bfloat16": (np.uint16, np.float32),
}
