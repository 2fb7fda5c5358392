"""The compiled workers of the CPU kernels: taken from disk where they were compiled before, else compiled by numba.

Compiling takes some seconds, once per machine (and version of this package, of numba, and of the processor). What comes
out is kept as machine code, which later processes load without numba: it would take 100 MiB and a third of a second of
each of them. The files lie in a folder `workers-...` in NUMBA_CACHE_DIR, if that is set, or else beside this package in
`__pycache__`; or, where that cannot be written to, in the user's folder for caches (`~/.cache/hf_schedulefree`). Where
no code can be loaded that way (see `machine_code`), numba is asked in each process, which has a cache of its own.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hf_schedulefree.optim.kernels import machine_code
from hf_schedulefree.optim.kernels.threads import Work

logger = logging.getLogger(__name__)

_OPTIMIZERS = Path(__file__).parents[1]
_SOURCES = f"{__package__}.sources"
_NOT_FOR_COMPILING = ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS")
_PROCESSOR = (b"vendor_id", b"cpu family", b"model", b"model name", b"stepping", b"flags")
_DIGEST_SIZE = hashlib.sha256().digest_size
_READ_BY_ALL, _WRITTEN_BY_OTHERS = 0o644, 0o022


class _Loaded(NamedTuple):
    address: int


def available() -> bool:
    """Whether `worker` will work: not with a numba that is broken, switched off or not allowed to run what it makes."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0") or not machine_code.permitted():
        return False
    if machine_code.AVAILABLE and any(path.suffix == ".o" for folder in _folders() for path in _listed(folder)):
        return True
    try:
        importlib.import_module(f"{_SOURCES}.building")
    except Exception as error:  # it does not go with numpy, or refuses its settings: it may be anything
        logger.info("numba is not used: %s: %s", type(error).__name__, error)
        return False
    return True


@functools.cache
def worker(name: str, *options: str | int) -> Work:
    """A worker of the module `sources`.

    Args:
        name: module and function there, as in "step.step".
        options: what the function takes.

    Raises:
        RuntimeError: it has to be compiled, and numba does not work: see `available`, which only looks whether anything
            was compiled before.
    """
    if machine_code.AVAILABLE:
        file = "-".join((name, *map(str, options))) + ".o"
        for folder in _folders():
            with contextlib.suppress(OSError, machine_code.UnusableError):
                return _Loaded(machine_code.load(_read(folder / file)))
    try:
        building = importlib.import_module(f"{_SOURCES}.building")
    except Exception as error:
        raise RuntimeError(
            f"The kernel {name} has to be compiled by numba, which does not work here any more "
            f"({type(error).__name__}: {error}). Mend that, uninstall numba, or set NUMBA_DISABLE_JIT=1: then torch's "
            "operations are used."
        ) from error
    module, _, function = name.rpartition(".")
    source = getattr(importlib.import_module(f"{_SOURCES}.{module}"), function)(*options)
    if machine_code.AVAILABLE:
        try:
            code = building.object_code(source)
            loaded = _Loaded(machine_code.load(code))
            _keep(file, code)
            return loaded
        except machine_code.UnusableError as error:
            logger.info("%s is compiled by numba in each process: %s", name, error)
    return building.by_numba(source)


def dtype_name(tensor: Tensor) -> str:
    """As `sources` has it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def _read(path: Path) -> bytes:
    with open(path, "rb") as stream:
        status, content = os.fstat(stream.fileno()), stream.read()
    code = content[_DIGEST_SIZE:]
    if _digest(path, code) != content[:_DIGEST_SIZE]:
        raise OSError(f"{path} is damaged")
    if status.st_uid not in (os.getuid(), _OPTIMIZERS.stat().st_uid) or status.st_mode & _WRITTEN_BY_OTHERS:
        raise OSError(f"{path} may have been written by another user")
    return code


def _keep(file: str, code: bytes) -> None:
    """Write it to the first folder that takes it; a process that reads meanwhile sees all of it or nothing."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=folder)
            try:
                with open(handle, "wb") as stream:
                    os.fchmod(handle, _READ_BY_ALL)
                    stream.write(_digest(folder / file, code) + code)
                os.replace(aside, folder / file)
            except BaseException:
                Path(aside).unlink(missing_ok=True)  # it may have its name already
                raise
            return


def _digest(path: Path, code: bytes) -> bytes:
    """A checksum, also of what the code is for."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}".encode() + code).digest()


def _folders() -> Iterator[Path]:
    beside = os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parent / "__pycache__"
    for root in (beside, Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hf_schedulefree")):
        with contextlib.suppress(RuntimeError, OSError):  # no home; nothing to tell versions apart by
            yield Path(root).expanduser() / f"workers-{_fingerprint()}"


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@functools.cache
def _fingerprint() -> str:
    """Of all that the machine code depends on: the sources, what compiles them and how, and the processor."""
    parts = [path.read_bytes() for path in sorted(_OPTIMIZERS.rglob("*.py"))]
    if not parts:
        raise OSError("the sources of this package are not at hand as files")
    parts += [_version(name).encode() for name in ("numba", "llvmlite", "numpy")]
    settings = sorted(name for name in os.environ if name.startswith("NUMBA_") and name not in _NOT_FOR_COMPILING)
    parts += [f"{name}={os.environ[name]}".encode() for name in settings]
    with contextlib.suppress(FileNotFoundError):
        parts.append(Path(".numba_config.yaml").read_bytes())
    parts.append(_processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _version(name: str) -> str:
    version = None
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # found, but not installed by the usual tools
        with contextlib.suppress(ImportError):
            version = getattr(importlib.import_module(name), "__version__", None)
    if version is None:
        raise OSError(f"the version of {name} is not known")
    return version


def _processor() -> bytes:
    """Which one it is, and what it can do."""
    with open("/proc/cpuinfo", "rb") as stream:
        first, _, _ = stream.read(2**14).partition(b"\n\n")
    facts = dict(line.split(b":", 1) for line in first.splitlines() if b":" in line)
    facts = {name.strip(): value for name, value in facts.items()}
    if b"flags" not in facts:
        raise OSError("the system does not say what the processor can do")
    return b"\n".join(facts.get(name, b"") for name in _PROCESSOR)
