"""Saves that write x without showing it: the same files as the ordinary way writes, and parameters left alone."""

import builtins
import contextlib
import copy
import errno
import functools
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ecosystem import tiny_llama
from safetensors.torch import load_file
from tiny import inner, make_trainer, x_in_float64
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import ExportableState

from hf_schedulefree import BatchNormRecalibrationCallback, ScheduleFreeMixin, ScheduleFreeTrainer, averaged_weights
from hf_schedulefree.checkpoint import CannotStream, streamed_weight_files, verify_checkpoint, writing
from hf_schedulefree.optim import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from hf_schedulefree.optim.pieces import AveragedPieces
from hf_schedulefree.streamed_save import save_averaged
from hf_schedulefree.weights import WeightSwitch

VOCABULARY = 64


def llama(dtype=torch.float32, **options):
    return tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=32, **options).to(dtype)


def gpt2(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, **options))


def partly_frozen():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


class Unused(LlamaForCausalLM):
    """With a parameter that no gradient reaches: it has no state."""

    def __init__(self, config):
        super().__init__(config)
        self.unused = nn.Parameter(torch.ones(3))


def with_unused():
    return Unused(llama().config)


class Plain(nn.Module):
    """No model of transformers: the Trainer writes its state dict. With buffers, and whole numbers among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, input_ids, labels=None):
        scores = self.head(self.embedding(input_ids)) * self.scale
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


def lora(adapters=("default",), **options):
    peft = pytest.importorskip("peft")
    config = functools.partial(peft.LoraConfig, r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config(**options))
    for name in adapters[1:]:
        model.add_adapter(name, config(**options))
    model.base_model.set_adapter(list(adapters))
    return model


STREAMED = {
    "gpt2, tied": (gpt2, {}),
    "gpt2, untied": (functools.partial(gpt2, tie_word_embeddings=False), {}),
    "llama": (llama, {}),
    "llama, float64": (functools.partial(llama, torch.float64), {}),
    "bfloat16 split": (functools.partial(llama, torch.bfloat16), {}),
    "bfloat16 stochastic": (functools.partial(llama, torch.bfloat16), {"optim_args": "state_precision=stochastic"}),
    "bfloat16 full": (functools.partial(llama, torch.bfloat16), {"optim_args": "state_precision=full"}),
    "bfloat16 parameter": (functools.partial(llama, torch.bfloat16), {"optim_args": "state_precision=parameter"}),
    "float16 split": (functools.partial(llama, torch.float16), {"learning_rate": 1e-3}),
    "sgd": (llama, {"optim": "sgd_schedulefree", "learning_rate": 0.5}),
    "radam": (llama, {"optim": "radam_schedulefree", "step": 8}),  # it begins with steps of size zero
    "partly frozen": (partly_frozen, {}),
    "without a gradient": (with_unused, {}),
    "no model of transformers": (Plain, {}),
    "lora": (lora, {}),
    "lora, two adapters": (functools.partial(lora, ("default", "other")), {}),
    "dora": (functools.partial(lora, use_dora=True), {}),
    "lora, modules_to_save": (functools.partial(lora, modules_to_save=["lm_head"]), {}),
}


@pytest.fixture
def switches(monkeypatch):
    """The number of switches to x so far, as a list of one."""
    count = [0]
    show_x = WeightSwitch.show_x

    def counted(self):
        count[0] += 1
        show_x(self)

    monkeypatch.setattr(WeightSwitch, "show_x", counted)
    return count


class At(TrainerCallback):
    """Calls a function after one step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def in_training(folder, model, act, trainer_class=ScheduleFreeTrainer, callbacks=(), step=3, **options):
    """Train; after a step, `act` gets the trainer."""
    options = {"max_steps": step + 1, "learning_rate": 2e-2, **options}
    trainer = make_trainer(folder, trainer_class, model, {"callbacks": list(callbacks)}, **options)
    done = []
    trainer.add_callback(At(step, lambda: done.append(act(trainer))))
    trainer.train()
    assert len(done) == 1
    return trainer


@contextlib.contextmanager
def ordinarily(trainer):
    """Within: saves switch to x."""
    former, trainer._cannot_stream = trainer._cannot_stream, "as a test wants it"
    yield
    trainer._cannot_stream = former


