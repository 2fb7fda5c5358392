"""Curves of one or several runs, from the `trainer_state.json` that the Trainer writes. Needs the extra `plot`."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart for colour-blind readers: dark ones first, without yellow. With 7 colours
# and 4 kinds of dashes, 28 runs look different, and neighbours do so in grey as well.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STATE_NAME = "trainer_state.json"

Curve = list[tuple[int, float]]  # (step, loss)


def plot_runs(run_dirs: Sequence[str | os.PathLike], output: str | os.PathLike) -> Path:
    """Draw the training loss and the evaluation loss at x of one or several runs into one picture.

    Args:
        run_dirs: folders of runs (the `output_dir` of the Trainer) or of checkpoints; the latest state in each is read.
        output: the picture; its suffix says the format (.png, .svg, .pdf).

    Returns:
        The path of the picture.

    Raises:
        ValueError: no run is given, a folder has no readable state or no losses, or the format is unknown.
        RuntimeError: matplotlib is not installed.
    """
    if not run_dirs:
        raise ValueError("run_dirs is empty; give at least one folder of a run")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("Plotting needs matplotlib: pip install 'hf_schedulefree[plot]'") from error
    output = Path(output)
    formats = FigureCanvasAgg.get_supported_filetypes()
    if output.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"output={str(output)!r} has no known picture format; expected one of {', '.join(formats)}")

    folders = [Path(run_dir) for run_dir in run_dirs]
    histories = [_log_history(folder) for folder in folders]
    # Where runs of a plain optimizer, which know no x and y, stand beside schedule-free ones, the titles say so.
    schedule_free = {any("averaging_weight" in entry for entry in history) for history in histories}
    whose = "schedule-free runs: " if len(schedule_free) > 1 else ""
    panels = [
        (f"Training loss ({whose}at y)", [{"": _training_curve(history)} for history in histories]),
        (f"Evaluation loss ({whose}at x)", [_evaluation_curves(history) for history in histories]),
    ]
    panels = [(title, runs) for title, runs in panels if any(curve for run in runs for curve in run.values())]
    if not panels:
        raise ValueError(f"No losses are logged in {', '.join(map(str, folders))}; set logging_steps or eval_strategy")

    figure = Figure(figsize=(5.6 * len(panels), 4.2), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    labels = _labels(folders)
    for axis, (title, runs) in zip(axes, panels, strict=True):
        for number, curves in enumerate(runs):
            for name, curve in curves.items():
                _draw(axis, curve, number, labels[number] + (f" ({name})" if name else ""), title)
        axis.set(title=title, xlabel="step")
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=True)
    axes[0].set_ylabel("loss")
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle  # the evaluation's, with its marker, where a run has both
    legend = figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name is no formula
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output


def _draw(axis: "Axes", curve: Curve, number: int, label: str, title: str) -> None:
    if not curve:
        return
    steps, losses = zip(*curve, strict=True)
    few = len(curve) <= 40
    axis.plot(
        steps,
        losses,
        label=label,
        color=_COLORS[number % len(_COLORS)],
        linestyle=_DASHES[number % len(_DASHES)],
        linewidth=1.6,
        marker=_MARKERS[number % len(_MARKERS)] if (few and "Evaluation" in title) or len(curve) == 1 else None,
        markersize=4.5,
    )


def _log_history(folder: Path) -> list[dict[str, Any]]:
    """The log of the latest state below a folder: its own, or that of its checkpoint with the most steps."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the output_dir of a run")
    candidates = [
        file for file in (folder / _STATE_NAME, *folder.glob(f"checkpoint-*/{_STATE_NAME}")) if file.is_file()
    ]
    if not candidates:
        raise ValueError(
            f"{folder} holds no {_STATE_NAME}, nor does a checkpoint in it; let the Trainer save checkpoints, or call "
            "trainer.save_state()"
        )
    states = []
    for file in candidates:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            history = list(state["log_history"])
            if not all(isinstance(entry, dict) and isinstance(entry.get("step", 0), int | float) for entry in history):
                raise TypeError("log_history")
            states.append((int(state["global_step"]), history))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is no state of a Trainer ({type(error).__name__}: {error})") from error
    return max(states, key=lambda state: (state[0], len(state[1])))[1]


def _training_curve(history: list[dict[str, Any]]) -> Curve:
    return _curve(history, "loss")


def _evaluation_curves(history: list[dict[str, Any]]) -> dict[str, Curve]:
    """Name of the evaluation set -> its losses; the name is empty for the usual single one."""
    keys = dict.fromkeys(key for entry in history for key in entry if key.startswith("eval_") and key.endswith("_loss"))
    if "eval_loss" in keys:
        return {"": _curve(history, "eval_loss")}
    return {key.removeprefix("eval_").removesuffix("_loss"): _curve(history, key) for key in keys}


def _curve(history: list[dict[str, Any]], key: str) -> Curve:
    """The finite values under a key; of a step that was logged twice (in a resumed run) the last."""
    values = {
        entry["step"]: float(entry[key])
        for entry in history
        if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key]) and "step" in entry
    }
    return sorted(values.items())


def _labels(folders: list[Path]) -> list[str]:
    """As few of the last parts of each path as tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            # matplotlib takes what starts with an underscore for a name of its own, and leaves it out.
            return [f" {label}" if label.startswith("_") else label for label in labels]
    return [str(folder) for folder in folders]
