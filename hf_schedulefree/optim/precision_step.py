"""One step for a half-precision parameter: y, z, v to float32, the update that all share, and back to storage."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, directions, precision, sharding
from hf_schedulefree.optim.directions import Direction
from hf_schedulefree.optim.precision import Storage

# Elements that are in float32 at a time: small enough for the caches of a CPU, large enough to fill a GPU.
_SLICE_ELEMENTS = {"cpu": 2**17}
_SLICE_ELEMENTS_ON_DEVICE = 2**24


def step_(
    p: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    storage: Storage,
    *,
    direction: Direction,
    weight_decay: float,
    lr: float,
    beta: float,
    c: float,
    key: int,
) -> None:
    """One schedule-free step in place, from y_t (in `p`), z_t and v_t to those of t + 1.

    Args:
        p: the parameter, bfloat16 or float16, of any strides; of a `DTensor`, each process's shard makes its step.
        grad: the gradient, in the shape of `p`; it is not changed.
        state: `z`, and what `storage` and the direction need of `y_low` and `exp_avg_sq`.
        storage: how these are kept.
        direction: the base optimizer's numbers.
        weight_decay: taken at y.
        lr: the step's rate.
        beta: the interpolation factor between z and x.
        c: the weight of z_{t+1} in x_{t+1}.
        key: of the random numbers, from `precision.rounding_key`.
    """
    names = [
        "z",
        *([precision.Y_LOW] if storage.low_bits else []),
        *(["exp_avg_sq"] if direction.beta2 is not None else []),
    ]
    for part, index in _slices({"p": p, "grad": grad, **{name: state[name] for name in names}}, p):
        y = precision.join(part["p"], part[precision.Y_LOW]) if storage.low_bits else part["p"].float()
        z, g = part["z"].float(), part["grad"].float()
        v = [part["exp_avg_sq"].float()] if direction.beta2 is not None else []
        (d,) = directions.compute(direction, [g], v)
        if weight_decay != 0:
            d = d.add(y, alpha=weight_decay)
        averaging.update_([y], [z], [d], lr=lr, beta=beta, c=c)
        bits = precision.random_bits(key, index) if storage.is_random else None
        if storage.low_bits:
            high, low = precision.split(y, p.dtype)
            part["p"].copy_(high)
            part[precision.Y_LOW].copy_(low)
        else:
            _store(part["p"], y, "y", bits)
        _store(part["z"], z, "z", bits)
        if v:
            _store(part["exp_avg_sq"], v[0], "exp_avg_sq", bits)


def _store(kept: Tensor, value: Tensor, name: str, bits: Tensor | None) -> None:
    if kept.dtype == torch.float32:
        kept.copy_(value)
    else:
        kept.copy_(precision.round_stochastically(value, kept.dtype, precision.bits_for(name, bits)))


def _slices(tensors: dict[str, Tensor], p: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Views of the tensors, a bounded number of elements at a time, and the elements' global indices."""
    tensors = {name: sharding.local(tensor) for name, tensor in tensors.items()}
    shape = tensors["p"].shape
    count = tensors["p"].numel()
    if not all(tensor.is_contiguous() for name, tensor in tensors.items() if name != "grad"):
        yield tensors, sharding.global_index(p, 0, count).view(shape)
        return
    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    size = _SLICE_ELEMENTS.get(p.device.type, _SLICE_ELEMENTS_ON_DEVICE)
    for start in range(0, count, size):
        stop = min(start + size, count)
        part = {name: tensor[start:stop] for name, tensor in flat.items()}
        yield part, sharding.global_index(p, start, stop)
