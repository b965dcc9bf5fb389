"""Kernels over memory of every space, for the tests of memory instructions."""

from __future__ import annotations

import numpy as np

LANES = 32
BYTES = 512  # size of each memory that the kernels read


def bits(type_: str) -> int:
    return int(type_[1:])


def register(width: int) -> str:
    return {16: "%h", 32: "%r", 64: "%d"}[width]


def random_bytes(seed: int, count: int = BYTES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def kernel(body: str, parameters: int = 3, extra: str = "", outside: str = "") -> str:
    """A kernel over pointers %d0, %d1, ...; %r0 is the lane."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(parameters))
    return f"""
{outside}
.visible .entry k({declared}{extra}) {{
.reg .b16 %h<40>;
.reg .b32 %r<40>;
.reg .b64 %d<40>;
.reg .pred %p<8>;
.shared .align 16 .b8 tile[{BYTES}];
.local .align 16 .b8 mine[16];
mov.u32 %r0, %tid.x;
{loads}
{body}
ret;
}}
"""


def space_base(space: str) -> str:
    """Statements that put the address of a space's data in %d20."""
    return {
        "global": "mov.b64 %d20, %d0;",
        "generic global": "mov.b64 %d20, %d0;",
        "const": "mov.u64 %d20, table;",
        "param": "mov.b64 %d20, data;",
        "shared": "mov.u64 %d20, tile;",
        "local": "mov.u64 %d20, mine;",
        "generic shared": "mov.u64 %d21, tile;\ncvta.shared.u64 %d20, %d21;",
        "generic local": "mov.u64 %d21, mine;\ncvta.local.u64 %d20, %d21;",
    }[space]


# Fills `tile` with the input and `mine` with 16 bytes of it per lane.
FILL = """
mul.wide.u32 %d10, %r0, 16;
add.s64 %d11, %d0, %d10;
ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d11];
mov.u64 %d12, tile;
add.s64 %d12, %d12, %d10;
st.shared.v4.b32 [%d12], {%r10, %r11, %r12, %r13};
mov.u64 %d13, mine;
st.local.v4.b32 [%d13], {%r10, %r11, %r12, %r13};
bar.sync 0;
"""
# %p0: lanes of the mask in p1[0]; %d22: the lane's offset, from p1[1 + lane].
MASK = """
ld.global.b32 %r20, [%d1];
shr.b32 %r21, %r20, %r0;
and.b32 %r21, %r21, 1;
setp.ne.b32 %p0, %r21, 0;
mul.wide.u32 %d23, %r0, 4;
add.s64 %d23, %d23, %d1;
ld.global.u32 %r22, [%d23+4];
cvt.u64.u32 %d22, %r22;
"""


def offsets_of(pattern: str, step: int, limit: int) -> np.ndarray:
    count = limit // step
    order = {
        "consecutive": np.arange(LANES) % count,
        "reversed": np.arange(LANES)[::-1] % count,
        "equal": np.full(LANES, count - 1),
        "mixed": np.random.default_rng(step).integers(0, count, LANES),
    }[pattern]
    return (order * step).astype(np.uint32)


def masks() -> list[int]:
    return [0xFFFFFFFF, 0x0F0F3C81, 0x80000000]
