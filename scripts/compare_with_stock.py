"""What the stock Trainer does with a schedule-free optimizer, beside ScheduleFreeTrainer: prints a Markdown table.

    python scripts/compare_with_stock.py [--output FILE] [--steps 200]

Both train the same byte-level language model on Python's own sources with the same options: the stock `Trainer` with
`optim="schedule_free_adamw"` (needs the `schedulefree` package), ours with `optim="adamw_schedulefree"`. CPU, minutes.
docs/why.md shows the table and explains the rows.
"""

import argparse
import copy
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_schedulefree import ScheduleFreeTrainer

BLOCK = 64
Side = tuple[type[Trainer], str]
SIDES: dict[str, Side] = {
    "stock": (Trainer, "schedule_free_adamw"),
    "ours": (ScheduleFreeTrainer, "adamw_schedulefree"),
}


def text_blocks(count: int) -> list[dict[str, Tensor]]:
    """Blocks of bytes of the standard library's sources, the same on every run with one Python."""
    data = bytearray()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data += file.read_bytes()
        if len(data) >= count * BLOCK:
            break
    rows = torch.tensor(list(data[: count * BLOCK]), dtype=torch.long).view(count, BLOCK)
    return [{"input_ids": row, "labels": row} for row in rows]


DATA = text_blocks(1200)
TRAIN, VALIDATION = DATA[:1136], DATA[1136:]


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=BLOCK, **sizes)).to(dtype)


def make_trainer(side: Side, output_dir: str, model: nn.Module | None = None, callbacks=(), **options: Any) -> Trainer:
    trainer_class, optim = side
    defaults = {
        "output_dir": output_dir,
        "optim": optim,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return trainer_class(
        model=make_model() if model is None else model,
        args=TrainingArguments(**{**defaults, **options}),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=list(callbacks),
    )


def optimizer_of(trainer: Trainer) -> Any:
    return trainer.optimizer.optimizer


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


class Sequences:
    """x and y in float64 where the optimizer has just stepped, so nobody can have switched anything."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        step = optimizer_of(trainer).step

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.note()
            return result

        optimizer_of(trainer).step = noted

    def note(self) -> None:
        optimizer = optimizer_of(self.trainer)
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        y, z = flat(trained), flat([optimizer.state[p]["z"] for p in trained])
        self.y, self.x = y, y + (1 - 1 / 0.9) * (z - y)

    def judge(self, weights: Tensor) -> str:
        to_x, to_y = (weights - self.x).norm(), (weights - self.y).norm()
        return "x" if to_x < to_y else "y"


class Noting(TrainerCallback):
    """Notes which weights the model shows to callbacks that read it, and at which weights files are written."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.sequences: Sequences | None = None
        self.seen: dict[str, str] = {}

    def shown(self) -> str:
        return self.sequences.judge(flat([p for p in self.trainer.model.parameters() if p.requires_grad]))

    def on_train_begin(self, args, state, control, **kwargs):
        self.sequences = Sequences(self.trainer)

    def on_save(self, args, state, control, **kwargs):
        self.seen["on_save"] = self.shown()

    def on_train_end(self, args, state, control, **kwargs):
        self.seen["on_train_end"] = self.shown()

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen["on_evaluate"] = self.shown()


def weights_in(folder: Path, model: nn.Module) -> Tensor:
    file = load_file(folder / "model.safetensors")
    return flat([file[name] for name, p in model.named_parameters() if p.requires_grad])


def noting_run(side: Side, folder: str, **options: Any) -> tuple[Trainer, Noting]:
    noting = Noting()
    trainer = make_trainer(side, folder, callbacks=[noting], **options)
    noting.trainer = trainer
    trainer.train()
    return trainer, noting


def who_sees_what(side: Side, steps: int) -> dict[str, str]:
    """Which weights each reader gets, in a run with a checkpoint far from any evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, noting = noting_run(side, folder, max_steps=steps, save_strategy="steps", save_steps=steps // 2)
        seen = {"callback on_save": noting.seen["on_save"], "callback on_train_end": noting.seen["on_train_end"]}
        at_end = noting.sequences.judge(weights_in(Path(folder) / f"checkpoint-{steps}", trainer.model))
        seen["a step-triggered checkpoint"] = at_end
        seen["code after train()"] = noting.shown()
        trainer.save_model(f"{folder}/model")
        seen["save_model() after train()"] = noting.sequences.judge(weights_in(Path(folder) / "model", trainer.model))
        seen["push_to_hub() after train()"] = noting.sequences.judge(pushed_weights(trainer))
        trainer.evaluate()
        seen["callback on_evaluate"] = noting.seen["on_evaluate"]
        seen["evaluate()"] = noting.shown()
    seen["a step-triggered checkpoint of a LoRA adapter"] = lora_checkpoint(side, steps)
    return seen


def pushed_weights(trainer: Trainer) -> Tensor:
    """The weights that `push_to_hub()` uploads; the client is replaced, so nothing leaves this machine."""
    uploaded = []

    class Client:
        def upload_folder(self, folder_path: str, **kwargs: Any) -> None:
            uploaded.append(weights_in(Path(folder_path), trainer.model))

    trainer.hub_model_id = "user/model"
    with mock.patch("transformers.trainer.hf_api", Client):
        trainer.push_to_hub()
    return uploaded[0]


def lora_checkpoint(side: Side, steps: int) -> str:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return "(needs peft)"
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": steps, "learning_rate": 2e-2}
        trainer, noting = noting_run(side, folder, model=model, **options)
        file = load_file(Path(folder) / f"checkpoint-{steps}" / "adapter_model.safetensors")
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        return noting.sequences.judge(flat([file[name.replace(".default", "")] for name in trained]))


def printed_and_loaded(side: Side, steps: int) -> str:
    """One weight of the evaluated model, and the same weight of the model that a checkpoint loads."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = noting_run(side, folder, max_steps=steps, save_strategy="steps", save_steps=steps)
        trainer.evaluate()
        name = "model.layers.0.self_attn.q_proj.weight"
        evaluated = trainer.model.get_parameter(name)[0, 0].item()
        loaded = load_file(Path(folder) / f"checkpoint-{steps}" / "model.safetensors")[name][0, 0].item()
    return f"{evaluated:.4e} -> {loaded:.4e}"


def perturbation(side: Side, steps: int, dtype: torch.dtype) -> str:
    """How far evaluating and saving every 5 steps moves the run, relative to the norm of its weights (at y)."""
    finals = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(side, folder, model=make_model(dtype), max_steps=steps, **options)
            trainer.train()
            optimizer_of(trainer).train()
            finals.append(flat(list(trainer.model.parameters())))
    difference = (finals[0] - finals[1]).norm() / finals[0].norm()
    return "0 (the same bits)" if torch.equal(*finals) else f"{difference:.1e}"


class StopAt(TrainerCallback):
    """Stops a run early, as a callback that watches the clock would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def best_model(side: Side, steps: int) -> tuple[str, str]:
    """Stop between two evaluations, load the best model, evaluate: how far its weights move, and its loss."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            side,
            folder,
            callbacks=[StopAt(steps - 5)],
            learning_rate=5e-2,
            max_steps=steps,
            eval_strategy="steps",
            eval_steps=10,
            save_strategy="steps",
            save_steps=10,
            load_best_model_at_end=True,
        )
        trainer.train()
        before = flat(list(trainer.model.parameters()))
        loss = trainer.evaluate()["eval_loss"]
        moved = (flat(list(trainer.model.parameters())) - before).abs().max().item()
    return f"{moved:.1e}", f"{trainer.state.best_metric:.4f} -> {loss:.4f}"


