"""Parameters of which each process holds one shard (`DTensor`: FSDP2, tensor parallelism). Needs torch only."""

from collections.abc import Iterable

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a `DTensor`, sharing its memory; any other tensor as it is."""
    return tensor.detach().to_local() if _is_sharded(tensor) else tensor


def in_any_process(flag: bool, params: Iterable[Tensor]) -> bool:
    """Whether `flag` holds in any of the processes that share `params`; one small all-reduce per dimension of a mesh.

    All of these processes must call it. Without sharded parameters nothing is exchanged.
    """
    meshes = list(dict.fromkeys(p.device_mesh for p in params if _is_sharded(p)))
    for mesh in meshes:
        votes = torch.tensor(float(flag), device=mesh.device_type)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dimension))
        flag = bool(votes)
    return flag


def _is_sharded(tensor: Tensor) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # only where there may be one: the import takes a second

    return isinstance(tensor, DTensor)
