#!/usr/bin/env python
"""Fine-tune a chat model on conversations with TRL and schedule-free AdamW; whole, or a LoRA adapter.

    python scripts/finetune_sft.py --model_name_or_path my-model --train_file chats.jsonl --assistant_only_loss
    python scripts/finetune_sft.py --model_name_or_path my-model --train_file chats.jsonl --use_peft --packing
    accelerate launch scripts/finetune_sft.py --config run.yaml --max_steps 100

Each line of the file is one conversation, `{"messages": [{"role": "user", "content": "..."}, ...]}`, or a pair
`{"prompt": "...", "completion": "..."}`. The arguments are those of `DataArguments` below and of TRL's `SFTConfig` and
`ModelConfig`; `--config` names a .yaml file with any of them, and flags win over it. Needs `pip install
'hf_schedulefree[trl,peft]'`.

Evaluation, the saved model or adapter, every checkpoint and a push to the Hub hold the averaged weights x.
"""

import json
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from hf_schedulefree import ScheduleFreeMixin

logger = logging.getLogger("finetune_sft")

# Other defaults than those of SFTConfig. They are set on the parser and not in a subclass, because the
# training_args.bin beside a saved model must load where this script is not.
TRAINING_DEFAULTS = {
    "output_dir": "runs/finetune_sft",
    "optim": "adamw_schedulefree",
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # TRL's True stops on a machine without
    "learning_rate": None,  # see default_learning_rate
    "warmup_steps": 0.05,  # a ratio; the average remembers early steps, so they should not be wild
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "logging_steps": 0.02,
}

KINDS_OF_ROWS = (("messages",), ("prompt", "completion"))


class ScheduleFreeSFTTrainer(ScheduleFreeMixin, SFTTrainer):
    """TRL's SFTTrainer, with x for every reader."""


@dataclass
class DataArguments:
    """Which conversations."""

    train_file: str | None = field(default=None, metadata={"help": "A .jsonl (or .json) file of conversations."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Without a validation file, the last rows of the training file are held out."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "With --use_peft: also save base and adapter merged into one model, in output_dir/merged."},
    )


def parse_arguments(argv: list[str]) -> tuple[DataArguments, SFTConfig, ModelConfig]:
    """`argv` without the program's name."""
    parser = TrlParser((DataArguments, SFTConfig, ModelConfig), description=__doc__.splitlines()[0])
    parser.set_defaults(**TRAINING_DEFAULTS)
    data_args, training_args, model_args = parser.parse_args_and_config(argv)
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the model to start from, a Hub id or a folder")
    if data_args.train_file is None:
        raise ValueError("--train_file is missing: a .jsonl file with one conversation per line")
    if data_args.merge_adapter and not model_args.use_peft:
        raise ValueError("--merge_adapter needs --use_peft: without an adapter there is nothing to merge")
    if training_args.learning_rate is None:
        training_args.learning_rate = default_learning_rate(model_args)
    return data_args, training_args, model_args


def default_learning_rate(model_args: ModelConfig) -> float:
    """An adapter starts from nothing and takes ten times the rate of the pretrained weights themselves."""
    return 5e-4 if model_args.use_peft else 5e-5


def load_rows(flag: str, path: str) -> Dataset:
    """The conversations in a file, with a plain word for what is wrong with it."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--{flag} {path!r} does not exist")
    if file.stat().st_size == 0:
        raise ValueError(f"--{flag} {path!r} is empty")
    try:
        rows = load_dataset("json", data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError) as error:  # the latter: no rows
        raise ValueError(f"--{flag} {path!r} cannot be read as JSON lines: {error.__cause__ or error}") from error
    for columns in KINDS_OF_ROWS:
        if set(columns) <= set(rows.column_names):
            return rows.select_columns(list(columns))
    raise ValueError(
        f"--{flag} {path!r} has the columns {rows.column_names}; expected 'messages', or 'prompt' and 'completion'"
    )


def load_data(args: DataArguments) -> tuple[Dataset, Dataset]:
    """Training and validation rows."""
    train = load_rows("train_file", args.train_file)
    if args.validation_file:
        return train, load_rows("validation_file", args.validation_file)
    percentage = args.validation_split_percentage
    if not 0 < percentage < 100:
        raise ValueError(f"--validation_split_percentage {percentage}: must be between 1 and 99")
    kept = len(train) - math.ceil(len(train) * percentage / 100)
    if kept < 1:
        raise ValueError(
            f"{len(train)} row(s) cannot be split into a training and a validation set: give --validation_file"
        )
    return train.select(range(kept)), train.select(range(kept, len(train)))


def load_tokenizer(model_args: ModelConfig, training_args: SFTConfig, train: Dataset) -> PreTrainedTokenizerBase:
    """The model's tokenizer; conversations need one with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    if "messages" in train.column_names and not tokenizer.chat_template and not training_args.chat_template_path:
        raise ValueError(
            f"the tokenizer of {model_args.model_name_or_path!r} has no chat template, which 'messages' need: give "
            "--chat_template_path (a .jinja file, or a model whose template is to be used)"
        )
    return tokenizer


def checkpoint_to_resume(training_args: SFTConfig) -> str | bool | None:
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


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run with these arguments (by default those of the command line); returns the evaluation metrics at x."""
    data_args, training_args, model_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if training_args.should_log else logging.WARNING)
    checkpoint = checkpoint_to_resume(training_args)
    with training_args.main_process_first(desc="loading the conversations"):
        train, validation = load_data(data_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = ScheduleFreeSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=load_tokenizer(model_args, training_args, train),
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    metrics = trainer.evaluate()
    for name, values in (("train", trained.metrics), ("eval", metrics)):
        trainer.log_metrics(name, values)
        trainer.save_metrics(name, values)
    trainer.save_state()
    if data_args.merge_adapter and trainer.is_world_process_zero():
        merged = Path(training_args.output_dir) / "merged"
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(merged)
        trainer.processing_class.save_pretrained(merged)
        logger.info("merged model: %s", merged)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(json.dumps({"output_dir": training_args.output_dir, "eval_loss": metrics["eval_loss"]}))
    return metrics


if __name__ == "__main__":
    main()
