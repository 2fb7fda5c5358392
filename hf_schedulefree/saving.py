"""`CheckpointMixin`: the Trainer's saves become atomic, and its resumes start from whole checkpoints only."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_schedulefree import disks, registry, weights
from hf_schedulefree.checkpoint import commit, files, verify
from hf_schedulefree.checkpoint.record import RECORD_NAME, CheckpointError, CheckpointFacts, Record, files_in
from hf_schedulefree.optim.base import ScheduleFreeOptimizer
from hf_schedulefree.optim.stored import stored_beta

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


class CheckpointMixin:
    """The part of `ScheduleFreeMixin` that deals with checkpoints; see docs/checkpoints.md.

    Everything here applies to schedule-free optimizers only: with another one, the Trainer's own code runs.
    """

    # Where the Trainer's own code is told that the run's directory is, while it writes or rotates checkpoints.
    _shown_run_dir: Path | None = None
    _push_after_commit = False
    _save_failed = False
    _fresh_optimizer = False
    # The checkpoint that this run was resumed from, once it is verified.
    _resumed: verify.VerifiedCheckpoint | None = None
    # The last commit: the folder, and each file's size and time of modification.
    _committed: tuple[Path, dict[str, tuple[int, int]]] | None = None
    # In every process: whether what `on_save` callbacks write belongs to a commit that they have not seen yet.
    _to_record = False
    # Whether some process was seen to write to another disk than the main one.
    _disks_differ = False

    # Saving

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        # The Trainer writes a checkpoint into whatever folder this names, and rotates what it finds there.
        return str(self._shown_run_dir) if self._shown_run_dir is not None else super()._get_output_dir(*args, **kwargs)

    @contextlib.contextmanager
    def _run_dir_shown_as(self, path: Path) -> Iterator[None]:
        former, self._shown_run_dir = self._shown_run_dir, path
        try:
            yield
        finally:
            self._shown_run_dir = former

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        # A checkpoint is written aside, recorded and moved into place; older ones are removed only after that.
        if self._switch is None or self._shown_run_dir is not None:
            return super()._save_checkpoint(model, trial, *args, **kwargs)
        run_dir = Path(self._get_output_dir(trial))
        destination = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best_before = self.state.best_model_checkpoint
        self._save_failed = self._to_record = False
        self._push_after_commit = False
        try:
            self._write_and_commit(destination, model, trial, *args, **kwargs)
        except BaseException as error:
            self.state.best_model_checkpoint = best_before  # while a checkpoint is staged, that may be its place there
            if not isinstance(error, Exception):
                raise
            self._save_failed = True
            if self.args.should_save:
                with contextlib.suppress(OSError):
                    commit.discard_staging(run_dir)
            if not self._can_go_on_after(error):
                raise
            newest, _ = verify.find_committed(run_dir)
            logger.error(
                f"Saving {destination} failed: {files.write_error_text(error)}. "
                + "Training goes on without this checkpoint; "
                + (f"the newest whole one is {newest.folder}." if newest else "there is no other one yet.")
            )
            return None
        if self._push_after_commit:
            self._push_from_checkpoint(str(destination))
        if self.args.should_save:
            self._remove_old_checkpoints(run_dir, destination)

    def _write_and_commit(self, destination: Path, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        staged = destination.parent / commit.STAGING / destination.name
        self._on_writers(lambda: commit.staged_folder(destination.parent, destination.name))
        errors: list[str] = []
        with self._run_dir_shown_as(staged.parent), self._write_errors_kept(staged, errors):
            super()._save_checkpoint(model, trial, *args, **kwargs)
            self._name_best_checkpoint(destination)
            if self.args.should_save:
                # Written once more, because it named the best checkpoint by its place in the staging folder.
                self.state.save_to_json(str(staged / files.TRAINER_STATE))
        facts = self._checkpoint_facts()
        self._all_learn_of("; ".join(errors) or None)
        self._see_all_shards(staged)
        self._on_writers(lambda: commit.commit_checkpoint(staged, facts, destination=destination))
        self._committed = (destination, _stamps(destination)) if self.args.should_save else None
        self._to_record = True

    def _see_all_shards(self, staged: Path) -> None:
        """Before a commit: whoever records what was written sees the parts of all processes.

        Raises:
            CommitError: some of them are on another disk.
        """
        if self.args.world_size == 1:
            return
        mine = disks.written_by(self.args.process_index, staged)
        written = self._of_all(mine)
        if self.args.save_on_each_node:  # what is no shard is on its node, where it is needed
            written = [names if disks.hold_shards(names) else [] for names in written]
        elsewhere: set[int] = set()
        if self.args.should_save:
            patience = 0.0 if self._disks_differ else disks.PATIENCE_AT_SAVES
            lost = set(disks.unseen(staged, [name for names in written for name in names], patience))
            elsewhere = {process for process, names in enumerate(written) if lost.intersection(names)}
        elsewhere = set().union(*self._of_all(elsewhere))
        self._disks_differ = bool(elsewhere)
        if self.args.process_index in elsewhere and not self.args.should_save:
            # One by one, and before the commit: to a node that sees late what others do, the folder that was moved
            # into place could still be this one.
            disks.discard(staged, mine)
        if any(disks.hold_shards(written[process]) for process in elsewhere):
            raise CommitError(
                "the processes wrote their shards of model and optimizer to different disks, and no run could resume "
                "from that: output_dir must be a folder that all nodes share"
            )

    @contextlib.contextmanager
    def _write_errors_kept(self, folder: Path, errors: list[str]) -> Iterator[None]:
        """Within, with several processes: errors in writing files are put into `errors` instead of being raised.

        A process that left a save by an exception would let the others wait for it.
        """
        if self.args.world_size == 1:
            yield
            return

        def keep(write: Callable[..., Any]) -> Callable[..., None]:
            def write_or_keep(*args: Any, **kwargs: Any) -> None:
                try:
                    write(*args, **kwargs)
                except Exception as error:
                    if not files.is_write_error(error):
                        raise
                    errors.append(files.write_error_text(error))

            return write_or_keep

        parts = ("_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state")
        writers = [*((self, name) for name in parts), (self.state, "save_to_json")]
        former = [(vars(owner), name, vars(owner).get(name)) for owner, name in writers]
        for owner, name in writers:
            setattr(owner, name, keep(getattr(owner, name)))
        try:
            with self._engine.keeping_write_errors(folder, self.accelerator, keep):
                yield
        finally:
            for attributes, name, own in former:
                if own is None:
                    del attributes[name]
                else:
                    attributes[name] = own

    def _name_best_checkpoint(self, destination: Path) -> None:
        """As the Trainer does it, by the final name of this checkpoint."""
        if self.state.best_global_step:
            best = destination.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == destination or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _checkpoint_facts(self) -> CheckpointFacts:
        optimizer = weights.unwrap_optimizer(self.optimizer)
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
        package = sys.modules[type(optimizer).__module__.partition(".")[0]]
        engine = "deepspeed" if self.is_deepspeed_enabled else "fsdp" if self.is_fsdp_enabled else None
        return CheckpointFacts(
            step=self.state.global_step,
            optimizer=type(optimizer).__name__,
            version=getattr(package, "__version__", None),
            world_size=self.args.world_size,
            engine=engine or ("ddp" if self.args.world_size > 1 else "single"),
            beta=stored_beta(self._switch.param_groups[0]),
            parameters=groups if all(group and None not in group for group in groups) else [],
        )

    def _weight_metadata(self) -> dict[str, str]:
        """What weight files written now say about themselves."""
        return files.weight_metadata(
            weights="x",
            step=self.state.global_step,
            optimizer=type(weights.unwrap_optimizer(self.optimizer)).__name__,
            beta=stored_beta(self._switch.param_groups[0]),
        )

    def _can_go_on_after(self, error: Exception) -> bool:
        # Where processes write together, the others may wait for one that failed: only their end can free them.
        return isinstance(error, CommitError) or (self.args.world_size == 1 and files.is_write_error(error))

    def _push_deferred(self) -> bool:
        """Whether a push must wait: it reads the folder later, when it has its final name."""
        self._push_after_commit = self._push_after_commit or self._shown_run_dir is not None
        return self._shown_run_dir is not None

    def _remove_old_checkpoints(self, run_dir: Path, newest: Path) -> None:
        keep = [newest, self.state.best_model_checkpoint]
        try:
            for removed in commit.remove_old_checkpoints(run_dir, self.args.save_total_limit, keep):
                logger.info(f"Deleted older checkpoint {removed} due to args.save_total_limit")
        except OSError as error:
            logger.warning(f"An older checkpoint could not be removed: {error}")

    def _tune_save_checkpoint(self, checkpoint_dir: str, *args: Any, **kwargs: Any) -> None:
        # Ray Tune copies the folder away as a whole; it only has to be recorded.
        super()._tune_save_checkpoint(checkpoint_dir, *args, **kwargs)
        if self._switch is not None and self.args.should_save:
            folder = Path(checkpoint_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            commit.commit_checkpoint(folder, self._checkpoint_facts())

    def _call_on_save(self, call: Callable[[], TrainerControl]) -> TrainerControl:
        """Call the `on_save` callbacks: not after a failed save, and with what they write recorded as well."""
        if self._save_failed:
            return self.control
        control = call()
        if self._to_record:
            self._all_learn_of(None)  # callbacks of other processes may still be writing
        self._to_record = False
        if self._committed is not None and self._committed[0].is_dir():
            folder, stamps = self._committed
            if _stamps(folder) != stamps:
                try:
                    commit.commit_checkpoint(folder)
                except OSError as error:
                    logger.error(f"What callbacks wrote into {folder} could not be recorded: {error}")
        return control

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With save_total_limit=1 and a best checkpoint, the Trainer would remove the newest one here.
        if self._switch is None or self.args.save_total_limit != 1:
            return super()._finalize_training(*args, **kwargs)
        with self._run_dir_shown_as(Path(self.args.output_dir) / commit.STAGING):
            return super()._finalize_training(*args, **kwargs)

    # Resuming

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        fresh_optimizer: bool = False,
        **kwargs: Any,
    ) -> Any:
        # True means the newest whole checkpoint, and a path is refused unless it is whole.
        self._fresh_optimizer, self._resumed = fresh_optimizer, None
        if resume_from_checkpoint and self._is_schedule_free_run():
            self._resumed = self._choose_together(resume_from_checkpoint)
            resume_from_checkpoint = str(self._resumed.folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_schedule_free_run(self) -> bool:
        """Whether the optimizer is (or, where there is none yet, will be) a schedule-free one."""
        if self.optimizer is not None and self.model_init is None:
            return self._switch is not None
        optimizer_class = (self.optimizer_cls_and_kwargs or (None,))[0]
        if optimizer_class is not None:
            return isinstance(optimizer_class, type) and (
                issubclass(optimizer_class, ScheduleFreeOptimizer)
                or optimizer_class.__module__.partition(".")[0] == "schedulefree"
            )
        return registry.names_schedule_free(self.args)

    def _choose_together(self, resume_from_checkpoint: str | bool) -> verify.VerifiedCheckpoint:
        """The checkpoint to resume from, in all processes: where each node saves, one that is whole on each."""
        last_step = None
        while True:
            choose = functools.partial(self._choose_checkpoint, resume_from_checkpoint, last_step)
            found, skipped = self._chosen_by_writer(choose)
            steps = set(self._of_all(found.step))
            if len(steps) == 1:
                break
            if resume_from_checkpoint is not True:
                raise CheckpointError(f"Cannot resume from {found.folder}: it is not of the same step on all nodes.")
            last_step = min(steps)
        if resume_from_checkpoint is True and self.args.should_save:
            (logger.warning if skipped else logger.info)(f"Resuming from {found.folder}. {skipped}")
        unseen = self._of_all(self._unseen_in(found.folder, found.record))
        for process, names in enumerate(unseen):
            if names:
                raise CheckpointError(
                    f"Cannot resume from {found.folder}: process {process} sees no {names[0]} there. output_dir must "
                    "be a folder that all nodes share, or (DDP, FSDP2 with FULL_STATE_DICT) each node must have saved "
                    "its own checkpoint, with save_on_each_node."
                )
        return found

    def _unseen_in(self, folder: Path, record: Record | None) -> list[str]:
        """The files of a checkpoint, except those of single processes, that this process does not see."""
        if self.args.world_size == 1:
            return []
        names = [files.TRAINER_STATE] if record is None else record.files
        return disks.unseen(folder, [name for name in names if not name.startswith("rng_state")])

    def _choose_checkpoint(
        self, resume_from_checkpoint: str | bool, last_step: int | None = None
    ) -> tuple[verify.VerifiedCheckpoint, str]:
        """The checkpoint to resume from, as this process sees it, and which newer ones were skipped."""
        if resume_from_checkpoint is True:
            run_dir = Path(self.args.output_dir)
            commit.finish_interrupted_move(run_dir)
            need_optimizer = not self._fresh_optimizer
            found, skipped = verify.find_committed(run_dir, need_optimizer=need_optimizer, last_step=last_step)
            skipped_text = f"skipped: {'; '.join(skipped)}" if skipped else ""
            if found is None:
                hint = f" {self._way_on_from_weights(None)}." if skipped else ""
                raise CheckpointError(f"No valid checkpoint found in output directory ({run_dir}) {skipped_text}{hint}")
            self._refuse_of_another_engine(found)
            return found, skipped_text
        folder = Path(resume_from_checkpoint)
        commit.finish_interrupted_move(folder.parent)
        try:
            found = verify.verify_checkpoint(folder)
            if not found.has_optimizer_state and not self._fresh_optimizer:
                _, optimizer_file = weights.files_to_resume_from(self.model, self.accelerator)
                raise CheckpointError(
                    f"{optimizer_file} is missing, as in a checkpoint of save_only_model. "
                    f"{self._way_on_from_weights(folder)}"
                )
        except CheckpointError as error:
            raise CheckpointError(f"Cannot resume from {folder}: {error}. {_newest_beside(folder)}") from error
        self._refuse_of_another_engine(found)
        return found, ""

    def _way_on_from_weights(self, folder: Path | None) -> str:
        """What to do with a checkpoint (None: with any) that has no optimizer state."""
        model_file, _ = weights.files_to_resume_from(self.model, self.accelerator)
        if model_file is None or (folder is not None and (folder / model_file).exists()):
            return "To go on from its weights with a new optimizer (x = y = z), call train(..., fresh_optimizer=True)"
        return (
            "To go on from its weights with a new optimizer (x = y = z), load them by from_pretrained and call "
            "train() without a checkpoint: FSDP and DeepSpeed read files of their own, and save_only_model writes none"
        )

    def _refuse_of_another_engine(self, found: verify.VerifiedCheckpoint) -> None:
        """The Trainer would go on without the optimizer state that it does not find, or fail in one process only."""
        record = found.record
        if record is not None and not weights.resumes_on(self.args.world_size, record, self.accelerator):
            raise CheckpointError(
                f"Cannot resume from {found.folder}: it was written by {record.world_size} processes, and DeepSpeed "
                f"resumes on the same number only; this run has {self.args.world_size}. Launch as many, or train anew "
                "from its weights by loading them with from_pretrained."
            )
        model_file, optimizer_file = weights.files_to_resume_from(self.model, self.accelerator)
        needed = [model_file] if model_file is not None else []
        if found.has_optimizer_state and not self._fresh_optimizer:
            needed.append(optimizer_file)
        missing = [name for name in needed if not (found.folder / name).exists()]
        if missing and not found.has_optimizer_state:
            raise CheckpointError(
                f"Cannot resume from {found.folder}: it has no optimizer state. "
                f"{self._way_on_from_weights(found.folder)}."
            )
        if missing:
            engine = record.engine if record is not None else None
            raise CheckpointError(
                f"Cannot resume from {found.folder}: there is no {missing[0]}, which this run would load. It was "
                f"written by another engine ({engine or 'unknown'}) or with another state_dict_type: resume with "
                "these, or train anew from its weights by loading them with from_pretrained."
            )

    def _loads_optimizer(self, checkpoint: str) -> bool:
        """Whether the optimizer state in a checkpoint is to be loaded; False only for a fresh optimizer.

        Raises:
            CheckpointError: it is missing, or that of another optimizer, which the Trainer would load or skip silently.
        """
        folder = Path(checkpoint)
        if self._resumed is None:  # a Trainer whose own create_optimizer made a schedule-free one
            self._resumed = self._choose_together(checkpoint)
        optimizer_class = type(weights.unwrap_optimizer(self.optimizer)).__name__
        written_by = self._resumed.optimizer or verify.optimizer_of_state(folder)
        fits = written_by in (None, optimizer_class)
        if not fits and not self._fresh_optimizer:
            raise CheckpointError(
                f"Cannot resume from {folder}: its optimizer state was written by {written_by}, and this run uses "
                f"{optimizer_class}. Use the same optimizer, or start a new one from the weights by "
                "train(..., fresh_optimizer=True)."
            )
        if self._fresh_optimizer and not self.is_deepspeed_enabled:
            return False  # with the state would come the former learning rate, weight decay, beta and warm-up
        _, optimizer_file = weights.files_to_resume_from(self.model, self.accelerator)
        of_this_engine = (folder / optimizer_file).exists()  # a fresh optimizer can do without
        return fits and self._resumed.has_optimizer_state and (of_this_engine or not self._fresh_optimizer)

    def _start_fresh_optimizer(self) -> None:
        self._switch.show_x()
        self._switch.restart()
        logger.info(f"A fresh optimizer goes on from the weights in {self._resumed.folder}: x = y = z.")

    def _load_whole_best(self, load: Callable[[], None]) -> None:
        """Have the best model loaded in all processes, if its checkpoint is whole.

        A bit that was flipped on disk since the save would be published, and a node that does not see the files would
        go on with other weights.
        """
        best = Path(self.state.best_model_checkpoint)
        found = self._chosen_by_writer(
            lambda: verify.verify_checkpoint(best) if (best / RECORD_NAME).exists() else None
        )
        recorded = self._of_all(found is not None)[0]
        unseen = recorded and (found is None or bool(self._unseen_in(best, found.record)))
        shared = self._engine.each_loads and any(self._of_all(unseen))
        if not (shared and unseen):
            load()
        if shared:
            self._engine.share_main_weights()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that is resumed after its last step has nothing to do; the Trainer would take one step more.
        if self._switch is not None and self._resumed is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    # Several processes

    def _on_writers(self, act: Callable[[], Any]) -> None:
        """Run `act` where files are written (the main process, or one per node); every process learns if it failed."""
        error = None
        if self.args.should_save:
            try:
                act()
            except OSError as raised:
                error = raised
        if self.args.world_size == 1 and error is not None:
            raise error
        self._all_learn_of(None if error is None else str(error))

    def _all_learn_of(self, failure: str | None) -> None:
        """Wait for all processes; each raises if one of them has failed."""
        failed = dict.fromkeys(text for text in self._of_all(failure) if text is not None)
        if failed:
            raise CommitError("; ".join(failed))

    def _chosen_by_writer(self, choose: Callable[[], Result]) -> Result:
        """On every process, what is chosen where files are written: in the main process, or on this node.

        So are the errors, which are those of all nodes.
        """
        if self.args.world_size == 1:
            return choose()
        outcome: tuple[Any, str | None] = (None, None)
        if self.args.should_save:
            try:
                outcome = choose(), None
            except CheckpointError as error:
                outcome = None, str(error)
        if self.args.save_on_each_node:
            outcomes = self._of_all(outcome)
        else:
            outcomes = [outcome]
            torch.distributed.broadcast_object_list(outcomes, src=0)
        errors = dict.fromkeys(error for _, error in outcomes if error is not None)
        if errors:
            raise CheckpointError("; ".join(errors))
        first_of_node = self.args.process_index - self.args.local_process_index
        return outcomes[first_of_node if self.args.save_on_each_node else 0][0]

    def _of_all(self, value: Result) -> list[Result]:
        """The values of all processes."""
        values = [value] * self.args.world_size
        if self.args.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values


class CommitError(OSError):
    """A checkpoint could not be written or committed; all processes know it."""


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of modification of each file, to see whether a callback wrote into the folder."""
    return {name: (path.stat().st_size, path.stat().st_mtime_ns) for name, path in files_in(folder).items()}


def _newest_beside(folder: str | os.PathLike[str]) -> str:
    """A sentence that names the newest whole checkpoint in the same run; `folder` may be that of the run."""
    folder = Path(folder).absolute()
    run_dir = folder if commit.checkpoint_folders(folder) else folder.parent
    newest, _ = verify.find_committed(run_dir, need_optimizer=True)
    parts = (RECORD_NAME, files.TRAINER_STATE, files.OPTIMIZER_FILE)
    if newest is None and any(folder.glob("*.safetensors")) and not any((folder / name).exists() for name in parts):
        return "It is a saved model and no checkpoint: load it by from_pretrained, and train() starts anew from it."
    if newest is None:
        return f"There is no whole checkpoint in {run_dir}."
    return f"The newest whole checkpoint in {run_dir} is {newest.folder.name}."
