"""Ordering of accesses by different warps, blocks and proxies: each rule with a kernel that keeps
it and one that breaks it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hopper import init, kernel, sm90, wait
from machine import MachineError, machine

LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.global.shared::cta.bulk_group"
REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32"
COMMIT = "cp.async.bulk.commit_group;\n"
FENCE = "fence.proxy.async.shared::cta;\n"
# %p0: thread 0; %p1: warp 0; %p2: warp 1; %p5: block 0. %r4: shared address of the thread's 16
# bytes.
PLACE = "mad.lo.u32 %r4, %r0, 16, %r2; setp.eq.u32 %p5, %r1, 0;\n"
ZERO = "mov.u32 %r20, 0; mov.u32 %r21, 1;\n"


@dataclass
class Case:
    body: str  # HERE marks the part that differs
    right: str
    wrong: str
    report: str
    grid: int = 1
    block: int = 64
    cluster: int = 1
    orders: tuple[str, ...] = ("forward", "reverse", "seeded")
    proxy: str = "usual"


def flag(write: str, read: str, before: str = "", after: str = "") -> str:
    """Block 0 writes a word and sets a flag; block 1 waits for the flag before it reads the
    word."""
    return f"""@!%p5 bra READ;
@%p0 st.global.u32 [%d0+256], 7;
{before}
@%p0 {write} [%d0], 1;
ret;
READ: {read} %r5, [%d0]; setp.eq.u32 %p4, %r5, 0; @%p4 bra READ;
{after}
ld.global.u32 %r6, [%d0+256];
"""


def ticket(before: str, after: str) -> str:
    """Each block writes a word; the last one reads all of them and resets the counter."""
    return f"""mul.wide.u32 %d2, %r1, 4; add.u64 %d2, %d2, %d0;
@%p0 st.global.u32 [%d2+256], %r1;
{before}
@!%p0 ret;
atom.global.add.u32 %r5, [%d0], 1;
setp.ne.u32 %p4, %r5, 3; @%p4 ret;
{after}
ld.global.v4.u32 {{%r6, %r7, %r8, %r9}}, [%d0+256];
st.global.u32 [%d0], 0;
"""


LANES = r"no bar\.warp\.sync \(__syncwarp\) or barrier lies between them"
NONE = "no barrier, mbarrier, or release and acquire lies between them"
GPU = r"no release and acquire of \.gpu scope lies between them"
CTA = r"a release and acquire of \.cta scope does not order them: \.{} is needed"
NARROW = r"one of them is of \.cta scope: \.gpu is needed"
PROXY = r"fence\.proxy\.async is missing between them"

THREE = """@%p1 st.shared.u32 [%r2], %r3;
setp.lt.u32 %p3, %r0, 64;
@%p3 bar.sync 1, 64;
@%p3 bar.sync 2, 64;
@HERE ld.shared.u32 %r5, [%r2];
"""
PAIR = """@%p1 bra WRITE;
HERE
ld.shared.u32 %r5, [%r2];
ret;
WRITE: st.shared.u32 [%r2], %r3;
bar.sync 1, 64;
"""
ARRIVE = (
    init(1)
    + """@!%p0 bra READ;
st.shared.u32 [%r2], 5;
HERE
ret;
READ: @!%p2 ret;
"""
    + wait("0")
    + "ld.shared.u32 %r5, [%r2];\n"
)
PASS = (
    init(1)
    + """@!%p0 bra READ;
st.shared.u32 [%r2], 5;
mbarrier.arrive.shared.b64 _, [bar];
ret;
READ: @!%p2 ret;
{ .reg .pred done;
AGAIN: mbarrier.try_wait.parity.HEREshared::cta.b64 done, [bar], 0;
@!done bra AGAIN; }
ld.shared.u32 %r5, [%r2];
"""
)
BULK = (
    init(1)
    + f"""@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 1024;
@%p0 {LOAD} [%r2], [%d0], 1024, [bar];
HERE
ld.shared.u32 %r5, [%r4];
"""
)
REUSE = (
    init(1)
    + f"""@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 1024;
