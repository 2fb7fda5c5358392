"""The command `hf-schedulefree`: look into checkpoints, verify them, take the averaged weights out, draw loss curves.

Each subcommand is a function that adds its parser to the others (`add_..._command`) and one that runs it; the latter
returns the exit status.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import hf_schedulefree
from hf_schedulefree.checkpoint import (
    CheckpointError,
    Contents,
    export_averaged,
    find_committed,
    inspect_weights,
    verify_checkpoint,
)
from hf_schedulefree.checkpoint.commit import checkpoint_folders
from hf_schedulefree.plotting import plot_runs

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# Exit status: 0 for yes, 1 for no (not whole, x cannot be known), 2 for a command that makes no sense (argparse's).
_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (CheckpointError, OSError) as error:
        if getattr(arguments, "json", False):
            _write_json({"error": str(error)})
        sys.stderr.write(f"hf-schedulefree {arguments.command}: {error}\n")
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-schedulefree",
        description="Look into, verify and repair the checkpoints of schedule-free training, and draw its curves.",
        epilog="In schedule-free training the averaged weights x are evaluated and published; gradients are taken at "
        "other weights, y. Example: hf-schedulefree export runs/my-model/checkpoint-1000 --output my-model",
    )
    parser.add_argument("--version", action="version", version=f"hf_schedulefree {hf_schedulefree.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def _add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write the answer as one JSON object")


def _write_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


class _Progress:
    """A counter on stderr for work that takes longer than a second; silent where nobody watches."""

    def __init__(self, what: str, shown: bool = True):
        self._what, self._count, self._start, self._last = what, 0, time.monotonic(), 0.0
        self._shown = shown and sys.stderr.isatty()

    def __call__(self, name: str) -> None:
        self._count += 1
        now = time.monotonic()
        if self._shown and now - self._start > 1 and now - self._last > 0.2:
            self._last = now
            sys.stderr.write(f"\r\033[K{self._what}: {self._count} tensors, {now - self._start:.0f} s  {name}")
            sys.stderr.flush()

    def close(self) -> None:
        """Clear the line."""
        if self._last:
            sys.stderr.write("\r\033[K")


# inspect


def add_inspect_command(commands: Any) -> None:
    """`hf-schedulefree inspect PATH`."""
    parser = commands.add_parser(
        "inspect",
        help="which weights a checkpoint or weight file holds, x or y, and how that is known",
        description="Say which weights a checkpoint folder, a weight file or a run's output folder (its newest "
        "checkpoint) holds: the averaged x or the training weights y, how that is known, the step, the optimizer, the "
        "distance |x - y| / |y|, and whether the checkpoint is whole.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, a run's output folder, or a weight file")
    _add_json_flag(parser)
    parser.set_defaults(run=run_inspect)


def run_inspect(arguments: argparse.Namespace) -> int:
    """Print what is known; the exit status is 0 if the weights could be read."""
    path = _checkpoint_in(arguments.path)
    progress = _Progress("reading", shown=not arguments.json)
    try:
        contents = inspect_weights(path, progress=progress)
    finally:
        progress.close()
    if arguments.json:
        _write_json(_contents_as_json(contents))
    else:
        sys.stdout.write(_contents_as_text(contents))
    return 0


def _contents_as_json(contents: Contents) -> dict[str, Any]:
    return {
        "path": str(contents.path),
        "weights": contents.weights,
        "reason": contents.reason,
        "step": contents.step,
        "optimizer": contents.optimizer,
        "beta": contents.beta,
        "complete": contents.complete,
        "problem": contents.problem,
        "distance": contents.distance,
        "note": contents.note,
    }


def _contents_as_text(contents: Contents) -> str:
    weights = {"x": "x, the averaged weights", "y": "y, the training weights (not those to publish)", None: "unknown"}
    complete = {True: "yes", False: f"no: {contents.problem}", None: "a lone file: nothing to compare it with"}
    rows = [
        ("path", contents.path),
        ("weights", weights[contents.weights]),
        ("known because", contents.reason),
        ("step", contents.step),
        ("optimizer", contents.optimizer),
        ("beta", contents.beta),
        ("complete", complete[contents.complete]),
        ("|x - y| / |y|", None if contents.distance is None else f"{contents.distance:.3g}"),
        ("note", contents.note),
    ]
    lines = [f"{name + ':':<15} {value}" for name, value in rows if value is not None]
    if contents.weights == "y":
        lines.append(f"To get x: hf-schedulefree export {contents.path} --output NEW_FOLDER")
    return "\n".join(lines) + "\n"


# verify


def add_verify_command(commands: Any) -> None:
    """`hf-schedulefree verify PATH`."""
    parser = commands.add_parser(
        "verify",
        help="whether a checkpoint, or every checkpoint of a run, is whole",
        description="Check every file of a checkpoint against its record: size and checksum. PATH may be a run's "
        "output folder: then all of its checkpoints are checked. The exit status is 0 if all are whole, else 1. A "
        "checkpoint of the stock Trainer has no record; its files are then checked for being readable and of one step.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run's output folder")
    _add_json_flag(parser)
    parser.set_defaults(run=run_verify)


def run_verify(arguments: argparse.Namespace) -> int:
    """Check, print a line per checkpoint, and return 0 if all are whole."""
    folders = checkpoint_folders(arguments.path) or [arguments.path]
    answers = []
    for folder in folders:
        problem, recorded = None, None
        try:
            recorded = verify_checkpoint(folder).record is not None
        except CheckpointError as error:
            problem = str(error)
        answers.append({"path": str(folder), "complete": problem is None, "problem": problem, "recorded": recorded})
    complete = all(answer["complete"] for answer in answers)
    if arguments.json:
        _write_json({"complete": complete, "checkpoints": answers})
    else:
        for answer in answers:
            how = "" if answer["recorded"] else " (no record: by what its own files tell)"
            answer_text = f"whole{how}" if answer["complete"] else answer["problem"]
            sys.stdout.write(f"{answer['path']}: {answer_text}\n")
    return 0 if complete else _FAILED


# export


def add_export_command(commands: Any) -> None:
    """`hf-schedulefree export PATH --output DIR`."""
    parser = commands.add_parser(
        "export",
        help="write the averaged weights of any checkpoint, ready for from_pretrained",
        description="Write the averaged weights x as safetensors into a new folder, with configuration and tokenizer, "
        "ready for from_pretrained. Takes any checkpoint: of this package, of the stock Trainer (also one that saved y "
        "under the name of the model), FSDP2's sharded ones, DeepSpeed's, and adapters.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run's output folder (its newest)")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        help="type of the written weights; by default that of the checkpoint's. float32 gives the full precision that "
        "the optimizer state holds for half-precision models",
    )
    _add_json_flag(parser)
    parser.set_defaults(run=run_export)


def run_export(arguments: argparse.Namespace) -> int:
    """Export, and say what was written."""
    path = _checkpoint_in(arguments.path)
    progress = _Progress("writing", shown=not arguments.json)
    try:
        written = export_averaged(path, arguments.output, dtype=_DTYPES.get(arguments.dtype), progress=progress)
    finally:
        progress.close()
    if arguments.json:
        _write_json({**_contents_as_json(written), "source": str(path)})
    else:
        step = "" if written.step is None else f" of step {written.step}"
        sys.stdout.write(f"The averaged weights{step} in {path} are now in {written.path}.\n")
    return 0


def _checkpoint_in(path: Path) -> Path:
    """The path itself, or the newest whole checkpoint if it is a run's output folder without weights of its own."""
    has_weights = path.is_file() or any(path.glob("*model*.safetensors*")) or any(path.glob("*model*.bin"))
    if not path.is_dir() or has_weights or not checkpoint_folders(path):
        return path
    found, skipped = find_committed(path)
    if found is None:
        raise CheckpointError(f"no checkpoint in {path} is whole: {'; '.join(skipped)}")
    return found.folder


