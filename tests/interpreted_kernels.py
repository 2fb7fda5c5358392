"""The one-pass kernel for GPUs, run on CPU by Triton's interpreter; `test_kernels_triton.py` starts this file.

In a process of its own: TRITON_INTERPRET must be set before triton is imported, and stays in force.
"""

import pytest
import torch
import triton
from cases import CASES
from packaging.version import Version
from tape import Tape
from test_kernels import (
    DIRECTIONS,
    SHAPES,
    TOLERANCE,
    by_kernel,
    numba_step,
    numbers_for,
    odd_rows,
    rows_of,
    run_and_compare,
    tensors,
)
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from hf_schedulefree.optim import AdamWScheduleFree, kernels, precision, precision_step
from hf_schedulefree.optim.kernels import one_pass_cuda, one_pass_triton, torch_ops
from hf_schedulefree.optim.kernels.numbers import DenseRow, StepNumbers
from hf_schedulefree.optim.precision import RandomKey

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def triton_step(*args):
    by_kernel(one_pass_cuda.prepare, *args)


TOLERANCE[torch.float16] = 2**-11

KEEPING = ("split", "stochastic", "full")


@pytest.fixture(autouse=True, scope="module")
def bounds_of_loops():
    """Before 3.7 the interpreter makes numbers of arrays of one element in a way that numpy 2.4 refuses."""
    with pytest.MonkeyPatch.context() as patch:
        if Version(triton.__version__) < Version("3.7"):
            usual = interpreter._patch_lang_tensor

            def patched(tensor, *rest):
                usual(tensor, *rest)
                tensor.__index__ = lambda self: self.handle.data.item()

            patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(one_pass_cuda, "CHUNK", 64)
    monkeypatch.setattr(one_pass_cuda, "BLOCK", 16)


@pytest.fixture
def on_cpu(monkeypatch):
    """Triton's kernel where numba's is otherwise taken."""
    monkeypatch.setattr(kernels, "one_pass_kernel", lambda device_type: one_pass_cuda.prepare)
    monkeypatch.setitem(kernels._ONE_PASS_DTYPES, "cpu", kernels._ONE_PASS_DTYPES["cuda"])


