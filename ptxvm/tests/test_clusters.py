"""Clusters: ranks, distributed shared memory, barrier.cluster, launch rules; and the other
warp-level instructions of compute capability 9.0."""

from __future__ import annotations

import numpy as np
import pytest
from hopper import kernel, sm90, wait
from machine import MachineError, machine

ORDERS = ["forward", "reverse", "seeded"]
MEET = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"


def test_special_registers() -> None:
    names = [
        f"%{n}.{x}"
        for n in ("clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
        for x in "xyz"
    ] + ["%cluster_ctarank", "%cluster_nctarank"]
    stores = "".join(
        f"mov.u32 %r5, {name}; st.global.u32 [%d1+{4 * i}], %r5;\n" for i, name in enumerate(names)
    )
    body = f"""
mov.u32 %r6, %ctaid.y; mov.u32 %r7, %nctaid.x; mad.lo.u32 %r8, %r6, %r7, %r1;
mov.u32 %r6, %ctaid.z; mul.lo.u32 %r7, %r7, 6; mad.lo.u32 %r8, %r6, %r7, %r8;
mad.wide.u32 %d1, %r8, 64, %d0;
{stores}
mov.pred %p3, %is_explicit_cluster; selp.u32 %r5, 1, 0, %p3; st.global.u32 [%d1+56], %r5;"""
    text = kernel(body, cluster=2).replace("2, 1, 1", "2, 3, 1")
    out = np.zeros((2, 6, 4, 16), np.uint32)
    for order in ORDERS:
        with sm90(order=order):
            machine.run(text, "k", out, grid=(4, 6, 2))
        z, y, x = np.meshgrid(*map(np.arange, out.shape[:3]), indexing="ij")
        wanted = [x // 2, y // 3, z, 2, 2, 2, x % 2, y % 3, 0, 2, 3, 1, x % 2 + y % 3 * 2, 6, 1]
        for i, value in enumerate(wanted):
            assert (out[..., i] == value).all(), names[i]


@pytest.mark.parametrize("order", ORDERS)
def test_memory_of_the_others(order: str) -> None:
    """Each block stores words in the next block's memory, by a mapped and by a generic address,
    adds to a word of block 0, and reads the previous block's words."""
    body = f"""
mov.u32 %r4, %cluster_ctarank; mov.u32 %r5, %cluster_nctarank;
add.u32 %r6, %r4, 1; rem.u32 %r6, %r6, %r5;
@%p0 st.shared.u32 [%r2+512], 0;
{MEET}
shl.b32 %r7, %r0, 2; add.u32 %r8, %r2, %r7;
mapa.shared::cluster.u32 %r9, %r8, %r6;
mad.lo.u32 %r10, %r1, 100, %r0;
st.shared::cluster.u32 [%r9], %r10;
cvt.u64.u32 %d2, %r8; cvta.shared.u64 %d3, %d2; mapa.u64 %d4, %d3, %r6;
st.u32 [%d4+128], %r10;
getctarank.shared::cluster.u32 %r11, %r9; getctarank.u64 %r12, %d4; getctarank.u64 %r13, %d3;
mov.u32 %r14, 0; mapa.shared::cluster.u32 %r15, %r2, %r14;
red.shared::cluster.add.u32 [%r15+512], 1;
atom.shared::cluster.add.u32 %r16, [%r15+512], 1;
{MEET}
ld.shared.u32 %r17, [%r8]; ld.shared.u32 %r18, [%r8+128]; ld.shared::cluster.u32 %r19, [%r15+512];
mul.wide.u32 %d5, %r0, 24; mad.wide.u32 %d5, %r1, 768, %d5; add.u64 %d5, %d5, %d0;
st.global.v2.u32 [%d5], {{%r11, %r12}}; st.global.v2.u32 [%d5+8], {{%r13, %r17}};
st.global.v2.u32 [%d5+16], {{%r18, %r19}};
{MEET}"""
    out = np.zeros((8, 32, 6), np.uint32)
    with sm90(order=order, seed=2, fuel=5 if order == "seeded" else 20000, check=1):
        machine.run(kernel(body, cluster=4), "k", out, grid=8)
    rank, lane = np.arange(8)[:, None] % 4, np.arange(32)
    before = np.arange(8)[:, None] // 4 * 4 + (rank + 3) % 4
    assert (out[..., :2] == ((rank + 1) % 4)[..., None]).all()
    assert (out[..., 2] == rank).all()
    assert (out[..., 3:5] == (before * 100 + lane)[..., None]).all()
    assert (out[..., 5] == 256).all()


@pytest.mark.parametrize("order", ORDERS)
def test_arrivals_at_another_block(order: str) -> None:
    """Block 0 waits for an arrival of each warp of the cluster and for bytes expected by other
    blocks."""
    body = f"""
@%p0 mbarrier.init.shared::cta.b64 [bar], 6;
fence.mbarrier_init.release.cluster;
{MEET}
mov.u32 %r4, 0; mov.u32 %r5, bar; mapa.shared::cluster.u32 %r6, %r5, %r4;
and.b32 %r7, %r0, 31; setp.eq.u32 %p3, %r7, 0;
mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%r6], 8;
@%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r6], 8;
mov.u32 %r8, %cluster_ctarank; setp.ne.u32 %p4, %r8, 0;
@%p4 bra OUT;
{wait("0")}
mul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d1, %d0; st.global.u32 [%d1], 1;
OUT:
{MEET}"""
    out = np.zeros(64, np.uint32)
    with sm90(order=order, seed=1, fuel=3 if order == "seeded" else 20000):
        machine.run(kernel(body, cluster=3), "k", out, grid=3, block=64)
    assert out.all()


def test_barrier_does_not_wait_for_threads_that_exited() -> None:
    body = """
setp.gt.u32 %p3, %r0, 40; @%p3 ret;
setp.eq.u32 %p4, %r1, 1; @%p4 ret;
barrier.cluster.arrive.relaxed; barrier.cluster.wait;
@%p0 st.global.u32 [%d0], 1;"""
    out = np.zeros(1, np.uint32)
    with sm90():
        machine.run(kernel(body, cluster=2), "k", out, grid=2, block=64)
    assert out[0] == 1


@pytest.mark.parametrize("order", ORDERS)
def test_an_arrival_counts_for_its_own_thread(order: str) -> None:
    """Warp 0 arrives and exits; warp 1 must still wait for warp 2."""
    body = f"""
mov.u32 %r5, 0;
@%p1 bra GONE;
@%p2 bra READ;
SPIN: add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 200; @%p4 bra SPIN;
st.shared.u32 [%r2], 7;
{MEET}
ret;
GONE: barrier.cluster.arrive.aligned; ret;
READ: {MEET}
ld.shared.u32 %r6, [%r2]; st.global.u32 [%d0], %r6;"""
    out = np.zeros(1, np.uint32)
    with sm90(order=order, fuel=20):
        machine.run(kernel(body), "k", out, block=96)
    assert out[0] == 7


def test_deadlock_names_all_blocks() -> None:
    body = "setp.eq.u32 %p3, %r1, 1;\n@%p3 bar.sync 1, 64;\n" + MEET
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(kernel(body, cluster=2), "k", np.zeros(1), grid=2)
    report = str(error.value)
    assert "deadlock in block (0, 0, 0)" in report and "and in block (1, 0, 0)" in report
    assert "waits at barrier 1" in report
    assert "waits at the barrier of the cluster: 32 of 64 threads have arrived" in report


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        ("barrier.cluster.wait;", "barrier.cluster.wait without an arrival"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "a second arrival"),
        ("mapa.shared::cluster.u32 %r5, %r2, 2;", "block 2 of a cluster of 2"),
        (
            "mov.u32 %r6, 1; mapa.shared::cluster.u32 %r5, %r2, %r6; "
            "ld.shared::cluster.u32 %r7, [%r5+4096];",
            "address 0x1000 of block 1 of the cluster: its shared memory has 1024 bytes, the",
        ),
        (
            "mov.u32 %r6, 1; mapa.shared::cluster.u32 %r5, %r2, %r6; ld.shared.u32 %r7, [%r5];",
            "read of 4 bytes at shared address",
        ),
    ],
)
def test_misuse(statement: str, report: str) -> None:
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(kernel(statement, cluster=2), "k", np.zeros(1), grid=2)
    assert report in str(error.value)


