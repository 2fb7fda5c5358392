"""The metrics beside the loss: c and |x - y| / |y|, right, at logging steps only, and on every tracker."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ecosystem import Witness, cpu_arguments, tiny_llama
from safetensors.torch import load
from transformers import TrainerCallback, TrainingArguments

from hf_schedulefree import ScheduleFreeTrainer
from hf_schedulefree import trainer as trainer_module


def rows(size=24):
    tokens = torch.randint(2, 258, (size, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(output_dir, **changes):
    witness = Witness()
    args = TrainingArguments(**cpu_arguments(output_dir, **changes))
    trainer = ScheduleFreeTrainer(model=tiny_llama(), args=args, train_dataset=rows(), callbacks=[witness])
    trainer.train()
    return trainer, witness


@pytest.mark.parametrize("optim", ["adamw_schedulefree", "sgd_schedulefree"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_logged_metrics_are_those_of_the_paper(optim, warmup, tmp_path):
    trainer, witness = train(tmp_path, optim=optim, warmup_steps=warmup, max_steps=6, logging_steps=2)
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert sorted(logged) == [2, 4, 6]
    rates = [2e-2 * min(1.0, (k + 1) / max(warmup, 1)) for k in range(6)]
    for step, entry in logged.items():
        weights = [rate**2 for rate in rates[:step]]
        assert entry["averaging_weight"] == pytest.approx(weights[-1] / sum(weights), rel=1e-9)
        x, y = witness.x[step], witness.y[step]
        distance = math.sqrt(sum(((x[name] - y[name]) ** 2).sum().item() for name in x))
        norm = math.sqrt(sum((y[name] ** 2).sum().item() for name in y))
        assert entry["relative_distance"] == pytest.approx(distance / norm, rel=1e-4) and distance > 0


def test_they_are_computed_at_logging_steps_only(tmp_path, monkeypatch):
    calls = []
    compute = trainer_module.progress
    monkeypatch.setattr(trainer_module, "progress", lambda *args: calls.append(1) or compute(*args))
    trainer, _ = train(tmp_path, max_steps=6, logging_steps=3)
    assert len(calls) == 2
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others and not any("averaging_weight" in entry for entry in others)


def test_a_plain_optimizer_logs_what_it_always_did(tmp_path):
    args = TrainingArguments(**cpu_arguments(tmp_path, optim="adamw_torch"))
    trainer = ScheduleFreeTrainer(model=tiny_llama(), args=args, train_dataset=rows())
    trainer.train()
    assert not any("averaging_weight" in entry or "relative_distance" in entry for entry in trainer.state.log_history)


def test_the_metrics_change_nothing(tmp_path):
    often, rarely = train(tmp_path / "a", logging_steps=1)[1], train(tmp_path / "b", logging_steps=100)[1]
    assert all(torch.equal(often.y[6][name], y) for name, y in rarely.y[6].items())


def test_callbacks_see_them(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    args = TrainingArguments(**cpu_arguments(tmp_path))
    trainer = ScheduleFreeTrainer(model=tiny_llama(), args=args, train_dataset=rows(), callbacks=[Tracker()])
    trainer.train()
    assert all({"averaging_weight", "relative_distance"} <= set(logs) for logs in seen if "loss" in logs)
    for logs in seen:
        assert all(type(logs[name]) is float for name in ("averaging_weight", "relative_distance") if name in logs)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = train(tmp_path, report_to=["tensorboard"])
    folder = next(tmp_path.glob("runs/*"), None) or tmp_path / "runs"
    events = EventAccumulator(str(folder)).Reload()
    for name in ("averaging_weight", "relative_distance"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in trainer.state.log_history if name in entry])


def test_wandb(tmp_path, monkeypatch):
    """W&B offline, through its own callback: the metrics, and a model artifact at x without the token."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "LOG_MODEL": "end"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "ARTIFACT_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    logged, artifacts = [], []
    run_class = wandb.sdk.wandb_run.Run
    log, log_artifact = run_class.log, run_class.log_artifact

    def noting_artifact(run, artifact, *args, **kwargs):
        artifacts.append(
            {name: Path(entry.local_path).read_bytes() for name, entry in artifact.manifest.entries.items()}
        )
        return log_artifact(run, artifact, *args, **kwargs)

    monkeypatch.setattr(
        run_class, "log", lambda run, data, *a, **k: logged.append(dict(data)) or log(run, data, *a, **k)
    )
    monkeypatch.setattr(run_class, "log_artifact", noting_artifact)
    token = "hf_nobodyshouldeverreadthis"
    _, witness = train(tmp_path / "out", report_to=["wandb"], hub_token=token)
    wandb.finish()
    assert any({"train/averaging_weight", "train/relative_distance"} <= set(data) for data in logged)
    (artifact,) = [files for files in artifacts if "model.safetensors" in files]
    witness.assert_at_x(6, load(artifact["model.safetensors"]))
    assert "training_args.bin" in artifact
    assert not [name for name, data in artifact.items() if token.encode() in data]
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or token.encode() not in file.read_bytes(), file


def test_trackio(tmp_path):
    """trackio's own store, read back; in a process of its own, as trackio chooses its folder when it is imported."""
    pytest.importorskip("trackio")
    options = "report_to=['trackio'], project='eco', run_name='r'"
    code = f"import sys; from test_trackers import train; train(sys.argv[1], {options})"
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], env=environment, check=True)
    stored = b"".join(file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file())
    assert b"train/averaging_weight" in stored and b"train/relative_distance" in stored
