"""The Python blocks of README.md and docs/ run, in the order in which they stand, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, token_data

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)")

WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = token_data()
    # What a reader has at hand: a model, data, and batches of it.
    names = {
        "__name__": "readme",
        "model": tiny_llama(),
        "train_dataset": data,
        "eval_dataset": data[:8],
        "batches": [{key: torch.stack([row[key] for row in data[:4]]) for key in data[0]}] * 3,
    }
    for code in BLOCK.findall(page.read_text(encoding="utf-8")):
        line = page.read_text(encoding="utf-8").split(code)[0].count("\n")
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}{anchor}"


def test_the_readme_has_code():
    assert len(BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) >= 4
