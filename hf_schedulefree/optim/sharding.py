"""Parameters of which each process holds one shard (`DTensor`: FSDP2, tensor parallelism). Needs torch only."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a `DTensor`, sharing its memory; any other tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def placed_as(parameter: Tensor, grad: Tensor) -> Tensor:
    """A gradient spread over the processes as its parameter is; all of these must call it.

    Autograd may leave a gradient as summands, one in each process (`Partial`): those of norms in sequence parallelism.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None or getattr(grad, "placements", placements) == placements:
        return grad
    return grad.redistribute(parameter.device_mesh, placements)


def in_any_process(flag: bool, params: Iterable[Tensor]) -> bool:
    """Whether `flag` holds in any of the processes that share `params`; one small all-reduce per dimension of a mesh.

    All of these processes must call it. Without sharded parameters nothing is exchanged.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    meshes = list(dict.fromkeys(p.device_mesh for p in params if is_sharded(p)))
    for mesh in meshes:
        votes = torch.tensor(float(flag), device=mesh.device_type)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dimension))
        flag = bool(votes)
    return flag


def first_index(parameter: Tensor) -> int | None:
    """The position, in the whole parameter in row-major order, of the first element of this process's shard.

    None if the shard's elements do not follow each other there.
    """
    if not is_sharded(parameter):
        return 0
    shape, offset = _placed(parameter)
    if any(size != whole for size, whole in zip(shape[1:], parameter.shape[1:], strict=True)):
        return None
    return offset[0] * math.prod(shape[1:]) if shape else 0


def _placed(parameter: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and global offset of this process's shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)


def global_index(parameter: Tensor, start: int, stop: int) -> Tensor:
    """The positions, in the whole parameter in row-major order, of elements start..stop of this process's shard."""
    index = torch.arange(start, stop, device=local(parameter).device)
    if not is_sharded(parameter):
        return index
    shape, offset = _placed(parameter)
    position = torch.zeros_like(index)
    stride = 1
    for size, local_size, first in reversed(list(zip(parameter.shape, shape, offset, strict=True))):
        position += (index % local_size + first) * stride
        index //= local_size
        stride *= size
    return position


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # only where there may be one: the import takes a second

    return isinstance(tensor, DTensor)