def everything(trainer):
    """What a save must leave alone: bits and versions of all parameters, and the state."""
    optimizer = inner(trainer.optimizer)
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    modes = [(group["train_mode"], group["parked_k"]) for group in optimizer.param_groups]
    return [(t._version, t.data_ptr(), t.detach().clone()) for t in tensors], modes


def unchanged(before, after):
    return before[1] == after[1] and all(
        (a[0], a[1]) == (b[0], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(before[0], after[0], strict=True)
    )


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def files_of_weights(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


def raw(path):
    """The header of a safetensors file as it stands there, but for the order of the metadata; and all other bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return header.pop("__metadata__", None), list(header.items()), end, content[end:]


def same_value(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    return a == b


def assert_same_files(one, other):
    assert files_in(one) == files_in(other)
    for name in files_in(one):
        first, second = Path(one) / name, Path(other) / name
        if name.endswith(".safetensors"):
            assert raw(first) == raw(second), name
        elif name.endswith((".pt", ".pth")):
            contents = [torch.load(path, weights_only=not name.startswith("rng")) for path in (first, second)]
            assert repr(contents[0]) == repr(contents[1]) if name.startswith("rng") else same_value(*contents), name
        elif name != "schedule_free.json":  # the order of the metadata in the header is by chance, and so its checksum
            assert first.read_bytes() == second.read_bytes(), name


def save_both_ways(trainer, folder, switches):
    """The streamed save, which must switch nothing and touch nothing, and the ordinary one beside it."""
    before, switched = everything(trainer), switches[0]
    trainer.save_model(folder / "streamed")
    assert switches[0] == switched and trainer._cannot_stream is None
    assert unchanged(before, everything(trainer))
    with ordinarily(trainer):
        trainer.save_model(folder / "ordinary")


@pytest.mark.parametrize("case", STREAMED)
def test_a_streamed_save_is_the_ordinary_one_and_touches_nothing(case, tmp_path, switches):
    build, options = STREAMED[case]

    def both(trainer):
        switched = switches[0]
        save_both_ways(trainer, tmp_path, switches)
        assert switches[0] == switched + 1
        written = [tensor for path in files_of_weights(tmp_path / "streamed") for tensor in load_file(path).values()]
        y = {tuple(p.flatten().tolist()) for p in trainer.model.parameters()}
        assert any(tuple(tensor.flatten().tolist()) not in y for tensor in written)

    in_training(tmp_path / "run", build(), both, **options)
    assert_same_files(tmp_path / "streamed", tmp_path / "ordinary")


def test_what_is_written_is_x_and_not_y(tmp_path):
    """Without trust in the ordinary way: against float64."""
    seen = []

    def save(trainer):
        trainer.save_model(tmp_path / "saved")
        seen.append((x_in_float64(trainer), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}))

    in_training(tmp_path / "run", llama(), save)
    ((exact, y),) = seen
    written = load_file(tmp_path / "saved/model.safetensors")
    assert exact.keys() == written.keys()
    for name, x in exact.items():
        assert (written[name].double() - x).abs().max() < 1e-6
        assert (written[name] - y[name]).abs().max() > 1e-4, name


def test_the_trainer_of_an_older_transformers_streams_too(tmp_path, switches):
    """Before 5.19 it had no attribute for models that were sharded while they were loaded."""

    def save(trainer):
        vars(trainer).pop("is_distributed_loading_by_transformers", None)
        save_both_ways(trainer, tmp_path, switches)

    in_training(tmp_path / "run", llama(), save)
    assert_same_files(tmp_path / "streamed", tmp_path / "ordinary")


@pytest.mark.parametrize("case", ["gpt2, tied", "bfloat16 split", "without a gradient", "lora"])
def test_checkpoints_are_the_same_and_resume_to_the_same_bits(case, tmp_path, switches):
    build, options = STREAMED[case]
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 2e-2, **options}
    runs = {}
    for way in ("streamed", "ordinary"):
        trainer = runs[way] = make_trainer(tmp_path / "run", model=build(), **options)
        if way == "ordinary":
            trainer._cannot_stream = "as a test wants it"
        switched = switches[0]
        trainer.train()
        # At the end of the training x is shown; the ordinary way switches for each checkpoint besides.
        assert switches[0] - switched == (1 if way == "streamed" else 4)
        (tmp_path / "run").rename(tmp_path / way)
    for step in (2, 4, 5):
        folders = [tmp_path / way / f"checkpoint-{step}" for way in runs]
        for folder in folders:
            assert verify_checkpoint(folder).record.weights == "x"
        assert_same_files(*folders)
    resumed = make_trainer(tmp_path / "streamed", model=build(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "streamed/checkpoint-2"))
    final = [trainer.model.state_dict() for trainer in (*runs.values(), resumed)]
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]) and torch.equal(tensor, final[2][name]), name


def test_the_state_dict_at_x_holds_the_parameters_themselves(tmp_path):
    model = llama()
    optimizer = stepped(model, AdamWScheduleFree(model.parameters(), lr=1e-2))
    with optimizer.state_dicts_at_x():
        at_x = optimizer.state_dict()
        copied = copy.deepcopy(at_x)
    index = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    assert all(state["y"].data_ptr() == index[i].data_ptr() for i, state in at_x["state"].items())
    assert all("y" not in state for state in optimizer.state.values()) and optimizer.mode == "train"
    optimizer.eval()
    assert same_value(copied, optimizer.state_dict())
    with optimizer.state_dicts_at_x():  # in eval mode there is nothing to change
        assert same_value(copied, optimizer.state_dict())


def test_a_parked_view_brings_no_other_memory_into_the_file():
    whole = torch.randn(1000)
    p = nn.Parameter(whole[:10])
    optimizer = AdamWScheduleFree([p], lr=0.1)
    optimizer.train()
    p.grad = torch.ones(10)
    optimizer.step()
    with optimizer.state_dicts_at_x():
        y = optimizer.state_dict()["state"][0]["y"]
    assert torch.equal(y, p) and y.untyped_storage().nbytes() == 40


# Training loops of one's own; shards


def stepped(model, optimizer, steps=3):
    """The optimizer after some steps on random gradients, in train mode."""
    generator = torch.Generator().manual_seed(0)
    optimizer.train()
    for _ in range(steps):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("optimizer_class", [AdamWScheduleFree, SGDScheduleFree, RAdamScheduleFree])
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused", None])
def test_shards_are_those_of_save_pretrained(optimizer_class, implementation, tmp_path, switches):
    model = llama(num_hidden_layers=2)
    optimizer = stepped(model, optimizer_class(model.parameters(), lr=0.1, implementation=implementation))
    save_averaged(model, optimizer, tmp_path / "streamed", max_shard_size="10KB")
    assert switches[0] == 0
    with averaged_weights(model, optimizer):
        model.save_pretrained(tmp_path / "ordinary", max_shard_size="10KB")
    assert_same_files(tmp_path / "streamed", tmp_path / "ordinary")
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("worth_a_thread", [0, 2**40])
def test_many_pieces_and_the_ends_of_tensors(worth_a_thread, tmp_path, monkeypatch):
    """Tensors of all sizes around that of a piece, and pieces with many of them."""
    monkeypatch.setattr(writing, "_PIECE_BYTES", 256)
    monkeypatch.setattr(writing, "_WORTH_A_THREAD", worth_a_thread)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        model = nn.ParameterList([torch.randn(n).to(dtype) for n in (1, 63, 64, 65, 127, 128, 129, 1000, *[3] * 99)])
        model.append(torch.randn((), dtype=dtype))
        optimizer = stepped(model, AdamWScheduleFree(model.parameters(), lr=0.1))
        tensors = dict(model.state_dict())
        with streamed_weight_files(optimizer.x_in_pieces(), [], list(model.parameters())):
            safetensors.torch.save_file(tensors, tmp_path / "streamed")
        optimizer.eval()
        safetensors.torch.save_file(tensors, tmp_path / "ordinary")
        assert (tmp_path / "streamed").read_bytes() == (tmp_path / "ordinary").read_bytes()


# What cannot stream


def with_hook():
    model = llama()
    model.register_state_dict_post_hook(lambda module, tensors, *args: None)
    return model


class OwnStateDict(LlamaForCausalLM):
    def state_dict(self, *args, **kwargs):
        return {name: tensor * 1 for name, tensor in super().state_dict(*args, **kwargs).items()}


class OwnSave(LlamaForCausalLM):
    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        norms = {name: float(p.detach().norm()) for name, p in self.named_parameters()}
        (Path(save_directory) / "norms.json").write_text(json.dumps(norms))


def save_in_the_instance():
    model = llama()
    own = model.save_pretrained

    def save_pretrained(save_directory, **kwargs):
        own(save_directory, **kwargs)
        torch.save(model.lm_head.weight, Path(save_directory) / "head.pt")

    model.save_pretrained = save_pretrained
    return model


class ExtraState(LlamaForCausalLM):
    def get_extra_state(self):
        return torch.stack([p.sum() for p in self.parameters()])

    def set_extra_state(self, state):
        pass


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=4, **sizes))


def not_contiguous():
    model = llama()
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        weight.data = weight.data.t().contiguous().t()
    return model


def not_saved():
    model = llama()
    model._keys_to_ignore_on_save = {"lm_head.weight"}
    return model


class WritesHead(ScheduleFreeTrainer):
    def save_model(self, output_dir=None, *args, **kwargs):
        super().save_model(output_dir, *args, **kwargs)
        torch.save(self.model.lm_head.weight.detach(), Path(output_dir) / "head.pt")


class Pickles(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), Path(output_dir) / "pickled.pt")


class PicklesX(ScheduleFreeMixin, Pickles):
    pass


ORDINARY = {
    "a state dict hook": (with_hook, ScheduleFreeTrainer),
    "a state_dict of its own": (lambda: OwnStateDict(llama().config), ScheduleFreeTrainer),
    "a save_pretrained of its own": (lambda: OwnSave(llama().config), ScheduleFreeTrainer),
    "a save_pretrained of the instance": (save_in_the_instance, ScheduleFreeTrainer),
    "extra state": (lambda: ExtraState(llama().config), ScheduleFreeTrainer),
    "experts that are split": (mixtral, ScheduleFreeTrainer),
    "a parameter that is not contiguous": (not_contiguous, ScheduleFreeTrainer),
    "a parameter that is not saved": (not_saved, ScheduleFreeTrainer),
    "a save_model that does more": (llama, WritesHead),
    "a _save that pickles": (llama, PicklesX),
}


@pytest.mark.parametrize("case", ORDINARY)
def test_where_the_host_does_more_a_checkpoint_is_written_at_x(case, tmp_path, switches):
    build, trainer_class = ORDINARY[case]

    def both(trainer):
        checkpoint = tmp_path / "run/checkpoint-3"
        before, switched = everything(trainer), switches[0]
        for count in (1, 2):
            trainer._save_checkpoint(trainer.model, None)
            assert switches[0] == switched + count
            checkpoint.rename(tmp_path / f"tried-{count}")
        after = everything(trainer)
        assert all(torch.equal(a[2], b[2]) for a, b in zip(before[0], after[0], strict=True))
        with trainer.averaged_weights():
            trainer._save_checkpoint(trainer.model, None)
        checkpoint.rename(tmp_path / "ordinary")

    in_training(tmp_path / "run", build(), both, trainer_class)
    for count in (1, 2):
        assert_same_files(tmp_path / f"tried-{count}", tmp_path / "ordinary")
        assert not list((tmp_path / f"tried-{count}").glob(".*"))


def test_what_is_no_parameter_as_it_stands_is_refused(tmp_path):
    model = llama()
    optimizer = stepped(model, AdamWScheduleFree(model.parameters(), lr=0.1))
    tensors, frozen = dict(model.state_dict()), torch.ones(4)
    name, p = next(iter(tensors.items()))
    other = tensors["lm_head.weight"]
    handed = {
        "a copy": {name: p.clone()},
        "a part": {name: p[1:]},
        "a transposed one": {name: p.t()},
        "another dtype": {name: p.view(torch.int32)},
        "something new": {**tensors, "new": torch.ones(2)},
        "twice": {"one": p, "two": p},
        "parts that overlap": {"one": frozen[:3], "two": frozen[2:]},
        "negated when read": {name: p, "negated": torch._neg_view(frozen)},
        "a subclass": {name: torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), p)},
        "an unusual dtype": {name: p, "complex": torch.ones(2, dtype=torch.complex64)},
        "not all of them": {name: p},
    }
    for case, given in handed.items():
        with (
            pytest.raises(CannotStream),
            streamed_weight_files(optimizer.x_in_pieces(), [frozen], [p, other] if case == "not all of them" else []),
            contextlib.suppress(CannotStream),  # the host may keep it to itself
        ):
            safetensors.torch.save_file(given, tmp_path / "file")
        assert not list(tmp_path.iterdir()), case
    with pytest.raises(CannotStream), streamed_weight_files(optimizer.x_in_pieces(), [], []):
        safetensors.torch.save(tensors)
    # A view in another shape is the whole parameter, and parts of what is not replaced are what they are.
    shaped = {**tensors, name: p.reshape(-1), "one": frozen[:2], "two": frozen[2:]}
    with streamed_weight_files(optimizer.x_in_pieces(), [frozen], [p, other]):
        safetensors.torch.save_file(shaped, tmp_path / "streamed")
    optimizer.eval()
    safetensors.torch.save_file(shaped, tmp_path / "ordinary")
    assert raw(tmp_path / "streamed")[1:] == raw(tmp_path / "ordinary")[1:]


def test_parameters_that_share_memory_are_not_streamed(tmp_path, switches):
    """A flat buffer is trained; the model's own parameters are views of it, and the file holds x of them all."""
    model = Plain()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    first = 0
    for p in model.parameters():
        p.data = flat.detach()[first : first + p.numel()].view(p.shape)
        first += p.numel()
    optimizer = AdamWScheduleFree([flat], lr=0.1)
    optimizer.train()
    flat.grad = torch.randn_like(flat)
    optimizer.step()
    with pytest.raises(CannotStream), streamed_weight_files(optimizer.x_in_pieces(), list(model.parameters()), []):
        safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "file")
    doubled = AdamWScheduleFree([nn.Parameter(flat.detach()), nn.Parameter(flat.detach()[:5])], lr=0.1)
    stepped(nn.ParameterList(doubled.param_groups[0]["params"]), doubled)
    with pytest.raises(CannotStream), streamed_weight_files(doubled.x_in_pieces(), [], []):
        pass


@pytest.mark.parametrize("case", ["some of the parameters", "a cast"])
def test_a_given_state_dict_that_cannot_stream_is_written_whole(case, tmp_path, switches):
    """transformers takes the tensors out of it while it saves: the second try needs them all again."""
    model = llama()
    optimizer = stepped(model, AdamWScheduleFree(model.parameters(), lr=0.1))

    tensors = model.state_dict()
    if case == "a cast":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    else:
        tensors = {name: p for name, p in tensors.items() if "mlp" in name}
    save_averaged(model, optimizer, tmp_path / "tried", state_dict=dict(tensors))
    assert switches[0] == 1
    with averaged_weights(model, optimizer):
        model.save_pretrained(tmp_path / "ordinary", state_dict=dict(tensors))
    assert_same_files(tmp_path / "tried", tmp_path / "ordinary")
    assert load_file(tmp_path / "tried/model.safetensors").keys() == tensors.keys()


class SavesItself(nn.Linear):
    """With a `save_pretrained` of which nothing is known."""

    def save_pretrained(self, folder):
        Path(folder).mkdir()
        safetensors.torch.save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "norm.json").write_text(json.dumps(self.weight.norm().item()))


