"""`only_data_loaded`: DeepSpeed resumes from a checkpoint without executing code that somebody may have put into it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def only_data_loaded(deepspeed_runs: bool) -> Iterator[None]:
    """Within: DeepSpeed's loader builds tensors, plain values and the few classes of its own that its files hold.

    It calls `torch.load(weights_only=False)`. Can go when it does not.

    Args:
        deepspeed_runs: without it, nothing happens.
    """
    if not deepspeed_runs:
        yield
        return
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

    def load(engine: Any, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True)

    former = TorchCheckpointEngine.load
    TorchCheckpointEngine.load = load
    try:
        yield
    finally:
        TorchCheckpointEngine.load = former
