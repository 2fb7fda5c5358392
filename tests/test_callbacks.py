"""Text sampled at x in the middle of training: really at x, logged, and without changing the training."""

import pytest
import torch
from ecosystem import tiny_tokenizer
from tiny import close_to, everything, make_trainer, parameters, same_bits, tiny_llama, train, x_in_float64
from transformers import Trainer

from hf_schedulefree import SampleGenerationCallback


def sampled(folder, trainer_class=None, **options):
    """A run of a model whose vocabulary is the tokenizer's, with or without the callback."""
    callback = SampleGenerationCallback(["ab", "b"], every_n_steps=4, max_new_tokens=5, **options)
    more = {"trainer_class": trainer_class} if trainer_class else {}
    trainer = make_trainer(
        folder,
        model=tiny_llama(attention_dropout=0.2, vocab_size=258),
        trainer_options={"callbacks": [callback], "processing_class": tiny_tokenizer()},
        **more,
    )
    return trainer, callback


def test_samples_are_generated_at_x_and_logged(tmp_path, caplog):
    trainer, callback = sampled(tmp_path)
    seen = []
    generate = trainer.model.generate

    def watched(*args, **kwargs):
        assert not trainer.model.training and not torch.is_grad_enabled()
        seen.append(close_to(parameters(trainer.model), x_in_float64(trainer)))
        return generate(*args, **kwargs)

    trainer.model.generate = watched
    trainer.train()
    assert seen == [True] * 4
    assert [(step, prompt) for step, prompt, _ in callback.samples] == [(4, "ab"), (4, "b"), (8, "ab"), (8, "b")]
    assert all(isinstance(text, str) for _, _, text in callback.samples)
    logged = [record.message for record in caplog.records if "sample at x" in record.message]
    assert len(logged) == 4 and "step 4" in logged[0] and "'ab'" in logged[0]


def test_sampling_changes_nothing(tmp_path):
    trainer, _ = sampled(tmp_path, do_sample=True, temperature=0.7)
    trainer.train()
    without = train(tmp_path / "without", model=tiny_llama(attention_dropout=0.2, vocab_size=258))
    assert same_bits(everything(trainer), everything(without))


def test_wrong_use_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="at least one text"):
        SampleGenerationCallback([])
    with pytest.raises(ValueError, match="at least one text"):
        SampleGenerationCallback("a text, not a list")
    with pytest.raises(ValueError, match="every_n_steps=0"):
        SampleGenerationCallback(["a"], every_n_steps=0)
    trainer, _ = sampled(tmp_path, trainer_class=Trainer)
    with pytest.raises(RuntimeError, match="ScheduleFreeMixin"):
        trainer.train()
    trainer, _ = sampled(tmp_path)
    trainer.processing_class = trainer.callback_handler.processing_class = None
    with pytest.raises(ValueError, match="processing_class"):
        trainer.train()


def test_with_a_plain_optimizer_it_samples_the_model(tmp_path):
    callback = SampleGenerationCallback(["a"], every_n_steps=5, max_new_tokens=3)
    train(
        tmp_path,
        model=tiny_llama(vocab_size=258),
        optim="adamw_torch",
        trainer_options={"callbacks": [callback], "processing_class": tiny_tokenizer()},
    )
    assert [step for step, _, _ in callback.samples] == [5, 10]
