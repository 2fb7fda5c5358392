"""scripts/finetune_lm.py: its arguments, its ways to read text, and the folder it leaves."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

SCRIPT = Path(__file__).parents[1] / "scripts" / "finetune_lm.py"
spec = importlib.util.spec_from_file_location("finetune_lm", SCRIPT)
finetune_lm = sys.modules["finetune_lm"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finetune_lm)

BLOCK = 16
TINY = [
    *("--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--vocab_size=300"),
    *(f"--block_size={BLOCK}", "--per_device_train_batch_size=4", "--max_steps=4", "--logging_steps=1"),
    *("--use_cpu", "--disable_tqdm=True"),
]
TEXTS = [f"Note {n}: the {['red', 'green', 'blue'][n % 3]} fox jumps over {n * 7} lazy dogs." for n in range(60)]
WRITERS = {
    "txt": lambda data, path: path.write_text("\n".join(data["text"]) + "\n"),
    "jsonl": lambda data, path: data.to_json(path),
    "json": lambda data, path: path.write_text(json.dumps(data.to_list())),
    "csv": lambda data, path: data.to_csv(path),
    "parquet": lambda data, path: data.to_parquet(path),
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """datasets keeps what it reads; these tests leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def write(folder: Path, extension: str, texts: list[str] = TEXTS, name: str = "notes") -> Path:
    path = folder / f"{name}.{extension}"
    WRITERS[extension](Dataset.from_dict({"text": texts, "number": list(range(len(texts)))}), path)
    return path


def data_arguments(**values) -> finetune_lm.DataArguments:
    return finetune_lm.DataArguments(**{name: str(v) if isinstance(v, Path) else v for name, v in values.items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run with a report, by flags, on a text file: (its folder, its metrics, the flags)."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, f"--train_file={write(folder, 'txt')}", "--save_steps=2", "--report"]
    metrics = finetune_lm.main([*flags, f"--output_dir={folder}"])
    return folder, metrics, flags


# --- the run ----------------------------------------------------------------------------------------------------------


def test_saved_folder_scores_the_loss_that_was_reported(trained):
    folder, metrics, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("".join(f"{text}\n" for text in TEXTS[-3:]), add_special_tokens=False)[
        "input_ids"
    ]  # 5 % of 60 lines
    blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).reshape(-1, BLOCK)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_folder_is_complete_and_loads_without_the_script(trained):
    folder = trained[0]
    for name in ("loss_curve.png", "checkpoint-2", "checkpoint-4", "trainer_state.json", "tokenizer.json"):
        assert (folder / name).exists()
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "all_results.json").read_text())
    assert {"eval_loss", "perplexity", "train_loss", "train_tokens_per_second"} <= set(results)
    # A subclass from the script would make the pickle unreadable elsewhere.
    args = torch.load(folder / "training_args.bin", weights_only=False)
    assert type(args) is TrainingArguments
    assert args.optim == "adamw_schedulefree"


def test_report_shows_x_and_y_and_the_saved_model(trained, tmp_path, capsys):
    _, _, flags = trained
    metrics = finetune_lm.main([*flags, f"--output_dir={tmp_path}"])
    rows = {
        line.split(",")[0].split(" ")[0]: line.split()[-3:] for line in capsys.readouterr().out.splitlines() if line
    }
    (x_loss, _, x_weight), (y_loss, _, y_weight), saved = rows["x"], rows["y"], rows["from_pretrained"]
    assert x_loss == f"{metrics['eval_loss']:.4f}"
    assert saved == rows["x"]
    assert y_loss != x_loss
    assert y_weight != x_weight
    assert float(x_weight) == pytest.approx(load_file(tmp_path / "model.safetensors")[
        "model.embed_tokens.weight"][0, 0].item(), rel=1e-4)  # fmt: skip


def test_report_refuses_a_saved_model_that_is_not_x(trained, tmp_path, monkeypatch):
    _, _, flags = trained

    class OtherModel:
        @staticmethod
        def from_pretrained(path, **options):
            model = AutoModelForCausalLM.from_pretrained(path, **options)
            with torch.no_grad():
                model.model.norm.weight[0] += 1e-6
            return model

        from_config = AutoModelForCausalLM.from_config

    monkeypatch.setattr(finetune_lm, "AutoModelForCausalLM", OtherModel)
    with pytest.raises(RuntimeError, match=r"does not hold x: \['model.norm.weight'\]"):
        finetune_lm.main([*flags, f"--output_dir={tmp_path}"])


