"""How a model is spread over processes, and what that changes for whoever switches, saves or loads its weights.

One class per engine, one row per engine in `tests/distributed`. `ENGINES` is asked in order.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.modeling import is_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_schedulefree.checkpoint import files
from hf_schedulefree.checkpoint.record import CheckpointFacts
from hf_schedulefree.optim import sharding
from hf_schedulefree.optim.switching import Park
from hf_schedulefree.weights.gathering import Gathering

# accelerate's mark.
_PREPARED = "_is_accelerate_prepared"

# Makes a function keep its write errors instead of raising them.
Keep = Callable[[Callable[..., Any]], Callable[..., None]]


class Engine:
    """One process, `DataParallel` or `DistributedDataParallel`: the optimizer's parameters are the module's own.

    Args:
        model: the model as wrapped for training.
        optimizer: the optimizer as wrapped for training, without accelerate's wrapper.
    """

    # See `WeightSwitch`.
    shows_x_alone = True
    shows_y_alone = True
    # How the optimizer has to keep y while x is shown; None: as it likes.
    park: Park | None = None
    # Whether each process loads the whole model from a file.
    each_loads = True

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

    @contextlib.contextmanager
    def gathering_model(self, accelerator: Accelerator) -> Iterator[Gathering | None]:
        """The model's state dict, tensor by tensor, where the Trainer would gather or copy all of it, or write none.

        All processes take part. None: the Trainer saves the model as it is.
        """
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is None or _in_one_file(plugin):
            yield None
            return
        yield _gathering_of_whole(accelerator.unwrap_model(self.model))  # it is not sharded yet

    @contextlib.contextmanager
    def loading_model(self) -> Iterator[None]:
        """Within: the Trainer can load whole tensors into the model."""
        yield

    def share_main_weights(self) -> None:
        """Give the main process's weights to those that could not load them."""
        for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
            shared = tensor.detach().contiguous()
            distributed.broadcast(shared, src=0)
            tensor.detach().copy_(shared)

    def save_states(self, folder: Path, accelerator: Accelerator, writes: bool) -> bool:
        """Save the optimizer's state and what goes with it, where the Trainer would not do it well.

        Args:
            folder: the checkpoint.
            accelerator: the Trainer's.
            writes: whether this process writes what one process writes for all (or, one on each node, for its node).

        Returns:
            Whether that was done.
        """
        return False

    def load_states(self, folder: Path) -> bool:
        """The opposite of `save_states`, where the Trainer could not load what it wrote."""
        return False

    @contextlib.contextmanager
    def keeping_write_errors(self, folder: Path, accelerator: Accelerator, keep: Keep) -> Iterator[None]:
        """Within: what writes a file while other processes wait in the same function does not raise write errors.

        Args:
            folder: the checkpoint.
            accelerator: the Trainer's.
            keep: makes a function keep its write errors, for `saving.py`, instead of raising them.
        """
        yield


