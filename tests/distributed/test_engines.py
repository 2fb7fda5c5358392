"""The matrix: engine x {trajectory, evaluate, save, best, resume, no perturbation}, every cell with numbers.

Each engine is launched once and does everything (`run.py`); the tests below judge what it left. A launch is judged by
its results, not by its exit: DeepSpeed on CPU sometimes aborts after it has finished.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from engines import ENGINES  # noqa: E402
from launching import launch, needs_its_engine  # noqa: E402
from run import STEPS, Sentences  # noqa: E402

from hf_schedulefree.checkpoint import export_averaged, inspect_weights, read_record, verify_checkpoint  # noqa: E402

PARTS = ("trajectory", "readers", "resume", "best", "refusals")
MATRIX = [name for name, row in ENGINES.items() if row.processes > 1]
# One engine of each kind; the others differ from these in other things.
MEASURED = ("fsdp2-full", "fsdp2-sharded", "zero2", "zero3")
FAILING = ("ddp", "fsdp2-full", "fsdp2-sharded", "zero3")


def with_slow(names, chosen):
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


pytestmark = pytest.mark.distributed


class Run:
    """What one engine left: `ranks` has the numbers of each process, `weights` what a file holds."""

    def __init__(self, engine, folder):
        self.row = ENGINES[engine]
        self.folder = folder / engine
        parts = list(PARTS if engine in MATRIX else ("trajectory",))
        parts += ["overflow"] * (engine in ("single", "ddp"))
        parts += ["evaluated_first"] * (engine in ("ddp", "zero3")) + ["second_train"] * (engine in ("zero2", "zero3"))
        parts += ["memory"] * (engine in MEASURED)
        parts += ["callbacks", "sigterm", "write_errors", "own_loop"] * (engine in FAILING)
        self.ranks = launch(engine, self.folder, parts, self.row.processes)

    def with_part(self, name, key):
        """The numbers of each process, after this part, too."""
        if key not in self.ranks[0]:
            self.ranks = launch(self.folder.name, self.folder, [name], self.row.processes)
        return self.ranks

    def kept(self, name):
        return torch.load(self.folder / f"{name}.pt", weights_only=True)

    def saved(self, name):
        return load_file(self.folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs so far; an engine that failed is not launched again for its other cells."""
    folder, made = tmp_path_factory.mktemp("engines"), {}

    def run(engine):
        needs_its_engine(engine)
        if engine not in made:
            made[engine] = None
            made[engine] = Run(engine, folder)
        if made[engine] is None:
            pytest.fail(f"{engine} did not finish, see the first failure")
        return made[engine]

    return run


def largest_difference(some, others):
    names = some.keys() & others.keys()
    assert len(names) >= 10
    return max((some[name].float() - others[name].float()).abs().max().item() for name in names)


def distance(some, others):
    """Root mean square over all weights."""
    names = sorted(some.keys() & others.keys())
    assert len(names) >= 10
    return torch.cat([(some[name] - others[name]).flatten() for name in names]).square().mean().sqrt().item()


def same_bits(some, others):
    """Equal where both name a tensor; a file leaves out what is tied."""
    names = some.keys() & others.keys()
    assert len(names) >= 10
    return all(torch.equal(some[name].float(), others[name].float()) for name in names)


def loss_of(weights):
    """On the evaluation set, computed here, without Trainer or engine."""
    model = LlamaForCausalLM.from_pretrained(weights) if isinstance(weights, Path) else weights
    rows = torch.stack([row["input_ids"] for row in Sentences(1, 16)])
    with torch.no_grad():
        return model.eval().float()(input_ids=rows, labels=rows).loss.item()


@pytest.mark.parametrize("engine", MATRIX)
def test_trajectory(engine, runs):
    run = runs(engine)
    reference = runs(run.row.reference)
    assert run.ranks[0]["processes"] == run.row.processes == len(run.ranks)
    for result in run.ranks:
        assert result["counts"] == [STEPS] * len(result["counts"])
    x, y = run.kept("trajectory_x"), run.kept("trajectory_y")
    expected_x, expected_y = reference.kept("trajectory_x"), reference.kept("trajectory_y")
    assert largest_difference(x, expected_x) < run.row.tolerance
    assert largest_difference(y, expected_y) < run.row.tolerance
    # In bf16 single weights may be as far off as x and y are apart; as a whole, each is where it should be.
    assert distance(x, expected_x) < 0.75 * distance(x, expected_y)
    assert distance(y, expected_y) < 0.75 * distance(y, expected_x)
    assert largest_difference(x, y) > 100 * run.row.tolerance or "bf16" in engine  # the two can be told apart