def equal(a, b):
    """Same bits; a NaN is any NaN."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(whole) == b.view(whole)) | ((a != a) & (b != b))).all())


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert all(equal(x, y) for x, y in zip(a, b, strict=True))


def v_of(groups, numbers):
    return groups[2] if numbers.direction.beta2 is not None else []


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_one_step(kind, weight_decay, dtype):
    run_and_compare(triton_step, *tensors(SHAPES, dtype), numbers_for(kind, weight_decay))


@pytest.mark.parametrize("changes", [{"c": 1.0}, {"c": 0.0}, {"lr": 0.0}, {"beta": 0.98}, {"beta": 0.3}], ids=str)
def test_one_step_at_the_ends_of_the_ranges(changes):
    run_and_compare(triton_step, *tensors(SHAPES, torch.float32), numbers_for("adam", 0.1, **changes))


# Around a block and a chunk of `small_chunks`; odd, empty, and of several chunks.
SIZES = [0, 1, 15, 16, 17, 63, 64, 65, 0, 80, 128, 129, 300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_the_bits_are_those_of_the_step_on_cpu(kind, dtype, small_chunks):
    numbers = numbers_for(kind, 0.1)
    ours, numba = (tensors([(size,) for size in SIZES], dtype) for _ in range(2))
    triton_step(*ours[:2], v_of(ours, numbers), ours[3], numbers)
    numba_step(*numba[:2], v_of(numba, numbers), numba[3], numbers)
    assert_equal(ours, numba)


def test_hundreds_of_tensors():
    numbers = numbers_for("adam", 0.1)
    ours, numba = (tensors([(1 + i % 7,) for i in range(257)], torch.float32) for _ in range(2))
    triton_step(*ours, numbers)
    numba_step(*numba, numbers)
    assert_equal(ours, numba)


def test_addresses_that_are_no_multiples_of_16(small_chunks):
    numbers = numbers_for("adam", 0.1)
    ours, numba = (tensors([(205,), (77,), (130,)], torch.float32) for _ in range(2))
    for groups in (ours, numba):
        for column, start in enumerate((0, 1, 2, 3)):
            groups[column][0] = groups[column][0][start : start + 200]
        groups[0][1], groups[1][1], groups[2][1], groups[3][1] = (group[1][3:76] for group in groups)
    triton_step(*ours, numbers)
    numba_step(*numba, numbers)
    assert_equal(ours, numba)


def half_rows(dtype, state_precision, sizes=SIZES, seed=-3):
    generator = torch.Generator().manual_seed(1)
    storage = precision.storage_for(dtype, state_precision)
    for number, size in enumerate(sizes):
        y, z, g = (torch.randn(size, generator=generator) for _ in range(3))
        if size > 100:
            y[:7] = torch.tensor([float("nan"), float("inf"), 3.4028235e38, -0.0, 1e-40, -6e-6, 65519.0])
        p, low = precision.split(y, dtype)
        if size > 100:  # somebody has written these, and the low bits are those of other values
            p[7:12] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0])
            low[7:12] = -9
        state = {"z": z.to(storage.z), "exp_avg_sq": torch.rand(size, generator=generator).to(storage.moments)}
        if storage.low_bits:
            state["y_low"] = low
        yield precision_step.HalfRow(p, (g * 0.1).to(dtype), state, storage, RandomKey(seed, number))


def kept(rows):
    return [[row.p, *row.state.values()] for row in rows]


@pytest.mark.parametrize(("state_precision", "seed"), [("split", -3), ("stochastic", 2**70 + 11), ("full", 0)])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_the_bits_of_half_precision_are_those_of_the_step_on_cpu(
    kind, state_precision, seed, small_chunks, monkeypatch
):
    numbers = numbers_for(kind, 0.1)
    numba, ours, before = (list(half_rows(torch.bfloat16, state_precision, seed=seed)) for _ in range(3))
    precision_step.step_(numba, numbers)
    monkeypatch.setattr(kernels, "one_pass_kernel", lambda device_type: one_pass_cuda.prepare)
    precision_step.step_(ours, numbers)
    assert_equal(kept(ours), kept(numba))
    assert not all(equal(a.p, b.p) for a, b in zip(ours, before, strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("state_precision", KEEPING)
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_float16_is_that_of_torchs_operations(kind, state_precision, on_cpu):
    numbers = numbers_for(kind, 0.1)
    ours, by_torch = (list(half_rows(torch.float16, state_precision, sizes=[20_011, 5])) for _ in range(2))
    precision_step.step_(ours, numbers)
    precision_step.step_(by_torch, numbers, "for-loop")
    for a, b in zip(ours, by_torch, strict=True):
        pairs = {name: (a.state[name], b.state[name]) for name in ("z", "exp_avg_sq")}
        pairs["y"] = (precision.wide(a.p, a.state), precision.wide(b.p, b.state))
        for name, (x, y) in pairs.items():
            rough = x.dtype != torch.float32 or (name == "y" and state_precision == "stochastic")
            # a difference in the last place of float32 rarely crosses a boundary of half precision
            assert not rough or (x != y).sum() - x.isnan().sum() <= 1e-3 * x.numel() + 1
            bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype if rough and name != "y" else torch.float16]
            bound = bound if rough else 1e-6
            torch.testing.assert_close(x, y, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [0, 2**31 - 20, 2**32 - 100, 5 * 2**32 - 1, 2**40 + 7])
def test_random_bits_follow_the_global_index(first, dtype, small_chunks):
    (row,) = half_rows(dtype, "split", sizes=[300])
    wanted = row.state["z"].float() - torch.tensor(0.01) * row.grad.float()
    bits = precision.random_bits(
        precision.rounding_key(row.key.seed, 5, row.key.parameter), torch.arange(first, first + 300)
    )
    wanted = precision.round_stochastically(wanted, dtype, precision.bits_for("z", bits))
    dense = DenseRow(row.p, row.state["y_low"], row.state["z"], None, first, row.key)
    one_pass_cuda.prepare([dense])([[row.grad.data_ptr()]], numbers_for("sgd", k=5))
    assert torch.equal(row.state["z"][12:], wanted[12:])  # some of the first values are no numbers


def test_tensors_of_every_layout_and_dtype_together(on_cpu):
    numbers = numbers_for("adam", 0.1)
    for dtype in TOLERANCE:
        odd = odd_rows(dtype) if dtype in (torch.float32, torch.float64) else []
        for row in [*odd, *rows_of(tensors(SHAPES, dtype))]:
            run_and_compare(
                lambda y, z, v, g, n: kernels.step_(list(zip(y, z, v, g, strict=True)), n),
                *([tensor] for tensor in row),
                numbers,
            )


@pytest.fixture
def launches(monkeypatch):
    """The grid of each launch; nothing runs."""
    made = []

    class Recorder:
        def __getitem__(self, grid):
            made.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(one_pass_triton, "step", Recorder())
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_tensors_of_a_dtype_are_one_launch(dtype, on_cpu, launches):
    params = [torch.nn.Parameter(torch.ones(1 + i % 5, dtype=dtype)) for i in range(150)]
    optimizer = AdamWScheduleFree(params, lr=0.1)
    optimizer.train()
    for step in range(1, 3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert launches == [(150,)] * step


def test_nothing_is_launched_for_nothing(launches):
    triton_step(*tensors([(0,), (2, 0)], torch.float32), numbers_for("adam"))
    assert not launches


def test_autograd_notices_the_step(on_cpu):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamWScheduleFree([p], lr=0.1)
    optimizer.train()
    loss = (p * p).sum()
    p.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


RUNS = [
    *((kind, setting, torch.float32) for kind, case in CASES.items() for setting in case.settings),
    *(("adamw", "everything", torch.bfloat16), ("sgd", "everything", torch.bfloat16)),
    *(("radam", setting, torch.bfloat16) for setting in ("decay", "sgd-phase")),
]


@pytest.mark.parametrize(("kind", "setting", "dtype"), RUNS, ids=str)
def test_a_run_has_the_bits_of_a_run_on_cpu(kind, setting, dtype, monkeypatch):
    found = []
    monkeypatch.setattr(torch_ops, "foreach_", None)  # neither falls back
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(kernels, "one_pass_kernel", lambda device_type: one_pass_cuda.prepare)
        shapes = [(7, 5), ()]
        params = [torch.nn.Parameter(t) for t in tensors(shapes, dtype)[0]]
        optimizer = CASES[kind].ours(params, **CASES[kind].options(setting))
        optimizer.train()
        for step in range(7):
            for p, g in zip(params, tensors(shapes, dtype, seed=step)[3], strict=True):
                p.grad = g
            optimizer.step()
        found.append([[p, *optimizer.state[p].values()] for p in params])
    assert_equal(*found)


def test_no_gpu_is_read_by_the_interpreter():
    assert not one_pass_cuda.runs()


@pytest.mark.parametrize(("kind", "setting", "dtype"), [*RUNS[4::5], *RUNS[-4:]], ids=str)
def test_a_captured_launch_makes_the_next_steps(kind, setting, dtype, on_cpu, monkeypatch):
    """On a tape, as in a CUDA graph: at a replay the kernel reads what the operations before it have counted."""
    monkeypatch.setattr(StepNumbers, "on", lambda self, device: self)  # tensors, as on a GPU
    shapes = [(5,), ()]

    def gradients(params, seed):
        for p, g in zip(params, tensors(shapes, dtype, seed=seed)[3], strict=True):
            p.grad = g if p.grad is None else p.grad.copy_(g)

    found = []
    for captured in (True, False):
        params = [torch.nn.Parameter(t) for t in tensors(shapes, dtype)[0]]
        optimizer = CASES[kind].ours(params, **CASES[kind].options(setting), capturable=True)
        optimizer.train()
        for step in range(2 if captured else 8):
            gradients(params, step)
            optimizer.step()
        if captured:
            gradients(params, 2)
            with Tape() as tape, monkeypatch.context() as context:
                context.setattr(one_pass_triton, "step", recorded(tape, one_pass_triton.step))
                optimizer.step()
            for step in range(3, 8):
                gradients(params, step)
                tape.replay()
        assert optimizer.param_groups[0]["k"] == 8
        found.append([[p, *optimizer.state[p].values()] for p in params])
    assert_equal(*found)


def recorded(tape, kernel):
    """The kernel, each of whose launches is one operation on the tape."""

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, **options):
                with _disable_current_modes():
                    kernel[grid](*args, **options)
                tape.record(kernel[grid], args, options)

            return launch

    return Kernel()
