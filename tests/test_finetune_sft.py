"""scripts/finetune_sft.py: chats in, x out; whole and as an adapter; and each mistake a user can make."""

import json

import datasets
import pytest
import torch
import yaml
from ecosystem import script, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")
pytest.importorskip("trl")

finetune_sft = script("finetune_sft")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_chats(folder, count=20, name="chats.jsonl"):
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(count)
    ]
    (folder / name).write_text("\n".join(map(json.dumps, chats)))
    return folder / name


def flags(model, data, output_dir, *more):
    return [
        *("--model_name_or_path", str(model), "--train_file", str(data), "--output_dir", str(output_dir)),
        *(
            "--max_steps",
            "4",
            "--per_device_train_batch_size",
            "2",
            "--learning_rate",
            "2e-2",
        ),
        *("--use_cpu", "--disable_tqdm", "True", "--report_to", "none", "--gradient_checkpointing", "False"),
        *more,
    ]


def loss_of(model, tokenizer, data):
    """The mean loss of the assistant's tokens, computed by hand."""
    total, count = 0.0, 0
    for line in data:
        encoded = tokenizer.apply_chat_template(
            line["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        labels = encoded["input_ids"].clone()
        labels[torch.as_tensor(encoded["assistant_masks"]).reshape(labels.shape) == 0] = -100
        with torch.no_grad():
            n = int((labels[:, 1:] != -100).sum())
            total += model(input_ids=encoded["input_ids"], labels=labels).loss.item() * n
            count += n
    return total / count


def test_chats_in_x_out(model, tmp_path):
    data = write_chats(tmp_path)
    metrics = finetune_sft.main(
        flags(model, data, tmp_path / "out", "--assistant_only_loss", "--per_device_eval_batch_size", "1")
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    held_out = [json.loads(line) for line in data.read_text().splitlines()[-1:]]  # 5 % of 20
    assert metrics["eval_loss"] == pytest.approx(loss_of(saved, tiny_tokenizer(), held_out), rel=1e-4)
    card = (tmp_path / "out" / "trainer_state.json").read_text()
    assert "averaging_weight" in card and "relative_distance" in card


def test_an_adapter_by_a_config_file_and_its_merger(model, tmp_path):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"use_peft": True, "lora_r": 2, "lora_alpha": 64, "packing": True})
    )
    data = write_chats(tmp_path, 40)
    arguments = flags(
        model, data, tmp_path / "out", "--config", str(tmp_path / "run.yaml"), "--merge_adapter", "--max_length", "64",
        "--packing_strategy", "wrapped", "--lora_target_modules", "q_proj", "v_proj",
    )  # fmt: skip
    finetune_sft.main(arguments)
    adapted = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert adapted.peft_config["default"].r == 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    tokens = torch.arange(2, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-5)
        assert (merged(tokens).logits - tiny_llama()(tokens).logits).abs().max() > 1e-3


def test_resuming_by_flag(model, tmp_path):
    data = write_chats(tmp_path)
    finetune_sft.main(flags(model, data, tmp_path / "a", "--save_steps", "2"))
    finetune_sft.main(flags(model, data, tmp_path / "b", "--save_steps", "2", "--max_steps", "2"))
    finetune_sft.main(flags(model, data, tmp_path / "b", "--resume_from_checkpoint", "True"))
    straight, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["--train_file", "nowhere.jsonl"], FileNotFoundError, "nowhere.jsonl"),
        (["--validation_split_percentage", "0"], ValueError, "between 1 and 99"),
        (["--merge_adapter"], ValueError, "--use_peft"),
        (["--resume_from_checkpoint", "True"], FileNotFoundError, "no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], FileNotFoundError, "nowhere"),
    ],
)
def test_mistakes(changes, error, message, model, tmp_path):
    data = write_chats(tmp_path)
    with pytest.raises(error, match=message):
        finetune_sft.main(flags(model, data, tmp_path / "out", *changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("{", "cannot be read"), ('{"text": "a"}', "'messages', or 'prompt'")],
)
def test_files_that_are_no_chats(content, message, model, tmp_path):
    (tmp_path / "chats.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        finetune_sft.main(flags(model, tmp_path / "chats.jsonl", tmp_path / "out"))


def test_what_is_missing_is_said(model, tmp_path):
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        finetune_sft.main(["--train_file", "chats.jsonl"])
    with pytest.raises(ValueError, match="--train_file is missing"):
        finetune_sft.main(["--model_name_or_path", str(model)])
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_llama().save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="--chat_template_path"):
        finetune_sft.main(flags(tmp_path / "bare", write_chats(tmp_path), tmp_path / "out"))
