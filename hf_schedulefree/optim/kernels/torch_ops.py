"""The step from torch's own operations: any device, any dtype, no compiler."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, directions
from hf_schedulefree.optim.kernels.numbers import StepNumbers

# Elements of four tensors that a CPU's last cache holds (8 MiB in float32).
_CACHED_ELEMENTS = 2**19


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
    """One step in place over contiguous tensors without any temporary: x takes the place of y while torch's fused Adam
    moves z.

    Its first moment is aliased to the gradient: at beta1 = 0 it is the gradient, and is written back unchanged. Not for
    half precision, which x would be rounded to.
    """
    if not y[0].is_cpu:
        return _fused_(y, z, v, grads, numbers)
    columns = [y, z, v, grads] if v else [y, z, grads]
    for parts in _cached_parts(columns):
        _fused_(*parts[:2], parts[2] if v else [], parts[-1], numbers)


def _cached_parts(columns: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """The same lists again, with some elements of each at a time, so that three passes over them read memory once."""
    parts: list[list[Tensor]] = [[] for _ in columns]
    elements = 0
    for tensors in zip(*columns, strict=True):
        size = tensors[0].numel()
        slices = [tensors]
        if size > _CACHED_ELEMENTS:
            slices = zip(*(tensor.view(-1).split(_CACHED_ELEMENTS) for tensor in tensors), strict=True)
            size = _CACHED_ELEMENTS
        for some in slices:
            if elements and elements + size > _CACHED_ELEMENTS:
                yield parts
                parts, elements = [[] for _ in columns], 0
            for part, tensor in zip(parts, some, strict=True):
                part.append(tensor)
            elements += size
    yield parts


def _fused_(
    y: Sequence[Tensor], z: Sequence[Tensor], v: Sequence[Tensor], grads: Sequence[Tensor], numbers: StepNumbers
) -> None:
    lr, beta, c, weight_decay, direction, _ = numbers
    torch._foreach_lerp_(y, z, 1 - 1 / beta)  # y holds x
    if weight_decay != 0:  # -lr * weight_decay * y, with y = (1 - beta) z + beta x
        torch._foreach_mul_(z, 1 - lr * weight_decay * (1 - beta))
        torch._foreach_add_(z, y, alpha=-lr * weight_decay * beta)
    if direction.normalizes:
        k = torch.tensor(float(direction.steps), device=z[0].device)
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
    else:
        directions.compute(direction, grads, v)  # collects v; d is the gradient
        torch._foreach_add_(z, grads, alpha=-lr)
    torch._foreach_lerp_(y, z, 1 - beta * (1 - c))
