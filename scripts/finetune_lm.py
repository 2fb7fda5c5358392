"""Fine-tune a causal language model, or train a small one from scratch, with schedule-free AdamW.

With no arguments it trains a small Llama-style model on text that every Python carries: the standard library's sources.

    python scripts/finetune_lm.py --report
    python scripts/finetune_lm.py --model_name_or_path my-model --train_file notes.jsonl --text_column body
    accelerate launch scripts/finetune_lm.py run.yaml --max_steps 100

The arguments are those of `ModelArguments`, `DataArguments` and `OutputArguments` below and all those of
`transformers.TrainingArguments`. A .yaml, .yml or .json file as the first argument gives them as `name: value`; flags
after it win over the file.

Evaluation, the saved model, every checkpoint and a push to the Hub hold the averaged weights x. Gradients are taken
at y.
"""

import json
import logging
import math
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import tokenizers
import torch
import yaml
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_schedulefree import ScheduleFreeTrainer

logger = logging.getLogger("finetune_lm")

LOADER_OF_EXTENSION = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
END_OF_TEXT = "<|endoftext|>"

# Other defaults than those of TrainingArguments. They are set on the parser and not in a subclass, because the
# training_args.bin beside a saved model must load where this script is not.
TRAINING_DEFAULTS = {
    "output_dir": "runs/finetune_lm",
    "optim": "adamw_schedulefree",
    "learning_rate": None,  # see default_learning_rate
    "warmup_steps": 0.05,  # a ratio; the average remembers early steps, so they should not be wild
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "logging_steps": 0.02,
}


@dataclass
class ModelArguments:
    """Which model: one to start from, or the sizes of a fresh Llama-style one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder to start from. Without it, a fresh model is built."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the Hub model."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub. Only for repositories that you have read."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the tokenizer. Without it, the model's own; for a fresh model, a byte-level "
            "BPE trained on the training text."
        },
    )
    vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained here."})
    hidden_size: int = field(default=128, metadata={"help": "Of a fresh model."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Of a fresh model; without it, 8/3 of hidden_size, rounded up to 32."}
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "Of a fresh model."})
    num_attention_heads: int = field(default=4, metadata={"help": "Of a fresh model."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, fresh or loaded: 'attention_dropout=0.1,rms_norm_eps=1e-5'."},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={
            "help": "Type of the weights. float32 is the most exact (--bf16 adds speed). bfloat16 takes less memory; "
            "the optimizer keeps what it would lose of the average. 'auto' takes the type of the loaded model."
        },
    )


@dataclass
class DataArguments:
    """Which text. With neither a dataset nor a file: the sources of Python's standard library."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder, for datasets.load_dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "A .txt, .jsonl, .json, .csv or .parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Where there is no validation set, the last rows of the training set become one."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens per training example."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many blocks."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


@dataclass
class OutputArguments:
    """What is shown at the end, beside the Trainer's own metrics."""

    report: bool = field(
        default=False,
        metadata={"help": "Print a table that compares x, y and the saved model, and says what is where."},
    )


@dataclass
class Corpus:
    """The raw text. `rows_are_documents`: each row stands alone; otherwise the rows are lines of one running text."""

    train: Dataset
    validation: Dataset
    rows_are_documents: bool


# --- arguments --------------------------------------------------------------------------------------------------------


def flags_from_file(path: str) -> list[str]:
    """The flags that a file of arguments stands for: the same code then parses and types both."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"the argument file {path!r} does not exist")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(values, dict):
        raise ValueError(f"the argument file {path!r} must hold 'name: value' pairs, not {type(values).__name__}")
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, OutputArguments, TrainingArguments]:
    """`argv` without the program's name: flags, or a file of arguments followed by flags."""
    if argv and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        argv = flags_from_file(argv[0]) + argv[1:]
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, OutputArguments, TrainingArguments),
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.set_defaults(**TRAINING_DEFAULTS)
    model_args, data_args, output_args, training_args = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False
    )
    if training_args.learning_rate is None:
        training_args.learning_rate = default_learning_rate(model_args)
    return model_args, data_args, output_args, training_args


def default_learning_rate(model_args: ModelArguments) -> float:
    """Schedule-free AdamW wants a rate somewhat above that of AdamW with a decaying schedule, and no decay of it.

    A fresh small model takes 5e-3. A pretrained one is to be moved gently: 5e-5, as in full fine-tuning with AdamW.
    """
    return 5e-3 if model_args.model_name_or_path is None else 5e-5


