"""Tiny models, a tokenizer, and an independent witness of x, for the tests with the packages around the Trainer."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "A:{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}U:{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a chat template that marks what the assistant says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 258,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            **changes,
        }
    )


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_llama_config(**changes))


class Witness(TrainerCallback):
    """Notes y and z of every step, in float64, where nobody has switched anything: x follows from them alone."""

    def __init__(self) -> None:
        self.y: dict[int, dict[str, Tensor]] = {}
        self.x: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        groups = optimizer.optimizer.param_groups
        beta = {p: g["betas"][0] if "betas" in g else g["momentum"] for g in groups for p in g["params"]}
        states = optimizer.optimizer.state
        y, x = {}, {}
        for name, p in model.named_parameters():
            if p not in states or "z" not in states[p]:
                continue
            y[name] = p.detach().double().clone()
            x[name] = y[name] + (1 - 1 / beta[p]) * (states[p]["z"].double() - y[name])
        self.y[state.global_step], self.x[state.global_step] = y, x

    def assert_at_x(self, step: int, shown: nn.Module | Mapping[str, Tensor]) -> None:
        """`shown` is the x of `step`; and that says something, as y is far away from it."""
        self._assert_is(self.x[step], self.y[step], shown)

    def assert_at_y(self, step: int, shown: nn.Module | Mapping[str, Tensor]) -> None:
        """`shown` is the y of `step`."""
        self._assert_is(self.y[step], self.x[step], shown)

    @staticmethod
    def _assert_is(
        expected: Mapping[str, Tensor], other: Mapping[str, Tensor], shown: nn.Module | Mapping[str, Tensor]
    ) -> None:
        if isinstance(shown, nn.Module):
            shown = dict(shown.named_parameters())
        assert expected, "no parameter was trained"
        missing = set(expected) - set(shown)
        assert not missing, f"not among the weights: {sorted(missing)[:3]}"
        error = max((shown[name].detach().double().cpu() - expected[name]).abs().max().item() for name in expected)
        apart = max((other[name] - expected[name]).abs().max().item() for name in expected)
        assert apart > 1e-4, f"x and y differ by {apart} only: this run shows nothing"
        assert error < 1e-6 and error < apart / 50, f"off by {error}, where x and y are {apart} apart"


def cpu_arguments(output_dir: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of a short, noisy run in which x and y differ."""
    return {
        "output_dir": str(output_dir),
        "optim": "adamw_schedulefree",
        "learning_rate": 2e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **changes,
    }


def script(name: str) -> ModuleType:
    """A program of scripts/, as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
