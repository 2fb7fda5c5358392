"""Models whose weights are saved under other names and in other shapes than their own: what is saved is read back."""

import pytest
import torch
from tiny import VOCABULARY, close_to, everything, make_trainer, parameters, same_bits, saved, train, x_in_float64
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback
from transformers.trainer_utils import load_sharded_checkpoint

from hf_schedulefree.checkpoint import CheckpointError, export_averaged, inspect_weights
from hf_schedulefree.renamed_weights import renamed_weights_loaded


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, attention_dropout=0.1, **sizes, **experts))


class SecondStepIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = float(state.global_step == 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_mixture_ends_as_one_that_was_not_interrupted(tmp_path, dtype):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = train(tmp_path, model=mixtral().to(dtype), **options)
    resumed = train(tmp_path / "on", resume=tmp_path / "checkpoint-4", model=mixtral().to(dtype), **options)
    assert same_bits(everything(resumed), everything(whole))


def test_the_best_mixture_is_that_of_its_file(tmp_path):
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    callbacks = {"callbacks": [SecondStepIsBest()]}
    trainer = make_trainer(tmp_path, model=mixtral(), trainer_options=callbacks, **steps, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    stored = MixtralForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same_bits(parameters(trainer.model), parameters(stored))


def test_several_files_and_weights_that_transformers_does_not_know(tmp_path):
    saved, model = mixtral(), mixtral()
    saved.head, model.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    generators = torch.get_rng_state()
    with renamed_weights_loaded(model, str(tmp_path)):
        load_sharded_checkpoint(model, str(tmp_path), strict=False)
    assert same_bits(parameters(model), parameters(saved))
    assert torch.equal(torch.get_rng_state(), generators) and "load_state_dict" not in vars(model)


def test_y_of_a_mixture_is_not_exported_as_x_but_can_be_resumed_and_saved(tmp_path):
    """The stock Trainer's checkpoint: its experts have other names and shapes than their z."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 8}
    stock = train(tmp_path, model=mixtral(), trainer_class=Trainer, **options)
    with pytest.raises(CheckpointError, match="cannot be matched"):
        export_averaged(tmp_path / "checkpoint-8", tmp_path / "x")
    contents = inspect_weights(tmp_path / "checkpoint-8")
    assert contents.weights == "y" and contents.distance is None and "other names or shapes" in contents.note
    trainer = train(tmp_path, resume=tmp_path / "checkpoint-8", model=mixtral(), **options)
    assert close_to(parameters(trainer.model), x_in_float64(stock))


def test_x_of_a_mixture_is_exported_as_it_was_saved(tmp_path):
    train(tmp_path, model=mixtral(), max_steps=4, save_strategy="steps", save_steps=4)
    export_averaged(tmp_path / "checkpoint-4", tmp_path / "x")
    assert same_bits(saved(tmp_path / "x"), saved(tmp_path / "checkpoint-4"))
