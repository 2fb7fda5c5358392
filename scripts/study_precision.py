"""What the precision of the state does to the averaged weights of a bfloat16 model.

A byte-level language model (two layers, 164 thousand parameters) learns Python's own standard library, once in float32
and once in bfloat16 with each `state_precision`, from the same weights and on the same batches. For each run the
validation loss of x is recorded: as published (x in the model's dtype) and, at the end, with x in float32.

    python scripts/study_precision.py run --output results.jsonl
    python scripts/study_precision.py run --output results.jsonl --seeds 0 --steps 2500
    python scripts/study_precision.py run --output results.jsonl --seeds 0 --steps 500 --trainer
    python scripts/study_precision.py report --output results.jsonl --plot docs/precision.png
    python scripts/study_precision.py time

`run` adds one line of JSON for each run, and leaves out what the file has already; `report` prints the tables. A step
takes some 50 milliseconds on one CPU core. `--precisions schedulefree` runs the `schedulefree` package, if installed.
`time` compares the optimizers' steps at 25 million bfloat16 parameters on one core, `schedulefree`'s among them.
"""

import argparse
import json
import pathlib
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_schedulefree.optim import AdamWScheduleFree, precision

PRECISIONS = ("float32", "full", "split", "stochastic", "parameter")
LENGTH, BATCH = 64, 16
LR, BETAS = 1e-3, (0.9, 0.999)


def corpus() -> tuple[Tensor, Tensor]:
    """Training and validation bytes: the standard library's files, every 20th of them held out."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 20 == 19].append(file.read_bytes())
    train, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, validation


def crops(data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random pieces of `data`, as token ids of shape (count, LENGTH)."""
    starts = torch.randint(0, len(data) - LENGTH, (count,), generator=generator)
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()]).long()


def build_model(seed: int, dtype: torch.dtype) -> nn.Module:
    """The model; for a seed, its weights are the same (bfloat16) values in every dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).to(dtype)


@torch.no_grad()
def validation_loss(model: nn.Module, batches: list[Tensor]) -> float:
    """Mean loss per byte, in nats."""
    return statistics.fmean(model(input_ids=batch, labels=batch).loss.item() for batch in batches)


def float32_x(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The model in float32 with all of x that the state holds; the optimizer is in eval mode."""
    wide = build_model(0, torch.float32)
    with torch.no_grad():
        for target, p in zip(wide.parameters(), model.parameters(), strict=True):
            state = optimizer.state[p]
            target.copy_(precision.wide_x(state["y"], state, BETAS[0]) if "y" in state else p)
    return wide


