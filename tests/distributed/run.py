"""The worker of the engine tests: one process of several, launched by torchrun. It does every check of one engine in
one launch and leaves numbers; `test_engines.py` judges them.

    torchrun --nproc_per_node 2 tests/distributed/run.py ENGINE FOLDER [PART ...]
"""

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import safetensors.torch
import torch
from engines import ENGINES, EngineRow
from memory import memory
from torch import distributed
from transformers import LlamaConfig, TrainerCallback, set_seed
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_schedulefree import ScheduleFreeTrainer, averaged_weights, disks, saving
from hf_schedulefree.optim import AdamWScheduleFree, ScheduleFreeOptimizer
from hf_schedulefree.weights import training_weights, unwrap_optimizer

STEPS = 8
GLOBAL_BATCH = 8


class Sentences(torch.utils.data.Dataset):
    """A fixed, learnable toy language: each token follows from the one before it, but for a little noise."""

    def __init__(self, seed, size):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, 64, (size, 1), generator=generator)
        noise = torch.randint(0, 3, (size, 16), generator=generator)
        self.rows = (first + torch.cumsum(noise, 1) * 7) % 64

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def config(**sizes):
    return LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
            "attention_dropout": 0.1,  # draws from the generators: a reader that disturbs them would be seen
            **sizes,
        }
    )