def test_a_model_of_another_library_is_saved_at_x(tmp_path, switches):
    model = SavesItself(4, 4)
    optimizer = stepped(model, AdamWScheduleFree(model.parameters(), lr=0.1))
    save_averaged(model, optimizer, tmp_path / "saved")
    assert switches[0] == 1
    with averaged_weights(model, optimizer):
        model.save_pretrained(tmp_path / "ordinary")
    assert_same_files(tmp_path / "saved", tmp_path / "ordinary")


def test_two_saves_at_once_in_two_threads(tmp_path):
    """Another thread's files are its own affair."""
    model = llama()
    optimizer = stepped(model, AdamWScheduleFree(model.parameters(), lr=0.1))
    mine, others = dict(model.state_dict()), {"other": torch.arange(3.0)}
    with streamed_weight_files(optimizer.x_in_pieces(), [], list(model.parameters())):
        thread = threading.Thread(target=safetensors.torch.save_file, args=(others, tmp_path / "other"))
        thread.start()
        thread.join()
        safetensors.torch.save_file(mine, tmp_path / "mine")
    assert torch.equal(load_file(tmp_path / "other")["other"], others["other"])
    # And where the host itself writes in another thread, nothing was streamed: the save is refused.
    with pytest.raises(CannotStream), streamed_weight_files(optimizer.x_in_pieces(), [], list(model.parameters())):
        thread = threading.Thread(target=safetensors.torch.save_file, args=(mine, tmp_path / "file"))
        thread.start()
        thread.join()


