"""TRL's trainers behind `ScheduleFreeMixin`: losses and rollouts at y, evaluation and every file at x."""

import pytest
import torch
from datasets import Dataset
from ecosystem import Witness, cpu_arguments, tiny_llama, tiny_llama_config, tiny_tokenizer
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from hf_schedulefree import ScheduleFreeMixin
from hf_schedulefree.weights import WeightSwitch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")


class SFT(ScheduleFreeMixin, trl.SFTTrainer):
    pass


class DPO(ScheduleFreeMixin, trl.DPOTrainer):
    pass


class Reward(ScheduleFreeMixin, trl.RewardTrainer):
    pass


class GRPO(ScheduleFreeMixin, trl.GRPOTrainer):
    pass


WORDS = ["red", "blue", "seven", "tree", "yes", "no", "salt", "moon"]


def chats(size=16):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"say {WORDS[i % 8]}"},
                    {"role": "assistant", "content": WORDS[i % 8]},
                ]
            }
            for i in range(size)
        ]
    )


def preferences(size=16):
    return Dataset.from_list(
        [
            {"prompt": f"say {WORDS[i % 8]} ", "chosen": WORDS[i % 8], "rejected": WORDS[(i + 3) % 8]}
            for i in range(size)
        ]
    )


def prompts(size=16):
    return Dataset.from_list([{"prompt": f"say {WORDS[i % 8]} "} for i in range(size)])


def lora(task_type="CAUSAL_LM"):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task_type, init_lora_weights="gaussian")


def arguments(config, output_dir, **changes):
    return config(
        **cpu_arguments(
            output_dir,
            **{
                "max_steps": 4,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "steps",
                "save_steps": 2,
                "bf16": False,
                "gradient_checkpointing": False,
                **changes,
            },
        )
    )