def checkpoint_to_resume(training_args: TrainingArguments) -> str | bool | None:
    """`--resume_from_checkpoint`: a folder, or True for the latest checkpoint in output_dir."""
    value = training_args.resume_from_checkpoint
    if value is None or value.lower() == "false":
        return None
    if value.lower() == "true":
        if not Path(training_args.output_dir).is_dir() or get_last_checkpoint(training_args.output_dir) is None:
            raise FileNotFoundError(f"--resume_from_checkpoint True: no checkpoint in {training_args.output_dir!r}")
        return True
    if not Path(value).is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint {value!r} is not a folder")
    return value


# --- text -------------------------------------------------------------------------------------------------------------


def standard_library_documents(max_bytes: int = 4_000_000) -> list[str]:
    """The sources of the standard library's modules by name, up to `max_bytes`: real text that every Python carries."""
    documents, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.name.startswith("_sysconfigdata"):  # generated: how this Python was compiled
            continue
        with tokenize.open(path) as source:  # honours the file's encoding line
            documents.append(source.read())
        total += path.stat().st_size
        if total >= max_bytes:
            break
    if not documents:
        raise FileNotFoundError(
            f"no sources of the standard library in {sysconfig.get_path('stdlib')!r}: "
            "give --train_file or --dataset_name"
        )
    return documents


def load_standard_library() -> Corpus:
    """Every twentieth module is held out."""
    documents = standard_library_documents()
    train = [text for number, text in enumerate(documents) if number % 20]
    return Corpus(
        train=Dataset.from_dict({"text": train}),
        validation=Dataset.from_dict({"text": documents[::20]}),
        rows_are_documents=True,
    )


def load_file(flag: str, path: str) -> Dataset:
    """One text file of a known extension, with a plain word for what is wrong with it."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--{flag} {path!r} does not exist")
    loader = LOADER_OF_EXTENSION.get(file.suffix.lower())
    if loader is None:
        raise ValueError(f"--{flag} {path!r}: unknown extension {file.suffix!r}; known: {sorted(LOADER_OF_EXTENSION)}")
    if file.stat().st_size == 0:
        raise ValueError(f"--{flag} {path!r} is empty")
    options = {"keep_linebreaks": True} if loader == "text" else {}
    try:
        return load_dataset(loader, data_files=str(file), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # the latter: no rows, no such format
        raise ValueError(f"--{flag} {path!r} cannot be read as {loader}: {error.__cause__ or error}") from error


def hold_out(data: Dataset, percentage: int) -> tuple[Dataset, Dataset]:
    """The last rows are held out: the same ones each time, and no neighbours of a held-out line are trained on."""
    if not 0 < percentage < 100:
        raise ValueError(f"--validation_split_percentage {percentage}: must be between 1 and 99")
    held_out = math.ceil(len(data) * percentage / 100)
    if held_out >= len(data):
        raise ValueError(
            f"{len(data)} row(s) cannot be split into a training and a validation set: give --validation_file"
        )
    return data.select(range(len(data) - held_out)), data.select(range(len(data) - held_out, len(data)))


def check_text(data: Dataset, name: str, column: str) -> Dataset:
    """The rows with their text column only."""
    if len(data) == 0:
        raise ValueError(f"the {name} set is empty")
    if column not in data.column_names:
        raise ValueError(
            f"the {name} set has no column {column!r}; its columns: {data.column_names}. Choose one by --text_column"
        )
    kind = getattr(data.features[column], "dtype", type(data.features[column]).__name__)
    if kind not in ("string", "large_string"):
        raise ValueError(f"column {column!r} of the {name} set holds {kind}, not text")
    return data.select_columns([column])


def load_corpus(args: DataArguments) -> Corpus:
    """The training and validation text that the arguments name."""
    if args.dataset_name and args.train_file:
        raise ValueError("give --dataset_name or --train_file, not both")
    if args.validation_file and not (args.train_file or args.dataset_name):
        raise ValueError("--validation_file needs --train_file or --dataset_name")
    if not args.dataset_name and not args.train_file:
        return load_standard_library()

    validation = None
    if args.dataset_name:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"dataset {args.dataset_name!r} has no split 'train'; its splits: {list(splits)}")
        train, validation = splits["train"], splits.get("validation")
    else:
        train = load_file("train_file", args.train_file)
    if args.validation_file:
        validation = load_file("validation_file", args.validation_file)
    train = check_text(train, "training", args.text_column)
    if validation is None:
        train, validation = hold_out(train, args.validation_split_percentage)
    else:
        validation = check_text(validation, "validation", args.text_column)
    lines = bool(args.train_file) and Path(args.train_file).suffix.lower() == ".txt"
    return Corpus(train, validation, rows_are_documents=not lines)


# --- tokenizer and blocks ---------------------------------------------------------------------------------------------


def train_tokenizer(data: Dataset, column: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it needs no unknown token, and what it encodes it decodes to the same text."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"--vocab_size {vocab_size}: a byte-level tokenizer needs more than {len(alphabet)}")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )

    def batches() -> Iterator[list[str]]:
        for rows in data.iter(batch_size=100):
            yield [text for text in rows[column] if text]

    backend.train_from_iterator(batches(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, corpus: Corpus
) -> PreTrainedTokenizerBase:
    """The tokenizer named, or the model's, or one trained on the training text."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        # One process of each machine trains it, and all read its file: they must agree on every token.
        with training_args.main_process_first(desc="training the tokenizer"):
            if training_args.local_process_index == 0:
                logger.info("training a tokenizer of %d tokens", model_args.vocab_size)
                trained = train_tokenizer(corpus.train, data_args.text_column, model_args.vocab_size)
                trained.save_pretrained(training_args.output_dir)
        name = training_args.output_dir
    revision = model_args.model_revision if name == model_args.model_name_or_path else "main"
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=model_args.trust_remote_code)


