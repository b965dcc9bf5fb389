"""The PTX machine from Python: PTX text, launches on arrays, options, reports and counters.

    machine = Machine(library)              # libcudart.so.13
    module = machine.load(open("kernel.ptx").read())
    with machine.options(check=1, order="reverse"):
        module.launch("kernel", x, out, np.int32(len(x)), grid=8, block=128, shared=4096)

This module imports nothing else of the package, and no other package except the arrays' own.
docs/guide.md lists the options; src/ptxvm/host_api.h declares the C functions underneath.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INVALID_VALUE, INVALID_PTX = 1, 218  # cudaErrorInvalidValue, cudaErrorInvalidPtx
_TEXTS = ("options", "last_report", "last_finding", "reports", "counters", "kernels", "demangled")


@dataclass(frozen=True)
class Position:
    """An instruction. `part` is the first line of the code around it that has neither branches nor
    instructions that order accesses; `file` and `source_line` come from -lineinfo ("" and 0)."""

    line: int  # of the PTX; 0: none
    part: int = 0
    file: str = ""
    source_line: int = 0


@dataclass(frozen=True)
class Report:
    """A rule that a kernel broke at a line of its PTX, and how often. `report` is the text of the
    first time; `cause` is an earlier access, or where a value was lost. A fault that ended a launch
    may have line 0: none."""

    kernel: str  # mangled
    line: int
    rule: str
    report: str
    count: int = 1
    name: str = ""  # demangled
    part: int = 0
    file: str = ""
    source_line: int = 0
    cause: Position | None = None

    @property
    def is_note(self) -> bool:
        """True for what is worth a look and breaks no rule."""
        return self.rule.startswith("note: ")

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Report:
        """Builds a report from an object of the machine's JSON (src/ptxvm/host_api.h)."""
        cause = entry["cause"] and Position(**entry["cause"])
        return cls(**{**entry, "cause": cause})


class MachineError(RuntimeError):
    """Error of a failed call, with the machine's report. `code` is the CUDA error: 719 if the
    kernel broke a rule, 710 if an assertion failed, 218 if the machine cannot run the PTX.
    `finding` is the rule that the kernel broke."""

    def __init__(self, report: str, code: int, finding: Report | None = None) -> None:
        super().__init__(report)
        self.code = code
        self.finding = finding


class Module:
    """PTX text that the machine has parsed."""

    def __init__(self, machine: Machine, handle: int) -> None:
        self._machine = machine
        self._handle = ctypes.c_void_p(handle)
        kernels = json.loads(machine.library.ptxvm_kernels(self._handle))
        # Per kernel: name, element type, number of elements of an array (0: a scalar), bytes.
        self.parameters: dict[str, list[dict[str, Any]]] = kernels

    def __del__(self) -> None:
        self._machine.library.ptxvm_unload(self._handle)

    def launch(
        self,
        kernel: str,
        *arguments: Any,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 32,
        shared: int = 0,
    ) -> None:
        """Runs a kernel.

        Arrays (NumPy, or torch on the CPU) are passed as pointers, and the kernel may access only
        these during the launch; it may not write NumPy arrays that are read-only. Other arguments
        are NumPy or ctypes scalars of the parameter's type. Extents are x or (x, y, z); `shared` is
        the dynamic shared memory of a block in bytes. Raises MachineError, and ValueError if the
        arguments do not match the kernel's parameters.
        """
        extents = _three(kernel, "grid", grid), _three(kernel, "block", block)
        bytes_ = ctypes.c_uint32(_word(kernel, "shared", shared))
        self._check_number(kernel, arguments)
        library = self._machine.library
        values: list[Any] = []
        registered: list[ctypes.c_void_p] = []
        try:
            for i, argument in enumerate(arguments):
                try:
                    pointer, writable = _memory_of(argument)
                    value = _scalar(argument) if pointer is None else ctypes.c_uint64(pointer)
                    self._check_size(kernel, i, value)
                except ValueError as error:
                    named = f"argument {i} ({self._name(kernel, i)})"
                    raise ValueError(f"{kernel}: {named}: {error}") from None
                values.append(value)
                if pointer is not None:
                    registered.append(ctypes.c_void_p(pointer))
                    size = ctypes.c_size_t(argument.nbytes)
                    library.ptxvm_register(registered[-1], size, int(writable))
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            failed = library.ptxvm_launch(self._handle, kernel.encode(), *extents, bytes_, pointers)
        finally:
            for address in registered:
                library.ptxvm_unregister(address)
        self._machine.check(failed)

    def _check_number(self, kernel: str, arguments: Sequence[Any]) -> None:
        parameters = self.parameters.get(kernel)
        if parameters is not None and len(arguments) != len(parameters):
            names = ", ".join(parameter["name"] for parameter in parameters)
            rule = f"must be {len(parameters)} ({names})"
            raise ValueError(f"{kernel}: arguments: {rule}; got {len(arguments)}")

    def _name(self, kernel: str, i: int) -> str:
        return str(self.parameters[kernel][i]["name"]) if kernel in self.parameters else ""

    def _check_size(self, kernel: str, i: int, value: Any) -> None:
        if kernel in self.parameters:
            size = self.parameters[kernel][i]["bytes"]
            if ctypes.sizeof(value) != size:
                raise ValueError(f"must have {size} bytes; got {ctypes.sizeof(value)}")


