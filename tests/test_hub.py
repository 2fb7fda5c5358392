"""The Hub end to end. The client reads its settings when it is imported, so the tests proper run in a process of their
own: see hub_end_to_end.py, which can also be given to pytest directly."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ecosystem import cpu_arguments, tiny_llama
from transformers import TrainingArguments

from hf_schedulefree import ScheduleFreeTrainer
from hf_schedulefree.hub import describe_weights, token_left_out
from hf_schedulefree.optim import AdamWScheduleFree

SECRET = "hf_nobodyshouldeverreadthis"


def test_against_a_server(tmp_path):
    here = Path(__file__).parent
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", "--durations=5",
         str(here / "hub_end_to_end.py"), f"--basetemp={tmp_path / 'inner'}"],
        cwd=here.parent, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_training_args_keep_their_token_but_are_written_without(tmp_path):
    args = TrainingArguments(**cpu_arguments(tmp_path, hub_token=SECRET, hub_model_id="user/name"))
    rows = [{"input_ids": torch.arange(2, 10), "labels": torch.arange(2, 10)} for _ in range(4)]
    trainer = ScheduleFreeTrainer(model=tiny_llama(), args=args, train_dataset=rows)
    trainer.save_model()
    written = (tmp_path / "training_args.bin").read_bytes()
    assert SECRET.encode() not in written
    assert args.hub_token == SECRET and not {"__reduce_ex__", "__deepcopy__"} & set(vars(args))
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.hub_token is None
    assert {**loaded.to_dict(), "hub_token": 0} == {**args.to_dict(), "hub_token": 0}


def test_a_failure_inside_leaves_the_arguments_as_they_were(tmp_path):
    args = TrainingArguments(**cpu_arguments(tmp_path, hub_token=SECRET))
    with pytest.raises(KeyError), token_left_out(args), token_left_out(args):
        raise KeyError
    assert not {"__reduce_ex__", "__deepcopy__"} & set(vars(args))


def test_a_copy_made_inside_keeps_the_token_and_is_written_without(tmp_path):
    args = TrainingArguments(**cpu_arguments(tmp_path, hub_token=SECRET))
    with token_left_out(args):
        duplicate = copy.deepcopy(args)
    assert duplicate.hub_token == SECRET and duplicate == args and duplicate is not args
    assert SECRET.encode() not in pickle.dumps(duplicate)
    assert SECRET.encode() in pickle.dumps(args)


def test_the_card_is_told_once_and_keeps_what_was_there(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags:\n- generated_from_trainer\n---\n\n# name\n\nWhat it is.\n")
    group = {"lr": 0.0025, "betas": (0.9, 0.999), "weight_decay": 0.1, "warmup_steps": 20, "k": 300, "params": []}
    describe_weights(card, "AdamWScheduleFree", group)
    first = card.read_text()
    describe_weights(card, "AdamWScheduleFree", group)
    assert card.read_text() == first
    assert "license: mit" in first and "- schedule-free" in first and "What it is." in first
    for words in ("schedule-free averages", "| lr | 0.0025 |", "| betas | 0.9, 0.999 |", "| steps | 300 |"):
        assert words in first


@pytest.mark.parametrize(
    ("options", "named", "no_schedule"),
    [
        ({}, "constant", True),
        ({"warmup_steps": 1}, "constant_with_warmup", True),
        ({"lr_scheduler_type": "cosine"}, "cosine", False),
    ],
)
def test_the_card_names_the_schedule_that_was_used(tmp_path, options, named, no_schedule):
    args = TrainingArguments(**cpu_arguments(tmp_path, **options))
    given = args.lr_scheduler_type
    rows = [{"input_ids": torch.arange(2, 10), "labels": torch.arange(2, 10)} for _ in range(4)]
    trainer = ScheduleFreeTrainer(model=tiny_llama(), args=args, train_dataset=rows)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"- lr_scheduler_type: {named}\n" in card
    assert ("No learning-rate schedule was needed" in card) == no_schedule
    assert args.lr_scheduler_type == given


def test_the_card_claims_nothing_of_a_schedule_passed_in(tmp_path):
    args, model = TrainingArguments(**cpu_arguments(tmp_path)), tiny_llama()
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    rows = [{"input_ids": torch.arange(2, 10), "labels": torch.arange(2, 10)} for _ in range(4)]
    trainer = ScheduleFreeTrainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, scheduler))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "schedule-free averages" in card and "No learning-rate schedule was needed" not in card