def test_batch_norm_callbacks_optimizer_hooks_and_exported_callbacks_take_the_ordinary_way(tmp_path, switches):
    class Exports(TrainerCallback, ExportableState):
        def state(self):
            return {"args": {}, "attributes": {}}

    def save(trainer):
        switched = switches[0]
        trainer._save_checkpoint(trainer.model, None)
        return switches[0] - switched

    counts = []
    in_training(tmp_path / "a", llama(), lambda trainer: counts.append(save(trainer)))
    in_training(
        tmp_path / "b",
        llama(),
        lambda trainer: counts.append(save(trainer)),
        callbacks=[BatchNormRecalibrationCallback(1)],
    )
    in_training(tmp_path / "c", llama(), lambda trainer: counts.append(save(trainer)), callbacks=[Exports()])

    def with_optimizer_hook(trainer):
        inner(trainer.optimizer).register_state_dict_post_hook(lambda optimizer, state_dict: None)
        counts.append(save(trainer))

    in_training(tmp_path / "d", llama(), with_optimizer_hook)
    assert counts == [0, 1, 1, 1]


# What a save inside a save sees


def test_a_save_where_x_is_shown_writes_the_parameters(tmp_path, switches):
    def save(trainer):
        with trainer.averaged_weights():
            switched = switches[0]
            trainer.save_model(tmp_path / "inside")
            assert switches[0] == switched
        trainer.save_model(tmp_path / "outside")
        with trainer._saving_x(), trainer.averaged_weights():  # a callback in the midst of a streamed save
            trainer.save_model(tmp_path / "within")
            shown = inner(trainer.optimizer).state_dict()
            assert not shown["param_groups"][0]["train_mode"]
            assert not torch.equal(shown["state"][0]["y"], next(trainer.model.parameters()))

    trainer = in_training(tmp_path / "run", llama(), save)
    trainer.save_model(tmp_path / "after")
    for name in ("inside", "within"):
        assert_same_files(tmp_path / name, tmp_path / "outside")
    written = load_file(tmp_path / "after/model.safetensors")
    assert all(torch.equal(written[name], p) for name, p in trainer.model.named_parameters())


