"""Compiled workers: compiled once per machine, then loaded without numba, and never from a file that is not right."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from hf_schedulefree.optim import AdamWScheduleFree, SGDScheduleFree, averaging
from hf_schedulefree.optim.kernels import jobs, machine_code, workers
from hf_schedulefree.optim.kernels.one_pass_cpu import COLLECT, NORMALIZE, PLAIN

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba (the extra `fast`)"),
    pytest.mark.skipif(not machine_code.AVAILABLE, reason="Linux on x86-64 only"),
]

KINDS = (PLAIN, COLLECT, NORMALIZE)
EITHER = (False, True)
ALL = [
    *(("step.step", dtype, kind) for dtype in ("float32", "float64") for kind in KINDS),
    *(("switch.write", dtype, compares, False, False) for dtype in ("float32", "float64") for compares in EITHER),
    *(("switch.write", "bfloat16", a, b, c) for a in EITHER for b in EITHER for c in EITHER),
    *(("residual.park", dtype, past_caches) for dtype in ("float32", "float64") for past_caches in EITHER),
    *(("residual.restore", dtype, compares) for dtype in ("float32", "float64") for compares in EITHER),
    *(("half_step.step", a, b, c, kind) for a in EITHER for b in EITHER for c in EITHER for kind in KINDS),
]
# Compiling these takes seconds for each.
SHORT = [
    case for case in ALL if case[0] != "half_step.step" or case in {("half_step.step", True, False, True, NORMALIZE)}
]


def steps(folder: Path, **environment: str) -> list[str]:
    """The sum of the weights after some steps in a process of its own, and whether it loaded numba."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", **environment}
    code = "import sys; from test_workers import steps_here; print(steps_here(), 'numba' in sys.modules)"
    command = [sys.executable, "-c", code]
    here = Path(__file__).parent
    return subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder for the workers of this test, and none kept from earlier ones."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    workers.worker.cache_clear()
    yield tmp_path
    workers.worker.cache_clear()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def steps_here() -> str:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40_001))
    optimizer = AdamWScheduleFree([p], lr=0.01, implementation="fused", park="residual")
    optimizer.train()
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.eval()
    optimizer.train()
    return p.double().sum().item().hex()


def test_a_second_process_does_without_numba(tmp_path):
    first, second = steps(tmp_path), steps(tmp_path)
    assert (first[1], second[1]) == ("True", "False")
    assert first[0] == second[0] == steps_here()
    assert {path.suffix for path in files(tmp_path)} == {".o"}
    assert steps(tmp_path, NUMBA_OPT="2")[1] == "True"  # compiled in another way, and kept beside the others
    assert len({path.parent for path in files(tmp_path)}) == 2


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in SHORT else pytest.mark.slow) for case in ALL])
def test_every_worker_is_one_that_can_be_loaded(case):
    assert isinstance(workers.worker(*case), workers._Loaded)


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("harm", [damaged, empty, cut])
def test_a_damaged_file_is_not_loaded_but_made_anew(folder, harm):
    before = steps_here()
    there = files(folder)
    for path in there:
        assert workers._read(path)
        harm(path)
        with pytest.raises(OSError, match="damaged"):
            workers._read(path)
    workers.worker.cache_clear()
    assert steps_here() == before
    assert files(folder) == there and all(workers._read(path) for path in there)


def test_each_choice_is_a_file_of_its_own(folder):
    for choice in (("float32", PLAIN), ("float32", NORMALIZE), ("float64", PLAIN)):
        workers.worker("step.step", *choice)
    assert [path.name for path in files(folder)] == [
        f"step.step-{choice}.o" for choice in ("float32-0", "float32-2", "float64-0")
    ]


def test_code_that_another_user_may_have_written_is_not_run(folder, monkeypatch):
    steps_here()
    path = files(folder)[0]
    assert workers._read(path) and path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o664)
    with pytest.raises(OSError, match="another user"):
        workers._read(path)
    path.chmod(0o644)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert workers._read(path)  # of the owner of the package
    monkeypatch.setattr(Path, "stat", lambda self: os.stat_result((0, 0, 0, 0, 12345, 0, 0, 0, 0, 0)))
    with pytest.raises(OSError, match="another user"):
        workers._read(path)


def test_a_file_counts_under_its_own_name_only(folder):
    steps_here()
    path = files(folder)[0]
    other_name = path.rename(path.with_name("step.step-float64-1.o"))
    with pytest.raises(OSError, match="damaged"):
        workers._read(other_name)
    other_folder = folder / "workers-of-another-processor"
    other_folder.mkdir()
    with pytest.raises(OSError, match="damaged"):
        workers._read(other_name.rename(other_folder / path.name))


def test_the_steps_go_on_where_nothing_can_be_written(folder, monkeypatch):
    expected = steps_here()
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere/else")
    workers.worker.cache_clear()
    assert steps_here() == expected


