"""Machine code that was compiled earlier, put into memory and ready to be called: Linux on x86-64.

What is taken is a relocatable object (ELF, 64 bits) with one function `work` and nothing that is not in it, but for the
C library's ways to copy memory. That is little enough to be placed without a linker, and without numba and LLVM, which
take 100 MiB and a third of a second of each process.
"""

import ctypes
import mmap
import platform
import struct
import sys

AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"

# The function that an object is made for.
ENTRY = "work"

# What compilers write for a loop that only copies.
_FROM_C_LIBRARY = ("memcpy", "memmove", "memset")

# Of the ELF format (System V ABI, and its supplement for x86-64).
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_MAGIC = b"\x7fELF\x02\x01\x01"
_RELOCATABLE, _X86_64 = 1, 62
_CONTENT, _SYMBOLS, _RELOCATIONS, _EMPTY = 1, 2, 4, 8
_WRITABLE, _IN_MEMORY = 1, 2
_UNDEFINED = 0
_ABSOLUTE_64 = 1
_UNWINDING = ".eh_frame"  # for debuggers only, as nothing here raises

# Code that is in use: it stays where it is as long as the process lives.
_mapped: list[mmap.mmap] = []


class UnusableError(ValueError):
    """The object is not of the kind that can be loaded here; the message says why."""


def load(code: bytes) -> int:
    """The address of an object's function `work`, ready to be called.

    Args:
        code: the object file.

    Raises:
        UnusableError: it is of another kind, refers to what is not in it, or memory must not be executed here.
    """
    if not AVAILABLE:
        raise UnusableError(f"no code can be loaded on {sys.platform}, {platform.machine()}")
    try:
        return _Object(code).place()
    except UnusableError:
        raise
    except (struct.error, IndexError, ValueError) as error:
        raise UnusableError(f"the object is damaged: {error}") from error


def permitted() -> bool:
    """Whether memory that was written to may be executed; True where that is not known."""
    return not AVAILABLE or _made_executable(mmap.mmap(-1, 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _made_executable(memory: mmap.mmap) -> bool:
    base = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    return not ctypes.CDLL(None).mprotect(base, ctypes.c_size_t(len(memory)), mmap.PROT_READ | mmap.PROT_EXEC)


class _Object:
    """A relocatable object: its sections, where each will lie, and its symbols."""

    def __init__(self, code: bytes):
        self._code = code
        if len(code) < _HEADER.size:
            raise UnusableError("the object is too short")
        magic, kind, machine, _, _, _, at, _, _, _, _, size, count, names = _HEADER.unpack_from(code)
        if not magic.startswith(_MAGIC) or (kind, machine, size) != (_RELOCATABLE, _X86_64, _SECTION.size):
            raise UnusableError("not a relocatable object for x86-64")
        self._sections = [_SECTION.unpack_from(code, at + size * i) for i in range(count)]
        self._names = self._sections[names]
        self._offsets: dict[int, int] = {}
        self._size = 0
        for index, (name, kind, flags, _, _, length, _, _, alignment, _) in enumerate(self._sections):
            if not flags & _IN_MEMORY or self._text(self._names, name) == _UNWINDING:
                continue
            if flags & _WRITABLE or kind not in (_CONTENT, _EMPTY):
                raise UnusableError("the object has variables of its own")
            start = -(-self._size // max(alignment, 1)) * max(alignment, 1)
            self._offsets[index], self._size = start, start + length

    def place(self) -> int:
        """Copy it into memory that can be executed, with all addresses filled in."""
        memory = mmap.mmap(-1, max(self._size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for index, start in self._offsets.items():
            _, kind, _, _, at, length, *_ = self._sections[index]
            if kind == _CONTENT:
                memory[start : start + length] = self._code[at : at + length]
        for section in self._sections:
            _, kind, _, _, at, length, symbols, target, *_ = section
            if kind == _RELOCATIONS and target in self._offsets:
                for place, info, addend in _RELOCATION.iter_unpack(self._code[at : at + length]):
                    if info & 0xFFFFFFFF != _ABSOLUTE_64:
                        raise UnusableError(f"relocation of kind {info & 0xFFFFFFFF}")
                    value = self._address(self._symbol(self._sections[symbols], info >> 32), base) + addend
                    struct.pack_into("<Q", memory, self._offsets[target] + place, value % 2**64)
        entry = self._entry(base)
        if not _made_executable(memory):
            raise UnusableError("this system does not let memory be executed")
        _mapped.append(memory)
        return entry

    def _entry(self, base: int) -> int:
        for section in self._sections:
            if section[1] == _SYMBOLS:
                for index in range(section[5] // _SYMBOL.size):
                    symbol = self._symbol(section, index)
                    if symbol[0] == ENTRY and symbol[1] in self._offsets:
                        return self._address(symbol, base)
        raise UnusableError(f"the object has no function {ENTRY!r}")

    def _symbol(self, table: tuple[int, ...], index: int) -> tuple[str, int, int]:
        """Name, section, offset there."""
        name, _, _, section, value, _ = _SYMBOL.unpack_from(self._code, table[4] + _SYMBOL.size * index)
        return self._text(self._sections[table[6]], name), section, value

    def _address(self, symbol: tuple[str, int, int], base: int) -> int:
        name, section, value = symbol
        if section == _UNDEFINED and name in _FROM_C_LIBRARY:
            return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
        if section not in self._offsets:
            raise UnusableError(f"the object refers to {name!r}, which is not in it")
        return base + self._offsets[section] + value

    def _text(self, table: tuple[int, ...], at: int) -> str:
        start = table[4] + at
        return self._code[start : self._code.index(b"\0", start)].decode()
