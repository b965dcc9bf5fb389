"""A strong write does not hide earlier writes, and each word of a vector is a flag: cases with a
kernel that orders the accesses and one that does not."""

from __future__ import annotations

import pytest
from test_races import GPU, NONE, Case, check

CASES = {
    "atomics of all and a plain read": Case(
        "st.shared.u32 [%r4], 0;\nbar.sync 0;\nred.shared.add.u32 [%r2], 1;\nHERE\n"
        "@%p2 ld.shared.u32 %r5, [%r2];\n",
        "bar.sync 0;",
        "",
        rf"race: (read of|write to) shared .*{NONE}",
    ),
    "atomics of all blocks and a plain read": Case(
        "@!%p0 ret;\nred.global.add.u32 [%d0], 1;\nsetp.eq.u32 %p3, %r1, 3;\n"
        "@%p3 HERE.global.u32 %r5, [%d0];\n",
        "ld.relaxed.gpu",
        "ld",
        rf"race: (read of|write to) global .*{GPU}",
        grid=4,
        block=32,
    ),
    "a plain write before atomics": Case(
        "@%p0 st.shared.u32 [%r2], 0;\nHERE\natom.shared.add.u32 %r5, [%r2], 1;\n",
        "bar.sync 0;",
        "",
        rf"race: write to shared .*{NONE}|uninitialised",
    ),
    "a plain write of one block before atomics": Case(
        "@!%p0 ret;\n@%p5 HERE.global.u32 [%d0], 0;\natom.global.add.u32 %r5, [%d0], 1;\n",
        "st.relaxed.gpu",
        "st",
        rf"race: write to global .*{GPU}",
        grid=4,
        block=32,
    ),
    "mbarrier.init before an arrival": Case(
        "@%p0 mbarrier.init.shared.b64 [bar], 64;\nHERE\nmbarrier.arrive.shared.b64 _, [bar];\n",
        "bar.sync 0;",
        "",
        rf"race: write to shared .*{NONE}|uninitialised|mbarrier",
    ),
    "a plain write before a strong one": Case(
        "@!%p0 ret;\n@%p5 bra WRITE;\nld.volatile.global.u32 %r5, [%d0];\nret;\n"
        "WRITE: HERE.global.u32 [%d0], 1;\nst.volatile.global.u32 [%d0], 2;\n",
        "st.volatile",
        "st",
        rf"race: (read of|write to) global .*{GPU}",
        grid=2,
        block=32,
    ),
    "a plain write before the release": Case(
        "@%p5 bra WRITE;\nSPIN: ld.acquire.gpu.global.u32 %r5, [%d0+128];\n"
        "setp.eq.u32 %p4, %r5, 0; @%p4 bra SPIN;\n"
        "HERE.gpu.global.u32 %r5, [%d0];\nret;\n"
        "WRITE: st.global.u32 [%d0], 1;\nst.release.gpu.global.u32 [%d0], 2;\n"
        "st.relaxed.gpu.global.u32 [%d0+128], 1;\n",
        "ld.acquire",
        "ld.relaxed",
        rf"race: read of global .*{GPU}",
        grid=2,
        block=32,
    ),
    "a flag in the second word of a vector": Case(
        "@!%p5 bra READ;\n@%p0 st.global.u32 [%d0+256], 7;\n"
        "@%p0 st.HERE.gpu.global.v2.u32 [%d0], {%r21, %r21};\nret;\n"
        "READ: ld.acquire.gpu.global.u32 %r5, [%d0+4]; setp.eq.u32 %p4, %r5, 0; @%p4 bra READ;\n"
        "ld.global.u32 %r6, [%d0+256];\n",
        "release",
        "relaxed",
        rf"race: read of global .*{GPU}",
        grid=2,
        block=32,
    ),
    "a flag that is read as the fourth word of a vector": Case(
        "@!%p5 bra READ;\n@%p0 st.global.u32 [%d0+256], 7;\n"
        "@%p0 st.release.gpu.global.u32 [%d0+12], %r21;\nret;\n"
        "READ: ld.HERE.gpu.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d0];\n"
        "setp.eq.u32 %p4, %r8, 0; @%p4 bra READ;\n"
        "ld.global.u32 %r6, [%d0+256];\n",
        "acquire",
        "relaxed",
        rf"race: read of global .*{GPU}",
        grid=2,
        block=32,
    ),
}


@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
@pytest.mark.parametrize("name", CASES)
def test_race(name: str, order: str) -> None:
    check(CASES[name], order, modes=("latest",))
