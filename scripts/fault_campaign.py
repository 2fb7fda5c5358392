#!/usr/bin/env python
"""Kill training at random moments, resume, and compare the end with a run that nobody disturbed.

    python scripts/fault_campaign.py --kills 200
    python scripts/fault_campaign.py --kills 20 --seed 7

One process imports everything and forks a child for each attempt; the child trains a tiny model, saving and rotating
often, and is killed (SIGKILL) at a random moment of training, saving, rotating or resuming. The next child resumes from
whatever is there (`resume_from_checkpoint=True`). When a run reaches its end, its weights must be bit for bit those of
the undisturbed run, and every checkpoint in its folder whole; then the next run starts. After each kill the newest
checkpoint must be whole, and never older than one that was seen before.

Every second kill is aimed: the child is stopped at the n-th file operation (write, fsync, rename, removal) of its
saves, so that the short moments of a save are hit as often as the long ones of training.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked children must not share threads

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_schedulefree import ScheduleFreeTrainer
from hf_schedulefree.checkpoint import find_committed, verify_checkpoint
from hf_schedulefree.checkpoint.commit import checkpoint_folders

STEPS = 12
OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "rmdir", "unlink", "remove")


def make_trainer(folder: Path, callbacks: list[TrainerCallback]) -> ScheduleFreeTrainer:
    """A run of 12 steps that saves at each, keeps two checkpoints and evaluates in between."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=16))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 32, (6,), generator=generator) for _ in range(40)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim="adamw_schedulefree",
        max_steps=STEPS,
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=False,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
    )
    return ScheduleFreeTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks
    )


class KillAtOperation:
    """Kills this process just before its n-th file operation below a folder."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.left = str(folder), count
        for name in OPERATIONS:
            setattr(os, name, self.counting(getattr(os, name)))

    def counting(self, operation):
        """`operation`, counted."""

        def counted(*args, **kwargs):
            if args and (isinstance(args[0], int) or self.folder in os.fspath(args[0])):
                self.left -= 1
                if self.left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return counted


class Note(TrainerCallback):
    """Writes down where the child is, in memory that outlives it."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def say(self, what: str) -> None:
        """One word to the parent."""
        os.write(self.pipe, f"{what}\n".encode())

    def on_train_begin(self, args, state, control, **kwargs):
        self.say(f"from {state.global_step}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.say("training")

    def on_step_end(self, args, state, control, **kwargs):
        self.say("saving")


def child(folder: Path, result: Path, operations: int | None, pipe: int) -> None:
    """Train to the end, or until killed."""
    log = os.open(folder.parent / "child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    note = Note(pipe)
    note.say("resuming")
    if operations is not None:
        KillAtOperation(folder, operations)
    trainer = make_trainer(folder, [note])
    trainer.train(resume_from_checkpoint=True if find_committed(folder)[0] else None)
    note.say("finished")
    torch.save({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, result)


def attempt(folder: Path, result: Path, kill_after: float | None, operations: int | None) -> tuple[bool, list[str]]:
    """Fork a child and maybe kill it. Returns whether it was killed, and what it said."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reader)
            child(folder, result, operations, writer)
            status = 0
        except BaseException as error:
            os.write(writer, f"failed {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    said = b""
    while part := os.read(reader, 65536):
        said += part
    os.close(reader)
    return os.WIFSIGNALED(status), said.decode().split("\n")[:-1]


@dataclass
class Campaign:
    """Runs, kills and what came of them."""

    folder: Path
    random: random.Random
    kills: int = 0
    runs: int = 0
    attempts: int = 0
    killed_while: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def undisturbed(self) -> dict[str, torch.Tensor]:
        """The weights that every run must end with; measures how long one takes."""
        result, run = self.folder / "undisturbed.pt", self.folder / "undisturbed"
        run.mkdir()
        start = time.monotonic()
        killed, said = attempt(run, result, None, None)
        self.duration = time.monotonic() - start
        if killed or not result.exists():
            raise RuntimeError(f"the undisturbed run failed: {said[-1:]}; see {self.folder / 'child.log'}")
        return torch.load(result, weights_only=True)

    def disturb(self, expected: dict[str, torch.Tensor], kills: int, until: float = float("inf")) -> None:
        """One run: killed and resumed until it ends."""
        run, result = self.folder / f"run-{self.runs}", self.folder / f"run-{self.runs}.pt"
        run.mkdir()
        self.runs += 1
        newest = 0
        while not result.exists() and not self.failures:
            aimed = self.random.random() < 0.5
            enough = self.kills >= kills or time.monotonic() > until
            # Aimed: a save takes some 40 operations. Otherwise a moment in what a whole run takes.
            operations = None if enough or not aimed else self.random.randint(1, 160)
            kill_after = None if enough or aimed else self.random.uniform(0.0, 0.6 * self.duration)
            killed, said = attempt(run, result, kill_after, operations)
            self.attempts += 1
            failed = [line for line in said if line.startswith("failed")]
            if failed:
                self.failures.append(f"run {self.runs}, attempt {self.attempts}: {failed[0]}")
            if killed:
                self.kills += 1
                self.killed_while[next((word for word in reversed(said) if not word.startswith("from")), "start")] += 1
            found, _ = find_committed(run)
            step = found.step if found is not None else 0
            if step < newest:
                self.failures.append(f"run {self.runs}: checkpoint {newest} was there, now {step} is the newest")
            newest = step
        if result.exists():
            weights = torch.load(result, weights_only=True)
            if any(not torch.equal(weights[name], expected[name]) for name in expected):
                self.failures.append(f"run {self.runs}: the final weights differ from those of the undisturbed run")
            for checkpoint in checkpoint_folders(run):
                verify_checkpoint(checkpoint)
            # One more than the limit is left where the kill came between the last commit and its rotation.
            if len(checkpoint_folders(run)) not in (2, 3):
                self.failures.append(f"run {self.runs}: {len(checkpoint_folders(run))} checkpoints are left, not 2")
        if not self.failures:
            shutil.rmtree(run)


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; printed, so that a run can be repeated")
    parser.add_argument("--folder", type=Path, default=None, help="where to run (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=arguments.folder))
    campaign = Campaign(folder, random.Random(seed))
    expected = campaign.undisturbed()
    start = time.monotonic()
    while campaign.kills < arguments.kills and not campaign.failures:
        campaign.disturb(expected, arguments.kills)
        print(f"{campaign.kills} kills, {campaign.runs} runs, {time.monotonic() - start:.0f} s", flush=True)
    print(f"killed while: {dict(campaign.killed_while)}")
    if campaign.failures:
        print("FAILED: " + "; ".join(campaign.failures) + f"\nseed {seed}, folder {folder}")
        return 1
    shutil.rmtree(folder)
    print(f"{campaign.runs} runs, {campaign.kills} kills: every run ended with the weights of the undisturbed one.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
