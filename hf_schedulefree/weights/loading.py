"""Where the hosts' own way to load a checkpoint is not safe, or fails."""

import contextlib
import functools
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


@functools.cache
def numbered_cpu_known() -> None:
    """From now on `torch.load(..., map_location="cpu:0")` loads to the CPU.

    In several processes on CPU the Trainer's device has a number, and the Trainer of transformers 5.17 loads the
    optimizer to it, at which torch fails. Can go when 5.18 is the oldest supported.
    """

    def load(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
        return storage if location.startswith("cpu:") else None

    # Asked after torch's own, so that nothing changes where these know the device.
    torch.serialization.register_package(1000, lambda storage: None, load)