def test_memory_of_a_block_that_finished() -> None:
    body = """
setp.eq.u32 %p3, %r1, 1; @%p3 ret;
mov.u32 %r9, 0;
SPIN: add.u32 %r9, %r9, 1; setp.lt.u32 %p5, %r9, 30000; @%p5 bra SPIN;
mov.u32 %r6, 1; mapa.shared::cluster.u32 %r5, %r2, %r6;
st.shared::cluster.u32 [%r5], 1;"""
    with sm90(), pytest.raises(MachineError, match="of block 1 of the cluster, which has finished"):
        machine.run(kernel(body, cluster=2), "k", np.zeros(1), grid=2)


ARRIVE = "@%p3 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];"
WAIT = f"@!%p4 bra OUT; {wait('0')} OUT:"
LOAD = "@%p3 ld.shared::cluster.u32 %r8, [%r7];"
RAISE = "@%p3 st.release.cluster.shared::cluster.u32 [%r7+4], 1;"
POLL = "POLL: ld.relaxed.cluster.shared.u32 %r9, [%r2+4]; setp.eq.u32 %p5, %r9, 0; @%p5 bra POLL;"
# Accesses of block 1 to the memory of block 0, and how block 1 waits for them.
ACCESSES = {
    "arrive": (ARRIVE, WAIT),
    "arrive, relaxed wait": (ARRIVE, WAIT.replace(".parity", ".parity.relaxed.cluster")),
    "store": ("@%p3 st.shared::cluster.u32 [%r7], 1;", MEET),
    "load": (LOAD, MEET),
    "load, relaxed poll": (LOAD + RAISE, f"@!%p4 bra OUT; {POLL} OUT:"),
}
WITHOUT_A_WAIT = "block 0 of the cluster may finish before this access to its shared memory"