def pack(
    data: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    documents: bool,
    limit: int | None,
) -> Dataset:
    """Tokenize, join and cut into blocks of `block_size`. What is left over of each thousand rows is dropped."""
    block_size, column = args.block_size, args.text_column

    def to_blocks(rows: dict[str, list]) -> dict[str, list]:
        texts = [text for text in rows[column] if text]
        if not texts:
            return {"input_ids": []}
        # Documents get the tokenizer's special tokens and an end; the lines of a running text get nothing in between.
        encoded = tokenizer(texts, add_special_tokens=documents, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        stream = []
        for ids in encoded:
            stream += ids
            if documents and end is not None and (not ids or ids[-1] != end):
                stream.append(end)
        whole = len(stream) - len(stream) % block_size
        return {"input_ids": [stream[i : i + block_size] for i in range(0, whole, block_size)]}

    blocks = data.map(
        to_blocks,
        batched=True,
        remove_columns=data.column_names,
        num_proc=args.preprocessing_num_workers,
        desc=f"Tokenizing and packing the {name} set",
    )
    if len(blocks) == 0:
        raise ValueError(
            f"the {name} set is shorter than one block of {block_size} tokens: lower --block_size or give more text"
        )
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))


def stack_blocks(blocks: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The data collator. The model shifts the labels itself."""
    input_ids = torch.tensor([block["input_ids"] for block in blocks])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


# --- model ------------------------------------------------------------------------------------------------------------


def fresh_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedConfig:
    """A Llama of the sizes asked for, with tied embeddings: in a small model they are most of the weights."""
    if args.hidden_size % args.num_attention_heads or (args.hidden_size // args.num_attention_heads) % 2:
        raise ValueError(
            f"--hidden_size {args.hidden_size} with --num_attention_heads {args.num_attention_heads}: "
            "their quotient, the size of one head, must be an even whole number"
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size or math.ceil(args.hidden_size * 8 / 3 / 32) * 32,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=max(block_size, 1024),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def load_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """The model named, or a fresh one."""
    options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **options)
    else:
        config = fresh_config(args, tokenizer, block_size)
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and block_size > longest:
        raise ValueError(f"--block_size {block_size} is more than the model's {longest} positions")

    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, config=config, dtype=args.dtype, **options
        )
    else:
        dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # a --tokenizer_name other than the model's
        model.resize_token_embeddings(len(tokenizer))
    logger.info("%s of %.2f million parameters", type(model).__name__, model.num_parameters() / 1e6)
    return model


# --- measurements -----------------------------------------------------------------------------------------------------


class StepTimer(TrainerCallback):
    """The time spent in training steps alone, without evaluation and saving."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self.begun

    def tokens_per_second(self, args: TrainingArguments, block_size: int) -> float:
        blocks_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.steps * blocks_per_step * block_size / self.seconds if self.steps else 0.0


@dataclass
class Reading:
    """What somebody who looks at a model sees: its loss on the validation set and one of its weights."""

    loss: float
    weight: float


def perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def first_weight(model: PreTrainedModel) -> tuple[str, float]:
    """The first number in the model and its name, as one would print it."""
    name, parameter = next(iter(model.named_parameters()))
    return f"{name}[{', '.join('0' for _ in parameter.shape)}]", parameter.detach().flatten()[0].item()


def read(model: PreTrainedModel, trainer: Trainer) -> Reading:
    """The weights as they stand in `model` now, on the validation set. (`Trainer.evaluate` would show x.)"""
    losses = []
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        for batch in trainer.get_eval_dataloader():
            loss = model(**batch).loss.detach()
            losses.append(trainer.accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
    return Reading(torch.cat(losses).float().mean().item(), first_weight(model)[1])


def read_x_y_and_saved(trainer: ScheduleFreeTrainer, trust_remote_code: bool) -> dict[str, Reading]:
    """After training: x, which the trainer shows and saves; y, where gradients are taken; and the model on disk.

    Raises `RuntimeError` if the model on disk is not x, bit for bit.
    """
    trainer.accelerator.wait_for_everyone()  # the main process may still be writing the model
    folder, model = trainer.args.output_dir, trainer.model
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=trust_remote_code)
    loaded = loaded.to(trainer.args.device)
    x = model.state_dict()
    different = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, x[name])]
    if different:
        raise RuntimeError(f"the model in {folder!r} does not hold x: {different} differ")
    readings = {"x": read(model, trainer)}
    with trainer.training_weights():
        readings["y"] = read(model, trainer)
    return readings | {"saved": read(loaded, trainer)}