class FullyShardedEngine(Engine):
    """FSDP2: parameters and optimizer state are `DTensor`s, of which each process holds a shard."""

    shows_y_alone = False  # train() asks all processes whether the weights were replaced
    each_loads = False

    @classmethod
    def runs(cls, model: nn.Module | None, optimizer: Any) -> bool:
        params = (p for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
        return any(sharding.is_sharded(p) for p in itertools.islice(params, 1))

    def publish(self) -> None:
        # A module that is unsharded (the root stays so after an evaluation) would go on with the former weights.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def gathering_model(self, accelerator: Accelerator) -> Iterator[Gathering]:
        yield _gathering_of_shards(_sharded_state().get_model_state_dict(self.model))

    def save_states(self, folder: Path, accelerator: Accelerator, writes: bool) -> bool:
        # torch would not load a checkpoint without the state of what has had no gradient yet (an expert, a head).
        self.optimizer.init_state()
        # accelerate's files, written tensor by tensor: it would gather model and optimizer first, in the main process.
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is None or not _in_one_file(plugin):
            return False
        from hf_schedulefree.checkpoint.pickled import write_pickled  # few runs need it

        trained = _sharded_state().StateDictOptions(ignore_frozen_params=is_peft_model(self.model))
        model = _sharded_state().get_model_state_dict(self.model, options=trained)
        optimizer = _sharded_state().get_optimizer_state_dict(self.model, self.optimizer)
        for name, state in ((files.FSDP_MODEL_FILE, model), (files.FSDP_OPTIMIZER_FILE, optimizer)):
            gathering = _gathering_of_shards(state)
            with gathering.open():
                if writes:
                    write_pickled(folder / name, gathering.content)
        return True

    @contextlib.contextmanager
    def keeping_write_errors(self, folder: Path, accelerator: Accelerator, keep: Keep) -> Iterator[None]:
        # torch tells all processes what went wrong in one of them, but each makes these folders before that.
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and not _in_one_file(plugin):
            for name in (files.FSDP_MODEL_FOLDER, files.FSDP_OPTIMIZER_FOLDER):
                keep((folder / name).mkdir)(parents=True, exist_ok=True)
        yield


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
            options = _sharded_state().StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
            return _sharded_state().set_model_state_dict(self.model, weights, options=options)

        self.model.load_state_dict = load_into_shards
        try:
            yield
        finally:
            vars(self.model).pop("load_state_dict", None)

    @contextlib.contextmanager
    def gathering_model(self, accelerator: Accelerator) -> Iterator[Gathering]:
        # With it, save_pretrained would gather the whole model into the main process, whatever it is given.
        config = accelerator.unwrap_model(self.model).config
        spread, config.distributed_config = config.distributed_config, None
        try:
            with super().gathering_model(accelerator) as gathering:
                yield gathering
        finally:
            config.distributed_config = spread

    def save_states(self, folder: Path, accelerator: Accelerator, writes: bool) -> bool:
        self.optimizer.init_state()  # as above
        state = _sharded_state().get_optimizer_state_dict(self.model, self.optimizer)
        distributed.checkpoint.save({"optimizer": state}, checkpoint_id=folder / files.FSDP_OPTIMIZER_FOLDER)
        return True

    def load_states(self, folder: Path) -> bool:
        state = {"optimizer": _sharded_state().get_optimizer_state_dict(self.model, self.optimizer)}
        distributed.checkpoint.load(state, checkpoint_id=folder / files.FSDP_OPTIMIZER_FOLDER)
        _sharded_state().set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        return True


class ZeroEngine(Engine):
    """DeepSpeed ZeRO-1 and ZeRO-2: the optimizer owns flat fp32 partitions, of which the module holds a copy."""

    park = "copy"  # DeepSpeed saves what is in the optimizer's `state`, and does not ask for a `state_dict`

    shows_x_alone = False
    shows_y_alone = False
    each_loads = False

    @classmethod
    def runs(cls, model: nn.Module | None, optimizer: Any) -> bool:
        return _is_from_deepspeed(optimizer) and hasattr(optimizer, "update_lp_params")

    @property
    def inner_optimizer(self) -> Any:
        return self.optimizer.optimizer

    def publish(self) -> None:
        self.optimizer.update_lp_params()

    @contextlib.contextmanager
    def gathering_model(self, accelerator: Accelerator) -> Iterator[Gathering]:
        # Every process has the whole module; accelerate would copy it once more, in each.
        yield _gathering_of_whole(self.model.module)

    @contextlib.contextmanager
    def keeping_write_errors(self, folder: Path, accelerator: Accelerator, keep: Keep) -> Iterator[None]:
        engine = self.model
        save_checkpoint, writer = engine.save_checkpoint, engine.checkpoint_engine

        def save_checkpoint_and_name(folder: str, **options: Any) -> None:
            save_checkpoint(folder, save_latest=False, **options)
            if engine.global_rank == 0:
                keep((Path(folder) / files.DEEPSPEED_LATEST).write_text)(f"global_step{engine.global_steps}")

        replaced = [
            (engine, "save_checkpoint", save_checkpoint_and_name),
            (engine, "_copy_recovery_script", keep(engine._copy_recovery_script)),
            (writer, "save", keep(writer.save)),
            (writer, "makedirs", keep(writer.makedirs)),
        ]
        for owner, name, function in replaced:
            setattr(owner, name, function)
        try:
            yield
        finally:
            for owner, name, _ in replaced:
                delattr(owner, name)

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
    def gathering_model(self, accelerator: Accelerator) -> Iterator[Gathering]:
        from deepspeed.runtime.zero import GatheredParameters

        def whole(part: torch.Tensor, wanted: bool) -> torch.Tensor | None:
            with GatheredParameters([part]):
                return part.detach().to("cpu", copy=True) if wanted else None

        self.optimizer.checkpoint_event_prologue()  # small parameters, gathered always, would not be so afterwards
        gathering = Gathering(
            _tensors_to_save(self.model.module), whole, shape=lambda part: getattr(part, "ds_shape", part.shape)
        )
        try:
            yield gathering
        except Exception:  # all processes have it: see Gathering.open
            self.optimizer.checkpoint_event_epilogue()
            raise
        self.optimizer.checkpoint_event_epilogue()


def _tensors_to_save(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a state dict holds, as the module holds it, under each of its names."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if torch.is_tensor(value)}


def _sharded_state() -> ModuleType:
    """torch's state dicts of sharded models. Imported here, so that a run of one process does not load them."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _gathering_of_whole(module: nn.Module) -> Gathering:
    """Of a module that this process holds as a whole."""
    return Gathering(
        _tensors_to_save(module), lambda tensor, wanted: tensor.detach().cpu() if wanted else None, joint=False
    )


def _gathering_of_shards(state: Any) -> Gathering:
    """Of a state dict with `DTensor`s."""

    def whole(part: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        tensor = part.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.cpu() if wanted else None

    return Gathering(state, whole)


def _in_one_file(fsdp_plugin: Any) -> bool:
    return "FULL_STATE_DICT" in str(fsdp_plugin.state_dict_type)


def files_to_resume_from(model: nn.Module | None, accelerator: Accelerator) -> tuple[str | None, str]:
    """The model's file (or folder) and the optimizer's that this run loads; None: in any engine's checkpoint.

    Args:
        model: as given to the Trainer, or as wrapped.
        accelerator: the Trainer's.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return files.DEEPSPEED_LATEST, files.DEEPSPEED_LATEST
    if NativeFullyShardedEngine.runs(model, None):
        return None, files.FSDP_OPTIMIZER_FOLDER
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        return None, files.OPTIMIZER_FILE
    if _in_one_file(plugin):
        return files.FSDP_MODEL_FILE, files.FSDP_OPTIMIZER_FILE
    return files.FSDP_MODEL_FOLDER, files.FSDP_OPTIMIZER_FOLDER


def resumes_on(processes: int, written: CheckpointFacts, accelerator: Accelerator) -> bool:
    """Whether so many processes can load a checkpoint.

    DeepSpeed's partitions are loaded by as many processes as wrote them, unless they were converted to its universal
    format. It says so itself, but in ZeRO-3 not in all processes: those without a partition fail at once.

    Args:
        processes: how many this run has.
        written: the facts about the checkpoint.
        accelerator: the Trainer's.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED or written.engine != "deepspeed":
        return True
    options = accelerator.state.deepspeed_plugin.deepspeed_config.get("checkpoint") or {}
    return processes == written.world_size or bool(options.get("load_universal"))


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


def to_be_wrapped(model: nn.Module, wrapped: nn.Module, accelerator: Accelerator) -> nn.Module:
    """What the Trainer has to wrap for training, if the model was evaluated or trained before.

    When accelerate has prepared a model for an evaluation, the model counts as prepared, and is not wrapped for DDP
    afterwards: each process would train by itself. And it forgets DeepSpeed's engine when the next training begins,
    with which the Trainer would go on. Can go when these two are mended.

    Args:
        model: the model.
        wrapped: what the Trainer holds as its outermost wrapper.
        accelerator: the Trainer's.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return model
    if kind in (DistributedType.NO, DistributedType.FSDP) or NativeFullyShardedEngine.runs(model, None):
        return wrapped
    without_compile = getattr(wrapped, "_orig_mod", wrapped)
    if without_compile is not model or not any(getattr(m, _PREPARED, False) for m in (model, wrapped)):
        return wrapped
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the next one is put around what the model itself does
    vars(model).pop(_PREPARED, None)
    return model


ENGINES: tuple[type[Engine], ...] = (Zero3Engine, ZeroEngine, NativeFullyShardedEngine, FullyShardedEngine, Engine)


def engine_for(model: nn.Module | None, optimizer: Any) -> Engine:
    """The engine that runs `model` with `optimizer`, both as wrapped for training."""
    optimizer = _without_accelerate(optimizer)
    return next(engine for engine in ENGINES if engine.runs(model, optimizer))(model, optimizer)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    return engine_for(None, optimizer).inner_optimizer


def _without_accelerate(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _is_from_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.split(".")[0] == "deepspeed"