def bytes_per_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Bytes of the storages behind the parameters and all of the optimizer's tensors, in train mode."""
    tensors = [*model.parameters()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / sum(p.numel() for p in model.parameters())


def build_optimizer(model: nn.Module, name: str, seed: int) -> torch.optim.Optimizer:
    if name == "schedulefree":
        import schedulefree

        return schedulefree.AdamWScheduleFree(model.parameters(), lr=LR, betas=BETAS)
    state_precision = None if name == "float32" else name
    return AdamWScheduleFree(
        model.parameters(), lr=LR, betas=BETAS, state_precision=state_precision, rounding_seed=seed
    )


def run(name: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """One training run in a plain loop."""
    train, validation = corpus()
    held_out = crops(validation, 512, torch.Generator().manual_seed(1234)).split(64)
    model = build_model(seed, torch.float32 if name == "float32" else torch.bfloat16)
    optimizer = build_optimizer(model, name, seed)
    generator = torch.Generator().manual_seed(seed)
    curve, wide, seconds = {}, {}, time.perf_counter()
    optimizer.train()
    for step in range(1, steps + 1):
        batch = crops(train, BATCH, generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            size = bytes_per_parameter(model, optimizer)
            optimizer.eval()
            curve[step] = validation_loss(model, held_out)
            if step % 500 == 0 or step == steps:
                wide[step] = validation_loss(float32_x(model, optimizer), held_out)
            optimizer.train()
    return {
        "precision": name,
        "seed": seed,
        "steps": steps,
        "through": "loop",
        "loss": curve,
        "loss_of_float32_x": wide,
        "bytes_per_parameter": size,
        "seconds": time.perf_counter() - seconds,
    }


class Crops(torch.utils.data.Dataset):
    """The training crops of a run, as the Trainer takes them."""

    def __init__(self, data: Tensor, count: int, seed: int):
        self.rows = crops(data, count, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def run_trainer(name: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """The same through `ScheduleFreeTrainer`, with a model loaded with `dtype=torch.bfloat16`."""
    from transformers import AutoModelForCausalLM, TrainingArguments

    from hf_schedulefree import ScheduleFreeTrainer

    train, validation = corpus()
    seconds = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        build_model(seed, torch.bfloat16).save_pretrained(f"{folder}/start")
        dtype = torch.float32 if name == "float32" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/start", dtype=dtype)
        args = TrainingArguments(
            output_dir=folder,
            optim="adamw_schedulefree",
            optim_args=None if name == "float32" else f"state_precision={name}",
            learning_rate=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=0.0,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="no",
            logging_steps=every,
            seed=seed,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = ScheduleFreeTrainer(
            model,
            args,
            train_dataset=Crops(train, steps * BATCH, seed),
            eval_dataset=Crops(validation, 512, 1234),
        )
        trainer.train()
        curve = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
        held_out = list(trainer.eval_dataset.rows.split(64))
        optimizer = trainer.optimizer.optimizer
        wide = {steps: validation_loss(float32_x(model, optimizer), held_out)}
        optimizer.train()
        size = bytes_per_parameter(model, optimizer)
    return {
        "precision": name,
        "seed": seed,
        "steps": steps,
        "through": "Trainer",
        "loss": curve,
        "loss_of_float32_x": wide,
        "bytes_per_parameter": size,
        "seconds": time.perf_counter() - seconds,
    }


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    results = [json.loads(line) for line in path.read_text().splitlines()]
    for result in results:
        for key in ("loss", "loss_of_float32_x"):
            result[key] = {int(step): loss for step, loss in result[key].items()}
    return results


def table(results: list[dict[str, Any]], through: str, step: int) -> Iterator[str]:
    """Markdown: the mean loss after `step` steps over the seeds that every precision has, and its gap to float32."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        if result["through"] == through and step in result["loss_of_float32_x"]:
            found.setdefault(result["precision"], {})[result["seed"]] = result
    if "float32" not in found:
        return
    seeds = sorted(set.intersection(*map(set, found.values())))
    yield f"\n{through}, {step} steps, mean of {len(seeds)} seed(s)\n"
    yield "| state_precision | bytes per parameter | loss of x | gap to float32 | loss of x in float32 | gap |"
    yield "|---|---|---|---|---|---|"
    base: list[float] = []
    for name in (*PRECISIONS, "schedulefree"):
        if name not in found:
            continue
        runs = [found[name][seed] for seed in seeds]
        losses = [statistics.fmean(run[key][step] for run in runs) for key in ("loss", "loss_of_float32_x")]
        base = base or losses
        size = runs[0]["bytes_per_parameter"]
        gaps = [loss - reference for loss, reference in zip(losses, base, strict=True)]
        yield f"| {name} | {size:.2f} | {losses[0]:.4f} | {gaps[0]:+.4f} | {losses[1]:.4f} | {gaps[1]:+.4f} |"


def plot(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss of x against step for the longest runs of the loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loops = [result for result in results if result["through"] == "loop"]
    longest = max(result["steps"] for result in loops)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    styles = {"float32": "k-", "full": "C0--", "split": "C2-.", "stochastic": "C1:", "parameter": "C3-"}
    for name, style in styles.items():
        for result in loops:
            if result["precision"] == name and result["steps"] == longest:
                axes.plot(list(result["loss"]), list(result["loss"].values()), style, label=name)
    axes.set(xlabel="step", ylabel="validation loss of x (nats per byte)", title="x of a bfloat16 model, by precision")
    axes.legend()
    figure.savefig(path, dpi=130)


def time_steps(elements: int = 25_000_000, tensors: int = 50, rounds: int = 12) -> None:
    """Print the time of one step, the optimizers taking turns, and its ratio to that of `schedulefree`'s foreach."""
    import schedulefree

    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        made = [nn.Parameter(torch.randn(elements // tensors, generator=generator).bfloat16()) for _ in range(tensors)]
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        return made

    options = {"lr": LR, "weight_decay": 0.1}
    optimizers = {
        "schedulefree, foreach": schedulefree.AdamWScheduleFree(parameters(), foreach=True, **options),
        "torch AdamW, fused": torch.optim.AdamW(parameters(), fused=True, **options),
    }
    for name in ("split", "stochastic", "full"):
        optimizers[name] = AdamWScheduleFree(parameters(), state_precision=name, **options)
    optimizers["split, torch's operations"] = AdamWScheduleFree(parameters(), implementation="for-loop", **options)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for name, optimizer in optimizers.items():
        if name != "torch AdamW, fused":
            optimizer.train()
        optimizer.step()
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    first = seconds["schedulefree, foreach"]
    for name, measured in seconds.items():
        ratio = statistics.median(reference / own for reference, own in zip(first, measured, strict=True))
        print(f"{name:26} {1e3 * statistics.median(measured):7.1f} ms  {ratio:5.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report", "time"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("precision.jsonl"), help="the results")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=(*PRECISIONS, "schedulefree"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=125, help="steps between two evaluations")
    parser.add_argument("--trainer", action="store_true", help="train through ScheduleFreeTrainer")
    parser.add_argument("--plot", type=pathlib.Path, help="where `report` writes the figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "time":
        time_steps()
        return
    results = read(args.output)
    if args.action == "report":
        for through in ("loop", "Trainer"):
            for step in sorted({result["steps"] for result in results}):
                print(*table(results, through, step), sep="\n")
        if args.plot:
            plot(results, args.plot)
        return
    through = "Trainer" if args.trainer else "loop"
    for seed in args.seeds:
        for name in args.precisions:
            if any(
                (r["precision"], r["seed"], r["through"]) == (name, seed, through) and args.steps in r["loss"]
                for r in results
            ):
                continue
            result = (run_trainer if args.trainer else run)(name, seed, args.steps, args.every)
            with args.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{through} {name} seed {seed}: {result['loss'][args.steps]:.4f} after {args.steps} steps, "
                f"x in float32 {result['loss_of_float32_x'][args.steps]:.4f}, {result['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
