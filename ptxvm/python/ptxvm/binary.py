"""Inspection of ELF files: decides whether a program can load the machine at all."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

RUNTIME = "libcudart.so"
_DYNAMIC, _INTERPRETER = 2, 3  # kinds of program headers
_NEEDED, _STRING_TABLE = 1, 5  # tags of the dynamic section
_LOADED = 1
MACHINE = 62  # x86-64, the architecture that the PTX machine is built for


@dataclass(frozen=True)
class Binary:
    """A 64-bit ELF file."""

    needed: tuple[str, ...]  # libraries, by the names that the loader resolves
    has_kernels: bool  # contains a fat binary of nvcc
    machine: int  # ELF machine type: 62 is x86-64
    is_program: bool  # not a shared object without an interpreter

    @property
    def runtime(self) -> str | None:
        """Name of the CUDA runtime that it loads, if any."""
        return next((name for name in self.needed if name.startswith(RUNTIME)), None)


def read(path: Path) -> Binary | None:
    """Parses an ELF file; None if the file is not 64-bit ELF."""
    image = path.read_bytes()
    if image[:5] != b"\x7fELF\x02":
        return None
    try:
        return _parse(image)
    except (struct.error, IndexError, ValueError, StopIteration):
        return None


def _parse(image: bytes) -> Binary:
    kind, machine, _, _, programs, sections, _, _, each, count, size, number, names = (
        struct.unpack_from("<HHIQQQIHHHHHH", image, 16)
    )
    headers = [struct.unpack_from("<IIQQQQQQ", image, programs + i * each) for i in range(count)]
    loaded = [(h[3], h[2], h[5]) for h in headers if h[0] == _LOADED]  # address, offset, bytes

    def offset_of(address: int) -> int:
        return next(o + address - a for a, o, n in loaded if a <= address < a + n)

    def text(at: int) -> str:
        return image[at : image.index(b"\0", at)].decode("latin1")

    dynamic: list[tuple[int, int]] = []
    for header in headers:
        if header[0] == _DYNAMIC:
            dynamic = list(struct.iter_unpack("<QQ", image[header[2] : header[2] + header[5]]))
    strings = next((value for tag, value in dynamic if tag == _STRING_TABLE), None)
    needed = []
    if strings is not None:
        base = offset_of(strings)
        needed = [text(base + value) for tag, value in dynamic if tag == _NEEDED]
    # struct.unpack_from: name, type, flags, address, offset of each section.
    tables = [struct.unpack_from("<IIQQQ", image, sections + i * size) for i in range(number)]
    named = {text(tables[names][4] + table[0]) for table in tables} if number else set()
    return Binary(
        needed=tuple(needed),
        has_kernels=".nv_fatbin" in named,
        machine=machine,
        is_program=kind == 2 or any(header[0] == _INTERPRETER for header in headers),
    )