# Callbacks


def test_only_callbacks_that_listen_are_worth_a_switch(tmp_path, switches):
    class Listens(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])

    class Proxy:
        """Answers by `__getattr__` alone."""

        def __getattr__(self, name):
            return getattr(Listens(), name)

    def in_instance():
        callback = TrainerCallback()
        callback.on_save = Listens().on_save
        return callback

    def wrapped():
        own = functools.wraps(TrainerCallback.on_save)(Listens.on_save)
        return type("Wrapped", (TrainerCallback,), {"on_save": own})()

    def run(folder, *callbacks):
        switched = switches[0]
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(
            tmp_path / folder, model=llama(), trainer_options={"callbacks": list(callbacks)}, **options
        )
        trainer.train()
        return switches[0] - switched

    seen = []
    assert run("none") == 1 and run("nothing", TrainerCallback()) == 1 and not seen
    expected = None
    for folder, callback in {"a": Listens(), "b": Proxy(), "c": in_instance(), "d": wrapped()}.items():
        seen = []
        assert run(folder, callback) == 3, folder  # two saves, and the end of the training
        assert len(seen) == 2
        expected = expected or seen
        assert all(
            torch.equal(a, b)
            for one, other in zip(seen, expected, strict=True)
            for a, b in zip(one, other, strict=True)
        )
        saved = load_file(tmp_path / folder / "checkpoint-2/model.safetensors")
        assert all(any(torch.equal(p, tensor) for tensor in saved.values()) for p in seen[0])


