"""Which files a process sees: nodes may share a disk, some of them seeing late what others write, or have their own."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

# Network file systems show what another machine did after so many seconds at most, by their usual options.
PATIENCE = 60.0

# A file that nobody has looked for yet is seen at once.
PATIENCE_AT_SAVES = 10.0

_GENERATORS = "rng_state_{}.pth"
_SHARDS = ("*/__{}_*.distcp", "global_step*/*zero_pp_rank_{}_*")


def written_by(process: int, folder: Path) -> list[str]:
    """The files in a checkpoint that only this process writes, in any engine."""
    patterns = [pattern.format(process) for pattern in (_GENERATORS, *_SHARDS)]
    return [path.relative_to(folder).as_posix() for pattern in patterns for path in sorted(folder.glob(pattern))]


def hold_shards(names: Iterable[str]) -> bool:
    """Whether parts of the model are among the files that a process writes."""
    return any("/" in name for name in names)


def unseen(folder: Path, names: Iterable[str], patience: float | None = None) -> list[str]:
    """Those files of a folder that this process does not see, however long it waits for them."""
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    missing = [name for name in names if not _sees(folder / name)]
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)
        missing = [name for name in missing if not _sees(folder / name)]
    return missing


def _sees(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no permission, say
        return False


def discard(folder: Path, names: Iterable[str]) -> None:
    """Remove files from a folder, and the folders that this leaves empty, up to the one that holds it."""
    paths = [folder / name for name in names]
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
    for directory in sorted({path.parent for path in paths} | {folder, folder.parent}, reverse=True):
        with contextlib.suppress(OSError):
            directory.rmdir()
