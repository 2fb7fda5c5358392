"""Machine code from an object in memory: runs as compiled, and what is of another kind is refused."""

import ctypes

import pytest

from hf_schedulefree.optim.kernels import machine_code
from hf_schedulefree.optim.kernels.machine_code import UnusableError, load

llvm = pytest.importorskip("llvmlite.binding", reason="needs numba's compiler (the extra `fast`)")
pytestmark = [
    pytest.mark.skipif(not machine_code.AVAILABLE, reason="Linux on x86-64 only"),
    # Without types of pointers, as the code below has it; objects are made from numba 0.62 on.
    pytest.mark.skipif(llvm.llvm_version_info < (16, 0, 0), reason="needs LLVM 16"),
]

ADD_CONSTANTS = """
@numbers = internal constant [3 x i64] [i64 40, i64 400, i64 4000]
@other = internal constant [2 x double] [double 0.5, double 2.5]
define void @first(i64 %job) { ret void }
define void @work(i64 %job) {
  %place = inttoptr i64 %job to ptr
  %index = load i64, ptr %place
  %from = getelementptr [3 x i64], ptr @numbers, i64 0, i64 %index
  %number = load i64, ptr %from
  %half = load double, ptr @other
  %whole = fptosi double %half to i64
  %sum = add i64 %number, 2
  %all = add i64 %sum, %whole
  store i64 %all, ptr %place
  ret void
}
"""
COPIES = """
declare ptr @memcpy(ptr, ptr, i64)
define void @work(i64 %job) {
  %from = inttoptr i64 %job to ptr
  %into = getelementptr i64, ptr %from, i64 1
  %done = call ptr @memcpy(ptr %into, ptr %from, i64 8)
  ret void
}
"""
CALLS = "declare void @puts(ptr)\ndefine void @work(i64 %job) { call void @puts(ptr null)\n ret void }"
COUNTS = """
@calls = internal global i64 7
define void @work(i64 %job) {
  %so_far = load i64, ptr @calls
  %more = add i64 %so_far, 1
  store i64 %more, ptr @calls
  ret void
}
"""
SHARES = COUNTS.replace("internal global i64 7", "common global i64 0")


def compiled(source: str, model: str = "large", reloc: str = "static", triple: str | None = None) -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(triple or llvm.get_process_triple())
    return target.create_target_machine(opt=0, reloc=reloc, codemodel=model).emit_object(llvm.parse_assembly(source))


def run(code: bytes, *values: int) -> list[int]:
    memory = (ctypes.c_int64 * len(values))(*values)
    ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(load(code))(ctypes.addressof(memory))
    return list(memory)


def test_code_and_its_constants_run():
    assert [run(compiled(ADD_CONSTANTS), index) for index in range(3)] == [[42], [402], [4002]]


def test_copies_go_through_the_c_library():
    assert run(compiled(COPIES), 5, 6) == [5, 5]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param(lambda: compiled(CALLS), "'puts'", id="function of others"),
        pytest.param(lambda: compiled(COUNTS), "variables", id="variable"),
        pytest.param(lambda: compiled(SHARES), "'calls'|variables", id="common variable"),
        pytest.param(lambda: compiled(COPIES, "small", "pic"), "relocation of kind", id="near addresses"),
        pytest.param(lambda: compiled(ADD_CONSTANTS.replace("@work", "@other_name")), "'work'", id="no entry"),
        pytest.param(lambda: b"", "too short", id="empty"),
        pytest.param(lambda: b"\0" * 1000, "not a relocatable", id="zeros"),
    ],
)
def test_what_is_of_another_kind_is_refused(code, reason):
    with pytest.raises(UnusableError, match=reason):
        load(code())


def test_no_part_of_an_object_is_taken_for_the_whole():
    code = compiled(ADD_CONSTANTS)
    for length in range(len(code)):
        with pytest.raises(UnusableError):
            load(code[:length])


def test_another_machine_is_refused(monkeypatch):
    code = compiled(ADD_CONSTANTS)
    changed = bytearray(code)
    changed[18] = 183  # aarch64
    with pytest.raises(UnusableError, match="x86-64"):
        load(bytes(changed))
    monkeypatch.setattr(machine_code, "AVAILABLE", False)
    with pytest.raises(UnusableError, match="no code can be loaded"):
        load(code)
