"""PEFT: what is saved, merged, resumed and chosen as best is the x of the adapters, and of nothing else."""

from pathlib import Path

import pytest
import torch
from ecosystem import Witness, cpu_arguments, tiny_llama
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from hf_schedulefree import ScheduleFreeTrainer

peft = pytest.importorskip("peft")

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, init_lora_weights="gaussian", **TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


class Texts(torch.utils.data.Dataset):
    """Random tokens: enough to move the weights about."""

    def __init__(self, size: int = 24, length: int = 12, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(2, 258, (size, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def make_trainer(model, output_dir, **changes):
    witness = Witness()
    args = TrainingArguments(**cpu_arguments(output_dir, **changes))
    trainer = ScheduleFreeTrainer(
        model=model, args=args, train_dataset=Texts(), eval_dataset=Texts(6, seed=2), callbacks=[witness]
    )
    return trainer, witness


def adapter_file(folder):
    """The saved adapter, under the names that its parameters have in the model (for the adapter "default")."""
    return {
        name.replace(".lora_A.", ".lora_A.default.")
        .replace(".lora_B.", ".lora_B.default.")
        .replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
        .replace(".ia3_l", ".ia3_l.default"): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_saved_and_the_merged_adapter_are_at_x(kind, tmp_path):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS[kind]())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer, witness = make_trainer(model, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()

    for step in (3, 6):
        witness.assert_at_x(step, adapter_file(tmp_path / f"checkpoint-{step}"))
    witness.assert_at_x(6, model)
    trainer.save_model()
    witness.assert_at_x(6, adapter_file(tmp_path))
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    inputs = Texts(2, seed=3).rows
    merged = model.merge_and_unload()
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload()
    for (name, p), (_, q) in zip(merged.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    at_x = peft.get_peft_model(tiny_llama(), ADAPTERS[kind]())
    at_x.load_state_dict({name: x.float() for name, x in witness.x[6].items()}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(merged(inputs).logits, at_x.eval()(inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_resumed_adapter_goes_the_same_way(tmp_path):
    def fresh():
        return peft.get_peft_model(tiny_llama(), ADAPTERS["lora"]())

    straight, witness = make_trainer(fresh(), tmp_path / "a", save_strategy="steps", save_steps=3)
    straight.train()
    resumed, second = make_trainer(fresh(), tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(second.y[6][name], y) for name, y in witness.y[6].items())


def choose_step(trainer, monkeypatch, best):
    """Let the evaluation at step `best` win, whatever the loss is."""
    evaluate = trainer.evaluate

    def evaluate_with_chosen_loss(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_loss"] = 0.0 if trainer.state.global_step == best else 1.0
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate_with_chosen_loss)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_best_adapter_is_the_x_of_its_step(kind, tmp_path, monkeypatch):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS[kind]())
    trainer, witness = make_trainer(model, tmp_path, **BEST)
    choose_step(trainer, monkeypatch, best=2)
    trainer.train()
    witness.assert_at_x(2, model)
    trainer.optimizer.eval()
    trainer.optimizer.train()
    trainer.optimizer.eval()
    witness.assert_at_x(2, model)


def two_adapters(active):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS["lora"](), adapter_name="first")
    torch.manual_seed(7)
    model.add_adapter("second", ADAPTERS["lora"]())
    model.base_model.set_adapter(active)
    return model


def saved_adapters(folder):
    return {
        name.replace(".lora_A.", f".lora_A.{adapter}.").replace(".lora_B.", f".lora_B.{adapter}."): tensor
        for adapter in ("first", "second")
        for name, tensor in load_file(folder / adapter / "adapter_model.safetensors").items()
    }


@pytest.mark.parametrize("active", [["first"], ["second"], ["first", "second"]], ids="+".join)
def test_several_adapters(active, tmp_path, monkeypatch):
    model = two_adapters(active)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer, witness = make_trainer(model, tmp_path, **BEST)
    choose_step(trainer, monkeypatch, best=2)
    trainer.train()

    for step in (2, 4, 6):
        saved = saved_adapters(tmp_path / f"checkpoint-{step}")
        witness.assert_at_x(step, saved)
        for name in set(saved) - set(witness.x[step]):
            assert torch.equal(saved[name], before[name]), f"{name} was not trained"
    witness.assert_at_x(2, model)
    assert sorted(model.base_model.active_adapters) == sorted(active)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(witness.x[2])


def test_a_best_adapter_in_a_folder_of_its_own_that_was_altered_is_not_loaded(tmp_path, monkeypatch):
    class Alter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                path = Path(state.best_model_checkpoint) / "second/adapter_model.safetensors"
                content = path.read_bytes()
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    trainer, _ = make_trainer(two_adapters(["first", "second"]), tmp_path, **BEST)
    trainer.add_callback(Alter())
    choose_step(trainer, monkeypatch, best=2)
    with pytest.raises(ValueError, match=r"second/adapter_model.safetensors is altered"):
        trainer.train()


@pytest.mark.parametrize("active", [["second"], ["first", "second"]], ids="+".join)
def test_several_adapters_resume(active, tmp_path):
    straight, witness = make_trainer(two_adapters(active), tmp_path / "a", save_strategy="steps", save_steps=3)
    straight.train()
    resumed, second = make_trainer(two_adapters(active), tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert set(second.y[6]) == set(witness.y[6])
    assert all(torch.equal(second.y[6][name], y) for name, y in witness.y[6].items())


@pytest.mark.parametrize("known", [(), ("other",)], ids=["only in the checkpoint", "known"])
def test_an_adapter_beside_the_one_that_is_trained(known, tmp_path):
    """Where a callback adds one in mid-training (TRL's teacher), the resumed run starts without it."""

    def fresh(*others):
        model = peft.get_peft_model(tiny_llama(), ADAPTERS["lora"]())
        for other in others:
            model.add_adapter(other, ADAPTERS["lora"]())
        return model

    straight, witness = make_trainer(fresh("other"), tmp_path / "a", save_strategy="steps", save_steps=3)
    straight.train()
    resumed, second = make_trainer(fresh(*known), tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(second.y[6][name], y) for name, y in witness.y[6].items())
    assert resumed.model.active_adapters == ["default"]
    ours = dict(resumed.model.named_parameters())
    assert {name for name, p in ours.items() if p.requires_grad} == set(witness.y[6])
    assert all(torch.equal(ours[name], p) for name, p in straight.model.named_parameters() if ".other." in name)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(bits, tmp_path):
    """QLoRA: the base stays quantised and untouched, the adapter is saved at x."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}[bits]
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**quantised), device_map={"": "cpu"}
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, ADAPTERS["lora"]())
    assert any("bitsandbytes" in type(module).__module__ for module in model.modules())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer, witness = make_trainer(model, tmp_path / "out", **BEST)
    trainer.train()
    for step in (2, 4, 6):
        witness.assert_at_x(step, adapter_file(tmp_path / "out" / f"checkpoint-{step}"))
    witness.assert_at_x(trainer.state.best_global_step, model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
