"""Runs of a program: one child process per mode, with the machine as its CUDA runtime."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import _cli, binary
from .findings import Mode, Run, read_log

CALL = (
    "import ctypes, sys; sys.exit(min(abs(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])()), 255))"
)
LINK = "link it with nvcc -cudart shared -gencode arch=compute_80,code=compute_80"
LOADER_FAILED = 127
OF_A_LAUNCH = {  # flags of a launch, with their names in the parsed options
    **{
        f"--{name}": name for name in ("launch", "kernel", "grid", "block", "shared", "arg", "save")
    },
    "--print": "shown",
}


def runs(options: argparse.Namespace, modes: Sequence[Mode], library: Path) -> list[Run]:
    for name in OF_A_LAUNCH:
        if getattr(options, OF_A_LAUNCH[name], None) not in (None, []):
            raise _cli.UsageError(f"{name}: is for PTX text; FILE is a program")
    command = _command(options, library)
    with tempfile.TemporaryDirectory() as folder:
        done = [
            _run(options, command, mode, library, Path(folder) / f"{i}.log")
            for i, mode in enumerate(modes)
        ]
    if not done[0].kernels:
        said = [*done[0].refused, *done[0].output.strip().splitlines()[-1:]]
        raise _cli.CannotRun(
            f"FILE: must launch a kernel on the machine; '{options.file}' launched none"
            + (f" (exit status {done[0].status})" if done[0].status else "")
            + (f": {said[0]}" if said else "")
        )
    return done


def _command(options: argparse.Namespace, library: Path) -> list[str]:
    is_here = os.path.isfile(options.file)
    path = os.path.abspath(options.file if is_here else shutil.which(options.file) or options.file)
    found = binary.read(Path(path)) if os.path.isfile(path) else None
    if found and found.machine != binary.MACHINE:
        raise _cli.UsageError(f"FILE: must be a program for x86-64; got '{options.file}'")
    if found:
        _check_runtime(options.file, found, library)
    if found and not found.is_program:
        if not options.entry:
            rule = "must be given for a shared object: a function that takes nothing"
            raise _cli.UsageError(f"--entry: {rule}; got '{options.file}'")
        return [sys.executable, "-c", CALL, path, options.entry, *options.args]
    if options.entry:
        raise _cli.UsageError(f"--entry: is for shared objects; got '{options.file}'")
    if not os.access(path, os.X_OK):
        raise _cli.UsageError(f"FILE: must be executable; got '{options.file}'")
    return [path, *options.args]


def _check_runtime(name: str, found: binary.Binary, library: Path) -> None:
    """Checks that the loader will resolve the CUDA runtime to the machine."""
    if found.runtime is None and found.has_kernels:
        raise _cli.UsageError(
            f"FILE: must be linked with the shared CUDA runtime, whose place the machine takes; "
            f"'{name}' has the static one: {LINK}"
        )
    if found.runtime not in (None, library.name):
        raise _cli.UsageError(
            f"FILE: must be linked with {library.name} (CUDA 13); '{name}' needs {found.runtime}"
        )


def _run(
    options: argparse.Namespace, command: list[str], mode: Mode, library: Path, log: Path
) -> Run:
    """Runs the command once. Only `run` prints the program's output; other commands show it on
    failure."""
    chosen = _cli.machine_options(options) | mode.options
    paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = os.environ | {f"PTXVM_{name.upper()}": str(v) for name, v in chosen.items()}
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
    environment["PTXVM_LOG"] = str(log)
    shows = options.action == "run" and not options.json
    sys.stdout.flush()
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=None if shows else subprocess.PIPE,
            stderr=None if shows else subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:  # another architecture, or a script without its interpreter
        rule = "must be a program that runs here"
        raise _cli.CannotRun(f"FILE: {rule}; got '{options.file}' ({error.strerror})") from None
    run = read_log(log, mode)
    run.status, run.output = done.returncode, done.stdout or ""
    if not run.kernels and run.status == LOADER_FAILED:
        raise _cli.CannotRun(f"FILE: {run.output.strip() or 'could not be loaded'}")
    if not run.kernels and run.output.startswith("PTXVM_") and run.status == 2:
        raise _cli.UsageError(run.output.strip().splitlines()[0])
    return run