# plot


def add_plot_command(commands: Any) -> None:
    """`hf-schedulefree plot RUN [RUN ...] -o PICTURE`."""
    parser = commands.add_parser(
        "plot",
        help="draw the training loss and the evaluation loss at x of one or several runs",
        description="Draw the training loss and the evaluation loss at x from trainer_state.json, several runs side by "
        "side in the same colours and axes. Needs matplotlib: pip install 'hf_schedulefree[plot]'.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's output folder (its latest state), or a checkpoint"
    )
    parser.add_argument(
        "--output", "-o", type=Path, default=Path("curves.png"), metavar="FILE", help="the picture: .png, .svg or .pdf"
    )
    parser.set_defaults(run=run_plot)


def run_plot(arguments: argparse.Namespace) -> int:
    """Draw, and say where the picture is."""
    try:
        picture = plot_runs(arguments.runs, arguments.output)
    except (ValueError, RuntimeError) as error:  # no such run, no losses, no matplotlib
        sys.stderr.write(f"hf-schedulefree plot: {error}\n")
        return _FAILED
    sys.stdout.write(f"{picture}\n")
    return 0


COMMANDS: list[Callable[[Any], None]] = [
    add_inspect_command,
    add_verify_command,
    add_export_command,
    add_plot_command,
]

if __name__ == "__main__":
    sys.exit(main())
