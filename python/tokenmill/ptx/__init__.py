"""The PTX machine: CUDA kernels on a CPU, with checks and counters, in a development build.

`python -m tokenmill ptx run|check|count FILE` runs programs and PTX text (docs/ptxvm.md); here is
the same machine for Python:

Example:
    >>> import numpy as np
    >>> from tokenmill import ptx
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
    >>> if ptx.find_library():
    ...     x = np.arange(64, dtype=np.float32)
    ...     with ptx.machine().options(check=1), ptx.machine().counting() as launches:
    ...         ptx.machine().load(text).launch("twice", x, grid=1, block=64)
    ...     assert x[63] == 126 and launches[0]["global"]["store"]["requests"] == 2
"""

from __future__ import annotations

import os
from pathlib import Path

from .vm import Machine, MachineError, Module, Report

__all__ = ["Machine", "MachineError", "Module", "Report", "find_library", "machine"]

LIBRARY = "libcudart.so.13"
HOW_TO_GET_IT = (
    "the PTX machine is not in this build: build the package with TOKENMILL_PTXVM=1 (docs/abi.md), "
    f"or csrc/ptxvm alone with CMake, and name its {LIBRARY} in PTXVM_LIBRARY"
)


def find_library() -> Path | None:
    """The machine's library: PTXVM_LIBRARY, or that of this build. None if there is none."""
    named = os.environ.get("PTXVM_LIBRARY")
    path = Path(named).absolute() if named else Path(__file__).parents[1] / "_ptxvm" / LIBRARY
    return path if os.path.isfile(path) else None


_loaded: dict[Path, Machine] = {}


def machine() -> Machine:
    """The machine of this process. Raises RuntimeError where there is none."""
    library, named = find_library(), os.environ.get("PTXVM_LIBRARY")
    if library is None and not named:
        raise RuntimeError(f"tokenmill.ptx: {HOW_TO_GET_IT}")
    try:
        if library is None or library.name != LIBRARY:
            raise OSError
        if library not in _loaded:
            _loaded[library] = Machine(library)
    except (OSError, AttributeError):  # no library, or one without the machine's functions
        rule = f"PTXVM_LIBRARY: must be {LIBRARY} of the PTX machine"
        raise RuntimeError(f"tokenmill.ptx: {rule}; got '{named or library}'") from None
    return _loaded[library]
