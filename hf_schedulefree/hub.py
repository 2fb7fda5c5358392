"""What goes to the Hub with the weights: a card that says what they are, no token, and a word when an upload fails."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainingArguments
from transformers.utils import logging

try:
    from huggingface_hub.utils import httpx  # the one that its version is built on
except ImportError:
    import httpx

logger = logging.get_logger(__name__)

# What the client raises if the Hub answers with an error, or not at all.
HUB_ERRORS = (httpx.HTTPError, ConnectionError)

HEADING = "## Schedule-free weights"
TAG = "schedule-free"

# The options that tell how a model was trained, under the names of the optimizers' arguments.
_SETTINGS = (
    "lr",
    "betas",
    "momentum",
    "eps",
    "weight_decay",
    "warmup_steps",
    "r",
    "weight_lr_power",
    "state_precision",
)


def describe_weights(
    card_file: Path, optimizer_name: str, group: Mapping[str, Any], *, constant_rate: bool = False
) -> None:
    """Add to a model card, as written by a Trainer, that the weights are schedule-free averages, and whose.

    Args:
        card_file: the README.md.
        optimizer_name: class of the optimizer.
        group: its first parameter group: settings, and the number of steps `k`.
        constant_rate: whether it is known that, after the warm-up, the rate was constant.
    """
    card = ModelCard.load(card_file)
    tags = card.data.tags or []
    card.data.tags = [*([tags] if isinstance(tags, str) else tags)]
    if TAG not in card.data.tags:
        card.data.tags.append(TAG)
    before, _, _ = card.text.partition(f"\n{HEADING}")
    settings = {name: group[name] for name in _SETTINGS if group.get(name) is not None}
    if group.get("k"):
        settings["steps"] = int(group["k"])
    rows = "\n".join(f"| {name} | {_readable(value)} |" for name, value in settings.items())
    no_schedule = " No learning-rate schedule was needed." if constant_rate else ""
    card.text = f"""{before.rstrip()}

{HEADING}

These weights are schedule-free averages: the sequence x of [The Road Less Scheduled](https://arxiv.org/abs/2405.15682),
not the point y at which the last gradients were taken. Use them as they are; evaluation during training was done with
the same averages.{no_schedule} To go on training from them, start a new optimizer.

| {optimizer_name} | |
|---|---|
{rows}
"""
    card.save(card_file)


def _readable(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_readable, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# What `token_left_out` puts over the methods of `TrainingArguments`, in the instance.
_HOOKS = ("__reduce_ex__", "__deepcopy__")


@contextlib.contextmanager
def token_left_out(args: TrainingArguments) -> Iterator[None]:
    """Within the block, `args` (and deep copies made there) are pickled without their `hub_token`.

    The Trainer writes them beside the weights, and so does the Trainer that W&B's callback makes for its artifact.
    """
    if _HOOKS[0] in vars(args):  # blocks may be nested
        yield
        return
    _leave_token_out(args)
    try:
        yield
    finally:
        for hook in _HOOKS:
            delattr(args, hook)


def _leave_token_out(args: TrainingArguments) -> None:
    def reduce_without_token(protocol: int) -> tuple[Any, ...]:
        build, how, state, *rest = type(args).__reduce_ex__(args, protocol)
        return build, how, {**_without_hooks(state), "hub_token": None}, *rest

    def deepcopy_with_token(memo: dict[int, Any]) -> TrainingArguments:
        duplicate = type(args).__new__(type(args))
        vars(duplicate).update(copy.deepcopy(_without_hooks(vars(args)), memo))
        _leave_token_out(duplicate)
        return duplicate

    for hook, function in zip(_HOOKS, (reduce_without_token, deepcopy_with_token), strict=True):
        setattr(args, hook, function)


def _without_hooks(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in _HOOKS}


def report_failed_job(job: Future) -> None:
    """For `Future.add_done_callback`: the Trainer drops the exceptions of uploads that run beside the training."""
    if not job.cancelled() and job.exception() is not None:
        report_failure(job.exception())


def report_failure(error: BaseException) -> None:
    """Tell that an upload failed during training, and that this is all that failed."""
    logger.error(
        f"An upload to the Hub failed ({type(error).__name__}: {error}). The training goes on and the files on disk "
        "are whole; the next save uploads them again, and so does trainer.push_to_hub()."
    )
