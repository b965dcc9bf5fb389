"""The CUDA kernels of a call, as rows of the table of its operator, asked from C++
(csrc/core/kernels.h) with a description of the arguments. No GPU and no CUDA build is needed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from .._check import InputError
from . import rules
from .operator import TorchOp

LAST = 999  # last compute capability of a kernel for every later chip

_ask_kernels: Any = rules.symbols.tokenmill_kernels
_ask_kernels.restype = ctypes.c_int64
_ask_kernels.argtypes = [ctypes.c_char_p] * 5 + [ctypes.c_int64]


@dataclass(frozen=True)
class Kernel:
    """A row. rest: another kernel that it runs for a part of the call. arch: name of its machine
    code in a build. first, last: compute capabilities that run it, as 10 major + minor.
    other_calls: it is meant for other calls, whatever rules this one breaks. switch: the knob that
    switches it off ("" without one); cuts: knobs that partition its work; read: knobs that its
    rules depend on. broken: its rules that the call breaks.
    """

    name: str
    rest: str
    arch: str
    first: int
    last: int
    built: bool
    other_calls: bool
    switch: str
    cuts: tuple[str, ...]
    read: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.name.rsplit("/", 1)[-1]

    @property
    def full_name(self) -> str:
        return f"{self.name} and {self.rest}" if self.rest else self.name

    @property
    def chips(self) -> str:
        if self.first == self.last:
            return f"sm_{self.first}"
        if self.last == LAST:
            return f"sm_{self.first} or later"
        return f"sm_{self.first} to sm_{self.last}"

    def fits(self, capability: int) -> bool:
        return self.first <= capability <= self.last


def table(op: TorchOp, record: Any) -> list[Kernel]:
    """The rows in the order in which a launch tries them. The last one takes every call. Empty for
    an operator with one kernel, and for a call that launches nothing.
    """
    status, text = rules.ask(_ask_kernels, op.name, *rules.describe(op.kinds, record))
    if status < 0:
        raise InputError(text)
    return [_row(line) for line in text.split("\n")[:-1]]


def _row(line: str) -> Kernel:
    name, rest, arch, first, last, built, other, switch, *lists, _ = line.split("\x1f")
    cuts, read, broken = (tuple(part.split("\x1e")[:-1]) for part in lists)
    return Kernel(
        name, rest, arch, int(first), int(last), built == "1", other == "1", switch,
        cuts, read, broken,
    )  # fmt: skip