def test_a_report_names_the_lane_that_arrived() -> None:
    body = f"""@%p0 mbarrier.init.shared::cta.b64 [bar], 1; fence.mbarrier_init.release.cluster;
{MEET}mov.u32 %r4, 0; mov.u32 %r5, bar; mapa.shared::cluster.u32 %r6, %r5, %r4;
setp.eq.u32 %p3, %r1, 1; setp.eq.u32 %p4, %r0, 5; and.pred %p3, %p3, %p4;
{ARRIVE}"""
    with (
        sm90(order="reverse", check=1),
        pytest.raises(MachineError, match="thread 5, warp 0, lane 5"),
    ):
        machine.run(kernel(body, cluster=2), "k", np.zeros(1), grid=2)


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("waits", [True, False])
def test_a_block_waits_for_accesses_of_others_to_its_memory(access: str, waits: bool) -> None:
    """The rule holds even if the block happens to finish last."""
    does, then = ACCESSES[access]
    body = f"""
@%p0 mbarrier.init.shared::cta.b64 [bar], 1;
@%p0 st.shared.v2.u32 [%r2], {{7, 0}};
fence.mbarrier_init.release.cluster;
{MEET}
mov.u32 %r4, 0; mov.u32 %r5, bar; mapa.shared::cluster.u32 %r6, %r5, %r4;
mapa.shared::cluster.u32 %r7, %r2, %r4;
setp.eq.u32 %p3, %r1, 1; and.pred %p3, %p3, %p0;
{does}
setp.eq.u32 %p4, %r1, 0;
{then if waits else ""}"""
    for order in ORDERS:
        with machine.options(on_fault="stop"), sm90(order=order, check=1):
            if waits:
                machine.run(kernel(body, cluster=2), "k", np.zeros(1), grid=2)
                continue
            with pytest.raises(MachineError, match=f"{WITHOUT_A_WAIT}|, which has finished"):
                machine.run(kernel(body, cluster=2), "k", np.zeros(1), grid=2)


def test_a_report_names_the_block_that_did_the_access() -> None:
    """The report is right even if that block ends first and another cluster could take its
    place."""
    body = f"""@%p0 st.shared.u32 [%r2], 7;
{MEET}mov.u32 %r4, 0; mapa.shared::cluster.u32 %r7, %r2, %r4;
setp.eq.u32 %p3, %r1, 1; and.pred %p4, %p3, %p0; mov.u32 %r9, 0;
@%p4 ld.shared::cluster.u32 %r8, [%r7]; @!%p3 bra OUT;
SPIN: add.u32 %r9, %r9, 1; setp.lt.u32 %p5, %r9, TURNS; @%p5 bra SPIN; OUT:"""
    options = {"on_fault": "stop", "resident_blocks": 2, "fuel": 50, "check": 1}
    for turns in (20, 60, 150):
        with sm90(**options), pytest.raises(MachineError, match=r"block \(1, 0, 0\)") as error:
            text = kernel(body.replace("TURNS", str(turns)), cluster=2)
            machine.run(text, "k", np.zeros(1), grid=16, block=32)
        assert WITHOUT_A_WAIT in str(error.value)


@pytest.mark.parametrize(
    ("grid", "cluster", "device", "report"),
    [
        (3, 2, "sm_90a", r"grid \(3, 1, 1\) must be a multiple of the cluster \(2, 1, 1\)"),
        (9, 9, "sm_90a", r"from 1 to 8 blocks without cudaFuncAttributeNonPortable.*\(9, 1, 1\)"),
        (2, 2, "sm_86", "clusters of more than one block need compute capability 9.0; this is sm_"),
    ],
)
def test_rules_of_a_launch(grid: int, cluster: int, device: str, report: str) -> None:
    with machine.options(device=device), pytest.raises(MachineError, match=report):
        machine.run(kernel("", cluster=cluster), "k", np.zeros(1), grid=grid)


def test_a_cluster_whose_size_overflows() -> None:
    text = kernel("", cluster=2).replace("2, 1, 1", "3, 2863311531, 1")  # 2^33 + 1 blocks
    with sm90(), pytest.raises(MachineError, match="a cluster has from 1 to 8 blocks"):
        machine.run(text, "k", np.zeros(1), grid=3)


