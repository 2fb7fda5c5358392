"""The command: its answers, its JSON, its exit status."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoint_runs import same, tiny_trainer, weights_of
from safetensors.torch import load_file
from transformers import Trainer

from hf_schedulefree import cli


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(run)
    trainer.train()
    return run, weights_of(trainer)


def answer(capsys, *argv):
    status = cli.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_inspect(finished, capsys):
    run, _ = finished
    for path in (run, run / "checkpoint-6"):
        status, out, _ = answer(capsys, "inspect", path, "--json")
        content = json.loads(out)
        assert status == 0
        assert (content["weights"], content["step"], content["optimizer"]) == ("x", 6, "AdamWScheduleFree")
        assert content["complete"] is True and 0 < content["distance"] < 1
    _, out, _ = answer(capsys, "inspect", run / "checkpoint-4/model.safetensors", "--json")
    content = json.loads(out)
    assert (content["weights"], content["step"], content["complete"]) == ("x", 4, None)
    _, out, _ = answer(capsys, "inspect", run / "checkpoint-6")
    assert "the averaged weights" in out and "AdamWScheduleFree" in out


def test_inspect_tells_how_to_repair_y(tmp_path, capsys):
    tiny_trainer(tmp_path, trainer_class=Trainer, optim="schedule_free_adamw", max_steps=2).train()
    _, out, _ = answer(capsys, "inspect", tmp_path / "checkpoint-2")
    assert "y, the training weights" in out and "hf-schedulefree export" in out
    assert json.loads(answer(capsys, "inspect", tmp_path / "checkpoint-2", "--json")[1])["weights"] == "y"


def test_verify_and_its_exit_status(finished, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    status, out, _ = answer(capsys, "verify", run)
    assert status == 0 and out.count("whole") == 3
    (run / "checkpoint-4/scheduler.pt").unlink()
    status, out, _ = answer(capsys, "verify", run)
    assert status == 1 and "scheduler.pt is missing" in out
    status, out, _ = answer(capsys, "verify", run / "checkpoint-4", "--json")
    content = json.loads(out)
    assert status == 1 and content["complete"] is False
    assert content["checkpoints"][0]["problem"] == "scheduler.pt is missing"
    assert answer(capsys, "verify", run / "checkpoint-6")[0] == 0
    assert answer(capsys, "verify", run / "nothing")[0] == 1


def test_export(finished, tmp_path, capsys):
    run, weights = finished
    status, out, _ = answer(capsys, "export", run, "--output", tmp_path / "out")
    assert status == 0 and str(tmp_path / "out") in out
    assert same(load_file(tmp_path / "out/model.safetensors"), weights)
    status, out, err = answer(capsys, "export", run, "--output", tmp_path / "out", "--json")
    assert status == 1 and "not an empty folder" in err and "error" in json.loads(out)
    status, _, err = answer(capsys, "export", tmp_path / "nowhere", "-o", tmp_path / "other")
    assert status == 1 and "does not exist" in err


def test_usage_errors_and_help(capsys):
    for argv in ([], ["export", "somewhere"], ["fly"]):
        with pytest.raises(SystemExit) as raised:
            cli.main(argv)
        assert raised.value.code == 2
    for command in ("inspect", "verify", "export"):
        with pytest.raises(SystemExit) as raised:
            cli.main([command, "--help"])
        assert raised.value.code == 0
        assert "PATH" in capsys.readouterr().out


def test_as_a_module(finished):
    command = [sys.executable, "-m", "hf_schedulefree", "verify", str(finished[0]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["complete"] is True


def test_a_saved_model_is_inspected_too(finished, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path / "run", save_strategy="no", max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    capsys.readouterr()
    content = json.loads(answer(capsys, "inspect", tmp_path / "model", "--json")[1])
    assert (content["weights"], content["step"], content["complete"], content["distance"]) == ("x", 1, True, None)
    # As a script leaves a run's own folder: save_model() and save_state(), with checkpoints inside or without.
    shutil.copy(finished[0] / "checkpoint-6/trainer_state.json", tmp_path / "model")
    content = json.loads(answer(capsys, "inspect", tmp_path / "model", "--json")[1])
    assert (content["weights"], content["complete"], content["problem"]) == ("x", True, None)
    os.truncate(tmp_path / "model/model.safetensors", 5000)
    status, _, err = answer(capsys, "inspect", tmp_path / "model")
    assert status == 1 and "model.safetensors has 5000 bytes" in err
