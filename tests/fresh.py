"""Processes that start with torch, its compiler and tokenmill imported: importing takes longer than
most scripts.

A server that has imported them and done nothing else forks each process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo.convert_frame",
        "functorch.compile",
        "numpy",
        "pytest",
        "hypothesis.strategies",
        "tokenmill",
    ]
)


def run_script(path: Path, *arguments: object) -> str:
    """Output of a script, whose exit status must be 0."""
    with tempfile.NamedTemporaryFile("r") as said:
        given = [str(a) for a in arguments]
        process = context.Process(target=_run, args=(str(path), given, said.name))
        process.start()
        process.join()
        assert process.exitcode == 0, said.read()
        return said.read()


def _run(path: str, arguments: list[str], said: str) -> None:
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.stdout.flush()
