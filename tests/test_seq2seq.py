"""A T5-style model with generation metrics: what it writes when evaluated, and what is saved, is x."""

import numpy as np
import pytest
import torch
from ecosystem import Witness, script
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

example = script("example_seq2seq")

SHORT = {
    "max_steps": 12,
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 8,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    trainer = example.make_trainer(str(tmp_path), **SHORT)
    witness = Witness()
    trainer.add_callback(witness)
    wrote_with = {}
    generate = T5ForConditionalGeneration.generate

    def noting_generate(self, *args, **kwargs):
        wrote_with[trainer.state.global_step] = {name: p.detach().clone() for name, p in self.named_parameters()}
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", noting_generate)
    trainer.train()
    return trainer, witness, wrote_with


def test_evaluation_writes_with_x_and_x_is_saved(run, tmp_path):
    trainer, witness, wrote_with = run
    assert sorted(wrote_with) == [4, 8, 12]
    for step in (4, 8, 12):
        witness.assert_at_x(step, wrote_with[step])
        witness.assert_at_x(step, load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"))
    evaluations = [entry for entry in trainer.state.log_history if "eval_exact_match" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8, 12]


def test_the_metrics_are_those_of_x_in_float64(run):
    """The same metric from a model that is built from x alone."""
    trainer, witness, _ = run
    model = example.make_model()
    model.load_state_dict({name: x.float() for name, x in witness.x[12].items()}, strict=False)
    model.eval()
    right = total = 0
    for row in trainer.eval_dataset:
        written = model.generate(row["input_ids"][None], max_length=example.DIGITS + 2)[0, 1 : example.DIGITS + 1]
        written = np.pad(written.numpy(), (0, example.DIGITS - len(written)))
        right += int((written == row["labels"][: example.DIGITS].numpy()).sum())
        total += example.DIGITS
    assert trainer.evaluate()["eval_digit_accuracy"] == pytest.approx(right / total)
    output = trainer.predict(trainer.eval_dataset)
    assert output.metrics["test_digit_accuracy"] == pytest.approx(right / total)


def test_the_example_learns(tmp_path):
    metrics = example.main(str(tmp_path), max_steps=150, eval_strategy="no", use_cpu=True, disable_tqdm=True)
    assert metrics["eval_digit_accuracy"] > 0.5  # by chance 0.1
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    row = example.make_data(1, seed=3)[0]
    with torch.no_grad():
        assert loaded(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss < 1.5
