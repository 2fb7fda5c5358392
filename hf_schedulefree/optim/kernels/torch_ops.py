"""The step from torch's own operations: any device, any dtype, no compiler."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, directions
from hf_schedulefree.optim.kernels.numbers import StepNumbers

# Elements of four tensors that a CPU's last cache holds (8 MiB in float32); of one launch on other devices.
_CACHED_ELEMENTS, _LAUNCHED_ELEMENTS = 2**19, 2**24


def foreach_(
    y: Sequence[Tensor], z: Sequence[Tensor], v: Sequence[Tensor], grads: Sequence[Tensor], numbers: StepNumbers
) -> None:
    """One step in place over lists of tensors, from multi-tensor operations; up to two temporaries per gradient."""
    d = directions.compute(numbers.direction, grads, v)
    if numbers.weight_decay != 0:  # decay is taken at y
        if d is grads:
            d = torch._foreach_add(grads, y, alpha=numbers.weight_decay)
        else:
            torch._foreach_add_(d, y, alpha=numbers.weight_decay)
    averaging.update_(y, z, d, lr=numbers.lr, beta=numbers.beta, c=numbers.c)


def fused_(
    y: Sequence[Tensor], z: Sequence[Tensor], v: Sequence[Tensor], grads: Sequence[Tensor], numbers: StepNumbers
) -> None:
    """One step in place over contiguous tensors, some elements at a time.

    x takes the place of y while torch's fused Adam moves z, without any temporary: its first moment is aliased to the
    gradient, at beta1 = 0 it is the gradient, and is written back unchanged; but an infinity, which makes a NaN of z,
    becomes one itself. Where d is the gradient, `foreach_` needs a temporary of so many elements for weight decay, and
    else none. Not for half precision, which x would be rounded to.
    """
    step_ = _by_fused_adam_ if numbers.direction.normalizes else foreach_
    columns = [y, z, v, grads] if v else [y, z, grads]
    for parts in _parts(columns, _CACHED_ELEMENTS if y[0].is_cpu else _LAUNCHED_ELEMENTS):
        step_(*parts[:2], parts[2] if v else [], parts[-1], numbers)


def _parts(columns: Sequence[Sequence[Tensor]], at_once: int) -> Iterator[list[list[Tensor]]]:
    """The same lists again, with some elements of each at a time: on CPU several passes then read memory once."""
    parts: list[list[Tensor]] = [[] for _ in columns]
    elements = 0
    for tensors in zip(*columns, strict=True):
        size = tensors[0].numel()
        slices = [tensors]
        if size > at_once:
            slices = zip(*(tensor.view(-1).split(at_once) for tensor in tensors), strict=True)
            size = at_once
        for some in slices:
            if elements and elements + size > at_once:
                yield parts
                parts, elements = [[] for _ in columns], 0
            for part, tensor in zip(parts, some, strict=True):
                part.append(tensor)
            elements += size
    yield parts


def _by_fused_adam_(
    y: Sequence[Tensor], z: Sequence[Tensor], v: Sequence[Tensor], grads: Sequence[Tensor], numbers: StepNumbers
) -> None:
    lr, beta, c, weight_decay, direction, _ = numbers
    torch._foreach_lerp_(y, z, 1 - 1 / beta)  # y holds x
    if weight_decay != 0:  # -lr * weight_decay * y, with y = (1 - beta) z + beta x
        torch._foreach_mul_(z, 1 - lr * weight_decay * (1 - beta))
        torch._foreach_add_(z, y, alpha=-lr * weight_decay * beta)
    k = torch.tensor(float(direction.steps), dtype=torch.float32, device=z[0].device)  # whatever the default dtype is
    torch._fused_adamw_(
        z,
        grads,
        grads,
        v,
        [],
        [k] * len(z),
        lr=lr,
        beta1=0.0,
        beta2=direction.beta2,
        weight_decay=0.0,
        eps=direction.eps,
        amsgrad=False,
        maximize=False,
    )
    torch._foreach_lerp_(y, z, 1 - beta * (1 - c))
