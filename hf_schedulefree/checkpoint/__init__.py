"""What a checkpoint is: its files, the record that commits it, how it is verified, and how x is exported from it.

A checkpoint is *committed* by its record, `schedule_free.json`, which is written last, in a folder that is renamed into
place as a whole. See docs/checkpoints.md.
"""

from typing import TYPE_CHECKING, Any

from hf_schedulefree.checkpoint.commit import commit_checkpoint, remove_old_checkpoints, staged_folder
from hf_schedulefree.checkpoint.files import read_header
from hf_schedulefree.checkpoint.record import RECORD_NAME, CheckpointError, CheckpointFacts, Record, read_record
from hf_schedulefree.checkpoint.streaming import CannotStream, describe_weight_files, streamed_weight_files
from hf_schedulefree.checkpoint.verify import find_committed, latest_committed, verify_checkpoint

if TYPE_CHECKING:
    from hf_schedulefree.checkpoint.export import Contents, export_averaged, inspect_weights

__all__ = [
    "RECORD_NAME",
    "CannotStream",
    "CheckpointError",
    "CheckpointFacts",
    "Contents",
    "Record",
    "commit_checkpoint",
    "describe_weight_files",
    "export_averaged",
    "find_committed",
    "inspect_weights",
    "latest_committed",
    "read_header",
    "read_record",
    "remove_old_checkpoints",
    "staged_folder",
    "streamed_weight_files",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    # The export, and all that reads foreign checkpoints, is loaded when it is asked for: no training needs it.
    if name in ("Contents", "export_averaged", "inspect_weights"):
        from hf_schedulefree.checkpoint import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
