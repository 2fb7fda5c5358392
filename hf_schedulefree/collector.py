"""Python's garbage collector while the package is imported."""

import contextlib
import gc
from collections.abc import Iterator

# How many more objects there must be than at the last time before the newest are looked through (Python: 700).
_NEWEST = 10_000
_NEVER = 2**30


@contextlib.contextmanager
def full_collections_postponed() -> Iterator[None]:
    """Within, only objects that were made lately are looked through for garbage; afterwards all is as before.

    torch and transformers make a million objects when they are imported, of which next to none is garbage, and Python
    would look through all of them seven times: a sixth of the time that the import takes.
    """
    newest, middle, full = gc.get_threshold()
    gc.set_threshold(newest and max(newest, _NEWEST), middle, _NEVER)  # 0: the user switched the collector off
    try:
        yield
    finally:
        gc.set_threshold(newest, middle, full)
