"""The PTX machine of csrc/ptxvm through ctypes: load PTX text, launch kernels, read counters."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class MachineError(RuntimeError):
    """What the machine reported of a failed call; ``code`` is the CUDA error."""

    def __init__(self, report: str, code: int) -> None:
        super().__init__(report)
        self.code = code


def find_library() -> Path | None:
    """PTXVM_LIBRARY, else the library beside an installed development build."""
    if named := os.environ.get("PTXVM_LIBRARY"):
        return Path(named)
    package = importlib.util.find_spec("tokenmill")
    if package is None or package.origin is None:
        return None
    installed = Path(package.origin).parent / "_ptxvm" / "libcudart.so.13"
    return installed if installed.exists() else None


class Module:
    """PTX text that the machine has parsed."""

    def __init__(self, machine: Machine, handle: int) -> None:
        self._machine = machine
        self._handle = handle

    def __del__(self) -> None:
        self._machine.library.ptxvm_unload(ctypes.c_void_p(self._handle))

    def launch(
        self,
        kernel: str,
        *arguments: Any,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 32,
        shared: int = 0,
    ) -> None:
        """Run a kernel.

        Arrays (NumPy, or torch on the CPU) are passed as pointers and may be touched by the kernel
        during the launch; NumPy arrays that are read-only stay so. Other arguments are NumPy or
        ctypes scalars of the parameter's type.
        """
        self._machine.launch(self._handle, kernel, arguments, grid, block, shared)


class Machine:
    """One instance of the library. Options and counters are the library's, so of the process."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.ptxvm_load.restype = ctypes.c_void_p
        library.ptxvm_last_report.restype = ctypes.c_char_p
        library.ptxvm_counters.restype = ctypes.c_char_p
        library.ptxvm_reports.restype = ctypes.c_char_p
        self.library = library

    def _check(self, error: int) -> None:
        if error:
            raise MachineError(self.library.ptxvm_last_report().decode(), error)

    def load(self, ptx: str) -> Module:
        """Parse PTX text; the lines .version, .target and .address_size may be left out."""
        handle = self.library.ptxvm_load(ptx.encode())
        self._check(0 if handle else 218)
        return Module(self, handle)

    def run(self, ptx: str, kernel: str, *arguments: Any, **launch: Any) -> None:
        """Load a text and launch one kernel of it."""
        self.load(ptx).launch(kernel, *arguments, **launch)

    def configure(self, **options: int | str) -> None:
        """Set options of machine.h."""
        settings = ",".join(f"{name}={value}" for name, value in options.items())
        self._check(self.library.ptxvm_configure(settings.encode()))

    @contextmanager
    def options(self, **options: int | str) -> Iterator[None]:
        """Set options for a while; each goes back to its default."""
        defaults: dict[str, int | str] = {
            "check": 0,
            "count": 0,
            "approximate": 0,
            "mma": "exact",
            "order": "forward",
            "seed": 0,
            "resident_blocks": 8,
            "fuel": 20000,
            "watchdog": 4000,
            "on_fault": "stop",
            "async": "latest",
            "device": os.environ.get("PTXVM_DEVICE", "sm_80"),
        }
        self.configure(**options)
        try:
            yield
        finally:
            self.configure(**{name: defaults[name] for name in options})

    def counters(self) -> list[dict[str, Any]]:
        """Counters of each launch since the last reset, as docs/ptxvm.md defines them."""
        launches: list[dict[str, Any]] = json.loads(self.library.ptxvm_counters())["launches"]
        return launches

    def reset_counters(self) -> None:
        self.library.ptxvm_reset_counters()

    def launch(
        self,
        handle: int,
        kernel: str,
        arguments: Sequence[Any],
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared: int,
    ) -> None:
        values: list[Any] = []
        registered: list[int] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                address, size = argument.ctypes.data, argument.nbytes
                writable = argument.flags.writeable
            elif hasattr(argument, "data_ptr"):
                address, size = argument.data_ptr(), argument.nbytes
                writable = True
            else:
                is_scalar = isinstance(argument, np.generic)
                values.append(np.array(argument) if is_scalar else argument)
                continue
            self.library.ptxvm_register(
                ctypes.c_void_p(address), ctypes.c_size_t(size), int(writable)
            )
            registered.append(address)
            values.append(ctypes.c_uint64(address))
        pointers = (ctypes.c_void_p * len(values))()
        for i, value in enumerate(values):
            is_array = isinstance(value, np.ndarray)
            pointers[i] = value.ctypes.data if is_array else ctypes.addressof(value)
        try:
            error = self.library.ptxvm_launch(
                ctypes.c_void_p(handle),
                kernel.encode(),
                _three(grid),
                _three(block),
                ctypes.c_uint32(shared),
                pointers,
            )
        finally:
            for address in registered:
                self.library.ptxvm_unregister(ctypes.c_void_p(address))
        self._check(error)


def _three(size: int | Sequence[int]) -> Any:
    given = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint32 * 3)(*[*given, 1, 1][:3])


_path = find_library()
if _path is None:
    pytest.skip("no PTX machine: not a development build", allow_module_level=True)
machine = Machine(_path)
