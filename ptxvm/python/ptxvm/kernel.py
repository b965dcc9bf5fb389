"""Runs of PTX text: the kernel is launched once in each mode, on freshly made arguments."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _cli, arguments, machine
from .findings import Mode, Run
from .vm import INVALID_PTX, Machine, MachineError, Module, Report

FIELDS = {"kernel": str, "grid": list, "block": list, "shared": int, "args": list}
MAX_SHOWN = 8  # elements of an array shown in one line


def text_of(name: str) -> str | None:
    """Contents of a PTX file; None if the file is a program."""
    path = Path(name)
    if not os.path.isfile(path):
        if shutil.which(name):
            return None
        raise _cli.UsageError(f"FILE: must be a program or PTX text; got '{name}'")
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"\x7fELF" or start[:2] == b"#!":
            return None
        ptx = path.read_text()
    except OSError as error:
        rule = "must be readable"
        raise _cli.UsageError(f"FILE: {rule}; got '{name}' ({error.strerror})") from None
    except UnicodeDecodeError:
        ptx = ""
    if ".entry" not in ptx:
        raise _cli.UsageError(f"FILE: must be a program or PTX text with an .entry; got '{name}'")
    return ptx


@dataclass(frozen=True)
class Launch:
    kernel: arguments.Kernel
    grid: list[int]
    block: list[int]
    shared: int
    arguments: list[str]


def launch_of(options: argparse.Namespace, module: Module) -> Launch:
    """The launch described by the --launch file, overridden by flags."""
    given = _read(options.launch) if options.launch else {}
    flags = {name: getattr(options, name) for name in ("kernel", "grid", "block", "shared")}
    given |= {name: value for name, value in flags.items() if value is not None}
    if options.arg is not None:
        given["args"] = options.arg
    kernels = {n: arguments.Kernel.of(n, each) for n, each in module.parameters.items()}
    kernel = _choose(kernels, given.get("kernel"))
    return Launch(
        kernel,
        given.get("grid", [1]),
        given.get("block", [32]),
        given.get("shared", 0),
        [str(argument) for argument in given.get("args", [])],
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _cli.UsageError(f"--launch: must be a JSON file; got '{path}' ({error})") from None
    if not isinstance(given, dict) or not given.keys() <= FIELDS.keys():
        raise _cli.UsageError(f"--launch: must be an object of {', '.join(FIELDS)}; got '{path}'")
    for name, kind in FIELDS.items():
        if name in ("grid", "block") and isinstance(given.get(name), int):
            given[name] = [given[name]]
        if name in given and not _fits(name, given[name], kind):
            raise _cli.UsageError(f"--launch: {name}: must be {_RULES[name]}; got {given[name]!r}")
    return given


_RULES = {
    "kernel": "a text",
    "grid": "1 to 3 whole numbers",
    "block": "1 to 3 whole numbers",
    "shared": "a whole number",
    "args": "a list of texts or numbers",
}


def _fits(name: str, value: Any, kind: type) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if isinstance(value, int):
        return 0 <= value < 1 << 32
    if isinstance(value, list) and name in ("grid", "block"):
        return 1 <= len(value) <= 3 and all(type(x) is int and 0 <= x < 1 << 31 for x in value)
    return True


def _choose(kernels: dict[str, arguments.Kernel], name: str | None) -> arguments.Kernel:
    listed = "; ".join(map(str, kernels.values()))
    if name in kernels:
        return kernels[name]
    fitting = [k for k in kernels.values() if name is None or name in k.name]
    if len(fitting) != 1:
        rule = "must name one kernel" + (f"; got '{name}'" if name else "")
        raise _cli.UsageError(f"--kernel: {rule}. The text has {listed}")
    return fitting[0]


def runs(options: argparse.Namespace, modes: Sequence[Mode], ptx: str) -> list[Run]:
    vm = machine()
    try:
        with vm.options(**_cli.machine_options(options)):
            module = vm.load(ptx)
    except MachineError as error:
        raise _cli.CannotRun(str(error)) from None
    launch = launch_of(options, module)
    inputs = _arguments(launch)
    numbers = [*getattr(options, "shown", []), *(n for n, _ in getattr(options, "save", []))]
    for number in numbers:
        if number >= len(inputs) or not isinstance(inputs[number], np.ndarray):
            flag = "--print" if number in options.shown else "--save"
            raise _cli.UsageError(f"{flag}: must be the number of an array; got {number}")
    for _, path in getattr(options, "save", []):
        _ask_for(path)
    done: list[Run] = []
    first: list[Any] = []
    try:
        with vm.options(**_cli.machine_options(options)):
            for mode in modes:
                values = _arguments(launch)
                done.append(_launch(vm, module, launch, mode, values))
                first = first or values
                done[-1].reports += _differences(vm, launch, first, values, done)
    except MachineError as error:  # the machine refuses the kernel, or the launch does not fit it
        refuses = error.code == INVALID_PTX
        raise (_cli.CannotRun if refuses else _cli.UsageError)(str(error)) from None
    except ValueError as error:
        raise _cli.UsageError(str(error)) from None
    if options.action == "run" and not done[0].reports:
        _show(options, launch, inputs, first)
    return done


def _arguments(launch: Launch) -> list[Any]:
    try:
        return arguments.for_kernel(launch.kernel, launch.arguments)
    except arguments.BadArgument as error:
        raise _cli.UsageError(f"--arg: {error}") from None
    except MemoryError:
        raise _cli.UsageError("--arg: must fit in memory") from None


def _launch(vm: Machine, module: Module, launch: Launch, mode: Mode, values: list[Any]) -> Run:
    run = Run(mode)
    vm.reset_counters()
    vm.reports()
    started = {"kernel": launch.kernel.name, "grid": launch.grid, "block": launch.block}
    with vm.options(**mode.options):
        try:
            with _interruptible():
                module.launch(
                    launch.kernel.name,
                    *values,
                    grid=launch.grid,
                    block=launch.block,
                    shared=launch.shared,
                )
            run.launches = vm.counters() or [started]
        except MachineError as error:
            if error.finding is None:
                raise
            run.launches = vm.counters()
            run.ended(error.finding)
    run.reports[:0] = vm.reports()
    return run


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes Ctrl-C end the process: Python handles signals only after a launch, which may never
    end."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _differences(
    vm: Machine, launch: Launch, first: list[Any], values: list[Any], done: Sequence[Run]
) -> list[Report]:
    """Reports arrays that differ bitwise from the first run's, if both runs ended."""
    if not (done[0].launches and done[-1].launches):
        return []
    found = []
    for i, (wanted, got) in enumerate(zip(first, values, strict=True)):
        if not isinstance(got, np.ndarray):
            continue
        if differ := _differ(wanted, got):
            name = launch.kernel.name
            what = f"{differ} of {got.size} elements of argument {i} are not those of "
            said = f"{what}[{done[0].mode}]"
            found.append(Report(name, 0, f"other result {i}", said, name=vm.demangled(name)))
    return found


