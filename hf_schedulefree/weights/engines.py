"""How a model is spread over processes, and what that changes for whoever switches, saves or loads its weights.

One class per engine, one row per engine in `tests/distributed`. `ENGINES` is asked in order. `EngineSwitch` joins an
engine with the `WeightSwitch` of whatever optimizer runs in it.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as sharded_state
from torch.distributed.fsdp import FSDPModule

from hf_schedulefree.optim import sharding
from hf_schedulefree.optim.switching import Park
from hf_schedulefree.weights.switch import WeightSwitch

# Where the shards of the optimizer are in a checkpoint; accelerate's name for them.
OPTIMIZER_SHARDS = "optimizer_0"


class Engine:
    """One process, `DataParallel` or `DistributedDataParallel`: the optimizer's parameters are the module's own.

    Args:
        model: the model as wrapped for training.
        optimizer: the optimizer as wrapped for training, without accelerate's wrapper.
    """

    # See `WeightSwitch`.
    shows_x_alone = True
    shows_y_alone = True
    # Whether no process waits for another one while it writes its files of a checkpoint.
    writes_alone = True
    # How the optimizer has to keep y while x is shown; None: as it likes.
    park: Park | None = None

    def __init__(self, model: nn.Module | None, optimizer: Any):
        self.model = model
        self.optimizer = optimizer

    @classmethod
    def runs(cls, model: nn.Module | None, optimizer: Any) -> bool:
        """Whether this engine runs this model with this optimizer."""
        return True

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer that knows x, y and z."""
        return self.optimizer

    @contextlib.contextmanager
    def reaching_parameters(self) -> Iterator[None]:
        """Within: the optimizer's groups hold all its parameters."""
        yield

    def publish(self) -> None:
        """After a switch: show in the module what the optimizer's parameters hold now."""

    def in_any_process(self, flag: bool) -> bool:
        """Whether `flag` holds in any process; asked where the optimizer cannot know that its parameters are shards."""
        return flag

    def model_to_save(self, accelerator: Accelerator) -> dict[str, torch.Tensor] | None:
        """The whole model on the main process, where the Trainer's save_model would write nothing; else None.

        All processes take part. The tensors are gathered one by one and go to the main process's CPU memory.
        """
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return None
        return accelerator.get_state_dict(self.model)

    @contextlib.contextmanager
    def loading_model(self) -> Iterator[None]:
        """Within: the Trainer can load whole tensors into the model."""
        yield

    def save_optimizer(self, folder: Path) -> bool:
        """Save the optimizer's state, where the Trainer would lose a part of it; returns whether that was done."""
        return False

    def load_optimizer(self, folder: Path) -> bool:
        """The opposite of `save_optimizer`."""
        return False