class Lab:
    """One engine in this launch: makes trainers, reads what they hold, keeps the results."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.engine: EngineRow = ENGINES[name]
        self.folder = folder
        self.results = {}

    def trainer(self, name, *, dropout=False, callbacks=(), model_sizes=None, idle=False, **options):
        set_seed(0)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        accumulation = options.pop("gradient_accumulation_steps", 2)
        defaults = {
            "output_dir": str(self.folder / name),
            "optim": "adamw_schedulefree",
            "learning_rate": 0.03,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "adam_epsilon": 1e-4,  # with less, gradients near zero turn rounding into steps of full length
            "max_grad_norm": 0.5,
            "max_steps": STEPS,
            "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
            "per_device_eval_batch_size": 8 // processes,
            "gradient_accumulation_steps": accumulation,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 1,
        }
        args = self.engine.arguments(**{**defaults, **options})
        set_seed(0)
        sizes = model_sizes or {}
        model = self.engine.model(config(**sizes), self.folder / "_".join(["start", *map(str, sizes.values())]))
        if not dropout:
            model.config.attention_dropout = 0.0
            for module in model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
        if idle:
            model.idle = torch.nn.Linear(8, 8, bias=False)  # no forward pass uses it: it never has a gradient
        return ScheduleFreeTrainer(
            model=model,
            args=args,
            train_dataset=Sentences(0, 64),
            eval_dataset=Sentences(1, 16),
            callbacks=list(callbacks),
        )

    @property
    def is_main(self):
        return int(os.environ.get("RANK", "0")) == 0

    def keep(self, name, value):
        self.results[name] = value

    def keep_weights(self, name, trainer):
        """The whole model as it stands, as anybody would read it."""
        weights = self.engine.whole_model(trainer)
        if self.is_main:
            weights = {key: value.detach().float().clone() for key, value in weights.items()}
            torch.save(weights, self.folder / f"{name}.pt")

    def finish(self):
        (self.folder / f"results_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(self.results))


def inner(trainer):
    optimizer = unwrap_optimizer(trainer.optimizer)
    return optimizer if isinstance(optimizer, ScheduleFreeOptimizer) else optimizer.optimizer


def fingerprint(trainer):
    """Of every bit that this process holds of the run: weights, optimizer state and counters; at y."""
    with trainer.training_weights():
        return fingerprint_of(trainer.model, inner(trainer))


def fingerprint_of(model, optimizer):
    """Of what they hold now."""
    digest = hashlib.sha256()
    for p in model.parameters():
        tensor = p.ds_tensor if hasattr(p, "ds_tensor") else p
        digest.update(bits(tensor))
    in_order = [optimizer.state[p] for p in model.parameters() if p in optimizer.state]
    for state in in_order or optimizer.state.values():  # DeepSpeed's parameters are none of the model's
        for name in sorted(state):
            if torch.is_tensor(state[name]):
                digest.update(name.encode() + bits(state[name]))
    for group in optimizer.param_groups:
        digest.update(repr([group[name] for name in ("k", "weight_sum", "lr_max")]).encode())
    return digest.hexdigest()


def bits(tensor):
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def counts(trainer):
    return [group["k"] for group in inner(trainer).param_groups]


# --- parts ------------------------------------------------------------------------------------------------------------


def trajectory(lab):
    """Without dropout, as the generators of two processes differ from those of one."""
    trainer = lab.trainer("trajectory", save_strategy="steps", save_steps=4, logging_strategy="steps", logging_steps=1)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    lab.keep("progress", [[entry[name] for name in ("relative_distance", "averaging_weight")] for entry in history])
    lab.keep_weights("trajectory_x", trainer)
    with trainer.training_weights():
        lab.keep_weights("trajectory_y", trainer)
    lab.keep("counts", counts(trainer))
    lab.keep("processes", trainer.args.world_size)
    lab.keep("distributed_type", str(trainer.accelerator.distributed_type))


class ReadsAlways(TrainerCallback):
    """Somebody who looks at the model in the middle of training."""

    def __init__(self):
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 3 == 0:
            with self.trainer.averaged_weights():
                pass


def readers(lab):
    """Evaluation, prediction, saves and best model: what they show, and that the training does not notice them."""
    quiet = lab.trainer("quiet", dropout=True)
    quiet.train()
    lab.keep("quiet", fingerprint(quiet))

    reader = ReadsAlways()
    busy = lab.trainer(
        "busy",
        dropout=True,
        callbacks=[reader],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
    )
    reader.trainer = busy
    busy.train()
    lab.keep("busy", fingerprint(busy))
    lab.keep_weights("busy_x", busy)
    with busy.training_weights():
        lab.keep_weights("busy_y", busy)
    lab.keep("eval_losses", [entry["eval_loss"] for entry in busy.state.log_history if "eval_loss" in entry])
    lab.keep("evaluate", busy.evaluate()["eval_loss"])
    predicted = busy.predict(Sentences(1, 16))
    lab.keep("predict", predicted.metrics["test_loss"])
    busy.save_model(str(lab.folder / "saved"))
    lab.keep("after_readers", fingerprint(busy))
    with busy.training_weights():
        busy.save_model(str(lab.folder / "saved_at_y"))
    lab.keep("after_saving", fingerprint(busy))


def resume(lab):
    """From the checkpoint of `readers` in the middle of the run."""
    run = "busy"
    trainer = lab.trainer("resumed", dropout=True)
    trainer.train(resume_from_checkpoint=str(lab.folder / run / "checkpoint-4"))
    lab.keep("resumed", fingerprint(trainer))
    lab.keep("resumed_step", trainer.state.global_step)
    lab.keep_weights("resumed_x", trainer)


def elsewhere(lab):
    """Resume the checkpoint of `trajectory`, which another number of processes wrote."""
    trainer = lab.trainer("elsewhere")
    trainer.train(resume_from_checkpoint=str(lab.folder / "trajectory" / "checkpoint-4"))
    lab.keep_weights("elsewhere_x", trainer)


def refused_elsewhere(lab):
    """As `elsewhere`, in an engine that resumes on the same number of processes only."""
    for fresh_optimizer in (False, True):
        try:
            lab.trainer("elsewhere").train(str(lab.folder / "trajectory/checkpoint-4"), fresh_optimizer=fresh_optimizer)
        except ValueError as error:
            lab.results.setdefault("refused_elsewhere", []).append(str(error))


def weights_alone(lab):
    """What is said of a checkpoint of `save_only_model`."""
    lab.trainer("alone", save_strategy="steps", save_steps=4, save_only_model=True).train()
    messages = []
    for checkpoint in (True, str(lab.folder / "alone/checkpoint-4")):
        for fresh_optimizer in (False, True):
            try:
                lab.trainer("alone").train(resume_from_checkpoint=checkpoint, fresh_optimizer=fresh_optimizer)
            except ValueError as error:
                messages.append(str(error))
    lab.keep("weights_alone", messages)


def each_node(lab):
    """With `save_on_each_node`; that the nodes have disks of their own is played by folders."""
    options = {"dropout": True, "save_strategy": "steps", "save_steps": 4, "save_on_each_node": True}
    trainer = lab.trainer(f"node_{os.environ['RANK']}", **options)
    trainer.train()
    trainer.save_model()
    lab.keep("each_node", fingerprint(trainer))
    lab.keep_weights("each_node_x", trainer)
    newest = Path(trainer.args.output_dir) / f"checkpoint-{STEPS}"
    for happened in ("nothing", "interrupted", "damaged", "lost"):
        if not lab.is_main and happened == "interrupted":
            (newest.parent / "_saving").mkdir()
            newest.rename(newest.parent / "_saving" / newest.name)
        elif not lab.is_main and happened == "damaged":
            with open(newest / "scheduler.pt", "ab") as file:
                file.write(b"more")
        elif not lab.is_main and happened == "lost":
            shutil.rmtree(newest)
        distributed.barrier()
        begin = Begin()
        resumed = lab.trainer(newest.parent.name, dropout=True, save_on_each_node=True, callbacks=[begin])
        resumed.train(resume_from_checkpoint=True)
        lab.keep(f"each_node_{happened}", [begin.step, fingerprint(resumed)])


class Begin(TrainerCallback):
    """From which step on a run was trained."""

    step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def own_disks(lab):
    """Without `save_on_each_node`; that the nodes have disks of their own is played by folders."""
    disks.PATIENCE = disks.PATIENCE_AT_SAVES = 0.1
    exists = Path.exists
    if not lab.is_main:
        Path.exists = lambda path: "disk_0" not in path.parts and exists(path)
    trainer = first_is_best(lab, f"disk_{os.environ['RANK']}")
    said = []
    error, saving.logger.error = saving.logger.error, lambda text, *args: said.append(text)
    trainer.train()
    saving.logger.error = error
    lab.keep("own_disks_said", said)
    lab.keep("own_disks_left", sorted(path.name for path in Path(trainer.args.output_dir).iterdir()))
    lab.keep_weights("own_disks_x", trainer)
    lab.keep("own_disks", fingerprint(trainer))
    try:
        lab.trainer(f"disk_{os.environ['RANK']}").train(resume_from_checkpoint=True)
    except ValueError as error:
        lab.keep("own_disks_resumed", str(error))
    Path.exists = exists


def seen_late(lab):
    """A disk that nodes share; the second one sees what was moved or made on the first one a second later."""
    exists, rmtree = Path.exists, shutil.rmtree
    first_asked = {}

    def exists_as_seen(path):
        if "_saving" in path.parts and "seen_late" in path.parts:
            return exists(path) or exists(moved(path))
        if "seen_late" in path.parts:
            return exists(path) and time.monotonic() - first_asked.setdefault(str(path), time.monotonic()) > 1
        return exists(path)

    def rmtree_as_seen(path, *args, **kwargs):
        return rmtree(path if exists(Path(path)) else moved(Path(path)), *args, **kwargs)

    def moved(path):
        return Path(*(part for part in path.parts if part != "_saving"))

    if not lab.is_main:
        Path.exists, shutil.rmtree = exists_as_seen, rmtree_as_seen
    trainer = first_is_best(lab, "seen_late")
    trainer.train()
    lab.keep_weights("seen_late_x", trainer)
    lab.keep("seen_late", fingerprint(trainer))
    first_asked.clear()
    resumed = lab.trainer("seen_late")
    resumed.train(resume_from_checkpoint=str(lab.folder / "seen_late/checkpoint-4"))
    Path.exists, shutil.rmtree = exists, rmtree
    lab.keep("seen_late_resumed", fingerprint(resumed))
    quiet = lab.trainer("seen_late_quiet")
    quiet.train()
    lab.keep("seen_late_quiet", fingerprint(quiet))


class FirstIsBest(TrainerCallback):
    """By the metric, the model of an early step is the best."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = 1.0 if state.global_step == 2 else 0.0


