"""Runs compiled CUDA kernels on a CPU, checks what they do and counts it.

`ptxvm run|check|count FILE` takes programs and PTX text; Python takes PTX text.

Example:
    >>> import numpy as np
    >>> import ptxvm
    >>> text = '''
    ... .visible .entry twice(.param .u64 x) {
    ... .reg .b64 %d<4>; .reg .b32 %r<2>; .reg .f32 %f<2>;
    ... ld.param.u64 %d0, [x];
    ... mov.u32 %r0, %tid.x;
    ... mul.wide.u32 %d1, %r0, 4;
    ... add.u64 %d2, %d0, %d1;
    ... ld.global.f32 %f0, [%d2];
    ... add.f32 %f1, %f0, %f0;
    ... st.global.f32 [%d2], %f1;
    ... ret; }'''
    >>> machine = ptxvm.machine()
    >>> x = np.arange(64, dtype=np.float32)
    >>> with machine.options(check=1), machine.counting() as launches:
    ...     machine.load(text).launch("twice", x, grid=1, block=64)
    >>> float(x[63]), launches[0]["global"]["store"]["requests"]
    (126.0, 2)
"""

from __future__ import annotations

import os
from pathlib import Path

from .vm import Machine, MachineError, Module, Position, Report

__all__ = ["Machine", "MachineError", "Module", "Position", "Report", "find_library", "machine"]

LIBRARY = "libcudart.so.13"
# Instruction sets of a wheel and the /proc/cpuinfo flags that each requires, best first. A library
# built for the local CPU is installed in place of the x86-64-v3 one.
ISAS = {
    "glibc-hwcaps/x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "": {"avx2", "fma", "f16c"},
}


def find_library() -> Path | None:
    """Path of the machine's library: PTXVM_LIBRARY, or the package's best one for this CPU; None if
    there is none."""
    if named := os.environ.get("PTXVM_LIBRARY"):
        return Path(named).absolute() if os.path.isfile(named) else None
    flags = _cpu_flags()
    folders = [Path(folder, "lib") for folder in __path__]  # two folders in an editable install
    paths = [
        folder / isa / LIBRARY
        for isa, needed in ISAS.items()
        if needed <= flags
        for folder in folders
    ]
    return next((path for path in paths if path.is_file()), None)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


_loaded: dict[Path, Machine] = {}


def machine() -> Machine:
    """The machine of this process. Raises RuntimeError if there is no library for this CPU."""
    library, named = find_library(), os.environ.get("PTXVM_LIBRARY")
    if library is None and not named:
        rule = "needs an x86-64 CPU with AVX2, FMA and F16C, and an installed package (pip install)"
        raise RuntimeError(f"ptxvm: {rule}, or the path of its {LIBRARY} in PTXVM_LIBRARY")
    try:
        if library is None or library.name != LIBRARY:
            raise OSError
        if library not in _loaded:
            _loaded[library] = Machine(library)
    except (OSError, AttributeError):  # no library, or one that lacks the machine's functions
        rule = f"PTXVM_LIBRARY: must be {LIBRARY} of the PTX machine"
        raise RuntimeError(f"ptxvm: {rule}; got '{named or library}'") from None
    return _loaded[library]
