"""The one-pass kernel for GPUs, on CPU: its arithmetic by Triton's interpreter, its machine code by a look at it."""

import collections
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("numba") is None,
    reason="needs triton (Linux only) and numba",
)

HERE = Path(__file__).parent


def test_in_the_interpreter():
    """The tests of `interpreted_kernels.py`, in a process of their own."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            str(HERE / "interpreted_kernels.py"),
        ],
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout) and "skipped" not in result.stdout


# Dtypes of parameter, z, v and arithmetic; low bits, stochastic, has v; 16-byte vectors, their loads and stores.
VARIANTS = {
    "float32": ("fp32", "fp32", "fp32", "fp32", False, False, True, "v4.b32", 8, 6),
    "float32, SGD": ("fp32", "fp32", "fp32", "fp32", False, False, False, "v4.b32", 6, 4),
    "float64": ("fp64", "fp64", "fp64", "fp64", False, False, True, "v2.b64", 16, 12),
    "bfloat16, parameter": ("bf16", "bf16", "bf16", "fp32", False, False, True, "v4.b32", 4, 3),
    "bfloat16, split": ("bf16", "bf16", "bf16", "fp32", True, True, True, "v4.b32", 5, 4),
    "bfloat16, stochastic": ("bf16", "bf16", "bf16", "fp32", False, True, True, "v4.b32", 4, 3),
    "float16, split": ("fp16", "fp16", "bf16", "fp32", True, True, True, "v4.b32", 5, 4),
}


def compiled(variant, capability):
    """PTX for one block of 1024 elements by 4 warps; needs no GPU."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_schedulefree.optim.kernels import one_pass_cuda, one_pass_triton

    dtypes = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
    values = [dtypes.get(value, value) for value in VARIANTS[variant][:7]]
    constants = dict(zip(("P", "Z", "V", "REAL", "LOW_BITS", "STOCHASTIC", "HAS_V"), values, strict=True))
    constants |= {"PART": one_pass_cuda.CHUNK, "STEP": one_pass_cuda.BLOCK}
    source = ASTSource(
        fn=one_pass_triton.step,
        signature={"table": "*i64", "numbers": "*fp64", **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    options = {"num_warps": one_pass_cuda.WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_machine_code(variant, capability):
    """Moves 16 bytes at a time, rounds every operation, flushes no small number to zero."""
    *_, has_v, vector, loads, stores = VARIANTS[variant]
    ptx = compiled(variant, capability)
    accesses = collections.Counter(re.findall(r"\b(?:ld|st)\.global[.\w]*", ptx))
    assert accesses[f"ld.global.{vector}"] == loads and accesses[f"st.global.{vector}"] == stores
    assert not re.search(r"\bfma\.|\.ftz|\.approx|\bdiv\.full|\.local", ptx)
    assert bool(re.search(r"\bsqrt\.rn\.f", ptx)) == bool(re.search(r"\bdiv\.rn\.f", ptx)) == has_v
