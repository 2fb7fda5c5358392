"""`DeferredTensor`: stands in a state dict for a tensor that is made only when it is needed.

Where processes share a model, its whole tensors exist nowhere. A state dict of these goes through any `save_pretrained`
as if it held them; `streaming.describe_weight_files` then writes one at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class DeferredTensor(Tensor):
    """A tensor on the device "meta" that any computation turns into the real one.

    Views stay deferred, so that looking at shape, size and place makes nothing.

    Args:
        like: the shape and type, on the device "meta".
        make: gives the real tensor, on the CPU.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, make: Callable[[], Tensor]) -> "DeferredTensor":
        deferred = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device="meta"
        )
        deferred.make = make
        return deferred

    def __init__(self, like: Tensor, make: Callable[[], Tensor]):
        super().__init__()

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}

        def compute() -> Any:
            return operation(*tree_map_only(cls, made, args), **tree_map_only(cls, made, kwargs))

        if operation.is_view:
            result = operation(*tree_map_only(cls, _shape, args), **tree_map_only(cls, _shape, kwargs))
            if isinstance(result, Tensor):
                return cls(result, compute)
        return compute()


def made(tensor: Tensor) -> Tensor:
    """The real tensor."""
    return tensor.make() if isinstance(tensor, DeferredTensor) else tensor


def _shape(deferred: DeferredTensor) -> Tensor:
    """A tensor without memory that has the same shape, strides and type."""
    return torch.empty_strided(deferred.shape, deferred.stride(), dtype=deferred.dtype, device="meta")