class FullyShardedEngine(Engine):
    """FSDP2: parameters and optimizer state are `DTensor`s, of which each process holds a shard."""

    shows_y_alone = False  # train() asks all processes whether the weights were replaced
    writes_alone = False

    @classmethod
    def runs(cls, model: nn.Module | None, optimizer: Any) -> bool:
        params = (p for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
        return any(sharding.is_sharded(p) for p in itertools.islice(params, 1))

    def publish(self) -> None:
        # A module that is unsharded (the root stays so after an evaluation) would go on with the former weights.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class NativeFullyShardedEngine(FullyShardedEngine):
    """FSDP2 as transformers applies it while loading a model (`from_pretrained(..., distributed_config=...)`).

    The Trainer treats such a model as if it were whole: it would save the main process's shard of the optimizer as
    that of all, and load whole tensors into shards.
    """

    @classmethod
    def runs(cls, model: nn.Module | None, optimizer: Any) -> bool:
        return bool(getattr(model, "is_distributed_loading_by_transformers", False))

    @contextlib.contextmanager
    def loading_model(self) -> Iterator[None]:
        def load_into_shards(weights: dict[str, torch.Tensor], strict: bool = True, assign: bool = False) -> Any:
            del self.model.load_state_dict  # what follows calls the model's own
            options = sharded_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
            return sharded_state.set_model_state_dict(self.model, weights, options=options)

        self.model.load_state_dict = load_into_shards
        try:
            yield
        finally:
            vars(self.model).pop("load_state_dict", None)

    def save_optimizer(self, folder: Path) -> bool:
        state = sharded_state.get_optimizer_state_dict(self.model, self.optimizer)
        distributed.checkpoint.save({"optimizer": state}, checkpoint_id=folder / OPTIMIZER_SHARDS)
        return True

    def load_optimizer(self, folder: Path) -> bool:
        state = {"optimizer": sharded_state.get_optimizer_state_dict(self.model, self.optimizer)}
        distributed.checkpoint.load(state, checkpoint_id=folder / OPTIMIZER_SHARDS)
        sharded_state.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        return True


class ZeroEngine(Engine):
    """DeepSpeed ZeRO-1 and ZeRO-2: the optimizer owns flat fp32 partitions, of which the module holds a copy."""

    park = "copy"  # DeepSpeed saves what is in the optimizer's `state`, and does not ask for a `state_dict`

    shows_x_alone = False
    shows_y_alone = False
    writes_alone = False

    @classmethod
    def runs(cls, model: nn.Module | None, optimizer: Any) -> bool:
        return _is_from_deepspeed(optimizer) and hasattr(optimizer, "update_lp_params")

    @property
    def inner_optimizer(self) -> Any:
        return self.optimizer.optimizer

    def publish(self) -> None:
        self.optimizer.update_lp_params()

    def in_any_process(self, flag: bool) -> bool:
        votes = torch.tensor(float(flag), device=next(self.model.parameters()).device)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return bool(votes)


class Zero3Engine(ZeroEngine):
    """DeepSpeed ZeRO-3: the module, too, holds partitions, and the optimizer's groups are empty between steps."""

    @classmethod
    def runs(cls, model: nn.Module | None, optimizer: Any) -> bool:
        return _is_from_deepspeed(optimizer) and hasattr(optimizer, "fp32_partitioned_groups_flat")

    @contextlib.contextmanager
    def reaching_parameters(self) -> Iterator[None]:
        self.optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self.optimizer._clear_fp32_optimizer_param_groups()

    def publish(self) -> None:
        # As at the end of DeepSpeed's own step(): it has no public function for it.
        zero = self.optimizer
        zero._partition_all_parameters()  # what is gathered now would keep the former weights
        for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:  # small parameters are always gathered
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()


@contextlib.contextmanager
def optimizer_saves_allowed(model: nn.Module | None, args: Any) -> Iterator[None]:
    """Around the construction of a Trainer: let it save checkpoints of a model that transformers sharded itself.

    It refuses them, because it could not save the optimizer; `NativeFullyShardedEngine` can.
    """
    if args is None or not NativeFullyShardedEngine.runs(model, None):
        yield
        return
    save_only_model, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = save_only_model


ENGINES: tuple[type[Engine], ...] = (Zero3Engine, ZeroEngine, NativeFullyShardedEngine, FullyShardedEngine, Engine)


def engine_for(model: nn.Module | None, optimizer: Any) -> Engine:
    """The engine that runs `model` with `optimizer`, both as wrapped for training."""
    optimizer = _without_accelerate(optimizer)
    return next(engine for engine in ENGINES if engine.runs(model, optimizer))(model, optimizer)


class EngineSwitch(WeightSwitch):
    """Switches what `switch` knows, in `engine`: reaches all its parameters, and shows them in the module."""

    def __init__(self, switch: WeightSwitch, engine: Engine):
        super().__init__(switch.optimizer)
        self.inner = switch
        self.engine = engine
        only_process = not distributed.is_initialized() or distributed.get_world_size() == 1
        self.shows_x_alone = engine.shows_x_alone or only_process
        self.shows_y_alone = engine.shows_y_alone or only_process

    @property
    def mode(self) -> Literal["train", "eval"]:
        return self.inner.mode

    @property
    def settled(self) -> bool:
        return self.inner.settled

    @property
    def schedulable(self) -> torch.optim.Optimizer:
        return self.inner.schedulable

    @contextlib.contextmanager
    def reaching_parameters(self) -> Iterator[None]:
        with self.engine.reaching_parameters():
            yield

    def show_x(self) -> None:
        if self.mode == "eval":
            return
        if self.engine.park is not None:
            self.optimizer.park = self.engine.park
        with self.engine.reaching_parameters():
            self.inner.show_x()
        self.engine.publish()

    def show_y(self) -> None:
        if self.mode == "train" and self.settled:
            return
        with self.engine.reaching_parameters():
            # Where the optimizer cannot see that its parameters are shards, all processes decide here.
            replaced = self.inner.weights_replaced()
            if self.engine.in_any_process(replaced) and not replaced:
                self.inner.restart()
            self.inner.show_y()
        self.engine.publish()

    def weights_replaced(self) -> bool:
        if self.mode == "train":
            return False
        with self.engine.reaching_parameters():
            return self.engine.in_any_process(self.inner.weights_replaced())

    def restart(self) -> None:
        self.inner.restart()

    def extra_state(self) -> dict[str, Any]:
        return self.inner.extra_state()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.inner.load_extra_state(state)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    return engine_for(None, optimizer).inner_optimizer


def _without_accelerate(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _is_from_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.split(".")[0] == "deepspeed"
