"""What the command line must know of PTX text: its kernels and their parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*(\((?P<parameters>[^)]*)\))?")
_PARAMETER = re.compile(
    r"\.param\s+(\.align\s+\d+\s+)?\.(?P<type>\w+)\s+((?!\[)[^,\[]*?)(?P<name>[\w$]+)\s*"
    r"(\[\s*(?P<count>\d+)\s*\])?\s*$"
)


@dataclass(frozen=True)
class Parameter:
    type: str  # u64, f32, b8, ...
    name: str
    count: int = 0  # elements of an array in the parameter itself, such as a struct; 0: a scalar

    def __str__(self) -> str:
        return f".{self.type} {self.name}" + (f"[{self.count}]" if self.count else "")


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[Parameter, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parameters))})"


def kernels(ptx: str) -> dict[str, Kernel]:
    """By their names, in the order of the text."""
    found = {}
    for entry in _ENTRY.finditer(_COMMENT.sub(" ", ptx)):
        parameters = []
        for declared in (entry["parameters"] or "").split(","):
            if match := _PARAMETER.search(declared.strip()):
                count = int(match["count"] or 0)
                parameters.append(Parameter(match["type"], match["name"], count))
        found[entry["name"]] = Kernel(entry["name"], tuple(parameters))
    return found


def around(ptx: str, line: int, margin: int = 2) -> list[str]:
    """A line of the text and its neighbours, numbered."""
    lines = ptx.splitlines()
    if not 1 <= line <= len(lines):
        return []
    first, last = max(line - margin, 1), min(line + margin, len(lines))
    return [
        f"{'>' if i == line else ' '} {i:5} | {lines[i - 1].expandtabs(4)[:100]}"
        for i in range(first, last + 1)
    ]
