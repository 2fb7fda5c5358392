"""Pushes, and failures to push, with the real client against `hub_server`. Run by test_hub.py in its own process."""

import io
import logging
import os
import sys

TOKEN = "hf_nobodyshouldeverreadthis"
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from hub_server import Hub  # noqa: E402

hub = Hub(TOKEN)
hub.__enter__()
# The client reads these once, when it is imported.
os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from ecosystem import Witness, cpu_arguments, tiny_llama, tiny_tokenizer  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from huggingface_hub import logging as client_logging  # noqa: E402
from safetensors.torch import load  # noqa: E402
from transformers import LlamaForCausalLM, TrainingArguments  # noqa: E402

from hf_schedulefree import ScheduleFreeTrainer  # noqa: E402

assert constants.ENDPOINT == hub.url


@pytest.fixture(autouse=True)
def heard():
    """Everything that anybody logs, at the lowest level; and nobody logs the token."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    client_logging.set_verbosity_debug()
    client_logging.enable_propagation()
    transformers.logging.set_verbosity_debug()
    transformers.logging.enable_propagation()
    hub.work_again()
    yield stream
    hub.work_again()
    root.removeHandler(handler)
    root.setLevel(level)
    assert TOKEN not in stream.getvalue()
    assert hub.problems == []


@pytest.fixture(autouse=True)
def no_token_in_any_file(tmp_path):
    yield
    homes = [tmp_path, constants.HF_HOME]
    for home in homes:
        for folder, _, names in os.walk(home):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    assert TOKEN.encode() not in file.read(), f"the token is in {folder}/{name}"
    for repo, commits in hub.commits.items():
        for commit in commits:
            assert not [path for path, data in commit["files"].items() if TOKEN.encode() in data], repo


def make_trainer(output_dir, name, model=None, **changes):
    witness = Witness()
    tokens = torch.randint(2, 258, (24, 12), generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(
        **cpu_arguments(
            output_dir,
            **{
                "push_to_hub": True,
                "hub_model_id": f"user/{name}",
                "hub_token": TOKEN,
                "hub_strategy": "every_save",
                "hub_always_push": True,
                "save_strategy": "steps",
                "save_steps": 3,
                "weight_decay": 0.03,
                **changes,
            },
        )
    )
    trainer = ScheduleFreeTrainer(
        model=tiny_llama() if model is None else model,
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
    )
    return trainer, witness


def weights_of(data):
    return load(data)


def assert_card(card):
    text = card.decode()
    for words in ("schedule-free averages", "AdamWScheduleFree", "| lr | 0.02 |", "| weight_decay | 0.03 |"):
        assert words in text, text


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_publishes_x(strategy, tmp_path):
    repo = f"user/{strategy}"
    trainer, witness = make_trainer(tmp_path / "run", strategy, hub_strategy=strategy)
    trainer.train()
    during = len(hub.commits[repo])
    assert (during == 0) == (strategy == "end")
    at_some_x = [file["model.safetensors"] for file in (c["files"] for c in hub.commits[repo])]
    for data in at_some_x:
        assert any(_is_x(witness, step, weights_of(data)) for step in (3, 6))
    for commit in hub.commits[repo]:
        assert_card(commit["files"]["README.md"])

    trainer.push_to_hub()
    files = hub.files(repo)
    witness.assert_at_x(6, weights_of(files["model.safetensors"]))
    assert_card(files["README.md"])
    assert "| steps | 6 |" in files["README.md"].decode()
    folders = {"checkpoint": {"last-checkpoint": 6}, "all_checkpoints": {"checkpoint-3": 3, "checkpoint-6": 6}}
    pushed = folders.get(strategy, {})
    assert {path.split("/")[0] for path in files if path.endswith("optimizer.pt")} == set(pushed)
    for folder, step in pushed.items():
        witness.assert_at_x(step, weights_of(files[f"{folder}/model.safetensors"]))
        local = tmp_path / "run" / f"checkpoint-{step}"
        names = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
        assert {path.removeprefix(f"{folder}/") for path in files if path.startswith(f"{folder}/")} == names
    assert {"create", "preupload", "batch", "put", "verify", "commit"} <= set(hub.requests)

    loaded = LlamaForCausalLM.from_pretrained(repo)
    witness.assert_at_x(6, loaded)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


def _is_x(witness, step, weights):
    try:
        witness.assert_at_x(step, weights)
    except AssertionError:
        return False
    return True


def test_the_model_itself_pushes_x(tmp_path):
    trainer, witness = make_trainer(tmp_path / "run", "by-model", push_to_hub=False, hub_model_id=None)
    trainer.train()
    trainer.model.push_to_hub("user/by-model", token=TOKEN)
    witness.assert_at_x(6, LlamaForCausalLM.from_pretrained("user/by-model"))


def test_a_push_from_a_callback_in_mid_training_is_x(tmp_path):
    class Pusher(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.push_to_hub(commit_message="step 4")

    changes = {"hub_strategy": "end", "save_strategy": "no"}
    quiet, undisturbed = make_trainer(tmp_path / "quiet", "quiet", push_to_hub=False, save_strategy="no")
    quiet.train()
    trainer, witness = make_trainer(tmp_path / "run", "mid-training", **changes)
    trainer.add_callback(Pusher())
    trainer.train()
    witness.assert_at_x(4, weights_of(hub.files("user/mid-training")["model.safetensors"]))
    assert all(torch.equal(witness.y[6][name], y) for name, y in undisturbed.y[6].items())


def test_a_push_from_a_callback_that_fails_does_not_end_the_training(tmp_path, heard):
    class Pusher(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                hub.fail("commit", "500")
                trainer.push_to_hub()

    trainer, witness = make_trainer(tmp_path / "run", "fails-in-callback", hub_strategy="end", save_strategy="no")
    trainer.add_callback(Pusher())
    assert trainer.train().global_step == 6
    assert "An upload to the Hub failed" in heard.getvalue()
    witness.assert_at_x(4, load((tmp_path / "run" / "model.safetensors").read_bytes()))
    witness.assert_at_x(6, trainer.model)


def test_named_adapters_are_published_during_training_as_well(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
    model = peft.get_peft_model(tiny_llama(), lora, adapter_name="first")
    model.add_adapter("second", lora)
    model.base_model.set_adapter(["first", "second"])
    trainer, witness = make_trainer(tmp_path / "run", "adapters", model=model)
    trainer.train()
    assert len(hub.commits["user/adapters"]) == 2
    for commit, step in enumerate((3, 6)):
        files = hub.files("user/adapters", commit)
        shown = {
            name.replace(".weight", f".{adapter}.weight"): tensor
            for adapter in ("first", "second")
            for name, tensor in load(files[f"{adapter}/adapter_model.safetensors"]).items()
        }
        witness.assert_at_x(step, shown)
        assert_card(files["README.md"])


def test_an_upload_that_stumbles_is_tried_again(tmp_path):
    trainer, witness = make_trainer(tmp_path / "run", "stumble", hub_strategy="end")
    trainer.train()
    hub.fail("put", "500")
    trainer.push_to_hub()
    witness.assert_at_x(6, weights_of(hub.files("user/stumble")["model.safetensors"]))


FAILURES = {"500": "HfHubHTTPError", "401": "HfHubHTTPError", "drop": "RemoteProtocolError"}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_training_outlives_a_hub_that_fails(how, strategy, tmp_path, heard):
    repo = f"user/fails-{how}-{strategy}"
    trainer, witness = make_trainer(tmp_path / "run", repo.split("/")[1], hub_strategy=strategy)
    hub.fail("commit", how, times=100)
    output = trainer.train()
    assert output.global_step == 6 and hub.commits[repo] == []

    for step in (3, 6):
        witness.assert_at_x(step, load((tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").read_bytes()))
    witness.assert_at_x(6, trainer.model)
    said = heard.getvalue()
    assert "An upload to the Hub failed" in said and FAILURES[how] in said and "training goes on" in said

    with pytest.raises((OSError, Exception)) as error:
        trainer.push_to_hub()
    assert TOKEN not in str(error.value) and type(error.value).__name__ in FAILURES[how]
    witness.assert_at_x(6, load((tmp_path / "run" / "model.safetensors").read_bytes()))
    witness.assert_at_x(6, trainer.model)
    hub.work_again()
    trainer.push_to_hub()
    witness.assert_at_x(6, weights_of(hub.files(repo)["model.safetensors"]))


def test_a_hub_that_recovers_gets_the_next_save(tmp_path, heard):
    trainer, witness = make_trainer(tmp_path / "run", "recovers")
    hub.fail("commit", "500", times=1)
    trainer.train()
    assert "An upload to the Hub failed" in heard.getvalue()
    witness.assert_at_x(6, weights_of(hub.files("user/recovers")["model.safetensors"]))


def test_a_wrong_token_is_told_before_the_training(tmp_path):
    with pytest.raises(OSError, match="401") as error:
        make_trainer(tmp_path / "run", "wrong", hub_token="hf_wrong")
    assert "hf_wrong" not in str(error.value)
