"""Compiling a worker by numba, and taking its machine code."""

from collections.abc import Callable

import llvmlite.binding as llvm
from numba import cfunc, types
from numba.core.registry import cpu_target

from hf_schedulefree.optim.kernels.machine_code import ENTRY, UnusableError
from hf_schedulefree.optim.kernels.threads import Work

_SIGNATURE = types.void(types.int64)
_OPTIONS = {"nopython": True, "error_model": "numpy"}

# The first one whose modules are written as `_ENTRY` is: pointers have no types.
_LLVM = (16, 0, 0)

# numba's functions return a status; it is 0 here, as nothing raises (`object_code` makes sure).
# Threads may differ in whether they take subnormal numbers for zeros (`torch.set_flush_denormal` changes one of them),
# and which of them works on which numbers is chance: within, all compute as IEEE 754 says (0x1F80, the usual MXCSR).
_ENTRY = """
target triple = "{triple}"
target datalayout = "{layout}"
declare i32 @"{name}"(ptr, ptr, i64)
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define void @{entry}(i64 %job) {{
  %result = alloca ptr
  %error = alloca ptr
  %former = alloca i32
  %usual = alloca i32
  store i32 8064, ptr %usual
  call void @llvm.x86.sse.stmxcsr(ptr %former)
  call void @llvm.x86.sse.ldmxcsr(ptr %usual)
  %status = call i32 @"{name}"(ptr %result, ptr %error, i64 %job)
  call void @llvm.x86.sse.ldmxcsr(ptr %former)
  ret void
}}
"""


def by_numba(function: Callable[[int], None]) -> Work:
    """A worker that needs numba in each process; it keeps its compilation on disk where that can be written to."""
    try:
        return cfunc(_SIGNATURE, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder to write the cache to: compiled anew in each process
        return cfunc(_SIGNATURE, **_OPTIONS)(function)


def object_code(function: Callable[[int], None]) -> bytes:
    """A worker as an object that `machine_code` loads.

    Raises:
        UnusableError: numba has made something else than a function that cannot fail, or its version is too old (before
            0.62) or too new for what is asked of its compiler here.
    """
    if llvm.llvm_version_info < _LLVM:
        raise UnusableError(f"LLVM {llvm.llvm_version_info} is older than {_LLVM}")
    compiled = cfunc(_SIGNATURE, **_OPTIONS)(function)
    try:
        return _stand_alone(compiled.inspect_llvm(), compiled.native_name.removeprefix("cfunc."))
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UnusableError(f"this version of llvmlite: {error}") from error


def _stand_alone(source: str, inner: str) -> bytes:
    """An object with the function `inner` of a module, called by its `ENTRY`, and nothing else."""
    module = llvm.parse_assembly(source)
    bodies = [str(defined) for defined in module.functions if defined.name == inner]
    if len(bodies) != 1 or any(line.split() != ["ret", "i32", "0"] for line in _returns(bodies[0])):
        raise UnusableError("the compiled function may raise, or has another name")
    entry = _ENTRY.format(triple=module.triple, layout=module.data_layout, name=inner, entry=ENTRY)
    module.link_in(llvm.parse_assembly(entry))
    for defined in (*module.functions, *module.global_variables):
        if not defined.is_declaration and defined.name != ENTRY:
            defined.linkage = "internal"
    _, processor, features = cpu_target.target_context.codegen().magic_tuple()
    target = llvm.Target.from_triple(module.triple).create_target_machine(
        cpu=processor, features=features, opt=3, reloc="static", codemodel="large"
    )
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()  # numba's wrapper for calls from Python, and what it refers to
    passes.run(module, llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options()))
    return target.emit_object(module)


def _returns(body: str) -> list[str]:
    return [line for line in body.splitlines() if line.split()[:1] == ["ret"]]
