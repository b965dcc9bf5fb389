"""The library of operators: loading it, and the namespaces of torch.ops that it fills.

`torch.ops.tokenmill.<op>` is the native operator. `torch.ops.tokenmill_triton.<op>` has the same
schema, fake, autograd and vmap, and runs the Triton kernel; where no native CUDA kernel is
registered it also serves `torch.ops.tokenmill.<op>` on CUDA. `torch.ops.tokenmill_emulated.<op>`,
only in development builds, runs the compiled CUDA kernel on CPU tensors, in the PTX machine. The
last two namespaces are filled at the first lookup of one of their operators.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import door

NAMESPACE = "tokenmill"
TRITON_NAMESPACE = "tokenmill_triton"
EMULATED_NAMESPACE = "tokenmill_emulated"
PACKAGE = Path(__file__).parents[1]


def find_ops(package: Path) -> Path:
    """The library of all operators in the package's folder."""
    ops, tree = package / "_ops.so", package.parents[1]
    if ops.exists():
        return ops
    rule = "the package was not built (pip install .)"
    if (tree / "CMakeLists.txt").exists():
        rule = (
            f"{tree} is a source tree without its build: pip install -e . builds into it; after "
            "pip install . run Python where it imports the installed package instead"
        )
    raise ImportError(f"tokenmill: {ops} is missing: {rule}")


LIBRARY_PATH = find_ops(PACKAGE)
torch.ops.load_library(str(LIBRARY_PATH))
native: Any = getattr(torch.ops, NAMESPACE)
if _isa := os.environ.get("TOKENMILL_CPU_ISA"):
    native.cpu_isa(_isa)

libraries = {NAMESPACE: torch.library.Library(NAMESPACE, "IMPL")}
doors = {NAMESPACE: door.functions(LIBRARY_PATH)}


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def _minor_version(package: str) -> tuple[int, ...]:
    """(major, minor), or () for a package that is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _find_interpreter_fault() -> str | None:
    triton, numpy = (_minor_version(name) for name in ("triton", "numpy"))
    if not numpy:
        return "Triton's interpreter needs NumPy"
    # Triton 3.6 converts a 1-element array to int, which is an error from NumPy 2.4 on.
    if triton and triton < (3, 7) and numpy >= (2, 4):
        return "Triton's interpreter needs Triton 3.7 or later, or NumPy below 2.4"
    return None


_INTERPRETER_FAULT = _find_interpreter_fault() if _TRITON_INSTALLED else None


def interpreter_fault() -> str | None:
    """The reason why the interpreter of the installed Triton cannot run kernels, or None."""
    return _INTERPRETER_FAULT


EMULATED_PATH = Path(os.environ.get("TOKENMILL_EMULATED") or PACKAGE / "_emulated.so")
_EMULATED_BUILT = EMULATED_PATH.exists()


def emulated_built() -> bool:
    return _EMULATED_BUILT


def load_emulated() -> None:
    torch.ops.load_library(str(EMULATED_PATH))
    doors[EMULATED_NAMESPACE] = door.functions(EMULATED_PATH)
    libraries[EMULATED_NAMESPACE] = torch.library.Library(EMULATED_NAMESPACE, "IMPL")


class FilledAtFirstUse(torch._ops._OpNamespace):
    """A namespace of torch.ops filled at first use by `filler`: its operators cost as much time as
    the rest of the import. operators: their names, once it is filled. finishers: functions that
    take the filled namespace before another thread sees it.
    """

    filler: Callable[[], set[str]] | None = None

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.operators: set[str] = set()
        self.finishers: list[Callable[[Any], None]] = []
        self._filling = threading.RLock()
        setattr(torch.ops, name, self)

    def fill(self) -> None:
        with self._filling:
            filler, self.filler = self.filler, None  # the filler looks operators up itself
            if filler:
                operators = filler()
                for finish in self.finishers:
                    finish(self)
                self.operators = operators  # another thread sees all of them or none

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # attributes that Python reads of any module
            self.fill()
        return super().__getattr__(name)


triton_namespace = FilledAtFirstUse(TRITON_NAMESPACE)
emulated_namespace = FilledAtFirstUse(EMULATED_NAMESPACE) if emulated_built() else None


def emulated_operators() -> set[str]:
    """The operators of the emulated library. A trace also calls this, and can neither load it nor
    take a lock to see that it is loaded.
    """
    if emulated_namespace is None:
        return set()
    if not emulated_namespace.operators:
        emulated_namespace.fill()
    return emulated_namespace.operators


def loaded_emulated() -> Any:
    """The namespace of the emulated library, or None before its first use."""
    loaded = emulated_namespace is not None and emulated_namespace.operators
    return emulated_namespace if loaded else None