@pytest.mark.parametrize("engine", [name for name in MATRIX if "bf16" not in name])
def test_logged_progress(engine, runs):
    """|x - y| / |y| and c at each step, as in one process."""
    run = runs(engine)
    expected = runs(run.row.reference).ranks[0]["progress"]
    assert len(expected) == STEPS and all(0 < distance < 0.1 for distance, _ in expected[1:])
    for result in run.ranks:
        assert len(result["progress"]) == STEPS
        for logged, (distance, c) in zip(result["progress"], expected, strict=True):
            assert logged == [pytest.approx(distance, rel=1e-3, abs=1e-6), c]


def test_an_overflow_in_one_process_skips_the_step_in_all(runs):
    run, reference = runs("ddp"), runs("single")
    assert run.ranks[0]["overflow"] == run.ranks[1]["overflow"]
    for result in (*run.ranks, *reference.ranks):
        assert result["overflow_counts"] == [STEPS - 2] * 2
        assert result["overflow_scale"] == 2.0**11  # grew three times, halved twice
    assert largest_difference(run.kept("overflow_x"), reference.kept("overflow_x")) < run.row.tolerance


@pytest.mark.parametrize("engine", MATRIX)
def test_evaluate(engine, runs):
    run = runs(engine)
    at_x = loss_of(run.folder / "saved")
    model = LlamaForCausalLM.from_pretrained(run.folder / "saved")
    model.load_state_dict(run.kept("busy_y"), strict=False)
    model.tie_weights()
    at_y = loss_of(model)
    # The engine computes in bf16, this test in fp32: there, the loss must be nearer to that of x than to that of y.
    near = 1e-5 if run.row.tolerance < 1e-3 else abs(at_x - at_y) / 2
    assert abs(at_x - at_y) > 5e-3
    for result in run.ranks:
        assert result["evaluate"] == pytest.approx(at_x, abs=near)
        assert result["predict"] == pytest.approx(at_x, abs=near)
        assert result["eval_losses"][-1] == pytest.approx(at_x, abs=near)


@pytest.mark.parametrize("engine", MATRIX)
def test_save(engine, runs):
    run = runs(engine)
    x = run.kept("busy_x")
    assert not same_bits(x, run.kept("busy_y"))
    for name in ("saved", "saved_at_y", f"busy/checkpoint-{STEPS}"):
        assert same_bits(run.saved(name), x), name
    LlamaForCausalLM.from_pretrained(run.folder / "saved")


@pytest.mark.parametrize("engine", MATRIX)
def test_export(engine, runs, tmp_path):
    run = runs(engine)
    checkpoint = run.folder / f"busy/checkpoint-{STEPS}"
    assert inspect_weights(checkpoint).weights == "x"
    export_averaged(checkpoint, tmp_path / "exported")
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert exported.keys() == run.saved("saved").keys()
    assert same_bits(exported, run.kept("busy_x"))


@pytest.mark.parametrize("engine", MATRIX)
def test_no_folder_of_a_checkpoint_is_empty(engine, runs):
    folders = [path for path in (runs(engine).folder / f"busy/checkpoint-{STEPS}").rglob("*") if path.is_dir()]
    assert all(any(folder.iterdir()) for folder in folders)


@pytest.mark.parametrize("engine", MATRIX)
def test_best(engine, runs):
    run = runs(engine)
    best = run.kept("best_x")
    assert run.ranks[0]["best_checkpoint"] == "checkpoint-2"
    assert same_bits(run.saved("best/checkpoint-2"), best)
    assert same_bits(run.saved("best_saved"), best)
    assert not same_bits(run.saved(f"best/checkpoint-{STEPS}"), best)
    near = 1e-5 if run.row.tolerance < 1e-3 else 5e-3
    assert run.ranks[0]["best_evaluate"] == pytest.approx(loss_of(run.folder / "best_saved"), abs=near)


@pytest.mark.parametrize("engine", MATRIX)
def test_resume(engine, runs):
    run = runs(engine)
    for result in run.ranks:
        assert result["resumed_step"] == STEPS
        assert result["resumed"] == result["busy"]
    assert same_bits(run.kept("resumed_x"), run.kept("busy_x"))


@pytest.mark.parametrize("engine", MATRIX)
def test_no_perturbation(engine, runs):
    for result in runs(engine).ranks:
        assert result["quiet"] == result["busy"] == result["after_readers"] == result["after_saving"]


