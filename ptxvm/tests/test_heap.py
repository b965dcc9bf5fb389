"""malloc and free of device code."""

from __future__ import annotations

import numpy as np
import pytest
from machine import MachineError, machine

# Each thread allocates in one launch what it reads and frees in another.
KERNELS = """
.extern .func (.param .b64 result) malloc (.param .b64 bytes);
.extern .func free (.param .b64 pointer);
.visible .entry take(.param .u64 kept, .param .u32 bytes) {
.reg .b64 %d<6>; .reg .b32 %r<4>; .reg .pred %p<2>;
ld.param.u64 %d0, [kept]; ld.param.u32 %r1, [bytes];
mov.u32 %r0, %tid.x; mul.wide.u32 %d1, %r0, 8; add.u64 %d0, %d0, %d1;
cvt.u64.u32 %d2, %r1;
{ .param .b64 p; .param .b64 q; st.param.b64 [p], %d2; call.uni (q), malloc, (p);
ld.param.b64 %d3, [q]; }
st.global.u64 [%d0], %d3;
setp.eq.u64 %p0, %d3, 0; @%p0 ret;
st.u32 [%d3], %r0;
ret; }
.visible .entry give(.param .u64 kept, .param .u64 out, .param .u32 again) {
.reg .b64 %d<6>; .reg .b32 %r<4>; .reg .pred %p<2>;
ld.param.u64 %d0, [kept]; ld.param.u64 %d1, [out]; ld.param.u32 %r2, [again];
mov.u32 %r0, %tid.x; mul.wide.u32 %d2, %r0, 8; add.u64 %d0, %d0, %d2;
mul.wide.u32 %d2, %r0, 4; add.u64 %d1, %d1, %d2;
ld.global.u64 %d3, [%d0];
ld.u32 %r1, [%d3+OFFSET];
st.global.u32 [%d1], %r1;
{ .param .b64 p; st.param.b64 [p], %d3; call.uni free, (p); }
setp.eq.u32 %p0, %r2, 1; @%p0 ld.u32 %r1, [%d3];
setp.ne.u32 %p0, %r2, 2; @%p0 ret;
{ .param .b64 p; st.param.b64 [p], %d3; call.uni free, (p); }
ret; }
"""
THREADS = 64


def kept(bytes_: int) -> np.ndarray:
    pointers = np.ones(THREADS, np.uint64)
    machine.run(KERNELS, "take", pointers, np.int32(bytes_), block=THREADS)
    return pointers


def give(pointers: np.ndarray, offset: int = 0, again: int = 0) -> np.ndarray:
    out = np.zeros(THREADS, np.int32)
    text = KERNELS.replace("OFFSET", str(offset))
    machine.run(text, "give", pointers, out, np.int32(again), block=THREADS)
    return out


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_memory_stays_from_launch_to_launch(order: str) -> None:
    with machine.options(check=1, order=order):
        pointers = kept(20)
        assert len(set(pointers.tolist())) == THREADS and not (pointers % 16).any()
        assert np.array_equal(give(pointers), np.arange(THREADS))
        assert (kept(0) == 0).all()
        # 8 MB for all of them
        pointers = kept(1 << 20)
        assert (pointers != 0).sum() == 8
        pointers[pointers == 0] = pointers[pointers != 0][0]
        with pytest.raises(MachineError, match=r"or of what was freed before .* lane 8"):
            give(pointers)


@pytest.mark.parametrize(
    ("offset", "again", "report"),
    [
        (20, 0, "outside every allocation; the nearest is .* of 20 bytes, .* 0 bytes past its end"),
        (0, 1, "outside every allocation"),
        (0, 2, "free of what malloc did not return, or of what was freed before"),
    ],
)
def test_errors(offset: int, again: int, report: str) -> None:
    pointers = kept(20)
    with pytest.raises(MachineError, match=report):
        give(pointers, offset, again)
