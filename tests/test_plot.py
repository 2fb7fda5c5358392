"""`plot_runs`: what it draws is what was logged; the picture is legible, and mistakes are told."""

import builtins
import json

import pytest

pytest.importorskip("matplotlib")

from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_schedulefree import cli, plotting
from hf_schedulefree.plotting import plot_runs


def write_run(folder, offset=0.0, steps=10, evaluate=True, where="."):
    history = []
    for step in range(1, steps + 1):
        history.append({"step": step, "epoch": step / steps, "loss": offset + 5.0 / step, "learning_rate": 1e-3})
        if evaluate and step % 5 == 0:
            history.append({"step": step, "epoch": step / steps, "eval_loss": offset + 4.0 / step})
    history.append({"step": steps, "train_loss": 1.0, "train_runtime": 2.0})
    (folder / where).mkdir(parents=True, exist_ok=True)
    state = {"global_step": steps, "log_history": history}
    (folder / where / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, for a look at what is in them."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    return figures


def lines(axis: Axes):
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axis.get_lines()}


def test_two_runs_side_by_side(tmp_path, drawn):
    runs = [write_run(tmp_path / "schedule-free"), write_run(tmp_path / "cosine", offset=1.0)]
    picture = plot_runs(runs, tmp_path / "pictures" / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    training, evaluation = figure.axes
    assert "Training" in training.get_title() and "at x" in evaluation.get_title()
    assert training.get_xlabel() == evaluation.get_xlabel() == "step" and training.get_ylabel() == "loss"
    assert lines(training)["cosine"] == [(step, 1.0 + 5.0 / step) for step in range(1, 11)]
    assert lines(evaluation)["schedule-free"] == [(5, 0.8), (10, 0.4)]
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["cosine", "schedule-free"]
    width, height = figure.get_size_inches() * figure.dpi
    assert width >= 1200 and height >= 600


def test_the_runs_can_be_told_apart_without_colours(tmp_path, drawn):
    plot_runs([write_run(tmp_path / f"run{i}", offset=i) for i in range(12)], tmp_path / "curves.svg")
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].get_lines()}
    assert len(looks) == 12
    assert len({line.get_marker() for line in drawn[0].axes[1].get_lines()}) == 7
    for line in drawn[0].axes[0].get_lines()[:5]:
        assert contrast_with_white(line.get_color()) >= 3  # what WCAG asks of graphics


def contrast_with_white(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color)]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_the_latest_checkpoint_counts_and_a_resumed_step_once(tmp_path, drawn):
    run = tmp_path / "run"
    write_run(run, steps=5, where="checkpoint-5")
    write_run(run, steps=20, offset=2.0, where="checkpoint-20")
    state = json.loads((run / "checkpoint-20" / "trainer_state.json").read_text())
    state["log_history"] += [{"step": 20, "loss": 7.5}, {"step": 19, "loss": float("nan")}]
    (run / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(state))
    plot_runs([run], tmp_path / "curves.png")
    curve = lines(drawn[0].axes[0])["run"]
    assert len(curve) == 20 and curve[-1] == (20, 7.5) and curve[-2] == (19, 2.0 + 5.0 / 19)
    plot_runs([run / "checkpoint-5"], tmp_path / "curves.png")
    assert len(lines(drawn[1].axes[0])["checkpoint-5"]) == 5


def test_beside_a_plain_run_the_titles_say_whose_x_it_is(tmp_path, drawn):
    plain, schedule_free = write_run(tmp_path / "plain"), write_run(tmp_path / "schedule-free")
    file = schedule_free / "trainer_state.json"
    state = json.loads(file.read_text())
    for entry in state["log_history"]:
        if "loss" in entry:
            entry["averaging_weight"] = 1 / entry["step"]
    file.write_text(json.dumps(state))
    plot_runs([plain, schedule_free], tmp_path / "curves.png")
    assert "schedule-free runs: at x" in drawn[0].axes[1].get_title()


def test_runs_of_one_name_are_labelled_by_their_folders(tmp_path, drawn):
    plot_runs([write_run(tmp_path / name / "out") for name in ("a", "b")], tmp_path / "curves.png")
    assert sorted(lines(drawn[0].axes[0])) == ["a/out", "b/out"]


def test_every_folder_is_named_as_it_is_called(tmp_path, drawn):
    """matplotlib leaves out what starts with an underscore, and reads what stands between dollar signs as a formula."""
    names = ["_first", "lr$\\frac$", "a$b", "plain"]
    plot_runs([write_run(tmp_path / name) for name in names], tmp_path / "curves.png")
    (legend,) = drawn[0].legends
    assert [text.get_text().strip() for text in legend.get_texts()] == names


def test_without_evaluations_there_is_one_panel_and_several_sets_have_names(tmp_path, drawn):
    plot_runs([write_run(tmp_path / "a", evaluate=False)], tmp_path / "curves.png")
    assert len(drawn[0].axes) == 1
    state = {"global_step": 2, "log_history": [{"step": 2, "eval_news_loss": 1.5, "eval_books_loss": 2.5}]}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "trainer_state.json").write_text(json.dumps(state))
    plot_runs([tmp_path / "b"], tmp_path / "curves.png")
    assert lines(drawn[1].axes[0]) == {"b (news)": [(2, 1.5)], "b (books)": [(2, 2.5)]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no trainer_state.json"),
        ("{", "is no state of a Trainer"),
        ('{"global_step": 3}', "log_history"),
        ('{"global_step": 3, "log_history": [5]}', "log_history"),
        ('{"global_step": 3, "log_history": [{"step": "a", "loss": 1}]}', "log_history"),
        ('{"global_step": 3, "log_history": []}', "No losses are logged"),
    ],
)
def test_a_folder_that_cannot_be_drawn(content, message, tmp_path):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        plot_runs([tmp_path / "run"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        plot_runs([tmp_path / "nowhere"], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="at least one"):
        plot_runs([], tmp_path / "curves.png")
    with pytest.raises(ValueError, match=r"curves\.docx.*png"):
        plot_runs([write_run(tmp_path / "run")], tmp_path / "curves.docx")


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(RuntimeError, match=r"pip install 'hf_schedulefree\[plot\]'"):
        plotting.plot_runs([run], tmp_path / "curves.png")


def test_the_command(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    picture = tmp_path / "curves.png"
    assert cli.main(["plot", *runs, "-o", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == str(picture) and picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plot", str(tmp_path / "nowhere"), "-o", str(picture)]) == 1
    said = capsys.readouterr()
    assert "is no folder" in said.err and said.out == "" and "Traceback" not in said.err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plot"])
    assert stopped.value.code == 2
