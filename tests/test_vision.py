"""An image classifier with BatchNorm: x is evaluated and saved with running statistics of its own."""

import pytest
import torch
from ecosystem import Witness, script
from safetensors.torch import load_file
from transformers import ResNetForImageClassification

example = script("example_vision")

WHOLE = 640  # all training images in one batch: the statistics do not depend on the order then


@pytest.fixture
def run(tmp_path):
    trainer = example.make_trainer(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=WHOLE,
        learning_rate=2e-2,
        warmup_steps=0,
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
    )
    witness = Witness()
    trainer.add_callback(witness)
    trainer.train()
    return trainer, witness


def model_of(x):
    """The classifier in float64 with weights x, and the statistics of one pass over the training images."""
    model = example.make_model().double()
    model.load_state_dict(x, strict=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(pixel_values=torch.stack([row["pixel_values"] for row in example.make_data(WHOLE, seed=1)]).double())
    return model.eval()


def test_the_loss_is_that_of_x_with_its_own_statistics(run):
    trainer, witness = run
    rows = example.make_data(128, seed=2)
    images = torch.stack([row["pixel_values"] for row in rows]).double()
    labels = torch.tensor([row["labels"] for row in rows])
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    for step in (2, 4):
        with torch.no_grad():
            logits = model_of(witness.x[step])(pixel_values=images).logits
        assert logged[step]["eval_loss"] == pytest.approx(
            torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
        )
        assert logged[step]["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_the_checkpoint_holds_both(run, tmp_path):
    trainer, witness = run
    for step in (2, 4):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        witness.assert_at_x(step, saved)
        expected = model_of(witness.x[step]).state_dict()
        statistics = [name for name in saved if "running" in name]
        assert statistics
        for name in statistics:
            torch.testing.assert_close(saved[name].double(), expected[name], rtol=1e-4, atol=1e-5)
    witness.assert_at_x(4, trainer.model)


def test_the_example_learns(tmp_path):
    metrics = example.main(str(tmp_path), max_steps=40, eval_strategy="no", use_cpu=True, disable_tqdm=True)
    assert metrics["eval_accuracy"] > 0.8  # by chance 0.25
    loaded = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    rows = example.make_data(128, seed=2)
    with torch.no_grad():
        logits = loaded(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    right = (logits.argmax(1) == torch.tensor([row["labels"] for row in rows])).double().mean().item()
    assert right == pytest.approx(metrics["eval_accuracy"])