def test_setmaxnreg() -> None:
    """Warps that request more registers wait until other warps have released some."""
    body = """
setp.lt.u32 %p3, %r0, 128; @%p3 bra GIVE;
setmaxnreg.inc.sync.aligned.u32 208;
st.global.u32 [%d0], 1;
ret;
GIVE: setmaxnreg.dec.sync.aligned.u32 LESS;"""
    for order in ORDERS:
        out = np.zeros(1, np.uint32)
        with sm90(order=order):  # 16 warps of 128 registers: 12 * 208 and 4 * 40 are not 2048
            text = kernel(body.replace("LESS", "40"), extra=".param .u32 b")
            with pytest.raises(MachineError, match="waits for registers of the block"):
                machine.run(text, "k", out, np.uint32(0), block=512)
            machine.run(text.replace("208", "128"), "k", out, np.uint32(0), block=512)
            # 8 warps compiled for 16 have 128 registers too: 4 * 208 and 4 * 40 fit.
            text = text.replace(") ", ") .maxntid 512, 1, 1 ", 1)
            machine.run(text, "k", out, np.uint32(0), block=256)
        assert out[0] == 1
    # 304 threads are 10 warps with 200 registers each.
    text = kernel("setmaxnreg.dec.sync.aligned.u32 208;", extra=".param .u32 b")
    text = text.replace(") ", ") .maxntid 304, 1, 1 ", 1)
    with sm90(), pytest.raises(MachineError, match="to 208 registers where the warp has 200"):
        machine.run(text, "k", np.zeros(1), np.uint32(0), block=128)


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        ("setmaxnreg.inc.sync.aligned.u32 100;", "multiple of 8 from 24 to 256"),
        ("setmaxnreg.dec.sync.aligned.u32 264;", "multiple of 8 from 24 to 256"),
        (
            "setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.dec.sync.aligned.u32 80;",
            "setmaxnreg.dec to 80 registers where the warp has 40",
        ),
        ("setmaxnreg.inc.sync.aligned.u32 24;", "setmaxnreg.inc to 24 registers where the warp"),
        ("griddepcontrol.frob;", "needs .launch_dependents or .wait"),
        ("fence.proxy.frob;", "unknown form"),
        ("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r2], {%r4};", "does not have the size"),
    ],
)
def test_refusals(statement: str, report: str) -> None:
    with sm90(), pytest.raises(MachineError, match=report):
        machine.run(kernel(statement), "k", np.zeros(1))


def test_hints_and_election() -> None:
    body = """
griddepcontrol.wait; griddepcontrol.launch_dependents;
fence.proxy.async; fence.proxy.alias; fence.proxy.async.global; fence.proxy.async.shared::cta;
fence.mbarrier_init.release.cluster;
prefetch.tensormap [%d0];
mov.u32 %r5, 0;
setp.lt.u32 %p3, %r0, 7; @%p3 bra DONE;
elect.sync %r6|%p4, 0xffffff80;
@%p4 add.u32 %r5, %r6, 100;
DONE: mul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d1, %d0; st.global.u32 [%d1], %r5;"""
    out = np.zeros(32, np.uint32)
    with sm90():
        machine.run(kernel(body), "k", out)
    assert np.flatnonzero(out).tolist() == [7] and out[7] == 107


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, trans: str) -> None:
    """Lane 4r + c has elements 2c and 2c + 1 of row r of each 8 x 8 matrix, or of its transpose;
    lane 8j + r has the address of row r of matrix j."""
    registers = ", ".join(f"%r{10 + j}" for j in range(count))
    loads = "".join(f"ld.global.u32 %r{10 + j}, [%d4+{128 * j}];\n" for j in range(count))
    body = f"""
mul.wide.u32 %d2, %r0, 4; add.u64 %d4, %d1, %d2; add.u64 %d3, %d0, %d2;
{loads}
ld.global.u32 %r5, [%d3]; add.u32 %r5, %r5, %r2;
stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r5], {{{registers}}};
ld.param.u64 %d5, [a2]; mad.wide.u32 %d6, %r0, 16, %d5; mad.lo.u32 %r6, %r0, 16, %r2;
ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r6];
st.global.v4.u32 [%d6], {{%r10, %r11, %r12, %r13}};"""
    random = np.random.default_rng(count)
    rows = random.permutation(32).astype(np.uint32)
    values = random.permutation(256).astype(np.uint16).reshape(4, 32, 2)
    out = np.zeros((32, 8), np.uint16)
    with sm90():
        machine.run(kernel(body, 3), "k", rows * np.uint32(16), values, out)
    matrices = values.reshape(4, 8, 8)
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    for j in range(count):
        for r in range(8):
            assert out[rows[8 * j + r]].tolist() == matrices[j, r].tolist()