def test_resume_ends_at_the_same_weights(trained, tmp_path):
    folder, _, flags = trained
    finetune_lm.main([*flags, f"--output_dir={tmp_path}", f"--resume_from_checkpoint={folder / 'checkpoint-2'}"])
    straight, resumed = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not (tmp_path / "checkpoint-2").exists(), "it began again instead of resuming"


def test_a_yaml_file_trains_a_saved_model_further(trained, tmp_path):
    """Another file type, a column of another name, a separate validation file and a model to start from."""
    start = trained[0]
    train = Dataset.from_dict({"body": TEXTS})
    train.to_json(tmp_path / "train.jsonl")
    train.select(range(20)).to_csv(tmp_path / "validation.csv")
    values = {
        "model_name_or_path": str(start),
        "train_file": str(tmp_path / "train.jsonl"),
        "validation_file": str(tmp_path / "validation.csv"),
        "text_column": "body",
        "block_size": BLOCK,
        "learning_rate": "1e-3",
        "max_steps": 50,
        "optim": "adamw_torch",
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "disable_tqdm": True,
        "max_eval_samples": 5,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    metrics = finetune_lm.main([str(tmp_path / "run.yaml"), "--max_steps=2"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert math.isfinite(metrics["eval_loss"])
    before, after = (load_file(path / "model.safetensors") for path in (start, tmp_path / "out"))
    change = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < change <= 2 * 1e-3 * 1.1  # two Adam steps of 1e-3 from where it stood, and not from fresh weights


@pytest.mark.distributed
def test_two_processes(tmp_path):
    train = write(tmp_path, "jsonl")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    flags = [*TINY, f"--train_file={train}", f"--output_dir={tmp_path / 'out'}", "--report", "--max_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, *launch, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x, averaged") == 1, "only the main process reports"
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("from_pretrained"))
    assert float(row[-3]) == pytest.approx(results["eval_loss"], abs=1e-3)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["yaml", "yml", "json"])
def test_a_file_means_the_same_as_flags(tmp_path, extension):
    values = {
        "learning_rate": "1e-3" if extension == "json" else 0.001,
        "weight_decay": 0.5,
        "output_dir": str(tmp_path),
        "report": True,
        "bf16": False,
        "num_hidden_layers": 3,
        "train_file": None,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "label_names": ["a", "b"],
    }
    path = tmp_path / f"run.{extension}"
    path.write_text(json.dumps(values) if extension == "json" else yaml.safe_dump(values))
    from_file = finetune_lm.parse_arguments([str(path), "--weight_decay=0.25"])
    flags = ["--learning_rate=1e-3", "--weight_decay=0.25", f"--output_dir={tmp_path}", "--report"]
    flags += ["--num_hidden_layers=3", '--lr_scheduler_kwargs={"num_cycles": 2}', "--label_names", "a", "b"]
    from_flags = finetune_lm.parse_arguments(flags)
    assert from_file[:3] == from_flags[:3]
    assert from_file[3].to_dict() == from_flags[3].to_dict()
    assert from_file[3].learning_rate == 1e-3
    assert from_file[3].lr_scheduler_kwargs == {"num_cycles": 2}


def test_yaml_numbers_in_exponent_form_are_numbers(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\n")  # YAML 1.1 reads a string here
    assert finetune_lm.parse_arguments([str(tmp_path / "run.yaml")])[3].learning_rate == 1e-3


def test_defaults_suit_schedule_free_training():
    model_args, _, _, args = finetune_lm.parse_arguments([])
    assert args.optim == "adamw_schedulefree"
    assert args.learning_rate == finetune_lm.default_learning_rate(model_args) == 5e-3
    assert finetune_lm.parse_arguments(["--model_name_or_path=m"])[3].learning_rate == 5e-5
    assert finetune_lm.parse_arguments(["--optim=sgd", "--learning_rate=0.5"])[3].learning_rate == 0.5
    assert finetune_lm.parse_arguments(["--optim=sgd"])[3].optim == "sgd"


def test_argument_files_and_flags_that_are_wrong(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "unknown.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        finetune_lm.parse_arguments([str(tmp_path / "absent.yaml")])
    with pytest.raises(ValueError, match="not list"):
        finetune_lm.parse_arguments([str(tmp_path / "list.yaml")])
    with pytest.raises(ValueError, match="learning_rat=1"):
        finetune_lm.parse_arguments([str(tmp_path / "unknown.yaml")])
    with pytest.raises(ValueError, match="--hidden_siz"):  # argparse would take it for --hidden_size
        finetune_lm.parse_arguments(["--hidden_siz=3"])


def test_checkpoints_that_are_not_there(tmp_path):
    def resume(value: str):
        return finetune_lm.checkpoint_to_resume(
            TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint=value, use_cpu=True)
        )

    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        resume("True")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        resume(str(tmp_path / "checkpoint-9"))
    (tmp_path / "checkpoint-9").mkdir()
    assert resume("True") is True
    assert resume(str(tmp_path / "checkpoint-9")) == str(tmp_path / "checkpoint-9")
    assert resume("False") is None
    assert resume(None) is None


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", sorted(WRITERS))
def test_every_file_type_gives_the_same_text(tmp_path, extension):
    corpus = finetune_lm.load_corpus(
        data_arguments(train_file=write(tmp_path, extension), validation_split_percentage=10)
    )
    end = "\n" if extension == "txt" else ""
    assert [text.removesuffix("\n") + end for text in corpus.train["text"]] == [text + end for text in TEXTS[:54]]
    assert list(corpus.validation["text"]) == [text + end for text in TEXTS[54:]]
    assert corpus.rows_are_documents is (extension != "txt")


def test_dataset_name_takes_a_folder_and_its_validation_split(tmp_path):
    write(tmp_path, "jsonl", TEXTS[:7], name="train")
    write(tmp_path, "jsonl", TEXTS[7:9], name="validation")
    corpus = finetune_lm.load_corpus(data_arguments(dataset_name=tmp_path))
    assert (list(corpus.train["text"]), list(corpus.validation["text"])) == (TEXTS[:7], TEXTS[7:9])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--train_file .*absent\.txt' does not exist"):
        finetune_lm.load_corpus(data_arguments(train_file=tmp_path / "absent.txt"))
    train = write(tmp_path, "txt")
    with pytest.raises(FileNotFoundError, match="--validation_file"):
        finetune_lm.load_corpus(data_arguments(train_file=train, validation_file=tmp_path / "absent.txt"))


def test_unknown_extension(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(ValueError, match=r"unknown extension '\.doc'; known: .*'\.parquet'"):
        finetune_lm.load_corpus(data_arguments(train_file=tmp_path / "notes.doc"))


@pytest.mark.parametrize("extension", sorted(WRITERS))
def test_empty_file(tmp_path, extension):
    path = tmp_path / f"notes.{extension}"
    path.touch()
    with pytest.raises(ValueError, match="is empty"):
        finetune_lm.load_corpus(data_arguments(train_file=path))


def test_empty_dataset(tmp_path):
    train = write(tmp_path, "jsonl")
    Dataset.from_dict({"text": TEXTS}).select([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet' cannot be read as parquet: .*no data"):
        finetune_lm.load_corpus(data_arguments(train_file=train, validation_file=tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match="the validation set is empty"):
        finetune_lm.check_text(Dataset.from_dict({"text": []}), "validation", "text")


def test_file_with_a_header_and_no_rows(tmp_path):
    (tmp_path / "notes.csv").write_text("text,number\n")
    with pytest.raises(ValueError, match=r"cannot be read as csv: .*no data"):
        finetune_lm.load_corpus(data_arguments(train_file=tmp_path / "notes.csv"))


def test_file_that_is_not_what_its_name_says(tmp_path):
    (tmp_path / "notes.parquet").write_text("plain text")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        finetune_lm.load_corpus(data_arguments(train_file=tmp_path / "notes.parquet"))


def test_text_column_that_is_not_there_or_not_text(tmp_path):
    train = write(tmp_path, "jsonl")
    with pytest.raises(ValueError, match=r"no column 'body'; its columns: \['text', 'number'\]"):
        finetune_lm.load_corpus(data_arguments(train_file=train, text_column="body"))
    with pytest.raises(ValueError, match="'number' of the training set holds int64, not text"):
        finetune_lm.load_corpus(data_arguments(train_file=train, text_column="number"))


def test_sources_that_contradict_each_other(tmp_path):
    train = write(tmp_path, "txt")
    with pytest.raises(ValueError, match="not both"):
        finetune_lm.load_corpus(data_arguments(train_file=train, dataset_name="d"))
    with pytest.raises(ValueError, match="--validation_file needs"):
        finetune_lm.load_corpus(data_arguments(validation_file=train))


def test_too_few_rows_to_hold_any_out(tmp_path):
    with pytest.raises(ValueError, match="give --validation_file"):
        finetune_lm.load_corpus(data_arguments(train_file=write(tmp_path, "jsonl", TEXTS[:1])))
    for percentage in (0, 100):
        with pytest.raises(ValueError, match="between 1 and 99"):
            finetune_lm.hold_out(Dataset.from_dict({"text": TEXTS}), percentage)


def test_default_text_holds_out_whole_modules():
    corpus = finetune_lm.load_standard_library()
    train, validation = set(corpus.train["text"]), set(corpus.validation["text"])
    assert len(train) > 10 * len(validation) > 0
    assert not train & validation
    assert any("class ArgumentParser" in text for text in train | validation)
    first = finetune_lm.standard_library_documents(max_bytes=1)
    assert first == finetune_lm.standard_library_documents()[:1]


# --- tokenizer, blocks and model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return finetune_lm.train_tokenizer(Dataset.from_dict({"text": TEXTS}), "text", 300)


def test_trained_tokenizer_is_lossless(tokenizer):
    text = "Unseen: ŷ = (1-β)z + βx,\n\ttabs  and   spaces 漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    with pytest.raises(ValueError, match="--vocab_size 256"):
        finetune_lm.train_tokenizer(Dataset.from_dict({"text": TEXTS}), "text", 256)


@pytest.mark.parametrize("documents", [True, False])
def test_packing_keeps_every_token_in_order(tokenizer, documents):
    data = Dataset.from_dict({"text": [*TEXTS, "", None], "other": [0] * (len(TEXTS) + 2)})
    args = data_arguments(block_size=BLOCK)
    blocks = finetune_lm.pack(data, "training", tokenizer, args, documents, None)
    end = [tokenizer.eos_token_id] if documents else []
    stream = [token for text in TEXTS for token in tokenizer(text)["input_ids"] + end]
    assert blocks.column_names == ["input_ids"]
    assert [token for block in blocks["input_ids"] for token in block] == stream[: len(stream) // BLOCK * BLOCK]
    assert all(len(block) == BLOCK for block in blocks["input_ids"])
    limited = finetune_lm.pack(data, "training", tokenizer, args, documents, 3)
    assert limited["input_ids"][:] == blocks["input_ids"][:3]


def test_text_shorter_than_one_block(tokenizer):
    with pytest.raises(ValueError, match="the validation set is shorter than one block of 512 tokens"):
        finetune_lm.pack(
            Dataset.from_dict({"text": TEXTS[:2]}), "validation", tokenizer, data_arguments(block_size=512), True, None
        )


def test_model_sizes(tokenizer):
    def load(block_size: int = BLOCK, **values):
        return finetune_lm.load_model(finetune_lm.ModelArguments(**values), tokenizer, block_size)

    model = load(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, config_overrides="rms_norm_eps=0.5")
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.rms_norm_eps) == (24, 64, 0.5)
    assert model.get_input_embeddings().num_embeddings == 300
    assert load(hidden_size=8, num_attention_heads=2, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--hidden_size 10 with --num_attention_heads 4"):
        load(hidden_size=10)
    with pytest.raises(ValueError, match="--block_size 64 is more than the model's 32 positions"):
        load(block_size=64, config_overrides="max_position_embeddings=32")


def test_a_larger_tokenizer_enlarges_a_loaded_model(trained):
    larger = finetune_lm.train_tokenizer(Dataset.from_dict({"text": TEXTS}), "text", 310)
    model = finetune_lm.load_model(finetune_lm.ModelArguments(model_name_or_path=str(trained[0])), larger, BLOCK)
    assert model.get_input_embeddings().num_embeddings == len(larger) == 310


# --- measurements -----------------------------------------------------------------------------------------------------


def test_speed_counts_training_steps_only(monkeypatch):
    clock = iter([10.0, 12.0, 100.0, 103.0])
    monkeypatch.setattr(finetune_lm.time, "perf_counter", lambda: next(clock))
    timer = finetune_lm.StepTimer()
    args = TrainingArguments(per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True)
    assert timer.tokens_per_second(args, BLOCK) == 0
    for _ in range(2):
        timer.on_step_begin(args, None, None)
        timer.on_step_end(args, None, None)
    assert timer.tokens_per_second(args, BLOCK) == pytest.approx(2 * 4 * 2 * BLOCK / 5)


def test_no_curve_without_matplotlib_but_a_word(tmp_path, monkeypatch, caplog):
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0}]
    assert finetune_lm.draw_loss_curve(history, tmp_path / "a.png", None) == tmp_path / "a.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert finetune_lm.draw_loss_curve(history, tmp_path / "b.png", None) is None
    assert "pip install matplotlib" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_perplexity_of_a_diverged_run():
    assert finetune_lm.perplexity(0.0) == 1.0
    assert finetune_lm.perplexity(1e4) == math.inf
