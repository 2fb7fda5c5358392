"""`export_averaged` and `inspect_weights`: x out of whatever checkpoint there is, equal to x in float64 to rounding."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from checkpoint_runs import same, tiny_model, tiny_trainer, weights_of
from peft import LoraConfig, PeftModel, get_peft_model
from prodigyplus import ProdigyPlusScheduleFree
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
    Trainer,
)

from hf_schedulefree.checkpoint import (
    CheckpointError,
    export_averaged,
    find_committed,
    inspect_weights,
    read_header,
    verify_checkpoint,
)
from hf_schedulefree.checkpoint.contents import open_weights
from hf_schedulefree.optim import AdamWScheduleFree

BETA = 0.9


def x_in_float64(model, optimizer):
    """x of every parameter, from y in the model and z in the optimizer, by the paper's formula."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    x = {}
    for name, p in model.named_parameters():
        y, z = p.detach().double(), optimizer.state[p]["z"].double() if p in optimizer.state else p.detach().double()
        x[name] = (y - (1 - BETA) * z) / BETA
    return x


def stock_run(output_dir, **arguments):
    """A finished run of the stock Trainer with schedulefree's AdamW, which saves y; its trainer, still at y."""
    trainer = tiny_trainer(output_dir, **{"trainer_class": Trainer, "optim": "schedule_free_adamw", **arguments})
    trainer.train()
    trainer.optimizer.train()
    return trainer


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    run = tmp_path_factory.mktemp("stock")
    return run, stock_run(run)


def assert_rounded(tensors, exact):
    assert tensors.keys() >= exact.keys()
    for name, value in exact.items():
        unit = torch.finfo(tensors[name].dtype).eps * value.abs().clamp_min(1e-30)
        assert bool(((tensors[name].double() - value).abs() <= 0.51 * unit).all()), name