def first_is_best(lab, name):
    return lab.trainer(
        name,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        callbacks=[FirstIsBest()],
    )


def best(lab):
    """The best model is that of an early step; it is loaded at the end, as x."""
    trainer = first_is_best(lab, "best")
    trainer.train()
    lab.keep("best_checkpoint", Path(trainer.state.best_model_checkpoint).name)
    lab.keep_weights("best_x", trainer)
    lab.keep("best_evaluate", trainer.evaluate()["eval_loss"])
    trainer.save_model(str(lab.folder / "best_saved"))


def overflow(lab):
    """With a gradient scaler; at two steps the gradients of the last process are infinite."""
    trainer = lab.trainer("overflow", eval_strategy="steps", eval_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    compute_loss = trainer.compute_loss

    def overflowing(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        last = trainer.args.process_index == trainer.args.world_size - 1
        overflows = model.training and last and trainer.state.global_step in (2, 5)
        return loss * float("inf") if overflows else loss

    trainer.compute_loss = overflowing
    trainer.train()
    lab.keep("overflow", fingerprint(trainer))
    lab.keep("overflow_counts", counts(trainer))
    lab.keep("overflow_scale", trainer.accelerator.scaler.get_scale())
    lab.keep_weights("overflow_x", trainer)


class OnlyInMain(TrainerCallback):
    """What a user adds in the main process only: the others do not know of it."""

    def __init__(self):
        self.seen = set()

    def on_log(self, *args, **kwargs):
        self.seen.add("log")

    def on_evaluate(self, *args, **kwargs):
        self.seen.add("evaluate")

    def on_save(self, *args, **kwargs):
        self.seen.add("save")

    def on_train_end(self, *args, **kwargs):
        self.seen.add("end")


class WritesItsOwn(TrainerCallback):
    """Each process writes a file into the checkpoint, the last one slowly."""

    def on_save(self, args, state, control, **kwargs):
        with open(Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"own_{args.process_index}", "w") as file:
            file.write("the first half, ")
            file.flush()
            time.sleep(args.process_index)
            file.write("and the second")


def callbacks(lab):
    """Callbacks that not all processes have, or that not all have done with at the same time."""
    only = OnlyInMain()
    trainer = lab.trainer(
        "callbacks",
        dropout=True,
        callbacks=[only, WritesItsOwn()] if lab.is_main else [WritesItsOwn()],
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    lab.keep("callbacks", fingerprint(trainer))
    lab.keep("callbacks_seen", sorted(only.seen))


class Sigterm(TrainerCallback):
    """In the last process, a SIGTERM's time has come in the third step."""

    def __init__(self):
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == args.world_size - 1:
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, JITCheckpointCallback):
                    callback.jit_manager.is_checkpoint_requested = True


def sigterm(lab):
    """With a checkpoint on SIGTERM, which one process notices alone and in the middle of a step."""
    stops = Sigterm()
    trainer = lab.trainer("sigterm", dropout=True, callbacks=[stops], enable_jit_checkpoint=True)
    stops.trainer = trainer
    trainer.train()
    lab.keep("sigterm_step", trainer.state.global_step)
    resumed = lab.trainer("sigterm", dropout=True)
    resumed.train(resume_from_checkpoint=True)
    lab.keep("sigterm_resumed", fingerprint(resumed))


def idle(lab):
    """A parameter without a gradient, and hence without optimizer state, is in the checkpoint as the others are."""
    trainer = lab.trainer("idle", dropout=True, idle=True, save_strategy="steps", save_steps=4)
    trainer.train()
    lab.keep("idle", fingerprint(trainer))
    resumed = lab.trainer("idle", dropout=True, idle=True)
    resumed.train(resume_from_checkpoint=str(lab.folder / "idle/checkpoint-4"))
    lab.keep("idle_resumed", fingerprint(resumed))


def evaluated_first(lab):
    """An evaluation and a prediction before `train()`, without and with mixed precision."""
    for options in ({}, {"bf16": True}) if lab.name == "ddp" else ({},):
        for name in ("unread", "evaluated_first"):
            trainer = lab.trainer(name, dropout=True, **options)
            if name == "evaluated_first":
                trainer.evaluate()
                trainer.predict(Sentences(1, 16))
                set_seed(trainer.args.seed)  # before train(), nobody promises to leave the generators as they are
            trainer.train()
            lab.results.setdefault(name, []).append(fingerprint(trainer))


def second_train(lab):
    """After `train()` once more, and the same by a Trainer whose model begins there."""
    for name in ("second_train", "begun_at_x"):
        trainer = lab.trainer(name, dropout=True)
        if name == "second_train":
            trainer.train()
            trainer.evaluate()
            trainer.save_model(str(lab.folder / "first_train"))
        else:
            distributed.barrier()
            trainer.model.load_state_dict(
                safetensors.torch.load_file(lab.folder / "first_train/model.safetensors"), strict=False
            )
        set_seed(trainer.args.seed)
        trainer.train()
        lab.keep(name, fingerprint(trainer))


def own_loop(lab):
    """No Trainer: accelerate prepares model and optimizer, saves and loads, and the loop is that of the docs."""

    def run(name, reads=False, resumes=False):
        accelerator, model = (made := lab.trainer(name, gradient_accumulation_steps=1)).accelerator, made.model
        optimizer = AdamWScheduleFree(model.parameters(), lr=0.03, warmup_steps=3)
        batches = torch.utils.data.DataLoader(Sentences(0, 64), batch_size=GLOBAL_BATCH // made.args.world_size)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        folder = str(lab.folder / "loop_state")
        if resumes:
            accelerator.load_state(folder)
            batches = accelerator.skip_first_batches(batches, STEPS // 2)
        with training_weights(model, optimizer):
            for step, batch in enumerate(batches, start=1):
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                if reads:
                    with averaged_weights(model, optimizer):
                        loss = evaluation_loss(model)
                        if step == STEPS // 2:
                            accelerator.save_state(folder)
            lab.keep(name, fingerprint_of(accelerator.unwrap_model(model), unwrap_optimizer(optimizer)))
        if reads:
            weights = accelerator.get_state_dict(model)
            if lab.is_main:
                torch.save({key: value.detach().clone() for key, value in weights.items()}, lab.folder / "loop_x.pt")
            lab.keep("loop_losses", [loss, evaluation_loss(model)])

    run("loop_quiet")
    run("loop_busy", reads=True)
    run("loop_resumed", resumes=True)


@torch.no_grad()
def evaluation_loss(model):
    rows = torch.stack([row["input_ids"] for row in Sentences(1, 16)])
    model.eval()
    loss = model(input_ids=rows, labels=rows).loss.item()
    model.train()
    return loss


class FailsToWrite(TrainerCallback):
    """At each step, a file that one process (or each) cannot write: the disk is full."""

    PLANS: ClassVar = {  # the beginning of an engine's name -> step -> rank (None: all), part of the file's path
        "ddp": {3: (0, "optimizer.pt")},
        "fsdp2-full": {3: (0, "pytorch_model_fsdp.bin"), 4: (0, "optimizer.bin")},
        "fsdp2-sharded": {3: (1, "pytorch_model_fsdp_0/__1_0.distcp"), 4: (1, "optimizer_0")},
        "fsdp2-native": {3: (0, "optimizer_0/.metadata"), 4: (1, "optimizer_0/__1_0.distcp")},
        "zero1": {3: (1, "zero_pp_rank_1"), 4: (0, "latest")},
        "zero2": {3: (0, "mp_rank_00_model_states.pt"), 4: (0, "zero_to_fp32.py")},
        "zero3": {3: (1, "zero_pp_rank_1_mp_rank_00_optim_states.pt"), 4: (1, "zero_pp_rank_1_mp_rank_00_model")},
        "": {
            2: (0, "model.safetensors"),
            4: (1, "rng_state_1.pth"),
            5: (0, "trainer_state.json"),
            6: (0, "_saving"),
            7: (None, "rng_state"),
        },
    }

    def __init__(self, engine):
        self.step = 0
        self.plan = {
            step: fault
            for name, plan in reversed(self.PLANS.items())
            if engine.startswith(name)
            for step, fault in plan.items()
        }
        for owner, name, position in (
            (torch, "save", 1),
            (safetensors.torch, "serialize_file", 1),
            (builtins, "open", 0),
            (io, "open", 0),
            (os, "mkdir", 0),
        ):
            setattr(owner, name, self.failing(getattr(owner, name), position))

    def failing(self, write, position):
        def write_or_fail(*args, **kwargs):
            rank, part = self.plan.get(self.step, (None, None))
            path = str(args[position]) if len(args) > position else ""
            concerned = part is not None and "_saving" in path and part in path
            if concerned and rank in (None, int(os.environ["RANK"])):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return write(*args, **kwargs)

        return write_or_fail

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step


def write_errors(lab):
    """As `readers`, with a save at each step, most of which fail in one process."""
    trainer = lab.trainer(
        "failing",
        dropout=True,
        callbacks=[FailsToWrite(lab.name)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        metric_for_best_model="loss",
    )
    said = []
    error, saving.logger.error = saving.logger.error, lambda text, *args: said.append(text)
    trainer.train()
    saving.logger.error = error
    lab.keep("failing", fingerprint(trainer))
    lab.keep("failing_said", said)
    resumed = lab.trainer("failing", dropout=True)
    resumed.train(resume_from_checkpoint=True)
    lab.keep("failing_resumed_step", resumed.state.global_step)
    lab.keep("failing_resumed", fingerprint(resumed))


def refusals(lab):
    """What this engine cannot do is refused when the Trainer is built."""
    messages = []
    for options, _ in lab.engine.refused():
        try:
            lab.trainer("refused", **options)
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("")
    lab.keep("refusals", messages)


PARTS = {
    part.__name__: part
    for part in (
        trajectory,
        readers,
        resume,
        best,
        elsewhere,
        refused_elsewhere,
        weights_alone,
        each_node,
        own_disks,
        seen_late,
        refusals,
        callbacks,
        sigterm,
        idle,
        evaluated_first,
        second_train,
        own_loop,
        write_errors,
        memory,
        overflow,
    )
}


def main():
    name, folder, *parts = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    lab = Lab(name, Path(folder))
    results = Path(folder) / f"results_{os.environ.get('RANK', '0')}.json"
    if results.exists():
        lab.results = json.loads(results.read_text())
    for part in parts or ["trajectory", "readers", "resume", "best"]:
        PARTS[part](lab)
        lab.finish()
    (lab.folder / f"done_{os.environ.get('RANK', '0')}").touch()
    with contextlib.suppress(Exception):
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DeepSpeed's threads sometimes abort an ordinary exit