@pytest.mark.parametrize("engine", [name for name in MATRIX if ENGINES[name].refused()])
def test_refused_at_the_start(engine, runs):
    run = runs(engine)
    for (options, words), message in zip(run.row.refused(), run.ranks[0]["refusals"], strict=True):
        assert words in message, options


@pytest.mark.parametrize("engine", [name for name in MATRIX if ENGINES[name].resumes_elsewhere])
def test_resume_on_another_number_of_processes(engine, runs, tmp_path):
    run = runs(engine)
    launch(engine, run.folder, ["elsewhere"], run.row.resumes_on)
    left, arrived = run.kept("trajectory_x"), run.kept("elsewhere_x")
    assert largest_difference(left, arrived) < run.row.tolerance


@pytest.mark.parametrize("engine", ["ddp", "fsdp2-full"])
def test_each_node_saves_whole_models_and_resumes_from_what_all_have(engine, tmp_path):
    needs_its_engine(engine)
    results = launch(engine, tmp_path, ["each_node"], 2, nodes=2)
    for result in results:
        begun = {"nothing": STEPS, "interrupted": STEPS, "damaged": STEPS // 2, "lost": STEPS // 2}
        assert {happened: result[f"each_node_{happened}"] for happened in begun} == {
            happened: [step, result["each_node"]] for happened, step in begun.items()
        }
    x = torch.load(tmp_path / "each_node_x.pt", weights_only=True)
    recorded = []
    for node in ("node_0", "node_1"):
        assert same_bits(load_file(tmp_path / node / "model.safetensors"), x)
        LlamaForCausalLM.from_pretrained(tmp_path / node)
        names = read_record(tmp_path / node / f"checkpoint-{STEPS // 2}").files
        recorded.append({name for name in names if not name.startswith("rng_state_")})
    assert recorded[0] == recorded[1]  # a resume reads what is on its node


def test_nodes_whose_disks_are_their_own_get_the_best_model(tmp_path):
    """Only the first one has checkpoints; without `save_on_each_node` the others cannot resume."""
    results = launch("ddp", tmp_path, ["own_disks"], 2, nodes=2)
    x = torch.load(tmp_path / "own_disks_x.pt", weights_only=True)
    assert same_bits(load_file(tmp_path / "disk_0/checkpoint-2/model.safetensors"), x)
    assert results[0]["own_disks"] == results[1]["own_disks"]
    assert results[1]["own_disks_left"] == [] and results[0]["own_disks_said"] == []
    for result in results:
        assert "process 1 sees no" in result["own_disks_resumed"] and "save_on_each_node" in result["own_disks_resumed"]


@pytest.mark.parametrize("engine", ["fsdp2-sharded", "zero2"])
def test_shards_on_several_disks_are_no_checkpoint(engine, tmp_path):
    needs_its_engine(engine)
    for result in launch(engine, tmp_path, ["own_disks"], 2, nodes=2):
        assert len(result["own_disks_said"]) == STEPS // 2 and result["own_disks_left"] == []
        assert all("a folder that all nodes share" in text for text in result["own_disks_said"])


def test_a_node_that_sees_late_what_others_do_spoils_nothing(tmp_path):
    results = launch("ddp", tmp_path, ["seen_late"], 2, nodes=2)
    for step in range(2, STEPS + 1, 2):
        verify_checkpoint(tmp_path / f"seen_late/checkpoint-{step}")
    x = torch.load(tmp_path / "seen_late_x.pt", weights_only=True)
    assert same_bits(load_file(tmp_path / "seen_late/checkpoint-2/model.safetensors"), x)
    assert results[0]["seen_late"] == results[1]["seen_late"]
    for result in results:
        assert result["seen_late_resumed"] == result["seen_late_quiet"]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_on_another_number_of_processes_is_refused(engine, runs):
    run = runs(engine)
    (result,) = launch(engine, run.folder, ["refused_elsewhere"], 1)
    assert len(result["refused_elsewhere"]) == 2
    for message in result["refused_elsewhere"]:
        assert "written by 2 processes" in message and "this run has 1" in message and "from_pretrained" in message


@pytest.mark.parametrize("engine", ["fsdp2-full", "zero2"])
def test_what_is_said_of_a_checkpoint_of_weights_alone_can_be_done(engine, runs):
    """These engines read weights from files that such a checkpoint has not, with a fresh optimizer, too."""
    for result in runs(engine).with_part("weights_alone", "weights_alone"):
        assert len(result["weights_alone"]) == 4
        for message in result["weights_alone"]:
            assert "fresh_optimizer" not in message and "another engine" not in message
            assert "from_pretrained" in message


@pytest.mark.parametrize("engine", with_slow([name for name in MATRIX if "bf16" not in name], FAILING))
def test_a_process_that_cannot_write_ends_no_run(engine, runs):
    run = runs(engine)
    for result in run.with_part("write_errors", "failing"):
        assert result["failing"] == result["failing_resumed"] == result["quiet"]
        assert len(result["failing_said"]) == 6
        for step, text in enumerate(result["failing_said"], start=2):
            assert f"checkpoint-{step} failed" in text and "No space left" in text
            assert text.endswith("checkpoint-1.")
        assert result["failing_resumed_step"] == STEPS
    checkpoints = sorted((run.folder / "failing").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-1", f"checkpoint-{STEPS}"]
    for path in checkpoints:
        verify_checkpoint(path)


@pytest.mark.parametrize("engine", with_slow([name for name in MATRIX if "bf16" not in name], FAILING))
def test_a_sigterm_that_one_process_notices_first(engine, runs):
    run = runs(engine)
    for result in run.with_part("sigterm", "sigterm_step"):
        assert result["sigterm_step"] == 3
        assert result["sigterm_resumed"] == result["quiet"]
    assert verify_checkpoint(run.folder / "sigterm/checkpoint-3").step == 3


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_an_evaluation_before_the_training(engine, runs):
    """The Trainer refuses one in the other engines."""
    run = runs(engine)
    for result in run.ranks:
        assert result["unread"] == result["evaluated_first"]
        assert engine != "ddp" or result["unread"] == run.ranks[0]["unread"]  # of the whole model


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_second_train_under_deepspeed_begins_at_x(engine, runs):
    for result in runs(engine).ranks:
        assert result["second_train"] == result["begun_at_x"]


@pytest.mark.parametrize("engine", ["fsdp2-full", "fsdp2-sharded"])
def test_resume_with_a_parameter_that_had_no_gradient(engine, runs):
    for result in runs(engine).with_part("idle", "idle"):
        assert result["idle"] == result["idle_resumed"]


# Accelerate would shard a model that transformers has sharded already.
@pytest.mark.parametrize(
    "engine", with_slow([name for name in MATRIX if "bf16" not in name and "native" not in name], FAILING)
)
def test_a_loop_of_ones_own(engine, runs):
    run = runs(engine)
    for result in run.with_part("own_loop", "loop_resumed"):
        assert result["loop_quiet"] == result["loop_busy"] == result["loop_resumed"]
    model = LlamaForCausalLM.from_pretrained(run.folder / "saved")
    model.load_state_dict(run.kept("loop_x"), strict=False)
    model.tie_weights()
    for loss in run.ranks[0]["loop_losses"]:
        assert loss == pytest.approx(loss_of(model), abs=1e-5)


@pytest.mark.parametrize("engine", with_slow([name for name in MATRIX if "bf16" not in name], FAILING))
def test_callbacks_of_one_process_or_late_in_one(engine, runs):
    run = runs(engine)
    for result in run.with_part("callbacks", "callbacks"):
        assert result["callbacks"] == result["quiet"]
    assert run.ranks[0]["callbacks_seen"] == ["end", "evaluate", "log", "save"]
    for step in (STEPS // 2, STEPS):
        checkpoint = run.folder / f"callbacks/checkpoint-{step}"
        verify_checkpoint(checkpoint)
        assert {"own_0", "own_1"} < read_record(checkpoint).files.keys()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("engine", with_slow([name for name in MATRIX if name != "ddp"], MEASURED))
def test_no_process_holds_a_whole_copy(engine, runs):
    run = runs(engine)
    for result in run.with_part("memory", "memory"):
        taken = result["memory"]
        assert taken["save_model"] < 0.2
        assert taken["checkpoint"] < 0.4  # four files are read at a time for their checksums
        if "zero1" in engine or "zero2" in engine:
            continue  # every process has the whole module anyway, and gloo a second one at the end of each step
        assert taken["show"] < 0.6  # y of its half of the model
        assert taken["evaluate"] < 0.9  # and the layers that are computed


@pytest.mark.parametrize("engine", MATRIX)
def test_record_names_all_parameters_or_none(engine, runs):
    """Under DeepSpeed the optimizer's parameters are flat partitions without names."""
    groups = read_record(runs(engine).folder / f"busy/checkpoint-{STEPS}").parameters
    assert groups == [] if "zero" in engine else len(groups) == 2 and all(groups)