def test_a_package_that_cannot_be_written_to_keeps_them_in_the_user_s_folder(folder, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(workers, "__file__", "/proc/nowhere/workers.py")
    expected = steps_here()
    assert {path.parents[1] for path in files(folder)} == {folder / "hf_schedulefree"}
    workers.worker.cache_clear()
    for name in [name for name in sys.modules if name.startswith(workers._SOURCES)]:
        monkeypatch.setitem(sys.modules, name, None)
    assert steps_here() == expected


def test_numba_is_asked_where_no_code_can_be_loaded(folder, monkeypatch):
    expected = steps_here()
    before = files(folder)
    workers.worker.cache_clear()
    monkeypatch.setattr(machine_code, "AVAILABLE", False)
    assert steps_here() == expected
    assert not isinstance(workers.worker("step.step", "float32", NORMALIZE), workers._Loaded)
    assert [path for path in files(folder) if path.suffix == ".o"] == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("llvm_version_info", (15, 0, 7)), ("create_new_module_pass_manager", lambda: None)],
)
def test_numba_is_asked_where_its_compiler_is_another_one(folder, monkeypatch, caplog, name, value):
    from hf_schedulefree.optim.kernels.sources import building

    expected = steps_here()
    workers.worker.cache_clear()
    monkeypatch.setattr(workers, "_keep", lambda file, code: pytest.fail("kept"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "other"))
    monkeypatch.setattr(building.llvm, name, value)
    with caplog.at_level("INFO"):
        assert steps_here() == expected
    assert "by numba in each process" in caplog.text


def test_code_that_may_raise_is_left_to_numba(folder):
    from hf_schedulefree.optim.kernels.sources import building, elements

    def raises(job):
        if elements.count(job, 1) > 5:
            raise ValueError

    with pytest.raises(machine_code.UnusableError, match="may raise"):
        building.object_code(raises)
    assert building.by_numba(raises).address


def test_the_fingerprint_is_of_all_that_the_code_depends_on(monkeypatch, tmp_path):
    def fingerprint() -> str:
        workers._fingerprint.cache_clear()
        return workers._fingerprint()

    monkeypatch.setenv("NUMBA_CACHE_DIR", "/elsewhere")
    seen = [fingerprint()]
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/elsewhere/else")
    assert fingerprint() == seen[0]
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    seen.append(fingerprint())
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".numba_config.yaml").write_text("cpu_name: nehalem")
    seen.append(fingerprint())
    monkeypatch.setattr(workers, "_processor", lambda: b"another one")
    seen.append(fingerprint())
    monkeypatch.setattr(workers, "_version", lambda name: "0.0")
    seen.append(fingerprint())
    monkeypatch.setattr(workers, "_OPTIMIZERS", Path(jobs.__file__).parent)
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    monkeypatch.setattr(workers, "_OPTIMIZERS", Path(sysconfig.get_paths()["scripts"]) / "nothing")
    with pytest.raises(OSError, match="not at hand"):
        fingerprint()
    workers._fingerprint.cache_clear()


def test_the_processor_is_told_by_what_it_can_do(monkeypatch, tmp_path):
    assert b"sse2" in workers._processor()
    unknown = tmp_path / "cpuinfo"
    unknown.write_bytes(b"processor\t: 0\nFeatures\t: fp asimd\n\n")
    monkeypatch.setattr("builtins.open", lambda *args, given=open: given(unknown, "rb"))
    with pytest.raises(OSError, match="does not say"):
        workers._processor()


def no_version(patch):
    patch.setattr(workers.importlib.metadata, "version", lambda name: None)


def no_metadata_and_no_number(patch):
    def version(name):
        raise workers.importlib.metadata.PackageNotFoundError

    patch.setattr(workers.importlib.metadata, "version", version)
    patch.setattr("llvmlite.__version__", None)


@pytest.mark.parametrize("harm", [no_version, no_metadata_and_no_number])
def test_without_known_versions_nothing_is_kept(folder, monkeypatch, harm):
    expected = steps_here()
    before = files(folder)
    workers._fingerprint.cache_clear()
    workers.worker.cache_clear()
    try:
        harm(monkeypatch)
        assert list(workers._folders()) == []
        assert workers.available()  # `sources` are imported
        assert steps_here() == expected
    finally:
        workers._fingerprint.cache_clear()
    assert files(folder) == before


def test_what_cannot_work_is_not_available(folder, monkeypatch):
    assert workers.available()
    with monkeypatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        assert not workers.available()
    with monkeypatch.context() as patch:
        patch.setattr(machine_code, "_made_executable", lambda memory: False)
        assert not workers.available()
    for error in (ImportError, AttributeError, OSError):  # as broken installations have it

        def broken(name, error=error):
            raise error(name)

        with monkeypatch.context() as patch:
            patch.setattr(workers.importlib, "import_module", broken)
            assert not workers.available()
    steps_here()  # keeps some
    monkeypatch.setitem(sys.modules, f"{workers._SOURCES}.building", None)
    assert workers.available()


@pytest.mark.parametrize("park", ["residual", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_thread_that_flushes_subnormal_numbers_computes_as_others_do(dtype, park, caplog):
    """torch's setting is that of one thread, and which thread works on which numbers is chance."""
    smallest = torch.finfo(dtype).smallest_normal
    start = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * smallest / 8
    ends = []
    for flush in (False, True):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = SGDScheduleFree([p], lr=0.5, implementation="fused", park=park)
        optimizer.train()
        for step in range(3):
            p.grad = start.roll(step).to(dtype)
            torch.set_flush_denormal(flush and step == 1)
            optimizer.step()
            torch.set_flush_denormal(False)
        y = p.detach().clone()
        optimizer.eval()
        x = p.detach().clone()
        torch.set_flush_denormal(flush)
        try:
            replaced = optimizer.weights_replaced()
            optimizer.train()
        finally:
            torch.set_flush_denormal(False)
        assert not replaced and averaging.same_bits(p.detach(), y)
        ends.append((y, x))
    assert all(map(averaging.same_bits, *ends))
    assert not torch.equal(*ends[0]) and "starts anew" not in caplog.text
