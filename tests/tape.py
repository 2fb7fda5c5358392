"""What a CUDA graph does, on CPU: the operations of a call are recorded with their tensors, and made again at a replay.

As there, no Python of the call runs at a replay, and the results of operations are fresh each time; all that the call
was given stays where it is.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Tape(TorchDispatchMode):
    """Records while it is entered; a read of a value (`item`, `bool`, ...) is an error, as in a capture."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def record(self, function, args, kwargs, result=None):
        self.calls.append((function, args, kwargs, result))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read during the capture")
        result = function(*args, **(kwargs or {}))
        self.record(function, args, kwargs or {}, result)
        return result

    @torch.no_grad()
    def replay(self):
        fresh = {}  # id of a recorded tensor -> what stands for it now; all recorded ones are alive

        def now(tensor):
            return fresh.get(id(tensor), tensor)

        for function, args, kwargs, result in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, now, (args, kwargs))
            made = function(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(made)[0], strict=True):
                if isinstance(old, torch.Tensor):
                    fresh[id(old)] = new