def test_a_stock_checkpoint_at_y_is_exported_as_x(stock, tmp_path):
    run, trainer = stock
    contents = inspect_weights(run / "checkpoint-6")
    assert (contents.weights, contents.step, contents.optimizer) == ("y", 6, "AdamWScheduleFree")
    assert contents.complete is True
    exact = x_in_float64(trainer.model, trainer.optimizer)
    y = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    apart = (
        sum((exact[name] - y[name]).square().sum() for name in y) ** 0.5
        / sum(v.square().sum() for v in y.values()) ** 0.5
    )
    assert contents.distance == pytest.approx(float(apart), rel=1e-6)
    export_averaged(run / "checkpoint-6", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert_rounded(written, exact)
    assert not same(written, load_file(run / "checkpoint-6/model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(dict(model.state_dict()), written)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    metadata = read_header(tmp_path / "out/model.safetensors")["__metadata__"]
    assert metadata["schedule_free.weights"] == "x" and metadata["format"] == "pt"
    again = inspect_weights(tmp_path / "out/model.safetensors")
    assert (again.weights, again.step, again.complete) == ("x", 6, None)
    with pytest.raises(FileExistsError):
        export_averaged(run / "checkpoint-6", tmp_path / "out")


def test_in_float64_nothing_is_rounded(stock, tmp_path):
    run, trainer = stock
    export_averaged(run / "checkpoint-6", tmp_path / "out", dtype=torch.float64)
    written = load_file(tmp_path / "out/model.safetensors")
    for name, value in x_in_float64(trainer.model, trainer.optimizer).items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-15)


def test_without_a_config_the_states_are_told_apart_by_their_values(stock, tmp_path):
    run, trainer = stock
    shutil.copytree(run / "checkpoint-6", tmp_path / "bare")
    (tmp_path / "bare/config.json").unlink()
    export_averaged(tmp_path / "bare", tmp_path / "out")
    assert_rounded(load_file(tmp_path / "out/model.safetensors"), x_in_float64(trainer.model, trainer.optimizer))


def test_states_that_cannot_be_told_apart_are_refused(stock, tmp_path):
    run, _ = stock
    shutil.copytree(run / "checkpoint-6", tmp_path / "bare")
    (tmp_path / "bare/config.json").unlink()
    tensors = load_file(tmp_path / "bare/model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].clone()
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "bare/model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        export_averaged(tmp_path / "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_x_of_states_that_cannot_be_told_apart_comes_by_a_resume(tmp_path):
    def partly_frozen(seed):
        model = tiny_model(seed).to(torch.bfloat16)  # in which norms stay at 1 when the steps are small
        model.model.embed_tokens.weight.requires_grad_(False)
        return model

    trainer = stock_run(tmp_path / "run", model=partly_frozen(0), learning_rate=1e-4)
    checkpoint = tmp_path / "run/checkpoint-6"
    with pytest.raises(CheckpointError, match=r"the same parameters frozen.* ScheduleFreeTrainer can resume"):
        export_averaged(checkpoint, tmp_path / "out")
    resumed = tiny_trainer(tmp_path / "again", model=partly_frozen(1))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed.save_model(tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    for name, value in x_in_float64(trainer.model, trainer.optimizer).items():
        torch.testing.assert_close(written[name].double(), value, rtol=2**-8, atol=2**-20)
    assert not list(tmp_path.glob("again/checkpoint-*"))


@pytest.mark.parametrize("variant", ["pickled", "sharded", "sharded pickled"])
def test_every_file_layout_is_read(stock, tmp_path, variant):
    run, trainer = stock
    shutil.copytree(run / "checkpoint-6", tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    (tmp_path / "in/model.safetensors").unlink()
    if variant == "pickled":
        torch.save(tensors, tmp_path / "in/pytorch_model.bin")
    elif variant == "sharded":
        trainer.model.save_pretrained(tmp_path / "in", max_shard_size="10KB")
    else:
        names = list(tensors)
        for number, part in enumerate((names[:9], names[9:])):
            torch.save({name: tensors[name] for name in part}, tmp_path / f"in/pytorch_model-{number}.bin")
        weight_map = {name: f"pytorch_model-{int(position >= 9)}.bin" for position, name in enumerate(names)}
        (tmp_path / "in/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert inspect_weights(tmp_path / "in").complete is True
    export_averaged(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_rounded(dict(model.state_dict()), x_in_float64(trainer.model, trainer.optimizer))
    if variant == "sharded":
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", ["schedule_free_radam", "schedule_free_sgd"])
def test_the_other_optimizers_of_the_stock_trainer(tmp_path, name):
    trainer = stock_run(tmp_path / "run", optim=name)
    contents = inspect_weights(tmp_path / "run/checkpoint-6")
    assert contents.optimizer == {"sgd": "SGDScheduleFree", "radam": "RAdamScheduleFree"}[name.rpartition("_")[2]]
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    assert_rounded(load_file(tmp_path / "out/model.safetensors"), x_in_float64(trainer.model, trainer.optimizer))


@pytest.mark.parametrize("written_by", [ProdigyPlusScheduleFree, pytorch_optimizer.ScheduleFreeAdamW])
def test_optimizers_of_other_packages(tmp_path, written_by):
    """prodigy-plus counts its steps from 1 on, and pytorch_optimizer calls the count `step`."""
    model = tiny_model()
    more = {"optimizers": (written_by(model.parameters()), None)}
    trainer = stock_run(tmp_path / "run", model=model, more=more, lr_scheduler_type="constant")
    assert verify_checkpoint(tmp_path / "run/checkpoint-6").step == 6
    contents = inspect_weights(tmp_path / "run/checkpoint-6")
    assert (contents.weights, contents.optimizer, contents.complete) == ("y", written_by.__name__, True)
    exact = x_in_float64(trainer.model, trainer.optimizer)
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all((written[name].double() - value).abs().max() < 1e-6 for name, value in exact.items())
    # And it is resumed, by an optimizer of this class only.
    for resumed_by in (written_by, AdamWScheduleFree):
        model = tiny_model()
        more = {"optimizers": (resumed_by(model.parameters()), None)}
        trainer = tiny_trainer(tmp_path / "run", model=model, more=more, max_steps=7)
        refused = pytest.raises(CheckpointError, match=f"written by {written_by.__name__}")
        with contextlib.nullcontext() if resumed_by is written_by else refused:
            trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-6"))


def test_an_optimizer_state_of_an_unknown_form_does_not_hide_the_weights(tmp_path):
    """That of pytorch_optimizer's wrapper has a form of its own; the weights beside it are x, as the record says."""
    model = tiny_model()
    optimizer = pytorch_optimizer.ScheduleFreeWrapper(pytorch_optimizer.AdamP(model.parameters()))
    trainer = tiny_trainer(tmp_path / "run", model=model, more={"optimizers": (optimizer, None)})
    trainer.train()
    contents = inspect_weights(tmp_path / "run/checkpoint-6")
    assert (contents.weights, contents.complete, contents.distance) == ("x", True, None)
    assert "form" in contents.note
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    assert same(load_file(tmp_path / "out/model.safetensors"), weights_of(trainer))


DAMAGED_STATES = {
    "groups are numbers": lambda content: content.update(param_groups=[5]),
    "no groups": lambda content: content.update(param_groups=[]),
    "a state is a number": lambda content: content["state"].update({0: 5}),
    "z is a number": lambda content: content["state"][0].update(z=5),
    "numbers of parameters": lambda content: content["param_groups"][0].update(params=[[]]),
    "no mode": lambda content: content["param_groups"][1].pop("train_mode"),
    "a mode of two": lambda content: content["param_groups"][0].update(train_mode=torch.zeros(2)),
    "beta": lambda content: content["param_groups"][0].update(betas=None),
    "the step": lambda content: content["param_groups"][0].update(k="6"),
}


@pytest.mark.parametrize("damage", DAMAGED_STATES)
def test_damaged_states_are_reported_and_never_raise_anything_else(stock, tmp_path, damage):
    run, _ = stock
    shutil.copytree(run / "checkpoint-6", tmp_path / "run/checkpoint-6")
    path = tmp_path / "run/checkpoint-6/optimizer.pt"
    content = torch.load(path, weights_only=True)
    DAMAGED_STATES[damage](content)
    torch.save(content, path)
    with contextlib.suppress(CheckpointError):  # what it looks at may be whole
        verify_checkpoint(path.parent)
    find_committed(tmp_path / "run")
    contents = inspect_weights(path.parent)
    assert contents.note is not None or contents.weights is None
    with pytest.raises(CheckpointError):
        export_averaged(path.parent, tmp_path / "out")


def deepspeed_files(folder, group, rank=None, model=None):
    """Files of ZeRO-2 as one process writes them, of one parameter `weight`; `rank` and `model` replace parts."""
    states = {0: {"z": torch.zeros(6), "y": torch.ones(6)}}
    content = {
        "zero_stage": 2,
        "partition_count": [1],
        "single_partition_of_fp32_groups": [torch.arange(6.0)],
        "base_optimizer_state": {"state": states, "param_groups": [{"params": [0], **group}]},
        **(rank or {}),
    }
    module = {
        "module": {"weight": torch.zeros(2, 3)},
        "param_shapes": [{"weight": torch.Size([2, 3])}],
        **(model or {}),
    }
    (folder / "global_step3").mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    torch.save({"optimizer_state_dict": content}, folder / "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(module, folder / "global_step3/mp_rank_00_model_states.pt")


OF_SCHEDULE_FREE = {"train_mode": False, "k": 3, "parked_k": 3, "betas": (0.9, 0.999)}


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": {"single_partition_of_fp32_groups": [5]}},
        {"rank": {"partition_count": []}},
        {"rank": {"zero_stage": "two"}},
        {"rank": {"base_optimizer_state": {"state": {}}}},
        {"model": {"param_shapes": 5}},
        {"model": {"param_shapes": [{"weight": torch.Size([2, 4])}]}},
        {"model": {"module": [1]}},
        {"group": {**OF_SCHEDULE_FREE, "betas": ()}},
        {"group": {"train_mode": False, "k": 3}},
    ],
)
def test_damaged_files_of_deepspeed_are_reported(tmp_path, changed):
    deepspeed_files(tmp_path / "whole", OF_SCHEDULE_FREE)
    export_averaged(tmp_path / "whole", tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x/model.safetensors")["weight"], torch.arange(6.0).view(2, 3))
    deepspeed_files(tmp_path / "damaged", **{"group": OF_SCHEDULE_FREE, **changed})
    with pytest.raises(CheckpointError, match="damaged"):
        export_averaged(tmp_path / "damaged", tmp_path / "out")
    with pytest.raises(CheckpointError, match="damaged"):
        inspect_weights(tmp_path / "damaged")


@pytest.mark.parametrize("name", [5, ("weight",), b"weight", "weight\udc80", "__metadata__"])
def test_names_that_no_weight_file_can_hold_are_reported(tmp_path, name):
    deepspeed_files(tmp_path / "in", OF_SCHEDULE_FREE, model={"param_shapes": [{name: torch.Size([2, 3])}]})
    assert inspect_weights(tmp_path / "in").weights == "x"
    with pytest.raises(CheckpointError, match="is damaged: it holds a tensor"):
        export_averaged(tmp_path / "in", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_types_of_numbers_that_no_weight_file_can_hold_are_reported(tmp_path):
    model = {"module": {"weight": torch.zeros(2, 3), "buffer": torch.zeros(2, dtype=torch.complex64)}}
    deepspeed_files(tmp_path / "in", OF_SCHEDULE_FREE, model=model)
    with pytest.raises(CheckpointError, match=r"buffer is of type torch\.complex64"):
        export_averaged(tmp_path / "in", tmp_path / "out")


def test_another_optimizer_under_deepspeed(tmp_path):
    deepspeed_files(tmp_path / "adamw", {"betas": (0.9, 0.999), "lr": 0.1})
    assert inspect_weights(tmp_path / "adamw").weights is None
    with pytest.raises(CheckpointError, match="nothing says so"):
        export_averaged(tmp_path / "adamw", tmp_path / "out")


@pytest.mark.parametrize("case", ["a hole", "a number that is no integer"])
def test_headers_that_safetensors_refuses_are_refused(stock, tmp_path, case):
    run, _ = stock
    shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint-6")
    path = tmp_path / "checkpoint-6/model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    first = min((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    if case == "a hole":
        first.update(shape=[0], data_offsets=[0, 0])
    else:
        first["data_offsets"][0] = 0.0
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    for act in (verify_checkpoint, inspect_weights, lambda folder: export_averaged(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
            act(tmp_path / "checkpoint-6")


@pytest.mark.parametrize("case", ["a value of another version", "code of its own", "no model", "no list"])
def test_a_configuration_that_builds_no_model_is_not_needed(stock, tmp_path, case, monkeypatch):
    """The values tell which state is whose. Code in a checkpoint is not run, nor is anybody asked about it."""
    run, trainer = stock
    shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint-6")
    path = tmp_path / "checkpoint-6/config.json"
    config = json.loads(path.read_text())
    if case == "a value of another version":
        config["hidden_act"] = {"name": "silu"}
    elif case == "code of its own":
        config.update(model_type="own", auto_map={"AutoConfig": "own.Config"})
        (path.parent / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
        monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    else:
        config["architectures"] = ["logging"] if case == "no model" else {"0": "LlamaForCausalLM"}
    asked = []
    path.write_text(json.dumps(config))
    export_averaged(path.parent, tmp_path / "out")
    assert_rounded(load_file(tmp_path / "out/model.safetensors"), x_in_float64(trainer.model, trainer.optimizer))
    assert not asked and not (tmp_path / "ran").exists()


def test_tied_and_frozen_weights(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.0" not in name
    trainer = stock_run(tmp_path / "run", model=model)
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    assert_rounded(load_file(tmp_path / "out/model.safetensors"), x_in_float64(trainer.model, trainer.optimizer))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def lora_model(**config):
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    return get_peft_model(tiny_model(), LoraConfig(**options))


@pytest.mark.parametrize("ours", [True, False])
def test_lora(tmp_path, ours):
    model = lora_model(modules_to_save=["lm_head"] if ours else None, use_dora=ours)
    if ours:
        trainer = tiny_trainer(tmp_path / "run", model=model)
        trainer.train()
        trainer.optimizer.train()
    else:
        trainer = stock_run(tmp_path / "run", model=model)
    contents = inspect_weights(tmp_path / "run/checkpoint-6")
    assert contents.weights == ("x" if ours else "y") and contents.distance > 0
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    loaded = dict(PeftModel.from_pretrained(tiny_model(), tmp_path / "out").named_parameters())
    exact = x_in_float64(trainer.model, trainer.optimizer)
    trained = {name: value for name, value in exact.items() if "lora" in name or "modules_to_save" in name}
    assert len(trained) > 8
    for name, value in trained.items():
        torch.testing.assert_close(loaded[name].double(), value, rtol=1e-6, atol=1e-8)
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "wide", dtype=torch.float64)
    wide = load_file(tmp_path / "wide/adapter_model.safetensors")
    wide = {name.replace(".weight", ""): value for name, value in wide.items()}
    for name, value in trained.items():
        short = name.replace(".default", "").replace(".weight", "").replace(".modules_to_save", "")
        torch.testing.assert_close(wide[short], value, rtol=0, atol=1e-15)


@pytest.mark.parametrize("names", [("default", "other"), ("one", "other")])
@pytest.mark.parametrize("active", ["both", "other"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_several_adapters(tmp_path, names, active, dtype):
    """`default` lies beside the folders of the others, under the same names of tensors."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config, adapter_name=names[0])
    model.add_adapter(names[1], config)
    model.base_model.set_adapter(list(names) if active == "both" else names[1])
    trainer = tiny_trainer(tmp_path / "run", model=model)
    trainer.train()
    checkpoint = tmp_path / "run/checkpoint-6"
    export_averaged(checkpoint, tmp_path / "out", dtype=dtype)
    paths = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("adapter_model.safetensors"))
    assert len(paths) == 2 and paths == sorted(
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.safetensors")
    )
    for path in paths:
        saved, written = load_file(checkpoint / path), load_file(tmp_path / "out" / path)
        assert written.keys() == saved.keys()
        assert all((written[name] - saved[name]).abs().max() < 1e-6 for name in saved)
    assert inspect_weights(checkpoint).distance > 0
    # Folders of checkpoints beside a saved adapter are no adapters.
    trainer.save_model()
    assert open_weights(tmp_path / "run").shapes == open_weights(checkpoint).shapes


def test_weight_files_that_disagree_say_nothing(tmp_path):
    for folder, said in ((".", "x"), ("other", "y")):
        (tmp_path / "model" / folder).mkdir(parents=True)
        metadata = {"format": "pt", "schedule_free.weights": said}
        save_file({"weight": torch.ones(2)}, tmp_path / "model" / folder / "adapter_model.safetensors", metadata)
    assert inspect_weights(tmp_path / "model").weights is None
    with pytest.raises(CheckpointError, match="nothing says so"):
        export_averaged(tmp_path / "model", tmp_path / "out")


def test_ours_is_copied_bit_for_bit(tmp_path):
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    contents = inspect_weights(tmp_path / "run/checkpoint-6")
    assert (contents.weights, contents.complete, contents.step) == ("x", True, 6) and contents.distance > 0
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    assert same(load_file(tmp_path / "out/model.safetensors"), weights_of(trainer))


def test_the_index_is_that_of_the_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    (index,) = (tmp_path / "model").glob("*.index.json")
    for path in (tmp_path / "model").glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt", "schedule_free.weights": "x"})
    export_averaged(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / index.name).read_bytes() == index.read_bytes()
    export_averaged(tmp_path / "model", tmp_path / "half", dtype=torch.bfloat16)
    metadata = [
        json.loads((folder / index.name).read_text())["metadata"] for folder in (index.parent, tmp_path / "half")
    ]
    assert metadata[0]["total_parameters"] == metadata[1]["total_parameters"]
    assert metadata[0]["total_size"] == 2 * metadata[1]["total_size"]


def test_folders_of_tokenizers_and_chat_templates_are_copied_and_other_models_are_not(tmp_path):
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    belonging = ["additional_chat_templates/tool_use.jinja", "qformer_tokenizer/tokenizer_config.json"]
    belonging.append("qformer_tokenizer/additional_chat_templates/rag.jinja")
    others = ["best/tokenizer_config.json", "best/config.json", "checkpoint-4/tokenizer_config.json", "runs/events"]
    for name in [*belonging, *others]:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    export_averaged(tmp_path / "run", tmp_path / "out")
    folders = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("*/**/*"))
    assert folders == sorted([*belonging, "qformer_tokenizer/additional_chat_templates"])


def test_names_with_slashes_stay_whole(tmp_path):
    """An adapter's folder is told apart from a name by itself; part of a name may look like one."""
    tensors = {
        "heads.a/cls.weight": torch.randn(3, 4),
        "heads.b/cls.weight": torch.randn(3, 4),
        "body/cls.weight": torch.randn(3),
    }
    for case in ("one file", "two adapters"):
        folders = ["."] if case == "one file" else ["a", "b"]
        for number, folder in enumerate(folders):
            (tmp_path / case / folder).mkdir(parents=True)
            name = "model.safetensors" if case == "one file" else "adapter_model.safetensors"
            content = {key: tensor + number for key, tensor in tensors.items()}
            save_file(content, tmp_path / case / folder / name, {"format": "pt", "schedule_free.weights": "x"})
        export_averaged(tmp_path / case, tmp_path / case / "out")
        for folder in folders:
            assert same(load_file(tmp_path / case / "out" / folder / name), load_file(tmp_path / case / folder / name))


@pytest.mark.parametrize("place", ["the working directory", "a link", "inside the checkpoint", "left by a kill"])
def test_an_export_into_a_folder_that_is_there(tmp_path, place, monkeypatch):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    source, output = tmp_path / "checkpoint", tmp_path / "new folder ü"
    model.save_pretrained(source)
    weights = source / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "schedule_free.weights": "x"})
    if place == "inside the checkpoint":
        output = source / "z"  # behind the adapter's configuration, in the order in which files are copied
    else:
        output.mkdir()
    if place == "a link":
        (tmp_path / "link").symlink_to(output)
    if place == "left by a kill":
        (output / ".tmp-export").mkdir()
        (output / ".tmp-export/part").touch()
    monkeypatch.chdir(output if place == "the working directory" else tmp_path)
    export_averaged(source, {"the working directory": ".", "a link": "link"}.get(place, output))
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "adapter_config.json", weights.name]
    assert same(load_file(output / weights.name), load_file(weights))
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_averaged(source, output)


def test_a_failed_export_leaves_an_empty_folder_empty(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    (tmp_path / "out").mkdir()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_schedulefree.checkpoint.export.write_safetensors", fail)
    with pytest.raises(OSError, match="No space left"):
        export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_bfloat16_state_gives_x_in_full_precision(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", model=tiny_model().to(torch.bfloat16))
    trainer.train()
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")
    export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "wide", dtype=torch.float32)
    narrow, wide = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "wide/model.safetensors")
    assert same(narrow, weights_of(trainer))
    assert same({name: tensor.bfloat16() for name, tensor in wide.items()}, narrow)
    assert any(not torch.equal(wide[name], narrow[name].float()) for name in wide)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("out", "wide")]
    assert same(dict(loaded[0].state_dict()), narrow) and same(dict(loaded[1].state_dict()), wide)
    kept, changed = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "wide"))
    assert changed == kept | {"dtype": "float32"}


@pytest.mark.parametrize("mode", [0o644, 0o444], ids=["writable", "read-only"])
def test_another_type_is_named_for_parts_that_are_loaded_alone(tmp_path, mode):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=64, dtype="bfloat16")
    vision = SiglipVisionConfig(**sizes, image_size=8, patch_size=4, dtype="bfloat16")
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    weights, config = tmp_path / "in/model.safetensors", tmp_path / "in/config.json"
    save_file(load_file(weights), weights, {"format": "pt", "schedule_free.weights": "x"})
    before = json.loads(config.read_text())
    before["quantization_config"] = {"dtype": "bfloat16"}  # in which something else is computed
    config.write_text(json.dumps(before))
    config.chmod(mode)
    export_averaged(tmp_path / "in", tmp_path / "out", dtype=torch.float32)
    after = json.loads((tmp_path / "out/config.json").read_text())
    parts = {name: before[name] | {"dtype": "float32"} for name in ("text_config", "vision_config")}
    assert before["text_config"]["dtype"] == "bfloat16" and after == before | parts | {"dtype": "float32"}
    assert json.loads(config.read_text()) == before


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    tiny_trainer(tmp_path / "run").train()
    path = tmp_path / "run/checkpoint-6/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is altered"):
        export_averaged(tmp_path / "run/checkpoint-6", tmp_path / "out")


def test_y_without_its_optimizer_and_unknown_weights_are_refused(stock, tmp_path):
    run, _ = stock
    with pytest.raises(CheckpointError, match="nothing says so"):
        export_averaged(run / "checkpoint-6/model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_fsdp(stock, tmp_path, kind):
    _, trainer = stock
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    state_dict = dict(trainer.model.state_dict())
    optimizer_state = {
        "state": {names[id(p)]: state for p, state in optimizer.state.items()},
        "param_groups": [
            {**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups
        ],
    }
    (tmp_path / "in").mkdir()
    trainer.model.config.save_pretrained(tmp_path / "in")
    if kind == "full":
        torch.save(state_dict, tmp_path / "in/pytorch_model_fsdp.bin")
        torch.save(optimizer_state, tmp_path / "in/optimizer.bin")
    else:
        dcp.save({"model": state_dict}, checkpoint_id=tmp_path / "in/pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": optimizer_state}, checkpoint_id=tmp_path / "in/optimizer_0", no_dist=True)
    contents = inspect_weights(tmp_path / "in")
    assert (contents.weights, contents.step, contents.optimizer) == ("y", 6, "AdamWScheduleFree")
    export_averaged(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_rounded(dict(model.state_dict()), x_in_float64(trainer.model, trainer.optimizer))


def test_another_name_of_a_tied_weight_gets_x_too(tmp_path):
    trainer = stock_run(tmp_path / "run", model=tiny_model(tie_word_embeddings=True))
    checkpoint = tmp_path / "run/checkpoint-6"
    torch.save(trainer.model.state_dict(), checkpoint / "pytorch_model.bin")  # with both names
    (checkpoint / "model.safetensors").unlink()
    export_averaged(checkpoint, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    exact = x_in_float64(trainer.model, trainer.optimizer)
    assert_rounded(written, exact | {"lm_head.weight": exact["model.embed_tokens.weight"]})


@pytest.mark.parametrize("tied", [True, False])
def test_fsdp_names_a_tied_weight_once(tmp_path, tied):
    trainer = stock_run(tmp_path / "run", model=tiny_model(tie_word_embeddings=tied))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    state = {"state": {names[id(p)]: state for p, state in optimizer.state.items()}, "param_groups": groups}
    (tmp_path / "in").mkdir()
    torch.save(trainer.model.state_dict(), tmp_path / "in/pytorch_model_fsdp.bin")
    torch.save(state, tmp_path / "in/optimizer.bin")
    export_averaged(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    exact = x_in_float64(trainer.model, trainer.optimizer)
    same_as = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert_rounded(written, exact | {"lm_head.weight": exact[same_as]})


class Attack:
    """Unpickled, it removes a folder."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (shutil.rmtree, (str(self.victim),))


def test_values_of_a_sharded_optimizer_run_no_code(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/trainer_state.json").write_text('{"global_step": 6}')
    dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=tmp_path / "in/pytorch_model_fsdp_0", no_dist=True)
    groups = [{"params": ["weight"], "k": Attack(tmp_path / "victim")}]
    state = {"optimizer": {"state": {"weight": {"z": torch.ones(2)}}, "param_groups": groups}}
    dcp.save(state, checkpoint_id=tmp_path / "in/optimizer_0", no_dist=True)
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify_checkpoint(tmp_path / "in")
    assert (tmp_path / "victim").is_dir()


def test_metadata_of_a_sharded_checkpoint_runs_no_code(stock, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "in/pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "in/pytorch_model_fsdp_0/.metadata").write_bytes(pickle.dumps(Attack(tmp_path / "victim")))
    (tmp_path / "in/trainer_state.json").write_text('{"global_step": 6}')
    for read in (inspect_weights, verify_checkpoint):
        with pytest.raises(CheckpointError, match=r"\.metadata asks for shutil"):
            read(tmp_path / "in")
    assert (tmp_path / "victim").is_dir()


def without(value, attribute):
    """`value` as a damaged file would have it."""
    vars(value).pop(attribute)
    return value


@pytest.mark.parametrize(
    "damage",
    [
        lambda metadata: without(metadata, "state_dict_metadata"),
        lambda metadata: vars(metadata).update(state_dict_metadata=["weight"]),
        lambda metadata: metadata.state_dict_metadata.update({5: metadata.state_dict_metadata["model.weight"]}),
        lambda metadata: metadata.state_dict_metadata.update({"model.weight": "two by two"}),
        lambda metadata: without(metadata.state_dict_metadata["model.weight"], "size"),
        lambda metadata: without(metadata.state_dict_metadata["model.weight"], "properties"),
    ],
)
def test_damaged_metadata_of_a_sharded_checkpoint_is_reported(tmp_path, damage):
    folder = tmp_path / "in/pytorch_model_fsdp_0"
    dcp.save({"model": {"weight": torch.ones(2, 2)}}, checkpoint_id=folder, no_dist=True)
    (tmp_path / "in/trainer_state.json").write_text('{"global_step": 6}')
    assert inspect_weights(tmp_path / "in").weights is None
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    damage(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (inspect_weights, verify_checkpoint, lambda path: export_averaged(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
            read(tmp_path / "in")


@pytest.fixture(scope="module")
def deepspeed_runs(tmp_path_factory):
    """The runs of `deepspeed_run.py`, of all stages in one launch."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    script = Path(__file__).parent / "distributed/deepspeed_run.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": root}
    launched = subprocess.run(
        [*launcher, str(script), str(folder), "1", "2", "3", "1-lora", "3-lora", "3-frozen"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # It may abort at its exit, after everything was written.
    assert (folder / "zero3-frozen/x.pt").exists(), launched.stderr[-2000:]
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(deepspeed_runs, tmp_path, stage):
    run = deepspeed_runs / f"zero{stage}"
    checkpoint = run / "checkpoint-2"
    contents = inspect_weights(checkpoint)
    assert (contents.weights, contents.step, contents.optimizer) == ("y", 2, "AdamWScheduleFree")
    export_averaged(checkpoint, tmp_path / "out")
    x, y = load_file(tmp_path / "out/model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert x.keys() == y.keys()
    engine_x = torch.load(run / "x.pt", weights_only=True)
    assert x.keys() == engine_x.keys()
    for name, expected in engine_x.items():
        # The optimizer's own way to x rounds in float32, the export does in float64; y is much further away.
        assert (x[name] - expected).abs().max() < 1e-7 < (y[name] - expected).abs().max() / 1000, name
    apart = sum((x[name].double() - y[name].double()).square().sum() for name in y) ** 0.5
    size = sum(tensor.double().square().sum() for tensor in y.values()) ** 0.5
    assert contents.distance > 1e-4 and float(apart / size) == pytest.approx(contents.distance, rel=1e-5)


@pytest.mark.distributed
def test_deepspeed_with_frozen_parameters(deepspeed_runs, tmp_path):
    run = deepspeed_runs / "zero3-frozen"
    export_averaged(run / "checkpoint-2", tmp_path / "out")
    x, engine_x = load_file(tmp_path / "out/model.safetensors"), torch.load(run / "x.pt", weights_only=True)
    assert x.keys() == engine_x.keys()
    for name, expected in engine_x.items():
        assert (x[name] - expected).abs().max() < 1e-7, name
        assert ".layers.0." not in name or torch.equal(x[name], expected), name


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_with_adapters(deepspeed_runs, tmp_path, stage):
    run = deepspeed_runs / f"zero{stage}-lora"
    export_averaged(run / "checkpoint-2", tmp_path / "out")
    engine_x, y = torch.load(run / "x.pt", weights_only=True), load_file(run / "checkpoint-2/adapter_model.safetensors")
    assert not list((tmp_path / "out").glob("model*"))
    x = load_file(tmp_path / "out/adapter_model.safetensors")
    assert x.keys() == y.keys() and len(x) == 4
    for name, tensor in x.items():
        expected = engine_x[name.replace(".weight", ".default.weight")]
        assert (tensor - expected).abs().max() < 1e-7 < (y[name] - expected).abs().max() / 100, name
    PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
