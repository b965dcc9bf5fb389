"""Kernels whose blocks wait for each other, correct under the PTX memory model, and their mutants:
a scan with decoupled look-back, a semaphore that orders sums, and a reduction by the last block.

Blocks have 64 threads; data is u32, so that sums do not depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

THREADS = 64
BLOCKS = 5

HEAD = """
.visible .entry k(.param .u64 x, .param .u64 work, .param .u64 out) {
.reg .b64 %x, %work, %out, %d<12>;
.reg .b32 %tid, %block, %r<24>;
.reg .pred %first, %last, %p<8>;
.shared .align 4 .b32 values[64];
.shared .align 4 .b32 told;
ld.param.u64 %x, [x];
ld.param.u64 %work, [work];
ld.param.u64 %out, [out];
mov.u32 %tid, %tid.x;
mov.u32 %block, %ctaid.x;
setp.eq.u32 %first, %tid, 0;
setp.eq.u32 %last, %tid, 63;
mov.u32 %r22, values;
mad.lo.u32 %r23, %tid, 4, %r22;
"""

# work: a ticket, and per tile a flag (1: sum published, 2: prefix published), sum, prefix. The last
# thread of a block publishes the sum of its tile, adds the preceding sums, and publishes the
# prefix; for the first tile it publishes the prefix at once.
LOOK_BACK = (
    HEAD
    + """
@%first atom.global.add.u32 %r0, [%work], 1;
@%first st.shared.u32 [told], %r0;
bar.sync 0;
ld.shared.u32 %r0, [told];
mad.lo.u32 %r1, %r0, 64, %tid;
mad.wide.u32 %d0, %r1, 4, %x;
ld.global.u32 %r2, [%d0];
st.shared.u32 [%r23], %r2;
bar.sync 0;
mov.u32 %r3, 0;
mov.u32 %r4, %r22;
SUM: ld.shared.u32 %r5, [%r4];
add.u32 %r3, %r3, %r5;
add.u32 %r4, %r4, 4;
setp.le.u32 %p0, %r4, %r23;
@%p0 bra SUM;
@!%last bra TELL;
mad.wide.u32 %d1, %r0, 12, %work;
mov.u32 %r6, 0;
setp.eq.u32 %p1, %r0, 0;
@%p1 bra FOUND;
st.global.u32 [%d1+8], %r3;
st.release.gpu.global.u32 [%d1+4], 1;
mov.b64 %d2, %d1;
BACK: sub.u64 %d2, %d2, 12;
SPIN: ld.acquire.gpu.global.u32 %r7, [%d2+4];
setp.eq.u32 %p2, %r7, 0;
@%p2 bra SPIN;
setp.eq.u32 %p3, %r7, 2;
@%p3 bra WHOLE;
ld.global.u32 %r8, [%d2+8];
add.u32 %r6, %r6, %r8;
bra BACK;
WHOLE: ld.global.u32 %r8, [%d2+12];
add.u32 %r6, %r6, %r8;
FOUND: add.u32 %r9, %r6, %r3;
st.global.u32 [%d1+12], %r9;
st.release.gpu.global.u32 [%d1+4], 2;
st.shared.u32 [told], %r6;
TELL: bar.sync 0;
ld.shared.u32 %r10, [told];
add.u32 %r11, %r10, %r3;
mad.wide.u32 %d3, %r1, 4, %out;
st.global.u32 [%d3], %r11;
ret; }
"""
)

# work: number of blocks that have added. Each block adds its row to out when its turn comes.
SEMAPHORE = (
    HEAD
    + """
