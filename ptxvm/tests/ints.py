"""Kernels on arrays of int32, one element per thread."""

from __future__ import annotations

from typing import Any

import numpy as np
from machine import machine

# Registers: %t thread of the grid; %in and %out addresses of its element in the two int arrays.
BEGIN = """
.visible .entry k(.param .u64 p_in, .param .u64 p_out)
{
 .reg .pred %p<10>; .reg .b32 %r<30>, %t; .reg .b64 %rd<10>, %in, %out, %all;
 mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x;
 mad.lo.u32 %t, %r0, %r1, %r2;
 ld.param.u64 %in, [p_in]; ld.param.u64 %all, [p_out];
 mul.wide.u32 %rd0, %t, 4;
 add.u64 %in, %in, %rd0; add.u64 %out, %all, %rd0;
"""


def run_ints(
    body: str, inputs: Any, *, block: int = 32, grid: int = 1, size: int | None = None
) -> np.ndarray:
    """Runs BEGIN + body on an int32 array; returns the output array."""
    given = np.ascontiguousarray(inputs, dtype=np.int32)
    out = np.full(size or block * grid, -1, dtype=np.int32)
    machine.run(BEGIN + body + "\n}", "k", given, out, block=block, grid=grid)
    return out