def evaluated_weights(trainer, monkeypatch):
    """What the model held in each evaluation, by step, noted inside the Trainer's own loop."""
    seen = {}
    loop = trainer.evaluation_loop

    def noting_loop(*args, **kwargs):
        seen[trainer.state.global_step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return loop(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluation_loop", noting_loop)
    return seen


def loss_weights(trainer, monkeypatch):
    """What the model held when each training loss was computed, by step."""
    seen = {}
    compute_loss = trainer.compute_loss

    def noting_loss(model, *args, **kwargs):
        if model.training:
            seen[trainer.state.global_step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return compute_loss(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", noting_loss)
    return seen


def saved(folder, with_lora):
    if not with_lora:
        return load_file(folder / "model.safetensors")
    return {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def train_and_check(trainer, witness, monkeypatch, tmp_path, with_lora=False):
    evaluated = evaluated_weights(trainer, monkeypatch)
    at_loss = loss_weights(trainer, monkeypatch)
    trainer.train()
    assert sorted(evaluated) == [2, 4]
    for step in (2, 4):
        witness.assert_at_x(step, evaluated[step])
        witness.assert_at_x(step, saved(tmp_path / f"checkpoint-{step}", with_lora))
    for step in (2, 3):  # after one step x, y and z are the same
        witness.assert_at_y(step, at_loss[step])
    witness.assert_at_x(4, trainer.model)
    card = (tmp_path / "README.md").read_text()
    assert "TRL" in card and "schedule-free" in card.lower()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history and all("averaging_weight" in entry and "relative_distance" in entry for entry in history)


SFT_CASES = {
    "plain": ({}, False),
    "lora": ({}, True),
    "packing": ({"packing": True, "max_length": 64, "packing_strategy": "wrapped"}, False),
    "assistant_only_loss": ({"assistant_only_loss": True}, False),
    "lora, assistant_only_loss": ({"assistant_only_loss": True}, True),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft(case, tmp_path, monkeypatch):
    changes, with_lora = SFT_CASES[case]
    witness = Witness()
    trainer = SFT(
        model=tiny_llama(),
        args=arguments(trl.SFTConfig, tmp_path, **changes),
        train_dataset=chats(32),
        eval_dataset=chats(8),
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
        **({"peft_config": lora()} if with_lora else {}),
    )
    train_and_check(trainer, witness, monkeypatch, tmp_path, with_lora)


@pytest.mark.parametrize("with_lora", [False, True])
def test_sft_saves_x_without_a_switch(with_lora, tmp_path, monkeypatch):
    switches, show_x = [], WeightSwitch.show_x
    monkeypatch.setattr(WeightSwitch, "show_x", lambda self: switches.append(show_x(self)))
    witness = Witness()
    trainer = SFT(
        model=tiny_llama(),
        args=arguments(trl.SFTConfig, tmp_path, eval_strategy="no"),
        train_dataset=chats(32),
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
        **({"peft_config": lora()} if with_lora else {}),
    )
    trainer.train()
    assert len(switches) == 1  # at the end of the training
    for step in (2, 4):
        witness.assert_at_x(step, saved(tmp_path / f"checkpoint-{step}", with_lora))


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_dpo(with_lora, tmp_path, monkeypatch):
    witness = Witness()
    reference = {"peft_config": lora()} if with_lora else {"ref_model": tiny_llama()}
    trainer = DPO(
        model=tiny_llama(),
        args=arguments(trl.DPOConfig, tmp_path),
        train_dataset=preferences(),
        eval_dataset=preferences(4),
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
        **reference,
    )
    train_and_check(trainer, witness, monkeypatch, tmp_path, with_lora)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_reward(with_lora, tmp_path, monkeypatch):
    torch.manual_seed(0)
    witness = Witness()
    trainer = Reward(
        model=LlamaForSequenceClassification(tiny_llama_config(num_labels=1)),
        args=arguments(trl.RewardConfig, tmp_path),
        train_dataset=preferences(),
        eval_dataset=preferences(4),
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
        **({"peft_config": lora("SEQ_CLS")} if with_lora else {}),
    )
    if not with_lora:
        train_and_check(trainer, witness, monkeypatch, tmp_path)
    else:
        trainer.train()
        witness.assert_at_x(4, trainer.model)


def short_is_good(completions, **kwargs):
    return [float(sum(ord(letter) for letter in completion) % 7) for completion in completions]


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_grpo_samples_at_y_and_evaluates_at_x(with_lora, tmp_path, monkeypatch):
    witness = Witness()
    args = arguments(
        trl.GRPOConfig,
        tmp_path,
        num_generations=2,
        max_completion_length=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        beta=0.01 if with_lora else 0.0,
        learning_rate=5e-2,
    )
    model = tiny_llama()
    trainer = GRPO(
        model=model,
        reward_funcs=short_is_good,
        args=args,
        train_dataset=prompts(),
        eval_dataset=prompts(4),
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
        **({"peft_config": lora()} if with_lora else {}),
    )
    sampled = {"rollout": {}, "evaluation": {}}
    generate = type(model).generate

    def noting_generate(self, *args, **kwargs):
        kind = "evaluation" if evaluating[0] else "rollout"
        sampled[kind][trainer.state.global_step] = {
            name: p.detach().clone() for name, p in trainer.model.named_parameters()
        }
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", noting_generate)
    evaluating = [False]
    prediction_step = trainer.prediction_step

    def noting_prediction_step(*args, **kwargs):
        evaluating[0] = True
        try:
            return prediction_step(*args, **kwargs)
        finally:
            evaluating[0] = False

    monkeypatch.setattr(trainer, "prediction_step", noting_prediction_step)
    train_and_check(trainer, witness, monkeypatch, tmp_path, with_lora)

    assert set(sampled["rollout"]) == {0, 1, 2, 3} and set(sampled["evaluation"]) == {2, 4}
    for step in (2, 3):
        witness.assert_at_y(step, sampled["rollout"][step])
    for step in (2, 4):
        witness.assert_at_x(step, sampled["evaluation"][step])


def test_an_evaluation_between_does_not_change_an_online_run(tmp_path):
    """Rollouts are sampled: an evaluation that moved the generators or the weights would change them all."""

    def run(folder, eval_strategy):
        witness = Witness()
        args = arguments(
            trl.GRPOConfig,
            folder,
            num_generations=2,
            max_completion_length=3,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            eval_strategy=eval_strategy,
            eval_steps=1,
            save_strategy="no",
        )
        trainer = GRPO(
            model=tiny_llama(),
            reward_funcs=short_is_good,
            args=args,
            train_dataset=prompts(),
            eval_dataset=prompts(4),
            processing_class=tiny_tokenizer(),
            callbacks=[witness],
        )
        trainer.train()
        return witness

    without, with_evaluation = run(tmp_path / "a", "no"), run(tmp_path / "b", "steps")
    assert all(torch.equal(with_evaluation.y[4][name], y) for name, y in without.y[4].items())


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_positional_arguments(tmp_path, kind):
    """Where the Trainer has the model and its arguments, TRL's have others in between."""
    if kind == "dpo":
        config, data = arguments(trl.DPOConfig, tmp_path), preferences()
        given = (tiny_llama(), tiny_llama(), config, None, data, data.select(range(4)), tiny_tokenizer())
    else:
        options = {"num_generations": 2, "max_completion_length": 3, "per_device_train_batch_size": 4}
        config = arguments(trl.GRPOConfig, tmp_path, per_device_eval_batch_size=4, **options)
        given = (tiny_llama(), lambda completions, **kwargs: [0.0] * len(completions), config)
        given += (prompts(), prompts(4), tiny_tokenizer())
    trainer = {"dpo": DPO, "grpo": GRPO}[kind](*given)
    trainer.train()
    assert trainer.args is config and type(trainer.optimizer.optimizer).__name__ == "AdamWScheduleFree"


class Engine:
    """Stands for vLLM: it samples from a copy of the weights that is made anew only when the trainer says so."""

    def __init__(self, trainer):
        self.trainer, self.weights = trainer, None

    def sync_weights(self):
        self.weights = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}

    def generate(self, prompts, **kwargs):
        self.sampled(self.trainer.state.global_step, self.weights)
        return prompts, [[5, 6, 1] for _ in prompts], [[[-5.5], [-5.5], [-5.5]] for _ in prompts], None


def test_an_engine_with_a_copy_of_the_weights_has_the_right_ones(tmp_path, monkeypatch):
    """TRL copies the weights to vLLM once per step; an evaluation in the same step is at x, the next rollout at y."""
    witness = Witness()
    args = arguments(
        trl.GRPOConfig,
        tmp_path,
        num_generations=2,
        max_completion_length=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        eval_steps=1,
        save_strategy="no",
    )
    trainer = GRPO(
        model=tiny_llama(),
        reward_funcs=lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        args=args,
        train_dataset=prompts(),
        eval_dataset=prompts(4),
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
    )
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(trainer), -1
    trainer.vllm_importance_sampling_correction = False
    seen = {"train": {}, "eval": {}}
    trainer.vllm_generation.sampled = lambda step, weights: seen[
        "train" if trainer.model.training else "eval"
    ].setdefault(step, weights)
    trainer.train()
    assert {2, 3} <= set(seen["train"]) and {2, 3, 4} <= set(seen["eval"])
    for step in (2, 3):
        witness.assert_at_y(step, seen["train"][step])
    for step in (2, 3, 4):
        witness.assert_at_x(step, seen["eval"][step])


def test_sft_resumes_to_the_same_bits(tmp_path):
    def make(folder):
        witness = Witness()
        return (
            SFT(
                model=tiny_llama(),
                args=arguments(trl.SFTConfig, folder, eval_strategy="no"),
                train_dataset=chats(32),
                processing_class=tiny_tokenizer(),
                callbacks=[witness],
            ),
            witness,
        )

    straight, witness = make(tmp_path / "a")
    straight.train()
    resumed, second = make(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(second.y[4][name], y) for name, y in witness.y[4].items())


def test_what_callbacks_of_trl_sample(tmp_path, monkeypatch):
    """`LogCompletionsCallback` samples at `on_step_end`, where the model shows y; inside `averaged_weights` it is x."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")

    class CompletionsAtX(callbacks.LogCompletionsCallback):
        def on_step_end(self, *args, averaged_weights, **kwargs):
            with averaged_weights():
                return super().on_step_end(*args, **kwargs)

    witness = Witness()
    trainer = SFT(
        model=tiny_llama(),
        args=arguments(trl.SFTConfig, tmp_path, save_strategy="no"),
        train_dataset=Dataset.from_list([{"prompt": f"say {w} ", "completion": w} for w in WORDS]),
        eval_dataset=Dataset.from_list([{"prompt": f"say {w} ", "completion": w} for w in WORDS[:2]]),
        processing_class=tiny_tokenizer(),
        callbacks=[witness],
    )
    seen = {}
    complete = callbacks._generate_completions

    def noting_complete(*args, **kwargs):
        seen[trainer.state.global_step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return complete(*args, **kwargs)

    monkeypatch.setattr(callbacks, "_generate_completions", noting_complete)
    trainer.eval_dataset = Dataset.from_list([{"prompt": f"say {w} "} for w in WORDS[:2]])
    callback = CompletionsAtX(trainer, freq=2)
    callback.generation_config = None
    trainer.add_callback(callback)
    trainer.args.eval_strategy = "no"
    trainer.train()
    for step in (2, 4):
        witness.assert_at_x(step, seen[step])


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_what_is_sampled_before_the_trainers_own_step(with_lora, tmp_path, monkeypatch):
    """GKD samples before `model.train()` is called: an evaluation or a resume must not turn its dropout off."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")

    class GKD(ScheduleFreeMixin, gkd.GKDTrainer):
        pass

    def run(folder, resumed_from=None, **changes):
        witness = Witness()
        trainer = GKD(
            model=tiny_llama(attention_dropout=0.3),
            teacher_model=tiny_llama(seed=1),
            args=arguments(gkd.GKDConfig, folder, lmbda=1.0, max_new_tokens=4, **changes),
            train_dataset=chats(),
            eval_dataset=chats(4),
            processing_class=tiny_tokenizer(),
            callbacks=[witness],
            **({"peft_config": lora()} if with_lora else {}),
        )
        trainer.train(resume_from_checkpoint=resumed_from)
        return witness.y[4]

    quiet = run(tmp_path / "quiet", eval_strategy="no", save_strategy="no")
    watched = run(tmp_path / "watched", eval_steps=1)
    resumed = run(tmp_path / "resumed", resumed_from=str(tmp_path / "watched" / "checkpoint-2"), eval_strategy="no")
    assert quiet and all(torch.equal(watched[name], y) for name, y in quiet.items())
    assert all(torch.equal(resumed[name], y) for name, y in quiet.items())
