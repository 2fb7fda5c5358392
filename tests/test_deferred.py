"""A state dict of deferred tensors: `save_pretrained` writes the same files of it, with one tensor in memory."""

import weakref
import zipfile

import pytest
import torch
from checkpoint_runs import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from hf_schedulefree.checkpoint import describe_weight_files, read_header
from hf_schedulefree.checkpoint.deferred import DeferredTensor, made
from hf_schedulefree.checkpoint.pickled import write_pickled

METADATA = {"schedule_free.weights": "x"}


class Maker:
    """Makes the tensors of a state dict when they are asked for, and counts how many are there at a time."""

    def __init__(self, state_dict):
        self.made, self.alive, self.most = 0, 0, 0
        self.state_dict = {
            name: DeferredTensor(tensor.detach().to("meta"), lambda tensor=tensor: self.make(tensor))
            for name, tensor in state_dict.items()
        }

    def make(self, tensor):
        copy = tensor.detach().clone()
        self.made, self.alive = self.made + 1, self.alive + 1
        self.most = max(self.most, self.alive)
        weakref.finalize(copy, self.gone)
        return copy

    def gone(self):
        self.alive -= 1


def mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=2, **sizes))


MODELS = {
    "llama": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "bf16": lambda: tiny_model().bfloat16(),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=8)),
    "mixtral": mixtral,  # its experts are split before they are written
    "lora": lambda: get_peft_model(
        tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ),
}


def files(folder):
    return {path.name: path for path in folder.iterdir() if path.suffix == ".safetensors"}


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_writes_the_same_files(tmp_path, name, size):
    model = MODELS[name]()
    options = {} if name == "lora" else {"max_shard_size": size}
    maker = Maker(model.state_dict())
    with describe_weight_files(METADATA):
        model.save_pretrained(tmp_path / "whole", **options)
        model.save_pretrained(tmp_path / "deferred", state_dict=maker.state_dict, **options)
    expected, written = files(tmp_path / "whole"), files(tmp_path / "deferred")
    assert written.keys() == expected.keys()
    for file, path in written.items():
        header = read_header(expected[file])
        assert read_header(path) == header and header["__metadata__"].items() >= METADATA.items()
        assert list(read_header(path))[1:] == list(header)[1:]  # in the same order
        whole = load_file(expected[file])
        assert all(torch.equal(tensor, whole[key]) for key, tensor in load_file(path).items())
    for index in (tmp_path / "whole").glob("*.index.json"):
        assert (tmp_path / "deferred" / index.name).read_text() == index.read_text()
    if name not in ("mixtral", "lora"):
        assert maker.most == 1 and maker.made == sum(len(read_header(path)) - 1 for path in written.values())
    if name == "lora":
        assert maker.made < len(maker.state_dict) / 2  # the base model's are not made
    assert maker.alive == 0


def test_without_the_block_the_file_is_the_same(tmp_path):
    model = tiny_model()
    maker = Maker(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=maker.state_dict)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items() if name in saved)


def test_any_computation_sees_the_real_tensor():
    tensor = torch.arange(12.0).view(3, 4)
    makes = []
    deferred = DeferredTensor(tensor.to("meta"), lambda: makes.append(1) or tensor)
    assert (deferred.shape, deferred.dtype, deferred.device.type) == (tensor.shape, tensor.dtype, "meta")
    view = deferred.view(-1)[2:5].detach()
    assert isinstance(view, DeferredTensor) and view.shape == (3,) and not makes
    assert torch.equal(made(view), tensor.view(-1)[2:5])
    assert torch.equal(deferred.T.contiguous(), tensor.T)
    assert torch.equal(deferred + 1, tensor + 1)
    assert torch.equal(torch.cat([deferred, deferred]), torch.cat([tensor, tensor]))
    assert [torch.equal(made(part), whole) for part, whole in zip(deferred.chunk(3), tensor.chunk(3), strict=True)] == [
        True
    ] * 3
    assert "shape=(3, 4)" in repr(deferred)


def test_write_pickled_writes_what_torch_saves(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(5, 7),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "empty": torch.empty(0),
        "transposed": torch.randn(4, 3).T,
    }
    maker = Maker(tensors)
    others = {"groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"], "none": None, "flag": True}]}
    write_pickled(tmp_path / "deferred.bin", {"state": {"a": maker.state_dict}, **others, "plain": tensors["w"]})
    loaded = torch.load(tmp_path / "deferred.bin", weights_only=True)
    assert maker.most == 1 and maker.alive == 0
    with zipfile.ZipFile(tmp_path / "deferred.bin") as archive:
        assert archive.testzip() is None  # checksums of the content, as `export` checks them
    assert {name: loaded[name] for name in others} == others
    assert torch.equal(loaded["plain"], tensors["w"])
    for name, tensor in tensors.items():
        copy = loaded["state"]["a"][name]
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor), name