def _memory_of(argument: Any) -> tuple[int | None, bool]:
    """Address of an array and whether it is writable; (None, False) if it is not an array."""
    if hasattr(argument, "data_ptr"):  # torch
        if argument.device.type != "cpu":
            raise ValueError(f"must be on the CPU; got {argument.device}")
        if not argument.is_contiguous():
            raise ValueError(f"must be contiguous; got strides {tuple(argument.stride())}")
        return argument.data_ptr(), True
    if hasattr(argument, "ctypes"):  # NumPy arrays; NumPy scalars have no ctypes
        if not argument.flags.c_contiguous:
            raise ValueError(f"must be contiguous; got strides {argument.strides}")
        pointer, read_only = argument.__array_interface__["data"]
        return pointer, not read_only
    return None, False


def _scalar(argument: Any) -> Any:
    """A ctypes object with the bytes of a scalar."""
    if hasattr(argument, "tobytes"):  # NumPy
        return ctypes.create_string_buffer(argument.tobytes(), argument.nbytes)
    try:
        ctypes.addressof(argument)
    except TypeError:
        rule = "must be an array, or a scalar of NumPy or ctypes"
        raise ValueError(f"{rule}; got {argument!r}") from None
    return argument


def _word(kernel: str, name: str, value: Any) -> int:
    """Checks and converts an unsigned integer of 32 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 32:
        raise ValueError(f"{kernel}: {name}: must be from 0 to {(1 << 32) - 1}; got {value!r}")
    return number


def _three(kernel: str, name: str, size: Any) -> Any:
    given = list(size) if isinstance(size, Iterable) else [size]
    if not 1 <= len(given) <= 3:
        raise ValueError(f"{kernel}: {name}: must be 1 to 3 extents; got {size!r}")
    return (ctypes.c_uint32 * 3)(
        *[_word(kernel, name, extent) for extent in given], *[1] * (3 - len(given))
    )


class Machine:
    """The PTX machine in a loaded library. Options, reports and counters belong to the library, and
    so are shared by the whole process. `library` has the C functions."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.library = ctypes.CDLL(str(path))
        self.library.ptxvm_load.restype = ctypes.c_void_p
        for name in _TEXTS:
            getattr(self.library, f"ptxvm_{name}").restype = ctypes.c_char_p

    def check(self, error: int) -> None:
        """Raises MachineError with the last report if the error is not 0."""
        if error:
            finding = json.loads(self.library.ptxvm_last_finding())
            report = self.library.ptxvm_last_report().decode()
            raise MachineError(report, error, finding and Report.of(finding))

    def load(self, ptx: str) -> Module:
        """Parses PTX text. The lines .version, .target and .address_size may be omitted."""
        handle = self.library.ptxvm_load(ptx.encode())
        self.check(0 if handle else INVALID_PTX)
        return Module(self, handle)

    def run(self, ptx: str, kernel: str, *arguments: Any, **launch: Any) -> None:
        """Loads a text and launches one kernel of it."""
        self.load(ptx).launch(kernel, *arguments, **launch)

    def configure(self, **options: int | str) -> None:
        """Sets options: configure(check=1, order="reverse"). Raises MachineError for an unknown
        option or value, and then sets none."""
        settings = ",".join(f"{name}={value}" for name, value in options.items())
        failed = self.library.ptxvm_configure(settings.encode())
        self.check(INVALID_VALUE if failed else 0)

    @property
    def settings(self) -> dict[str, str]:
        """All current options."""
        text = self.library.ptxvm_options().decode()
        return dict(setting.split("=", 1) for setting in text.split(","))

    @contextlib.contextmanager
    def options(self, **options: int | str) -> Iterator[None]:
        """Sets options inside the block and restores them afterwards."""
        before = self.settings
        self.configure(**options)
        try:
            yield
        finally:
            self.configure(**{name: before[name] for name in options})

    def demangled(self, name: str) -> str:
        """The C++ name of a kernel; any other name as it is."""
        return str(self.library.ptxvm_demangled(name.encode()).decode())

    def reports(self) -> list[Report]:
        """Reports collected under on_fault=report since the last call."""
        return [Report.of(entry) for entry in json.loads(self.library.ptxvm_reports())]

    def counters(self) -> list[dict[str, Any]]:
        """Counters of each launch since the last reset, as docs/guide.md defines them."""
        launches: list[dict[str, Any]] = json.loads(self.library.ptxvm_counters())["launches"]
        return launches

    def reset_counters(self) -> None:
        self.library.ptxvm_reset_counters()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[list[Report]]:
        """Inside the block, kernels continue after breaking a rule of check mode. The list is
        filled when the block ends."""
        found: list[Report] = []
        self.reports()
        with self.options(on_fault="report"):
            try:
                yield found
            finally:
                found += self.reports()

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[dict[str, Any]]]:
        """Counts the launches inside the block. The list is filled when the block ends, one entry
        per launch."""
        launches: list[dict[str, Any]] = []
        self.reset_counters()
        try:
            with self.options(count=1):
                yield launches
        finally:
            launches += self.counters()
            self.reset_counters()
