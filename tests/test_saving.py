"""Saving and resuming through the Trainer: a checkpoint exists or it does not, and only a whole one is resumed from."""

import concurrent.futures
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_runs import same, tiny_data, tiny_model, tiny_trainer, weights_of
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from hf_schedulefree import disks, saving
from hf_schedulefree.checkpoint import commit, latest_committed, read_header, verify_checkpoint
from hf_schedulefree.checkpoint.record import read_record


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 6 steps: its folder and its final weights."""
    run = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(run)
    trainer.train()
    return run, weights_of(trainer)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may damage."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def folders(run):
    return sorted(path.name for path in Path(run).iterdir())


def test_a_save_leaves_recorded_checkpoints_and_nothing_else(finished):
    run, _ = finished
    assert folders(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (2, 4, 6):
        folder = run / f"checkpoint-{step}"
        verified = verify_checkpoint(folder)
        record = verified.record
        assert (record.step, record.optimizer, record.weights, record.world_size) == (step, "AdamWScheduleFree", "x", 1)
        assert record.files.keys() == {path.name for path in folder.iterdir()} - {"schedule_free.json"}
        names = [name for group in record.parameters for name in group]
        assert sorted(names) == sorted(name for name, _ in tiny_model().named_parameters())
    assert latest_committed(run) == str(run / "checkpoint-6")


def test_weight_files_say_what_they_are(finished, tmp_path):
    run, _ = finished
    for step in (2, 6):
        metadata = read_header(run / f"checkpoint-{step}" / "model.safetensors")["__metadata__"]
        assert metadata == {
            "format": "pt",
            "schedule_free.weights": "x",
            "schedule_free.step": str(step),
            "schedule_free.optimizer": "AdamWScheduleFree",
            "schedule_free.beta": "0.9",
        }
    trainer = tiny_trainer(tmp_path, save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "whole")
    assert read_header(tmp_path / "whole/model.safetensors")["__metadata__"]["schedule_free.weights"] == "x"
    with trainer.averaged_weights():
        trainer.model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert read_header(shard)["__metadata__"]["schedule_free.step"] == "6"
    # Readers that do not know the metadata are not disturbed, and other files are left alone.
    assert same(weights_of(trainer), dict(tiny_model().from_pretrained(tmp_path / "sharded").state_dict()))
    tiny_model().save_pretrained(tmp_path / "plain")
    assert read_header(tmp_path / "plain/model.safetensors")["__metadata__"] == {"format": "pt"}


def test_resume_takes_the_newest_whole_one_and_says_what_it_skipped(run, finished, monkeypatch):
    (run / "checkpoint-6/optimizer.pt").unlink()
    os.truncate(run / "checkpoint-4/model.safetensors", 100)
    trainer = tiny_trainer(run)
    lines = []
    monkeypatch.setattr(saving.logger, "warning", lambda text, *args: lines.append(text))
    trainer.train(resume_from_checkpoint=True)
    assert same(weights_of(trainer), finished[1])
    (line,) = lines
    assert "Resuming from" in line and "checkpoint-2" in line
    assert "checkpoint-6 (optimizer.pt is missing)" in line
    assert "checkpoint-4 (model.safetensors is truncated" in line
    assert verify_checkpoint(run / "checkpoint-6").step == 6  # written anew


def test_resuming_a_finished_run_changes_nothing(run, finished):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    trainer = tiny_trainer(run)
    trainer.train(resume_from_checkpoint=True)
    assert same(weights_of(trainer), finished[1])
    assert trainer.state.global_step == 6
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_node_whose_checkpoint_is_not_kept_removes_its_own_files_only(tmp_path):
    """If it is on the main one's disk after all, the others' lie beside them."""
    staged = tmp_path / "_saving/checkpoint-2"
    own = ("rng_state_1.pth", "optimizer_0/__1_0.distcp", "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    others = ("rng_state_11.pth", "optimizer_0/__11_0.distcp", "../removed-checkpoint-1/model.safetensors")
    for name in (*own, *others):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).touch()
    assert sorted(disks.written_by(1, staged)) == sorted(own)
    disks.discard(staged, disks.written_by(1, staged))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {(staged / name).resolve() for name in others}
    assert not (staged / "global_step2").exists()
    for name in others:
        (staged / name).unlink()
    disks.discard(staged, ["optimizer_0/__1_0.distcp"])
    assert not staged.exists() and staged.parent.exists()


@pytest.mark.parametrize("written", ["latest", "optimizer.bin", "optimizer_0"])
def test_a_checkpoint_of_another_engine_is_refused(run, written):
    """DeepSpeed's and FSDP's: the Trainer would find no optimizer state of its kind, and go on without."""
    (run / "checkpoint-6/optimizer.pt").rename(run / "checkpoint-6" / written)
    commit.commit_checkpoint(run / "checkpoint-6")
    for resume in (True, str(run / "checkpoint-6")):
        trainer = tiny_trainer(run, max_steps=8)
        with pytest.raises(ValueError, match=r"no optimizer\.pt.*another engine \(single\).*from_pretrained"):
            trainer.train(resume_from_checkpoint=resume)
    fresh = tiny_trainer(run, max_steps=8, save_strategy="no")
    fresh.train(resume_from_checkpoint=str(run / "checkpoint-6"), fresh_optimizer=True)
    assert fresh.optimizer.optimizer.param_groups[0]["k"] == 2


@pytest.mark.parametrize("damage", ["removed", "emptied", "truncated", "flipped", "swapped"])
def test_a_damaged_file_is_named_and_the_newest_whole_one_too(run, damage):
    for name in sorted(os.listdir(run / "checkpoint-6")):
        path = run / "checkpoint-6" / name
        content = path.read_bytes()
        other = (run / "checkpoint-4" / name).read_bytes()
        if damage == "swapped" and other == content:
            continue
        if damage == "removed":
            path.unlink()
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
        else:
            path.write_bytes(other)
        with pytest.raises(ValueError) as raised:
            tiny_trainer(run)._choose_checkpoint(str(run / "checkpoint-6"))
        assert name in str(raised.value) and "checkpoint-4" in str(raised.value), str(raised.value)
        assert latest_committed(run) == str(run / "checkpoint-4")
        path.write_bytes(content)
    assert latest_committed(run) == str(run / "checkpoint-6")


def test_weights_slipped_in_are_refused(run):
    shutil.copy(run / "checkpoint-4/model.safetensors", run / "checkpoint-6/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin does not belong"):
        verify_checkpoint(run / "checkpoint-6")


def test_a_checkpoint_of_another_optimizer_is_refused(run):
    trainer = tiny_trainer(run, optim="sgd_schedulefree")
    with pytest.raises(ValueError, match=r"AdamWScheduleFree.*SGDScheduleFree"):
        trainer.train(resume_from_checkpoint=True)


def test_without_optimizer_state_only_a_fresh_optimizer_resumes(tmp_path):
    trainer = tiny_trainer(tmp_path, save_only_model=True)
    trainer.train()
    for resume in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(ValueError, match="fresh_optimizer=True"):
            tiny_trainer(tmp_path).train(resume_from_checkpoint=resume)

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.states = len(optimizer.optimizer.state)

    look = Look()
    trainer = tiny_trainer(tmp_path, more={"callbacks": [look]})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"), fresh_optimizer=True)
    assert look.states == 0
    assert same(look.weights, load_file(tmp_path / "checkpoint-4/model.safetensors"))
    assert trainer.state.global_step == 6
    assert trainer.optimizer.param_groups[0]["k"] == 2


def test_a_fresh_optimizer_has_the_options_of_the_new_run(run, tmp_path):
    """Whatever else the checkpoint holds: its own rate, or that of another optimizer, or none."""
    options = {"learning_rate": 1e-4, "adam_beta1": 0.95, "weight_decay": 0.25, "warmup_steps": 3, "max_steps": 8}
    ends = []
    for with_state in (True, False):
        if not with_state:
            os.remove(run / "checkpoint-4/optimizer.pt")
            commit.commit_checkpoint(run / "checkpoint-4")
        trainer = tiny_trainer(tmp_path / str(with_state), **options)
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"), fresh_optimizer=True)
        group = trainer.optimizer.param_groups[0]
        assert (group["betas"], group["weight_decay"], group["warmup_steps"]) == ((0.95, 0.999), 0.25, 3)
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert rates == pytest.approx([1e-2, 1e-2, 2e-4 / 3, 1e-4])
        ends.append(weights_of(trainer))
    assert same(*ends)


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_way_to_go_on(run, tmp_path):
    with pytest.raises(ValueError, match=rf"The newest whole checkpoint in {run} is checkpoint-6"):
        tiny_trainer(run).train(resume_from_checkpoint=str(run))
    tiny_trainer(tmp_path).save_model(tmp_path / "elsewhere/model")
    for fresh_optimizer in (False, True):
        with pytest.raises(ValueError, match=r"It is a saved model and no checkpoint: load it by from_pretrained"):
            tiny_trainer(tmp_path).train(str(tmp_path / "elsewhere/model"), fresh_optimizer=fresh_optimizer)


@pytest.mark.parametrize("mode", ["y", "x"])
def test_a_checkpoint_of_the_stock_trainer_is_resumed_in_its_own_mode(tmp_path, mode):
    constant = {"lr_scheduler_type": "constant"}
    whole = tiny_trainer(tmp_path / "whole", trainer_class=Trainer, save_strategy="no", **constant)
    whole.train()

    class ShowX(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            optimizer.eval()

    callbacks = {"callbacks": [ShowX()]} if mode == "x" else {}
    stock = tiny_trainer(tmp_path / "run", trainer_class=Trainer, more=callbacks, **constant)
    stock.train()
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    trainer = tiny_trainer(tmp_path / "run", **constant)
    trainer.train(resume_from_checkpoint=True)
    whole.optimizer.eval()
    assert same(weights_of(trainer), weights_of(whole))


@pytest.mark.parametrize("damage", ["removed", "emptied", "truncated", "swapped"])
def test_a_torn_checkpoint_of_the_stock_trainer_is_skipped(tmp_path, damage):
    stock = tiny_trainer(tmp_path, trainer_class=Trainer)
    stock.train()
    assert latest_committed(tmp_path) == str(tmp_path / "checkpoint-6")
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
        path = tmp_path / "checkpoint-6" / name
        content = path.read_bytes()
        if damage == "swapped" and name == "model.safetensors":
            continue  # nothing in the file says of which step it is
        if damage == "removed":
            path.unlink()
        else:
            other = (tmp_path / "checkpoint-4" / name).read_bytes()
            path.write_bytes({"emptied": b"", "truncated": content[:-100], "swapped": other}[damage])
        if name == "optimizer.pt" and damage == "removed":
            with pytest.raises(ValueError, match="fresh_optimizer"):
                tiny_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        else:
            with pytest.raises(ValueError, match=name):
                verify_checkpoint(tmp_path / "checkpoint-6")
            assert latest_committed(tmp_path) == str(tmp_path / "checkpoint-4")
        path.write_bytes(content)


def test_an_optimizer_that_is_not_schedule_free_is_refused(tmp_path):
    tiny_trainer(tmp_path, trainer_class=Trainer, optim="adamw_torch").train()
    with pytest.raises(ValueError, match="written by another optimizer"):
        tiny_trainer(tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_rotation_keeps_the_limit_the_best_and_the_newest(tmp_path):
    trainer = tiny_trainer(tmp_path, save_total_limit=2, max_steps=8)
    trainer.train()
    assert folders(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_at_the_end_the_newest_checkpoint_stays_beside_the_best(tmp_path):
    class GetsWorse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = tiny_trainer(
        tmp_path,
        save_total_limit=1,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        more={"eval_dataset": [{"input_ids": torch.arange(8), "labels": torch.arange(8)}], "callbacks": [GetsWorse()]},
    )
    trainer.train()
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert same(weights_of(trainer), load_file(tmp_path / "checkpoint-2/model.safetensors"))
    assert trainer.state.load_from_json(tmp_path / "checkpoint-2/trainer_state.json").best_model_checkpoint == str(
        tmp_path / "checkpoint-2"
    )


def test_a_step_saved_again_replaces_the_folder_as_a_whole(run):
    trainer = tiny_trainer(run, max_steps=6)
    (run / "checkpoint-6/stale.txt").write_text("from the former save")
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert not (run / "checkpoint-6/stale.txt").exists()
    assert verify_checkpoint(run / "checkpoint-6").step == 6


@pytest.mark.parametrize("where", ["_save_rng_state", "_name_best_checkpoint", "_checkpoint_facts"])
def test_after_an_interrupted_save_the_best_checkpoint_is_one_that_is_there(tmp_path, monkeypatch, where):
    trainer = tiny_trainer(
        tmp_path,
        save_total_limit=3,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        more={"eval_dataset": [{"input_ids": torch.arange(8), "labels": torch.arange(8)}]},
    )
    part = getattr(trainer, where)

    def interrupted(*args, **kwargs):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return part(*args, **kwargs)

    def evaluated(*args, evaluate=trainer.evaluate, **kwargs):
        return evaluate(*args, **kwargs) | {"eval_loss": -trainer.state.global_step}

    monkeypatch.setattr(trainer, where, interrupted)
    monkeypatch.setattr(trainer, "evaluate", evaluated)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.best_global_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replaced_folder_is_there_whenever_the_move_fails(run, monkeypatch, exchange):
    staged = commit.staged_folder(run, "checkpoint-6")
    (staged / "file").write_text("new")
    if not exchange:
        monkeypatch.setattr(commit, "_exchange", lambda one, other: False)
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    if exchange:
        commit.commit_checkpoint(staged, destination=run / "checkpoint-6")
        assert calls == [] and (run / "checkpoint-6/file").read_text() == "new"
    else:
        with pytest.raises(OSError, match="Input/output"):
            commit.commit_checkpoint(staged, destination=run / "checkpoint-6")
        monkeypatch.undo()
        assert read_record(run / "checkpoint-6").step == 6 and not (run / "checkpoint-6/file").exists()


def test_a_move_that_a_kill_interrupted_is_completed(run, finished):
    (run / "_saving").mkdir()
    os.rename(run / "checkpoint-6", run / "_saving/checkpoint-6")
    trainer = tiny_trainer(run)
    trainer.train(resume_from_checkpoint=True)
    assert folders(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert trainer._resumed.step == 6


def test_no_reader_of_checkpoints_sees_a_save_that_is_going_on(run):
    commit.staged_folder(run, "checkpoint-8")
    assert get_last_checkpoint(run) == str(run / "checkpoint-6")
    assert sort_checkpoints(str(run))[-1] == str(run / "checkpoint-6")
    assert latest_committed(run) == str(run / "checkpoint-6")


class _WriteInto(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "notes.txt").write_text("from a callback")
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")


def test_what_callbacks_write_on_save_is_recorded(tmp_path):
    tiny_trainer(tmp_path, more={"callbacks": [_WriteInto()]}).train()
    record = verify_checkpoint(tmp_path / "checkpoint-6").record
    assert "notes.txt" in record.files and record.optimizer == "AdamWScheduleFree"


def test_links_that_lead_nowhere_and_pipes_in_a_checkpoint_end_no_training(tmp_path):
    class Leaves(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "latest").symlink_to(folder / "nowhere")
            os.mkfifo(folder / "pipe")
            (folder / "notes.txt").touch()

    trainer = tiny_trainer(tmp_path, more={"callbacks": [Leaves()]})
    trainer.train()
    assert trainer.state.global_step == 6
    record = verify_checkpoint(tmp_path / "checkpoint-6").record
    assert "notes.txt" in record.files and not {"latest", "pipe"} & record.files.keys()


def test_an_exception_in_a_callback_leaves_the_newest_checkpoint_whole(tmp_path):
    class Fails(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyError("a callback's mistake")

    with pytest.raises(KeyError):
        tiny_trainer(tmp_path, more={"callbacks": [Fails()]}).train()
    assert latest_committed(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_sigterm_checkpoint_is_committed_as_any(tmp_path):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                jit.jit_manager.is_checkpoint_requested = True

    trainer = tiny_trainer(tmp_path, enable_jit_checkpoint=True, save_strategy="no", more={"callbacks": [Terminate()]})
    (jit,) = [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "jit_manager")]
    trainer.train()
    (name,) = folders(tmp_path)
    assert verify_checkpoint(tmp_path / name).record is not None
    assert not (tmp_path / name / "checkpoint-is-incomplete.txt").exists()


@pytest.mark.parametrize(
    "event", ["epoch_begin", "step_begin", "substep_end", "pre_optimizer_step", "step_end", "epoch_end"]
)
def test_a_run_that_sigterm_ended_is_resumed_exactly(event, tmp_path):
    def terminate(args, state, control, **kwargs):
        jit.jit_manager.is_checkpoint_requested |= state.global_step == 4

    def new(folder, **options):
        model = tiny_model(attention_dropout=0.5)
        sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}  # 4 steps in an epoch
        return tiny_trainer(folder, model=model, **sizes, **options)

    whole = new(tmp_path / "whole")
    whole.train()
    terminator = TrainerCallback()
    setattr(terminator, f"on_{event}", terminate)
    trainer = new(tmp_path, enable_jit_checkpoint=True, save_strategy="no")
    (jit,) = [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "jit_manager")]
    trainer.callback_handler.callbacks.insert(0, terminator)
    trainer.train()
    assert trainer.state.global_step < 6
    resumed = new(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize(
    ("strategy", "event", "step"),
    [
        ("epoch", "step_begin", 2),
        ("epoch", "step_end", 2),
        ("epoch", "step_end", 4),
        ("epoch", "epoch_end", 4),
        ("steps", "step_end", 4),
        ("steps", "step_end", 3),
    ],
)
def test_a_run_that_sigterm_ended_evaluates_as_a_whole_one(strategy, event, step, tmp_path):
    def terminate(args, state, control, **kwargs):
        jit.jit_manager.is_checkpoint_requested |= state.global_step == step

    def new(folder, **options):
        model = tiny_model(attention_dropout=0.5)
        sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}  # 4 steps in an epoch
        strategies = {"eval_strategy": strategy, "eval_steps": 2, "save_strategy": strategy}
        data = {"eval_dataset": tiny_data()}
        return tiny_trainer(folder, model=model, more=data, **sizes, **strategies, **options)

    whole = new(tmp_path / "whole")
    whole.train()
    trainer = new(tmp_path, enable_jit_checkpoint=True)
    (jit,) = [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "jit_manager")]
    terminator = TrainerCallback()
    setattr(terminator, f"on_{event}", terminate)
    trainer.callback_handler.callbacks.insert(0, terminator)
    trainer.train()
    assert trainer.state.global_step == step
    resumed = new(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(resumed), weights_of(whole))
    losses = [
        [(entry["step"], entry["eval_loss"]) for entry in run.state.log_history if "eval_loss" in entry]
        for run in (resumed, whole)
    ]
    assert losses[0] == losses[1]


def test_other_optimizers_are_saved_as_the_trainer_does(tmp_path):
    tiny_trainer(tmp_path, optim="adamw_torch").train()
    assert not list(tmp_path.rglob("schedule_free.json"))
    assert "__metadata__" in read_header(tmp_path / "checkpoint-6/model.safetensors")
    assert len(read_header(tmp_path / "checkpoint-6/model.safetensors")["__metadata__"]) == 1


def test_a_push_reads_the_checkpoint_in_its_final_place(tmp_path, monkeypatch):
    uploads = []

    class Client:
        def upload_folder(self, folder_path, **kwargs):
            folder = Path(folder_path)
            committed = folder.name.startswith("checkpoint-") and verify_checkpoint(folder).step
            header = read_header(folder / "model.safetensors")
            uploads.append((folder.name, committed, header["__metadata__"]["schedule_free.weights"]))
            done = concurrent.futures.Future()
            done.set_result(None)
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Client)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    trainer = tiny_trainer(tmp_path / "run", push_to_hub=True, hub_strategy="all_checkpoints", hub_model_id="me/run")
    trainer.hub_model_id, trainer.push_in_progress = "me/run", None
    trainer.train()
    assert uploads[0::2] == [("run", False, "x")] * 3
    assert uploads[1::2] == [(f"checkpoint-{step}", step, "x") for step in (2, 4, 6)]


def test_a_best_model_that_was_altered_is_not_loaded(tmp_path):
    class Alter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                path = Path(state.best_model_checkpoint) / "model.safetensors"
                content = path.read_bytes()
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    trainer = tiny_trainer(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        more={"eval_dataset": [{"input_ids": torch.arange(8), "labels": torch.arange(8)}], "callbacks": [Alter()]},
    )
    with pytest.raises(ValueError, match=r"model.safetensors is altered"):
        trainer.train()


def test_rotation_never_removes_the_newest_committed_one(run):
    """Also where folders of later steps lie beside it that no save has finished."""
    for step in (8, 9):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}/optimizer.pt").write_bytes(b"torn")
    removed = [path.name for path in commit.remove_old_checkpoints(run, 1, [run / "checkpoint-2"])]
    assert removed == ["checkpoint-8", "checkpoint-9", "checkpoint-4"]
    assert folders(run) == ["checkpoint-2", "checkpoint-6"] and latest_committed(run) == str(run / "checkpoint-6")


def test_rotation_keeps_what_it_is_told_to(run):
    assert [path.name for path in commit.remove_old_checkpoints(run, 1, [run / "checkpoint-2"])] == ["checkpoint-4"]
    assert list(commit.remove_old_checkpoints(run, None, [])) == []
    assert folders(run) == ["checkpoint-2", "checkpoint-6"]
