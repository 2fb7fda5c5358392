"""The optimizer's name in transformers: wherever arguments come from, and wherever they go."""

import copy
import enum
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import arguments, make_trainer, tiny_llama, train
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from hf_schedulefree import ScheduleFreeTrainer, register_optimizers, registry

NAMES = sorted(registry.SPECS)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_a_member_in_every_enum_table(name):
    member = OptimizerNames(name)
    assert isinstance(member, OptimizerNames) and member == name and member.value == name
    assert OptimizerNames[name.upper()] is member and getattr(OptimizerNames, name.upper()) is member
    assert member in OptimizerNames and member in list(OptimizerNames)
    assert OptimizerNames.__members__[name.upper()] is member
    assert name in OptimizerNames.__dict__.get("_hashable_values_", [name])
    # A member that Python made itself has the same attributes.
    assert set(vars(OptimizerNames.SGD)) <= set(vars(member))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_from_python_command_line_and_yaml(name, tmp_path):
    assert TrainingArguments(output_dir=str(tmp_path), optim=name).optim == name
    parser = HfArgumentParser(TrainingArguments)
    (from_flags,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name])
    assert from_flags.optim is OptimizerNames(name)
    file = tmp_path / "arguments.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "optim": name}))
    assert parser.parse_yaml_file(str(file))[0].optim is OptimizerNames(name)
    assert Seq2SeqTrainingArguments(output_dir=str(tmp_path), optim=name).optim is OptimizerNames(name)


def test_arguments_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    assert (
        trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, optim="adamw_schedulefree").optim == "adamw_schedulefree"
    )


@pytest.mark.parametrize("name", NAMES)
def test_arguments_serialize(name, tmp_path):
    args = arguments(tmp_path, optim=name)
    assert args.to_dict()["optim"] == name
    assert json.loads(args.to_json_string())["optim"] == name
    assert copy.deepcopy(args).optim == name
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(args, protocol)).optim == name


def test_training_args_bin_loads_where_the_package_is_unknown(tmp_path):
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    code = (
        "import sys, torch; args = torch.load(sys.argv[1], weights_only=False); "
        "assert 'hf_schedulefree' not in sys.modules; print(type(args.optim).__name__, args.optim)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "training_args.bin")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["str", "adamw_schedulefree"]


def test_arguments_that_came_back_from_a_pickle_still_train(tmp_path):
    buffer = io.BytesIO(pickle.dumps(arguments(tmp_path, max_steps=2)))
    args = pickle.load(buffer)
    assert type(args.optim) is str
    trainer = make_trainer(tmp_path)
    ScheduleFreeTrainer(model=tiny_llama(), args=args, train_dataset=trainer.train_dataset).train()


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_trainer_trains_with_it(name, tmp_path):
    trainer = train(tmp_path, trainer_class=Trainer, optim=name, max_steps=4, optim_args="r=0.5, weight_lr_power=1.0")
    group = trainer.optimizer.param_groups[0]
    assert (group["k"], group["r"], group["weight_lr_power"]) == (4, 0.5, 1.0)
    assert isinstance(trainer.optimizer.optimizer, registry.SPECS[name].optimizer_class)


def test_options_come_from_the_arguments(tmp_path):
    args = arguments(
        tmp_path, adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-5, weight_decay=0.3, learning_rate=0.007
    )
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert kwargs == {"lr": 0.007, "betas": (0.8, 0.97), "eps": 1e-5, "weight_decay": 0.3, "rounding_seed": 42}


@pytest.mark.parametrize(
    ("optim_args", "said"),
    [
        ("r", "'r' is not of the form key=value"),
        ("r=", "is not of the form"),
        ("=1", "is not of the form"),
        ("r=1,", "is not of the form"),
        ("rr=1", "unknown key 'rr'"),
        ("r=1,r=2", "'r' is given twice"),
        ("r=one", "'one' is no value for 'r'"),
        ("r=nan", "r=nan is out of range"),
        ("weight_lr_power=inf", "weight_lr_power=inf is out of range"),
        ("r=-1", "r=-1.0 is out of range"),
        ("implementation=fastest", "implementation='fastest' is unknown"),
        ({"r": 1.0}, "expected a text of the form 'key=value,key=value', not dict"),
    ],
)
def test_optim_args_are_refused_with_the_accepted_keys(optim_args, said, tmp_path):
    with pytest.raises(ValueError) as refused:
        make_trainer(tmp_path, optim_args=optim_args)
    assert said in str(refused.value)
    for key in registry.SPECS["adamw_schedulefree"].options:
        assert key in str(refused.value)
    with pytest.raises(ValueError, match="weight_lr_power"):  # the stock Trainer refuses it before its first step
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args=optim_args))


@pytest.mark.parametrize(
    "field", [{"adam_beta1": 0.0}, {"adam_beta2": 1.0}, {"learning_rate": -1.0}, {"weight_decay": -0.1}]
)
def test_fields_out_of_range_are_refused_at_construction(field, tmp_path):
    with pytest.raises(ValueError, match="out of range"):
        make_trainer(tmp_path, **field)


def test_registering_again_changes_nothing():
    before = (list(OptimizerNames), dict(_OPTIMIZER_HANDLERS))
    register_optimizers()
    assert (list(OptimizerNames), dict(_OPTIMIZER_HANDLERS)) == before


def test_the_builtin_names_stay_what_they_are(tmp_path):
    import schedulefree

    built = {"adamw": "AdamWScheduleFree", "radam": "RAdamScheduleFree", "sgd": "SGDScheduleFree"}
    for name, class_name in built.items():
        optimizer_class, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=f"schedule_free_{name}"))
        assert optimizer_class is getattr(schedulefree, class_name)


def test_a_name_that_is_taken_is_a_loud_error(monkeypatch):
    def somebody_elses_handler(context):
        raise AssertionError

    monkeypatch.setitem(_OPTIMIZER_HANDLERS, "adamw_schedulefree", somebody_elses_handler)
    with pytest.raises(RuntimeError, match="already registered"):
        register_optimizers()


def test_members_are_added_as_this_python_would_do_it():
    class Names(str, enum.Enum):
        FIRST = "first"

    tables = {name for name in vars(Names) if name.startswith("_") and name.endswith(("_map_", "_names_", "_values_"))}
    known = {"_member_map_", "_member_names_", "_value2member_map_", "_hashable_values_"}
    # A table that is not filled for a hashable value may stay as it is; any other must be known to the registry.
    assert {name for name in tables - known if getattr(Names, name)} == set()


def test_numbers_that_yaml_reads_as_text(tmp_path):
    """`1e-3` without a point is a text in YAML; the run is the one of the number, and nonsense is refused by name."""
    path = tmp_path / "run.yaml"
    lines = [f"output_dir: {tmp_path}", "optim: adamw_schedulefree", "use_cpu: true", "weight_decay: 1e-2"]
    path.write_text("\n".join([*lines, "learning_rate: 5e-3", "adam_epsilon: 1e-7"]), encoding="utf-8")
    (args,) = HfArgumentParser(TrainingArguments).parse_yaml_file(path)
    kwargs = registry.spec_for(args).kwargs(args)
    assert (kwargs["lr"], kwargs["weight_decay"], kwargs["eps"]) == (5e-3, 1e-2, 1e-7)
    args.learning_rate = "fast"
    with pytest.raises(ValueError, match="lr='fast'"):
        registry.spec_for(args).kwargs(args)