mad.lo.u32 %r1, %block, 64, %tid;
mad.wide.u32 %d0, %r1, 4, %x;
ld.global.u32 %r2, [%d0];
@!%first bra TURN;
SPIN: ld.acquire.gpu.global.u32 %r3, [%work];
setp.ne.u32 %p0, %r3, %block;
@%p0 bra SPIN;
TURN: bar.sync 0;
mad.wide.u32 %d1, %tid, 4, %out;
ld.global.u32 %r4, [%d1];
add.u32 %r5, %r4, %r2;
st.global.u32 [%d1], %r5;
bar.sync 0;
add.u32 %r6, %block, 1;
@%first st.release.gpu.global.u32 [%work], %r6;
ret; }
"""
)

# work: a ticket, and from byte 256 on 64 numbers per block. The last block adds them up.
LAST_BLOCK = (
    HEAD
    + """
mad.lo.u32 %r1, %block, 64, %tid;
mad.wide.u32 %d0, %r1, 4, %x;
ld.global.u32 %r2, [%d0];
mad.wide.u32 %d1, %r1, 4, %work;
st.global.u32 [%d1+256], %r2;
bar.sync 0;
@!%first bra WAIT;
fence.acq_rel.gpu;
atom.relaxed.gpu.global.add.u32 %r3, [%work], 1;
fence.acq_rel.gpu;
st.shared.u32 [told], %r3;
WAIT: bar.sync 0;
ld.shared.u32 %r4, [told];
mov.u32 %r5, %nctaid.x;
sub.u32 %r6, %r5, 1;
setp.ne.u32 %p0, %r4, %r6;
@%p0 bra END;
mov.u32 %r7, 0;
mad.wide.u32 %d2, %tid, 4, %work;
ADD: ld.global.u32 %r8, [%d2+256];
add.u32 %r7, %r7, %r8;
add.u64 %d2, %d2, 256;
sub.u32 %r5, %r5, 1;
setp.ne.u32 %p1, %r5, 0;
@%p1 bra ADD;
mad.wide.u32 %d3, %tid, 4, %out;
st.global.u32 [%d3], %r7;
END: ret; }
"""
)


@dataclass(frozen=True)
class Kernel:
    text: str
    work: int  # number of u32 zeros
    outputs: int
    expected: Callable[[np.ndarray], np.ndarray]


KERNELS = {
    "look_back": Kernel(
        LOOK_BACK, 1 + 3 * BLOCKS, BLOCKS * THREADS, lambda x: np.cumsum(x, dtype=np.uint32)
    ),
    "semaphore": Kernel(
        SEMAPHORE, 1, THREADS, lambda x: x.reshape(BLOCKS, -1).sum(0, dtype=np.uint32)
    ),
    "last_block": Kernel(
        LAST_BLOCK,
        64 * (1 + BLOCKS),
        THREADS,
        lambda x: x.reshape(BLOCKS, -1).sum(0, dtype=np.uint32),
    ),
}

# (kernel, fault): original text, its occurrence, faulty text.
MUTANTS: dict[tuple[str, str], tuple[str, int, str]] = {
    ("look_back", "release of the sum relaxed"): ("st.release.gpu", 0, "st.relaxed.gpu"),
    ("look_back", "release of the prefix relaxed"): ("st.release.gpu", 1, "st.relaxed.gpu"),
    ("look_back", "acquire relaxed"): ("ld.acquire.gpu", 0, "ld.relaxed.gpu"),
    ("look_back", "scope of the sum lowered"): ("st.release.gpu", 0, "st.release.cta"),
    ("look_back", "scope of the prefix lowered"): ("st.release.gpu", 1, "st.release.cta"),
    ("look_back", "scope of the acquire lowered"): ("ld.acquire.gpu", 0, "ld.acquire.cta"),
    ("look_back", "flag stored without order"): ("st.release.gpu.global", 0, "st.global"),
    ("look_back", "flag read without order"): ("ld.acquire.gpu.global", 0, "ld.global"),
    ("look_back", "flag published before the sum"): (
        "st.global.u32 [%d1+8], %r3;\nst.release.gpu.global.u32 [%d1+4], 1;",
        0,
        "st.release.gpu.global.u32 [%d1+4], 1;\nst.global.u32 [%d1+8], %r3;",
    ),
    ("look_back", "flag published before the prefix"): (
        "st.global.u32 [%d1+12], %r9;\nst.release.gpu.global.u32 [%d1+4], 2;",
        0,
        "st.release.gpu.global.u32 [%d1+4], 2;\nst.global.u32 [%d1+12], %r9;",
    ),
    ("look_back", "wait for the flag dropped"): ("@%p2 bra SPIN;", 0, ""),
    ("look_back", "barrier behind the ticket dropped"): ("bar.sync 0;", 0, ""),
    ("look_back", "barrier behind the values dropped"): ("bar.sync 0;", 1, ""),
    ("look_back", "barrier behind the prefix dropped"): ("TELL: bar.sync 0;", 0, "TELL:"),
    ("look_back", "ticket not atomic"): (
        "@%first atom.global.add.u32 %r0, [%work], 1;",
        0,
        "@%first ld.global.u32 %r0, [%work];\n@%first add.u32 %r12, %r0, 1;\n"
        "@%first st.global.u32 [%work], %r12;",
    ),
    ("semaphore", "release relaxed"): ("st.release.gpu", 0, "st.relaxed.gpu"),
    ("semaphore", "acquire relaxed"): ("ld.acquire.gpu", 0, "ld.relaxed.gpu"),
    ("semaphore", "scope of the release lowered"): ("st.release.gpu", 0, "st.release.cta"),
    ("semaphore", "scope of the acquire lowered"): ("ld.acquire.gpu", 0, "ld.acquire.cta"),
    ("semaphore", "release without order"): ("st.release.gpu.global", 0, "st.global"),
    ("semaphore", "wait dropped"): ("@%p0 bra SPIN;", 0, ""),
    ("semaphore", "barrier behind the wait dropped"): ("TURN: bar.sync 0;", 0, "TURN:"),
    ("semaphore", "barrier before the release dropped"): ("bar.sync 0;", 1, ""),
    ("semaphore", "released before the sum"): (
        "st.global.u32 [%d1], %r5;\nbar.sync 0;\nadd.u32 %r6, %block, 1;\n"
        "@%first st.release.gpu.global.u32 [%work], %r6;",
        0,
        "bar.sync 0;\nadd.u32 %r6, %block, 1;\n"
        "@%first st.release.gpu.global.u32 [%work], %r6;\nst.global.u32 [%d1], %r5;",
    ),
    ("semaphore", "released for another"): (
        "add.u32 %r6, %block, 1;",
        0,
        "add.u32 %r6, %block, 2;",
    ),
    ("last_block", "fence before the ticket dropped"): ("fence.acq_rel.gpu;", 0, ""),
    ("last_block", "fence behind the ticket dropped"): ("fence.acq_rel.gpu;", 1, ""),
    ("last_block", "scope of the first fence lowered"): (
        "fence.acq_rel.gpu;",
        0,
        "fence.acq_rel.cta;",
    ),
    ("last_block", "scope of the second fence lowered"): (
        "fence.acq_rel.gpu;",
        1,
        "fence.acq_rel.cta;",
    ),
    ("last_block", "scope of the ticket lowered"): ("atom.relaxed.gpu", 0, "atom.relaxed.cta"),
    ("last_block", "barrier before the ticket dropped"): ("bar.sync 0;", 0, ""),
    ("last_block", "barrier behind the ticket dropped"): ("WAIT: bar.sync 0;", 0, "WAIT:"),
    ("last_block", "one block too early"): ("sub.u32 %r6, %r5, 1;", 0, "sub.u32 %r6, %r5, 2;"),
}


def mutant(kernel: str, fault: str) -> str:
    before, time, after = MUTANTS[kernel, fault]
    parts = KERNELS[kernel].text.split(before)
    assert len(parts) > time + 1, f"{kernel}: {fault}: no such place"
    return before.join(parts[: time + 1]) + after + before.join(parts[time + 1 :])
