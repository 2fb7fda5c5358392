"""torch.compile around the model: the compiled code reads whichever of x and y the parameters hold now."""

import contextlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import close_to, make_trainer, parameters, same_bits, saved, tiny_llama, token_data, train, x_in_float64
from torch.nn import functional
from transformers import Trainer

from hf_schedulefree.optim import AdamWScheduleFree

# "eager" traces and guards like all backends, and needs no compiler; "aot_eager" traces the gradient, too.
BACKENDS = ("eager", "aot_eager")


def loss_of(model, ids):
    logits = model(input_ids=ids).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("park", ["copy", "residual"])
def test_steps_and_switches_are_seen_and_compile_nothing_anew(backend, park):
    ids = torch.stack([row["input_ids"] for row in token_data(4)])
    plain, model = tiny_llama(), tiny_llama()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    optimizers = [AdamWScheduleFree(m.parameters(), lr=0.05, park=park) for m in (plain, model)]
    compilations = torch._dynamo.utils.counters["stats"]
    for step in range(4):
        for m, optimizer in zip((plain, compiled), optimizers, strict=True):
            optimizer.train()
            m.train()
            loss_of(m, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.eval()
            m.eval()
        with torch.no_grad():
            assert torch.allclose(loss_of(compiled, ids), loss_of(plain, ids), atol=1e-6)
        if step == 1:
            after_two = compilations["unique_graphs"]
    assert compilations["unique_graphs"] == after_two
    y_loss = []
    for m, optimizer in zip((plain, compiled), optimizers, strict=True):
        optimizer.train()
        y_loss.append(loss_of(m, ids).item())
    with torch.no_grad():
        optimizers[1].eval()
        x_loss = loss_of(compiled, ids).item()
    assert y_loss[1] == pytest.approx(y_loss[0], abs=1e-6) and abs(x_loss - y_loss[1]) > 1e-4


def test_the_trainer_compiles_the_model(tmp_path):
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = train(tmp_path / "run", save_strategy="steps", save_steps=5, **options)
    quiet = train(tmp_path / "quiet", **options)
    assert close_to(saved(tmp_path / "run" / "checkpoint-10"), x_in_float64(trainer))
    assert same_bits(parameters(trainer.model), parameters(quiet.model))


def lora(base):
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def compiled(model):
    return torch.compile(model, backend="eager")


def with_a_compiled_layer():
    model = tiny_llama()
    model.model.layers[0] = compiled(model.model.layers[0])
    return model


@pytest.mark.parametrize("make", [lambda: lora(compiled(tiny_llama())), with_a_compiled_layer], ids=["base", "layer"])
def test_names_that_from_pretrained_would_not_find_are_refused(tmp_path, make):
    with pytest.raises(ValueError, match=r"model\.compile\(\)"):
        make_trainer(tmp_path, model=make())
    make_trainer(tmp_path, model=make(), optim="adamw_torch")  # the Trainer's own affair


def test_an_optimizer_that_was_given_meets_the_same_refusal(tmp_path):
    model = compiled(tiny_llama())
    optimizer = AdamWScheduleFree(model.parameters())
    options = {"trainer_options": {"optimizers": (optimizer, None)}, "optim": "adamw_torch"}
    with pytest.raises(ValueError, match=r"model\.compile\(\)"):
        make_trainer(tmp_path, model=model, **options)


@pytest.mark.parametrize("optim", ["adamw_schedulefree", "schedule_free_adamw"])
def test_what_torch_compile_returned_is_trained_and_saved_by_its_own_names(tmp_path, optim):
    torch._dynamo.reset()
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    model = tiny_llama()
    options = {"optim": optim, "save_strategy": "steps", "save_steps": 10}
    trainer = train(tmp_path, model=torch.compile(model, backend=backend), **options)
    assert trainer.model is model and calls
    trainer.save_model()
    assert same_bits(parameters(type(model).from_pretrained(tmp_path)), parameters(model))
    if optim == "adamw_schedulefree":
        assert close_to(saved(tmp_path / "checkpoint-10"), x_in_float64(trainer))


@pytest.mark.parametrize("fresh", [False, True], ids=["resumed", "fresh optimizer"])
@pytest.mark.parametrize("make", [compiled, lambda model: model], ids=["compiled", "plain"])
def test_a_checkpoint_of_the_names_that_torch_compile_gives_is_read(tmp_path, fresh, make):
    """The Trainer saved them, without the mixin; and would pass over them."""
    torch._dynamo.reset()
    options = {
        "optim": "schedule_free_adamw",
        "save_strategy": "steps",
        "save_steps": 5,
        "remove_unused_columns": False,
    }
    train(tmp_path / "run", trainer_class=Trainer, model=compiled(tiny_llama()), **options)
    file = saved(tmp_path / "run/checkpoint-10")
    assert all(name.startswith("_orig_mod.") for name in file)
    trainer = make_trainer(tmp_path / "again", model=make(tiny_llama(1)), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"), fresh_optimizer=fresh)  # no step is left
    with contextlib.nullcontext() if fresh else trainer.training_weights():  # the file holds y
        assert same_bits(parameters(trainer.model), {name.removeprefix("_orig_mod."): p for name, p in file.items()})


def test_what_torch_compile_returned_of_an_adapter_is_saved(tmp_path):
    torch._dynamo.reset()
    trainer = train(tmp_path, model=compiled(lora(tiny_llama())))
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    own = {name: p for name, p in parameters(trainer.model).items() if "lora_" in name}
    assert own and same_bits({name: parameters(loaded)[name] for name in own}, own)


def test_a_model_compiled_in_place_is_saved_by_its_own_names(tmp_path):
    torch._dynamo.reset()
    model = tiny_llama()
    model.compile(backend="eager")
    trainer = train(tmp_path, model=model)
    trainer.save_model()
    assert same_bits(parameters(type(model).from_pretrained(tmp_path)), parameters(model))
