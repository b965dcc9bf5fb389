"""Kernels of compute capability 9.0a, for the tests of asynchronous operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from machine import machine

# Every result must be the same at each of these moments.
MODES = ["latest", "earliest", "seed:1", "seed:2"]


@contextmanager
def sm90(**options: Any) -> Iterator[None]:
    with machine.options(device="sm_90a", **options):
        yield


def kernel(
    body: str, pointers: int = 1, shared: int = 1024, cluster: int = 1, extra: str = ""
) -> str:
    """A kernel over pointers %d0, %d1, ...: %r0 thread, %r1 block, %r2 shared address of `data`,
    %p0 thread 0 of the block, %p1 warp 0, %p2 warp 1."""
    declared = ", ".join(
        [*(f".param .u64 a{i}" for i in range(pointers)), *([extra] * bool(extra))]
    )
    loads = "\n".join(f"ld.param.u64 %d{i}, [a{i}];" for i in range(pointers))
    size = f".explicitcluster .reqnctapercluster {cluster}, 1, 1" if cluster > 1 else ""
    return f"""
.visible .entry k({declared}) {size} {{
.reg .b16 %h<8>;
.reg .b32 %r<40>;
.reg .b64 %d<20>;
.reg .f32 %f<300>;
.reg .pred %p<8>;
.shared .align 1024 .b8 data[{shared}];
.shared .align 8 .b64 bar[4];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, data;
setp.eq.u32 %p0, %r0, 0;
setp.lt.u32 %p1, %r0, 32;
shr.u32 %r3, %r0, 5;
setp.eq.u32 %p2, %r3, 1;
{loads}
{body}
ret;
}}
"""


_waits = 0


def wait(parity: str, barrier: str = "bar", form: str = "try_wait") -> str:
    """Waits for the end of the phase of that parity."""
    global _waits
    _waits += 1
    return f"""{{ .reg .pred done;
W{_waits}: mbarrier.{form}.parity.shared::cta.b64 done, [{barrier}], {parity};
@!done bra W{_waits}; }}
"""


def init(count: int | str, barrier: str = "bar") -> str:
    """Initialises an mbarrier in thread 0, before the other threads continue."""
    return f"""@%p0 mbarrier.init.shared::cta.b64 [{barrier}], {count};
bar.sync 0;
"""