@%p0 {LOAD} [%r2], [%d0], 1024, [bar];
{wait("0")}
bar.sync 1, 64;
ld.shared.u32 %r5, [%r4];
HERE
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 1024;
@%p0 {LOAD} [%r2], [%d0], 1024, [bar];
{wait("1")}
"""
)
FILLED = f"""st.shared.v4.u32 [%r4], {{%r0, %r0, %r0, %r0}};
HERE
@%p0 {STORE} [%d0], [%r2], 1024;
@%p0 {COMMIT}
@%p0 cp.async.bulk.wait_group.read 0;
"""
DRAIN = f"""st.shared.v4.u32 [%r4], {{%r0, %r0, %r0, %r0}};
{FENCE}
bar.sync 0;
@%p0 {STORE} [%d0], [%r2], 512;
@%p0 {COMMIT}
HERE
"""
COPIES = (
    init(32)
    + """@%p1 cp.async.ca.shared.global [%r4], [%d0], 16;
@%p1 cp.async.mbarrier.arrive.noinc.shared.b64 [bar];
HERE
sub.u32 %r5, %r4, 512;
@%p2 ld.shared.u32 %r6, [%r5];
"""
)
PRODUCT = """wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %d3, %d3, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
"""
OPERANDS = """mov.u64 %d4, 0x0000000800000000; cvt.u64.u32 %d3, %r2; shr.u64 %d3, %d3, 4;
or.b64 %d3, %d3, %d4;
st.shared.v4.u32 [%r4], {%r20, %r20, %r20, %r20};
"""
CLUSTER = """@%p0 st.shared.u32 [%r2], 7;
barrier.cluster.arrive.HERE.aligned; barrier.cluster.wait.acquire.aligned;
xor.b32 %r5, %r1, 1; mapa.shared::cluster.u32 %r6, %r2, %r5;
ld.shared::cluster.u32 %r7, [%r6];
barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
"""
REMOTE = (
    "@%p0 mbarrier.init.shared.b64 [bar], 1;\nfence.mbarrier_init.release.cluster;\n"
    "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned;\n"
    "mov.u32 %r8, bar; mapa.shared::cluster.u32 %r9, %r8, 0;\n"
    "mapa.shared::cluster.u32 %r10, %r2, 0;\n"
    "@%p5 bra READ;\n@%p0 st.shared::cluster.u32 [%r10], 7;\n"
    "@%p0 mbarrier.arrive.HEREshared::cluster.b64 _, [%r9];\nbra OUT;\nREAD:\n"
    + wait("0")
    + "ld.shared.u32 %r5, [%r2];\n"
    "OUT: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;\n"
)
CHAIN = """setp.eq.u32 %p3, %r1, 1;
@%p5 bra FIRST;
@%p3 bra SECOND;
LAST: ld.acquire.gpu.global.u32 %r5, [%d0]; setp.ne.u32 %p4, %r5, 2; @%p4 bra LAST;
ld.global.u32 %r6, [%d0+256];
ret;
FIRST: st.global.u32 [%d0+256], 7;
st.release.gpu.global.u32 [%d0], 1;
ret;
SECOND: ld.relaxed.gpu.global.u32 %r5, [%d0]; setp.ne.u32 %p4, %r5, 1; @%p4 bra SECOND;
HERE
"""

CASES = {
    "a named barrier orders those that take part": Case(
        THREE,
        "%p2",
        "!%p3",
        rf"race: .*(written|read) by warp [02] at line .*shared.*{NONE}",
        block=96,
    ),
    "bar.arrive does not acquire": Case(
        PAIR, "bar.sync 1, 64;", "bar.arrive 1, 64;", rf"race: .*{NONE}"
    ),
    "mbarrier.arrive releases": Case(
        ARRIVE,
        "mbarrier.arrive.shared.b64 _, [bar];",
        "mbarrier.arrive.relaxed.cta.shared.b64 _, [bar];",
        rf"race: read of .*written by warp 0 at line.*{NONE}",
    ),
    "mbarrier.try_wait acquires": Case(PASS, "", "relaxed.cta.", rf"race: read .*{NONE}"),
    "a fence after a relaxed wait": Case(
        PASS.replace("HERE", "relaxed.cta.").replace("ld.shared", "HERE\nld.shared"),
        "fence.acq_rel.cta;",
        "",
        rf"race: read .*{NONE}",
    ),
    "bulk copy: its mbarrier": Case(
        BULK,
        wait("0"),
        "bar.sync 0;\n",
        "while a bulk copy of warp 0 into it is in flight|no wait for the mbarrier",
    ),
    "bulk copy: one waits for all": Case(
        BULK,
        "@%p2 bra MEET;\n" + wait("0") + "MEET: bar.sync 0;\n",
        "@%p2 bra MEET;\n" + wait("0") + "MEET:\n",
        f"while a bulk copy|no wait for the mbarrier|write to .*{NONE}",
    ),
    "bulk copy over what others read": Case(
        REUSE, FENCE + "bar.sync 0;\n", FENCE, rf"race: write to .*{NONE}|in flight"
    ),
    "bulk copy over what others read: proxy": Case(
        REUSE,
        FENCE + "bar.sync 0;\n",
        "bar.sync 0;\n",
        rf"race: write to .*read by warp .*{PROXY}",
        proxy="strict",
    ),
    "bulk store: proxy fence of the writers": Case(
        FILLED, FENCE + "bar.sync 0;\n", "bar.sync 0;\n", rf"race: read of .*written by .*{PROXY}"
    ),
    "bulk store: proxy fence of another memory": Case(
        FILLED.replace("HERE", "fence.proxy.async.HERE;\nbar.sync 0;"),
        "shared::cta",
        "global",
        r"fence\.proxy\.async between them is not of this memory",
    ),
    "bulk store: proxy fence behind the barrier": Case(
        FILLED, "bar.sync 0;\n" + FENCE, FENCE, rf"race: .*{NONE}|uninitialised"
    ),
    "bulk store: its source": Case(
        DRAIN + "@%p2 st.shared.u32 [%r2], 1;\n",
        "@%p0 cp.async.bulk.wait_group.read 0;\nbar.sync 0;\n",
        "bar.sync 0;\n",
        r"race: write to .*read by a bulk copy of warp 0 at line.*cp.async.*wait_group\.read",
    ),
    "bulk store: what it wrote": Case(
        DRAIN + "@%p2 ld.global.u32 %r5, [%d0];\n",
        "@%p0 cp.async.bulk.wait_group 0;\nbar.sync 0;\n",
        "@%p0 cp.async.bulk.wait_group.read 0;\nbar.sync 0;\n",
        r"race: read of global .*written by a bulk copy of warp 0 at line.*no cp\.async\.bulk",
    ),
    "bulk reductions do not race, a store does": Case(
        DRAIN.replace("HERE", "@%p0 cp.async.bulk.wait_group 0;").replace(STORE, "HERE"),
        REDUCE,
        STORE,
        r"race: write to global .*written by a bulk copy "
        r"of warp 0 of block",
        grid=2,
    ),
    "cp.async that arrives": Case(
        COPIES,
        wait("0"),
        "bar.sync 0;\n",
        "while a cp.async of warp 0 into it is in flight|no wait for the mbarrier",
    ),
    "wgmma: proxy fence": Case(
        OPERANDS + "HERE" + PRODUCT + "wgmma.wait_group.sync.aligned 0;\n",
        FENCE + "bar.sync 0;\n",
        "bar.sync 0;\n",
        rf"race: read of .*written by warp .*{PROXY}",
        block=128,
    ),
    "wgmma: its operands": Case(
        OPERANDS
        + FENCE
        + "bar.sync 0;\n"
        + PRODUCT
        + "HERE\nst.shared.u32 [%r4], 1;\nwgmma.wait_group.sync.aligned 0;\n",
        "wgmma.wait_group.sync.aligned 0;\nbar.sync 0;\n",
        "bar.sync 0;\n",
        r"race: write to .*read by wgmma of the warpgroup of warp \d at line.*wgmma\.wait_group",
        block=128,
    ),
    "wgmma: registers before the fence": Case(
        OPERANDS
        + FENCE
        + "bar.sync 0;\nmov.f32 %f1, 0f00000000;\nHERE"
        + PRODUCT.partition("\n")[2]
        + "wgmma.wait_group.sync.aligned 0;\n",
        "wgmma.fence.sync.aligned;\n",
        "",
        r"a register of it was written at line \d+: mov\.f32.*no wgmma\.fence lies between",
        block=128,
    ),
    "wgmma: registers before the wait": Case(
        OPERANDS
        + FENCE
        + "bar.sync 0;\n"
        + PRODUCT
        + "HERE\nmov.f32 %f1, 0f00000000;\nwgmma.wait_group.sync.aligned 0;\n",
        "wgmma.wait_group.sync.aligned 0;",
        "",
        r"write to a register of wgmma at line \d+: wgmma.*before its wgmma\.wait_group",
        block=128,
    ),
    "wgmma: A in registers before the wait": Case(
        OPERANDS + FENCE + "bar.sync 0;\nwgmma.fence.sync.aligned;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, "
        "{%r20, %r21, %r20, %r21}, %d3, 0, 1, 1, 0;\nwgmma.commit_group.sync.aligned;\n"
        "HERE\nmov.u32 %r21, 5;\nwgmma.wait_group.sync.aligned 0;\n",
        "wgmma.wait_group.sync.aligned 0;",
        "",
        r"write to a register of wgmma at line \d+: wgmma.*before its wgmma\.wait_group",
        block=128,
    ),
    "cluster: arrive.release": Case(
        CLUSTER,
        "release",
        "relaxed",
        r"race: read of shared address 0x0 of block \d, written by warp 0 of block \(\d, 0, 0\) "
        r"at line.*no barrier\.cluster",
        grid=2,
        cluster=2,
    ),
    "cluster: scope of an arrival": Case(
        REMOTE, "", "release.cta.", CTA.format("cluster"), grid=2, cluster=2
    ),
    "flag: release and acquire": Case(
        flag("HERE.global.u32", "ld.acquire.gpu.global.u32"),
        "st.release.gpu",
        "st.relaxed.gpu",
        rf"race: read of global .*written by warp 0 of block \(0, 0, 0\) at line.*{GPU}",
        grid=2,
    ),
    "flag: the acquire": Case(
        flag("st.release.gpu.global.u32", "HERE.global.u32"),
        "ld.acquire.gpu",
        "ld.relaxed.gpu",
        rf"race: read of global .*{GPU}",
        grid=2,
    ),
    "flag: scope of the release": Case(
        flag("st.release.HERE.global.u32", "ld.acquire.gpu.global.u32"),
        "gpu",
        "cta",
        rf"race: .* global .*{NARROW}",
        grid=2,
    ),
    "flag: scope of the acquire": Case(
        flag("st.release.gpu.global.u32", "ld.acquire.HERE.global.u32"),
        "gpu",
        "cta",
        rf"race: .* global .*{NARROW}",
        grid=2,
    ),
    "flag: fences": Case(
        flag("st.volatile.global.u32", "ld.volatile.global.u32", "HERE", "membar.gl;"),
        "membar.gl;",
        "",
        rf"race: read of global .*{GPU}",
        grid=2,
    ),
    "flag: the second fence": Case(
        flag("st.volatile.global.u32", "ld.volatile.global.u32", "membar.gl;", "HERE"),
        "membar.gl;",
        "",
        rf"race: read of global .*{GPU}",
        grid=2,
    ),
    "flag: scope of a fence": Case(
        flag(
            "st.relaxed.gpu.global.u32",
            "ld.relaxed.gpu.global.u32",
            "fence.acq_rel.HERE;",
            "fence.acq_rel.gpu;",
        ),
        "gpu",
        "cta",
        rf"race: read of global .*{CTA.format('gpu')}",
        grid=2,
    ),
    "flag: a weak store": Case(
        flag("HERE.global.u32", "ld.acquire.gpu.global.u32"),
        "st.release.gpu",
        "st",
        rf"race: (read of|write to) global .*{GPU}",
        grid=2,
    ),
    "flag: a strong store behind the release": Case(
        flag("HERE st.relaxed.gpu.global.u32", "ld.acquire.gpu.global.u32"),
        "st.release.gpu.global.u32 [%d0], 1; @%p0",
        "st.release.cta.global.u32 [%d0], 1; @%p0",
        rf"race: (read of|write to) global .*({CTA.format('gpu')}|{NARROW})",
        grid=2,
    ),
    "ticket: fence before": Case(
        ticket("HERE\nbar.sync 0;", "membar.gl;"),
        "membar.gl;",
        "membar.cta;",
        rf"race: read of global .*{CTA.format('gpu')}",
        grid=4,
    ),
    "ticket: fence after": Case(
        ticket("membar.gl;", "HERE"),
        "membar.gl;",
        "",
        rf"race: read of global .*{GPU}",
        grid=4,
    ),
    "fence.sc of a cluster before a barrier": Case(
        "@!%p5 bra READ;\n@%p2 st.global.u32 [%d0+256], 7;\nHERE\nbar.sync 0;\n"
        "@%p0 st.relaxed.cluster.global.u32 [%d0], 1;\nret;\n"
        "READ: ld.relaxed.cluster.global.u32 %r5, [%d0]; setp.eq.u32 %p4, %r5, 0;\n"
        "@%p4 bra READ;\nfence.acq_rel.cluster;\nld.global.u32 %r6, [%d0+256];\n",
        "fence.sc.cluster;",
        "fence.sc.cta;",
        r"race: read of global .*written by warp 1 .*\.cluster",
        grid=2,
        cluster=2,
    ),
    "an atomic goes on with the release": Case(
        CHAIN,
        "@%p0 atom.relaxed.gpu.global.add.u32 %r5, [%d0], 1;",
        "@%p0 st.relaxed.gpu.global.u32 [%d0], 2;",
        rf"race: read of global .*{GPU}",
        grid=3,
        block=32,
        orders=("forward",),  # in other orders block 2 acquires the first block's release
    ),
    "strong accesses of too small a scope": Case(
        "red.relaxed.HERE.global.add.u32 [%d0], 1;\n",
        "gpu",
        "cta",
        rf"race: write to global .*written by warp \d of block.*{NARROW}",
        grid=2,
    ),
    "each of many reads again what it saw": Case(
        "@!%p0 ret; @!%p5 bra READ;\nst.relaxed.HERE.global.u32 [%d0], 1; ret;\n"
        "READ: ld.relaxed.gpu.global.u32 %r5, [%d0]; setp.eq.u32 %p4, %r5, 0; @%p4 bra READ;\n"
        "ld.global.u32 %r6, [%d0];\n",
        "gpu",
        "cta",
        rf"race: (read of|write to) global .*{NARROW}",
        grid=20,
        block=32,
        orders=("forward", "seeded"),
    ),
    "ld.global.nc behind a write": Case(
        "@%p0 st.global.u32 [%d0], 7;\nbar.sync 0;\nld.globalHERE.u32 %r5, [%d0];\n",
        "",
        ".nc",
        r"read of global .* by ld\.global\.nc, written in the same launch at line",
    ),
    "ld.global.nc before a write": Case(
        "ld.globalHERE.u32 %r5, [%d0];\nbar.sync 0;\n@%p0 st.global.u32 [%d0], 7;\n",
        "",
        ".nc",
        r"write to global .*, which ld\.global\.nc reads in the same launch, at line",
    ),
    "lanes of a warp": Case(
        "@%p1 st.shared.u32 [%r4], %r0;\nHERE\n@%p0 ld.shared.u32 %r5, [%r4+16];\n",
        "bar.warp.sync -1;",
        "",
        rf"race: read of shared .*written by lane 1 of the warp at line .*{LANES}",
    ),
    "lanes that store to one word": Case(
        "HERE st.shared.u32 [%r2], %r0;\n",
        "@%p0",
        "@%p1",
        rf"race: write to shared address 0x0, written by lane 0 of the warp.*{LANES}",
    ),
    "an arrival of lane 0 for other lanes": Case(
        init(1)
        + "@!%p1 bra READ;\nst.shared.u32 [%r4], 5;\nHERE\n"
        + "@%p0 mbarrier.arrive.shared.b64 _, [bar];\nret;\nREAD: "
        + wait("0")
        + "sub.u32 %r4, %r4, 512;\nld.shared.u32 %r5, [%r4];\n",
        "bar.warp.sync -1;",
        "",
        rf"race: read of shared address 0x10, written by warp 0 .*{NONE}",
    ),
    "an arrival of lane 0 for the reads of other lanes": Case(
        init(1)
        + "@!%p1 bra WRITE;\nld.shared.u32 %r5, [%r4];\nHERE\n"
        + "@%p0 mbarrier.arrive.shared.b64 _, [bar];\nret;\nWRITE: "
        + wait("0")
        + "sub.u32 %r4, %r4, 512;\nst.shared.u32 [%r4], 5;\n",
        "bar.warp.sync -1;",
        "",
        rf"race: write to shared address 0x10, read by warp 0 .*{NONE}",
    ),
    "a flag of lane 0 for other lanes": Case(
        "@!%p5 bra READ;\nmul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d1, %d0;\n"
        "st.global.u32 [%d1+256], 7;\nHERE\n@%p0 fence.acq_rel.gpu;\n"
        "@%p0 st.relaxed.gpu.global.u32 [%d0], 1;\nret;\n"
        "READ: ld.acquire.gpu.global.u32 %r5, [%d0]; setp.eq.u32 %p4, %r5, 0; @%p4 bra READ;\n"
        "ld.global.u32 %r6, [%d0+260];\n",
        "bar.warp.sync -1;",
        "",
        rf"race: read of global .*, written by warp 0 .*{GPU}",
        grid=2,
        block=32,
    ),
    "one of many readers": Case(
        "ld.shared.u32 %r5, [%r2];\nsetp.ne.u32 %p3, %r3, 15;\nHERE;\n"
        "@%p0 st.shared.u32 [%r2], 1;\n",
        "bar.sync 1",
        "@%p3 bar.sync 1, 928",
        rf"race: (write to shared .*read by warp 15|read of shared .*written by warp 0).*{NONE}",
        block=960,
    ),
    "blocks that overlap": Case(
        "mul.wide.u32 %d2, %r1, HERE; mad.wide.u32 %d2, %r0, 4, %d2; add.u64 %d2, %d2, %d0;\n"
        "st.global.u32 [%d2], %r0;\n",
        "256",
        "252",
        rf"race: write to global .*{GPU}",
        grid=3,
    ),
    "a copy from what another block writes": Case(
        "@!%p0 ret;\n@!%p5 bra OTHER;\ncp.async.ca.shared.global [%r4], [%d0], 16;\n"
        "cp.async.wait_all;\nret;\n"
        "OTHER: st.global.u32 [%d0+HERE], 1;\n",
        "16",
        "12",
        rf"race: (write to|read of) global .*{GPU}",
        grid=2,
    ),
}


def run(case: Case, text: str) -> None:
    data = np.zeros(1024, np.uint32)
    body = PLACE + ZERO + case.body.replace("HERE", text)
    machine.run(
        kernel(body, shared=4096, cluster=case.cluster), "k", data, grid=case.grid, block=case.block
    )


def check(
    case: Case, order: str, modes: tuple[str, ...] = ("latest", "earliest", "seed:1")
) -> None:
    fuel = 7 if order == "seeded" else 20000
    for mode in modes:
        options = {"order": order, "async": mode, "proxy": case.proxy}
        with sm90(check=1, **options, seed=3, fuel=fuel, watchdog=1):
            run(case, case.right)
            with pytest.raises(MachineError, match=case.report):
                run(case, case.wrong)


@pytest.mark.parametrize(
    ("name", "order"), [(name, order) for name, case in CASES.items() for order in case.orders]
)
def test_race(name: str, order: str) -> None:
    check(CASES[name], order)