def _differ(a: np.ndarray, b: np.ndarray) -> int:
    """Number of elements that differ bitwise."""
    bits = np.dtype(f"u{a.itemsize}")
    return int((a.view(bits) != b.view(bits)).sum())


def _show(options: argparse.Namespace, launch: Launch, before: list[Any], after: list[Any]) -> None:
    """Prints the arrays that the kernel changed, and those requested."""
    total = 0
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if not isinstance(new, np.ndarray):
            continue
        kind = arguments.kind_of(launch.arguments[i])
        changed = _differ(old, new)
        total += changed
        values = arguments.readable(new, kind)
        if i in options.shown:
            sizes = ",".join(map(str, new.shape))
            _cli.say(options, f"argument {i}, {kind}[{sizes}]:")
            _cli.say(options, np.array2string(values, threshold=new.size + 1, max_line_width=100))
        elif changed:
            start = " ".join(f"{x:.6g}" for x in values.ravel()[:MAX_SHOWN].tolist())
            more = " ..." if new.size > MAX_SHOWN else ""
            _cli.say(
                options, f"argument {i}: {changed} of {new.size} elements changed: {start}{more}"
            )
    if not total:
        _cli.say(options, "no argument changed")
    for number, path in options.save:
        kind = arguments.kind_of(launch.arguments[number])
        try:
            with _beside(path).open("wb") as file:
                np.save(file, arguments.readable(after[number], kind))
            os.replace(_beside(path), path)
        except OSError as error:
            raise _cli.UsageError(_cli.unwritable("--save", path, error)) from None
        _cli.say(options, f"wrote {path}")


def _beside(path: Path) -> Path:
    """Temporary path in the same folder; the complete file is renamed from it."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _ask_for(path: Path) -> None:
    """Checks that --save can write, before any work that would be lost."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _beside(path).touch()
        _beside(path).unlink()
    except OSError as error:
        raise _cli.UsageError(_cli.unwritable("--save", path, error)) from None
