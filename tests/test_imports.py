"""What importing the package loads: next to nothing that the Trainer itself would not have loaded."""

import gc
import subprocess
import sys

import pytest

from hf_schedulefree.collector import full_collections_postponed

# What the package depends on anyway. Everything else has to be loaded by what needs it, when it needs it.
ITS_OWN = set("hf_schedulefree accelerate huggingface_hub numpy safetensors torch transformers xxhash".split())

LOADED_WHEN_NEEDED = {
    "hf_schedulefree.checkpoint.contents",
    "hf_schedulefree.checkpoint.deepspeed",
    "hf_schedulefree.checkpoint.export",
    "hf_schedulefree.checkpoint.matching",
    "hf_schedulefree.checkpoint.pickled",
    "hf_schedulefree.checkpoint.sharded",
    "hf_schedulefree.cli",
    "hf_schedulefree.optim.kernels.jobs",
    "hf_schedulefree.optim.kernels.one_pass_triton",
    "hf_schedulefree.plotting",
    "torch.distributed.checkpoint.state_dict",
}


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.fixture(scope="module")
def added() -> set[str]:
    """The modules that this package loads beyond those of the Trainer."""
    return loaded_by("import hf_schedulefree") - loaded_by("from transformers import Trainer")


def test_the_package_loads_little_beyond_the_trainer(added):
    roots = {name.partition(".")[0] for name in added}
    assert "hf_schedulefree" in roots
    assert roots <= ITS_OWN | sys.stdlib_module_names
    assert len([name for name in added if not name.startswith("hf_schedulefree")]) < 25


def test_what_few_runs_need_is_loaded_when_it_is_needed(added):
    assert not added & LOADED_WHEN_NEEDED


def test_exports_are_found_where_they_always_were():
    from hf_schedulefree import checkpoint
    from hf_schedulefree.checkpoint import Contents, export, export_averaged, inspect_weights

    assert {name: getattr(checkpoint, name) for name in checkpoint.__all__}["export_averaged"] is export_averaged
    assert (export_averaged, inspect_weights) == (export.export_averaged, export.inspect_weights)
    assert Contents is export.Contents
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = checkpoint.no_such_name


COUNT_FULL_COLLECTIONS = """
import gc, sys
full = []
gc.callbacks.append(lambda phase, info: full.append(phase) if phase == "start" and info["generation"] == 2 else None)
gc.set_threshold(600, 9, 8)
"""


def test_at_most_one_full_collection_when_the_package_is_imported():
    code = f"{COUNT_FULL_COLLECTIONS}import hf_schedulefree\nprint(len(full), gc.get_threshold(), gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The one may come when the thresholds are back; of Python's own accord there would be seven.
    assert done.stdout.splitlines()[-1] in ("0 (600, 9, 8) True", "1 (600, 9, 8) True")


@pytest.mark.parametrize("newest", [0, 700, 50_000])
def test_the_thresholds_come_back(newest):
    former = gc.get_threshold()
    try:
        gc.set_threshold(newest, 7, 5)
        with pytest.raises(KeyError), full_collections_postponed():
            within = gc.get_threshold()
            raise KeyError
        assert gc.get_threshold() == (newest, 7, 5)
        assert within[0] >= newest and within[2] > 10**6
        assert bool(within[0]) == bool(newest)  # a collector that was switched off stays so
    finally:
        gc.set_threshold(*former)
