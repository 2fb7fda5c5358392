"""The step for half-precision parameters: y, z, v to float32, the update that all share, and back to storage."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_schedulefree.optim import kernels, precision, sharding
from hf_schedulefree.optim.kernels import Implementation, torch_ops
from hf_schedulefree.optim.kernels.numbers import DenseRow, StepNumbers
from hf_schedulefree.optim.precision import Y_LOW, RandomKey, Storage, Words

# Elements that are in float32 at a time: small enough for the caches of a CPU, large enough to fill a GPU.
_SLICE_ELEMENTS = {"cpu": 2**17}
_SLICE_ELEMENTS_ON_DEVICE = 2**24


class HalfRow(NamedTuple):
    """One parameter at one step.

    Args:
        p: y, bfloat16 or float16, of any strides; of a `DTensor`, each process steps its shard.
        grad: in the shape of `p`; it is not changed.
        state: `z`, and what `storage` and the direction need of `y_low` and `exp_avg_sq`.
        storage: how these are kept.
        key: of the random numbers.
    """

    p: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    storage: Storage
    key: RandomKey


def step_(rows: Sequence[HalfRow], numbers: StepNumbers, implementation: Implementation | None = None) -> None:
    """One step in place for many parameters, from y_t, z_t, v_t to those of t + 1.

    In one pass over memory where a kernel is at hand and the tensors allow, unless `implementation` is "for-loop" or
    "foreach"; else slice by slice with torch's operations, which round with the same random numbers.
    """
    buckets: dict[tuple[torch.device, torch.dtype, Storage], list[tuple[HalfRow, DenseRow, Tensor]]] = {}
    for row in rows:
        local = _dense(row, numbers.direction.beta2 is not None) if implementation in (None, "fused") else None
        if local is None:
            _step_in_slices(row, numbers)
        else:
            tensors, grad = local
            buckets.setdefault((grad.device, grad.dtype, row.storage), []).append((row, tensors, grad))
    for (device, dtype, _), bucket in buckets.items():
        kernel = kernels.kernel_for(device, dtype)
        if kernel is not None:
            ready = kernel([tensors for _, tensors, _ in bucket])
            ready([[grad.data_ptr() for *_, grad in bucket]], numbers.on(device))
        else:
            for row, *_ in bucket:
                _step_in_slices(row, numbers)


def _dense(row: HalfRow, uses_v: bool) -> tuple[DenseRow, Tensor] | None:
    """The tensors of a row, and its gradient, if a kernel for its device and dtype could take them; else None."""
    p, grad, state, storage, key = row
    tensors = (p, state.get(Y_LOW), state["z"], state["exp_avg_sq"] if uses_v else None, grad)
    first = 0
    if type(p) not in kernels.PLAIN_TENSORS:
        tensors = tuple(None if t is None else sharding.local(t) for t in tensors)
        first = sharding.first_index(p)
    *kept, grad = tensors
    p, _, z, v = kept
    if first is None or grad.dtype is not p.dtype:
        return None
    # A kernel takes all rows of a storage to be kept as the first one is.
    if z.dtype is not storage.z or (v is not None and v.dtype is not storage.moments):
        return None
    tensors = [t for t in tensors if t is not None]
    if not all(t.is_contiguous() and t.device == p.device and t.shape == p.shape for t in tensors):
        return None
    if not all(map(kernels.is_in_memory, tensors)):
        return None
    if p.device.type == "cpu" and first >> 32 != (first + p.numel()) >> 32:
        return None
    return DenseRow(*kept, first, key), grad


def _step_in_slices(row: HalfRow, numbers: StepNumbers) -> None:
    p, grad, state, storage, random_key = row
    numbers = numbers.on(p.device)
    key = precision.rounding_key(random_key.seed, numbers.k, random_key.parameter)
    uses_v = numbers.direction.beta2 is not None
    names = ["z", *([Y_LOW] if storage.low_bits else []), *(["exp_avg_sq"] if uses_v else [])]
    for part, start in _slices({"p": p, "grad": grad, **{name: state[name] for name in names}}):
        y = precision.join(part["p"], part[Y_LOW]) if storage.low_bits else part["p"].float()
        z, v = part["z"].float(), [part["exp_avg_sq"].float()] if uses_v else []
        torch_ops.foreach_([y], [z], v, [part["grad"].float()], numbers)
        bits = _random_bits(p, key, start, y) if storage.is_random else None
        if storage.low_bits:
            high, low = precision.split(y, p.dtype)
            part["p"].copy_(high)
            part[Y_LOW].copy_(low)
        else:
            _store(part["p"], y, "y", bits)
        _store(part["z"], z, "z", bits)
        if uses_v:
            _store(part["exp_avg_sq"], v[0], "exp_avg_sq", bits)


def _store(kept: Tensor, value: Tensor, name: str, bits: Tensor | None) -> None:
    if kept.dtype == torch.float32:
        if kept is not value:  # `float()` gave the state itself
            kept.copy_(value)
    else:
        kept.copy_(precision.round_stochastically(value, kept.dtype, precision.bits_for(name, bits)))


def _random_bits(p: Tensor, key: tuple[Words, Words], start: int, values: Tensor) -> Tensor:
    """For the elements of this process's shard of `p` from `start` on, one for each of `values`."""
    first = sharding.first_index(p)
    if first is not None:
        return precision.random_bits_in_a_row(key, first + start, values.numel(), values.device).view(values.shape)
    index = sharding.global_index(p, start, start + values.numel())
    return precision.random_bits(key, index).view(values.shape)


def _slices(tensors: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Views of the tensors, a bounded number of elements at a time, and the place of the first."""
    tensors = {name: sharding.local(tensor) for name, tensor in tensors.items()}
    p = tensors["p"]
    if not all(tensor.is_contiguous() for name, tensor in tensors.items() if name != "grad"):
        yield tensors, 0
        return
    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    size = _SLICE_ELEMENTS.get(p.device.type, _SLICE_ELEMENTS_ON_DEVICE)
    for start in range(0, p.numel(), size):
        yield {name: tensor[start : start + size] for name, tensor in flat.items()}, start