def second_train(side: Side, steps: int) -> str:
    """After loading the best model, how far from its weights a second train() starts."""
    starts = []

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.fresh = True

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if self.fresh:
                starts.append(flat(list(model.parameters())))
            self.fresh = False

    with tempfile.TemporaryDirectory() as folder:
        often = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
        trainer = make_trainer(
            side,
            folder,
            callbacks=[Start()],
            learning_rate=5e-2,
            max_steps=steps,
            load_best_model_at_end=True,
            **often,
        )
        trainer.train()
        loaded = flat(list(trainer.model.parameters()))
        trainer.evaluate()
        trainer.args.max_steps = 1
        trainer.train()
    return f"{(starts[1] - loaded).abs().max().item():.1e}"


def measure(side: Side, steps: int) -> dict[str, str]:
    rows = {f"weights read by {reader}": weights for reader, weights in who_sees_what(side, steps).items()}
    rows["a weight as evaluated -> as loaded from the checkpoint"] = printed_and_loaded(side, steps)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rows[f"change of a {name} run by evaluating and saving every 5 steps"] = perturbation(side, steps, dtype)
    rows["best model: moved by the next evaluate()"], rows["best model: its loss -> loss evaluated"] = best_model(
        side, steps
    )
    rows["best model: distance at which a second train() starts"] = second_train(side, min(steps, 60))
    return rows


def table(columns: dict[str, dict[str, str]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | " + " | ".join(column[row] for column in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, measured: Callable[[Side, int], dict[str, str]] = measure) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default 200)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    titles = {"stock": "Trainer, `schedule_free_adamw`", "ours": "ScheduleFreeTrainer, `adamw_schedulefree`"}
    text = table({titles[name]: measured(copy.copy(side), options.steps) for name, side in SIDES.items()})
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