def report_table(readings: dict[str, Reading], weight_name: str) -> str:
    """One row for each of the weights that somebody could hold after this run."""
    labels = {
        "x": "x, averaged: what was evaluated and saved here",
        "y": "y, training: what a plain Trainer's save would hold",
        "saved": "from_pretrained of the saved folder",
    }
    rows = [("weights", "eval loss", "perplexity", weight_name)]
    for key, reading in readings.items():
        rows.append((labels[key], f"{reading.loss:.4f}", f"{perplexity(reading.loss):.2f}", f"{reading.weight:.4e}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report_places(output_dir: Path, curve: Path | None) -> str:
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    places = {
        "model, tokenizer": output_dir,
        "loss curve": curve or "not drawn: pip install matplotlib",
        "checkpoints": ", ".join(folder.name for folder in checkpoints) or "none",
        "metrics": output_dir / "all_results.json",
        "history": output_dir / "trainer_state.json",
    }
    return "\n".join(f"{name:<16}  {place}" for name, place in places.items())


def draw_loss_curve(history: list[dict], path: Path, y_loss: float | None) -> Path | None:
    """The training loss and the evaluation loss at x over the steps and, where known, y's at the end."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no loss curve: matplotlib is not installed. Get it with: pip install matplotlib")
        return None
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Blue, vermillion and green of Okabe and Ito's palette: colour-blind readers tell them apart.
    if training:
        axes.plot(*zip(*training, strict=True), color="#0072B2", linewidth=1, alpha=0.7, label="training loss, at y")
    axes.plot(*zip(*evaluation, strict=True), color="#D55E00", linewidth=2, marker="o", label="evaluation loss, at x")
    if y_loss is not None:
        axes.plot(
            evaluation[-1][0], y_loss, color="#009E73", marker="D", linestyle="none", label="evaluation loss, at y"
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


# --- the run ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run with these arguments (by default those of the command line); returns the evaluation metrics at x."""
    model_args, data_args, output_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if training_args.should_log else logging.WARNING)
    checkpoint = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="loading the text"):
        corpus = load_corpus(data_args)
    tokenizer = load_tokenizer(model_args, data_args, training_args, corpus)
    with training_args.main_process_first(desc="tokenizing"):
        train, validation = (
            pack(data, name, tokenizer, data_args, corpus.rows_are_documents, limit)
            for data, name, limit in (
                (corpus.train, "training", data_args.max_train_samples),
                (corpus.validation, "validation", data_args.max_eval_samples),
            )
        )
    logger.info(
        "%d blocks of %d tokens to train on, %d to evaluate on", len(train), data_args.block_size, len(validation)
    )

    timer = StepTimer()
    trainer = ScheduleFreeTrainer(
        model=load_model(model_args, tokenizer, data_args.block_size),
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=stack_blocks,
        callbacks=[timer],
    )
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    metrics["perplexity"] = perplexity(metrics["eval_loss"])
    trained.metrics["train_tokens_per_second"] = timer.tokens_per_second(training_args, data_args.block_size)
    for name, values in (("train", trained.metrics), ("eval", metrics)):
        trainer.log_metrics(name, values)
        trainer.save_metrics(name, values)
    trainer.save_state()

    readings = None
    if output_args.report:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning("--report needs the whole model in every process: left out under FSDP and DeepSpeed")
        else:
            readings = read_x_y_and_saved(trainer, model_args.trust_remote_code)
    if trainer.is_world_process_zero():
        output_dir = Path(training_args.output_dir)
        curve = draw_loss_curve(
            trainer.state.log_history, output_dir / "loss_curve.png", readings and readings["y"].loss
        )
        if readings:
            speed = (
                f"{trained.metrics['train_tokens_per_second']:,.0f} tokens per second in {timer.steps} training steps"
            )
            table = report_table(readings, first_weight(trainer.model)[0])
            print(f"\n{table}\n\n{'speed':<16}  {speed}\n{report_places(output_dir, curve)}")
    if training_args.push_to_hub:
        trainer.push_to_hub(
            finetuned_from=model_args.model_name_or_path, dataset=data_args.dataset_name, tasks="text-generation"
        )
    return metrics


if __name__ == "__main__":
    main()