# Errors


@pytest.mark.parametrize("operation", ["open", "posix_fallocate", "write", "replace", "content"])
def test_a_save_that_fails_leaves_the_former_file_and_the_parameters(operation, tmp_path, monkeypatch):
    def save(trainer):
        trainer.save_model(tmp_path / "saved")
        former = (tmp_path / "saved/model.safetensors").read_bytes()
        before, files = everything(trainer), files_in(tmp_path / "saved")
        with monkeypatch.context() as patch:

            def fail(*args, **kwargs):
                if operation != "open" or "model.safetensors" in str(args[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return plain_open(*args, **kwargs)

            if operation == "write":
                patch.setattr(writing, "write_at", fail)
            elif operation == "content":
                patch.setattr(AveragedPieces, "read", fail)
            elif operation == "open":
                plain_open = builtins.open
                patch.setattr(builtins, "open", fail)
            else:
                patch.setattr(os, operation, fail)
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                trainer.save_model(tmp_path / "saved")
        assert (tmp_path / "saved/model.safetensors").read_bytes() == former
        assert files_in(tmp_path / "saved") == files and unchanged(before, everything(trainer))
        assert not trainer._streaming and trainer._cannot_stream is None
        assert inner(trainer.optimizer).state_dict()["param_groups"][0]["train_mode"] is True

    in_training(tmp_path / "run", llama(), save)


# Size


def test_a_checkpoint_is_that_of_adamw_and_one_copy_of_the_trainable_parameters(tmp_path):
    for build in (functools.partial(llama, hidden_size=64), functools.partial(lora, modules_to_save=["lm_head"])):
        sizes = []
        for trainer_class, optim in ((Trainer, "adamw_torch"), (ScheduleFreeTrainer, "adamw_schedulefree")):
            folder = tmp_path / f"{build.func.__name__}-{optim}"
            options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
            trainer = make_trainer(folder, trainer_class, build(), optim=optim, **options)
            trainer.train()
            sizes.append(
                sum((folder / "checkpoint-2" / name).stat().st_size for name in files_in(folder / "checkpoint-2"))
            )
        copy_of_them = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
        # The record, and what the header of the weights says: the same few KiB for a model of any size.
        assert sizes[1] - sizes[0] <= copy_of_them + 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["gpt2, tied", "bfloat16 split", "float16 split", "partly frozen", "lora"])
def test_a_streamed_save_from_a_gpu(case, tmp_path, switches):
    build, options = STREAMED[case]

    def both(trainer):
        save_both_ways(trainer, tmp_path, switches)

    in_training(tmp_path / "run", build(), both, use_cpu=False, **options)
    assert_same_files(tmp_path / "streamed", tmp_path / "ordinary")


# Several processes


DDP = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from test_streamed_save import *

folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
count = [0]
show_x = WeightSwitch.show_x
def counted(self):
    count[0] += 1
    show_x(self)
WeightSwitch.show_x = counted

for name, build, expected in (("llama", llama, 0), ("mixtral", mixtral, 1)):
    def both(trainer):
        before, switched = everything(trainer), count[0]
        trainer._save_checkpoint(trainer.model, None)
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert count[0] - switched == (expected if rank == 0 else 0), count
        after = everything(trainer)
        assert all(torch.equal(a[2], b[2]) for a, b in zip(before[0], after[0], strict=True))
        if rank == 0:
            (folder / name / "checkpoint-3").rename(folder / name / "first")
        torch.distributed.barrier()
        with ordinarily(trainer):
            trainer._save_checkpoint(trainer.model, None)
    trainer = in_training(folder / name, build(), both)
    final = [None, None]
    torch.distributed.all_gather_object(final, [p.detach() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*final, strict=True))
    if rank == 0:
        assert_same_files(folder / name / "first", folder / name / "checkpoint-3")
(folder / f"done-{rank}").touch()
"""


@pytest.mark.distributed
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", DDP, str(Path(__file__).parent), str(tmp_path)]
    workers = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists(), "\n".join(text[-3000:] for text in said)


# Memory


MEMORY = """
import sys
import safetensors.torch
import torch
from torch import nn
from hf_schedulefree.checkpoint import streamed_weight_files
from hf_schedulefree.optim import AdamWScheduleFree

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1])

def save(elements, dtype, implementation):
    model = nn.ParameterList([torch.randn(elements).to(dtype) for _ in range(2)])
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.1, implementation=implementation)
    optimizer.train()
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    tensors = dict(model.state_dict())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far is forgotten
    before = peak()
    with streamed_weight_files(optimizer.x_in_pieces(), [], list(model)):
        safetensors.torch.save_file(tensors, sys.argv[1])
    return peak() - before

for case in ((torch.float32, None), (torch.float32, "foreach"), (torch.bfloat16, None)):
    save(1000, case[0], case[1] or "fused")  # libraries are loaded
    print("KIB", save(2**23, *case))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_streamed_save_needs_no_more_than_four_mebibytes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "file")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    peaks = [int(peak) for peak in output.split() if peak.isdigit()]
    assert len(peaks) == 3 and max(peaks) <= 4 * 1024, peaks  # one of the two tensors has 32 or 16 MiB
