"""Check mode: each check reports a small kernel that breaks its rule, and accepts its correct twin.
Without check mode both run."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from machine import MachineError, machine
from unset_values import SINK, STORE, UNINITIALISED

WARPS = 4


def kernel(body: str) -> str:
    """%r0 thread, %r1 warp, %r2 shared address of the thread's word, %d0 global memory of the
    warp."""
    return f"""
.visible .entry k(.param .u64 p) {{
.reg .b16 %h<8>;
.reg .b32 %r<24>;
.reg .b64 %d<8>;
.reg .f32 %f<8>;
.reg .pred %p<8>;
.shared .align 16 .b8 tile[2048];
.local .align 16 .b8 mine[32];
ld.param.u64 %d0, [p];
mov.u32 %r0, %tid.x;
shr.u32 %r1, %r0, 5;
mov.u32 %r3, tile;
mad.lo.u32 %r2, %r0, 4, %r3;
mov.u32 %r4, %ctaid.x;
mad.lo.u32 %r4, %r4, 4, %r1;
mad.wide.u32 %d0, %r4, 256, %d0;
setp.eq.u32 %p0, %r1, 0;
setp.eq.u32 %p1, %r1, 1;
setp.eq.u32 %p2, %r0, 0;
{body}
ret;
}}
"""


def run(body: str, block: int = 32 * WARPS) -> np.ndarray:
    data = np.zeros(512, np.float32)
    machine.run(kernel(body), "k", data, block=block)
    return data


LOAD_NEXT = "xor.b32 %r5, %r2, 128;\nld.shared.b32 %r6, [%r5];\n"  # the next warp's word
COPY = "cp.async.ca.shared.global [%r2], [%d0], 4;\n"
FILL = STORE + "bar.sync 0;\n"


def race(address: str = r"\w+") -> str:
    """Pattern of the report, whichever of the two accesses comes second."""
    return (
        rf"race: (read of|write to) shared address 0x{address}, (read|written) by warp \d.*; "
        "no barrier, mbarrier, or release and acquire lies between them"
    )


# name: (wrong, right, pattern of the report)
RACES = {
    "read after write": (
        FILL + STORE + LOAD_NEXT,
        FILL + STORE + "bar.sync 0;\n" + LOAD_NEXT,
        race(),
    ),
    "write after read": (
        FILL + LOAD_NEXT + STORE,
        FILL + LOAD_NEXT + "bar.sync 0;\n" + STORE,
        race(),
    ),
    "write after write": (
        "st.shared.b32 [%r3], %r1;\n",
        "@%p0 st.shared.b32 [%r3], %r1;\nbar.sync 0;\n@%p1 st.shared.b32 [%r3], %r1;\n",
        race("0"),
    ),
    "read by several warps, then written": (
        FILL + "ld.shared.b32 %r5, [%r3];\n@%p1 st.shared.b32 [%r3], %r1;\n",
        FILL + "ld.shared.b32 %r5, [%r3];\nbar.sync 0;\n@%p1 st.shared.b32 [%r3], %r1;\n",
        race("0"),
    ),
    "one byte of a word": (
        "shr.u32 %r4, %r0, 5;\nadd.u32 %r5, %r3, %r4;\nst.shared.b8 [%r5], %r1;\n"
        "@%p1 ld.shared.b8 %r6, [%r3+2];\n",
        "shr.u32 %r4, %r0, 5;\nadd.u32 %r5, %r3, %r4;\nst.shared.b8 [%r5], %r1;\n"
        "@%p1 ld.shared.b8 %r6, [%r3+1];\n",
        race("2"),
    ),
    "wide accesses": (
        FILL + "@%p0 ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3+112];\n"
        "@%p1 st.shared.b16 [%r3+126], %r1;\n",
        FILL + "@%p0 ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3+112];\n"
        "@%p1 st.shared.b16 [%r3+128], %r1;\n",
        race("7e"),
    ),
    "plain read of what atomics changed": (
        FILL + "red.shared.add.u32 [%r3], %r0;\n@%p1 ld.shared.b32 %r5, [%r3];\n",
        FILL + "red.shared.add.u32 [%r3], %r0;\nbar.sync 0;\n@%p1 ld.shared.b32 %r5, [%r3];\n",
        race("0"),
    ),
    "plain write of what atomics change": (
        FILL + "@%p0 st.shared.b32 [%r3], %r1;\n@%p1 red.shared.add.u32 [%r3], %r0;\n",
        FILL + "@%p0 red.shared.add.u32 [%r3], %r0;\n@%p1 red.shared.add.u32 [%r3], %r0;\n",
        race("0"),
    ),
    "ldmatrix": (
        "st.shared.b32 [%r2], %r0;\nand.b32 %r4, %r0, 31;\nmad.lo.u32 %r5, %r4, 16, %r3;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r5];\n",
        "st.shared.b32 [%r2], %r0;\nbar.sync 0;\nand.b32 %r4, %r0, 31;\n"
        "mad.lo.u32 %r5, %r4, 16, %r3;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r5];\n",
        race(),
    ),
}

COPIES = {
    "read before the wait": (
        COPY + "cp.async.commit_group;\nld.shared.b32 %r5, [%r2];\n",
        COPY + "cp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.b32 %r5, [%r2];\n",
        r"read of shared address 0x\w+ while a cp.async of warp \d into it is in flight",
    ),
    "wait for the wrong group": (
        COPY + "cp.async.commit_group;\ncp.async.wait_group 1;\nld.shared.b32 %r5, [%r2];\n",
        COPY + "cp.async.commit_group;\ncp.async.commit_group;\ncp.async.wait_group 1;\n"
        "ld.shared.b32 %r5, [%r2];\n",
        r"in flight",
    ),
    "no barrier after the wait": (
        COPY + "cp.async.wait_all;\n" + LOAD_NEXT,
        COPY + "cp.async.wait_all;\nbar.sync 0;\n" + LOAD_NEXT,
        race() + "|in flight",
    ),
    "barrier instead of wait": (
        COPY + "cp.async.commit_group;\nbar.sync 0;\n" + LOAD_NEXT,
        COPY + "cp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;\n" + LOAD_NEXT,
        r"in flight \(no cp.async.wait_group or wait_all since\)",
    ),
    "issued while others read": (
        FILL + LOAD_NEXT + COPY + "bar.sync 0;\ncp.async.wait_all;\n",
        FILL + LOAD_NEXT + "bar.sync 0;\n" + COPY + "cp.async.wait_all;\n",
        race() + "|in flight",
    ),
    "overwritten in flight": (
        COPY + STORE + "cp.async.wait_all;\n",
        COPY + "cp.async.wait_all;\n" + STORE,
        r"write to shared address 0x\w+ while a cp.async of warp \d",
    ),
    "two in flight to one place": (
        COPY + COPY + "cp.async.wait_all;\n",
        COPY + "cp.async.wait_all;\n" + COPY + "cp.async.wait_all;\n",
        r"cp.async.*write to shared address 0x\w+ while a cp.async",
    ),
}

ALL = {
    f"{group}: {name}": case
    for group, cases in {"race": RACES, "copy": COPIES, "uninitialised": UNINITIALISED}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
@pytest.mark.parametrize("name", list(ALL))
def test_check(name, order):
    wrong, right, message = ALL[name]
    with machine.options(check=1, order=order, seed=3, fuel=7 if order == "seeded" else 20000):
        run(right)
        with pytest.raises(MachineError, match=message):
            run(wrong)


# Cases that break other rules too, depending on the register's garbage value.
WILD = [
    f"uninitialised: {what}"
    for what in (
        "an address",
        "the address of a store",
        "the number of a barrier",
        "the size of a copy",
    )
]


@pytest.mark.parametrize("name", [name for name in ALL if name not in WILD])
def test_without_check_mode_nothing_is_reported(name):
    wrong, right, _ = ALL[name]
    run(right)
    run(wrong)


SILENT = {
    "a warp with itself": STORE
    + "bar.warp.sync -1;\nxor.b32 %r5, %r2, 4;\nld.shared.b32 %r6, [%r5];\n"
    + STORE,
    "named barrier of two warps": """
setp.lt.u32 %p3, %r1, 2;
@!%p3 bra OTHERS;
st.shared.b32 [%r2], %r0;
bar.sync 1, 64;
xor.b32 %r5, %r2, 128;
ld.shared.b32 %r6, [%r5];
bar.sync 1, 64;
st.shared.b32 [%r2], %r6;
bra DONE;
OTHERS:
st.shared.b32 [%r2], %r0;
bar.sync 2, 64;
xor.b32 %r5, %r2, 128;
ld.shared.b32 %r6, [%r5];
DONE:
""",
    "producer and consumer": """
@!%p0 bra CONSUMER;
st.shared.b32 [%r2], %r0;
bar.arrive 1, 64;
bar.sync 2, 64;
st.shared.b32 [%r2], %r0;
bra DONE;
CONSUMER:
@!%p1 bra DONE;
bar.sync 1, 64;
xor.b32 %r5, %r2, 128;
ld.shared.b32 %r6, [%r5];
bar.arrive 2, 64;
DONE:
""",
    "strong accesses": FILL
    + "st.volatile.shared.b32 [%r3], %r0;\nld.volatile.shared.b32 %r5, [%r3];\n"
    "atom.shared.add.u32 %r6, [%r3], 1;\n",
    "the last warp reads after a fence": """
mov.b32 %r4, 0;
@%p2 st.shared.b32 [%r3+1024], %r4;
bar.sync 0;
st.shared.b32 [%r2], %r0;
membar.cta;
and.b32 %r4, %r0, 31;
setp.ne.u32 %p4, %r4, 0;
@%p4 bra DONE;
atom.shared.add.u32 %r5, [%r3+1024], 1;
membar.cta;
setp.ne.u32 %p3, %r5, 3;
@%p3 bra DONE;
ld.shared.b32 %r6, [%r3];
ld.shared.b32 %r6, [%r3+384];
DONE:
""",
    "warps that have exited": "setp.ge.u32 %p3, %r0, 64;\n@%p3 bra DONE;\n"
    + STORE
    + "bar.sync 0;\n"
    + LOAD_NEXT
    + "DONE:\n",
    "copies that nobody waits for": COPY,
    "padding of a struct": "mov.u64 %d1, mine;\n"
    "st.local.b32 [%d1], %r0;\nst.local.b8 [%d1+4], %r0;\n"
    "ld.local.v4.b32 {%r4, %r5, %r6, %r7}, [%d1];\n",
}


@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
@pytest.mark.parametrize("name", list(SILENT))
def test_silent(name, order):
    with machine.options(check=1, order=order, seed=5, fuel=3 if order == "seeded" else 20000):
        run(SILENT[name])


def test_reports_are_counted_and_the_kernel_goes_on(capfd):
    machine.reports()
    body = "add.u32 %r5, %r7, 1;\nst.global.b32 [%d0], %r5;\n" + FILL + STORE + LOAD_NEXT
    with machine.options(check=1, on_fault="report"):
        assert run(body + "@%p2 st.global.b32 [%d0+4], 1;\n").view(np.int32)[1] == 1
        run(body)
        with pytest.raises(MachineError, match="stopped itself"):
            run("trap;\n")
    printed = capfd.readouterr().err.splitlines()
    reports = machine.reports()
    assert machine.reports() == []
    assert printed == [f"ptxvm: {report.report}" for report in reports]
    (unset,) = (r for r in reports if "depends on an uninitialised value: source 2" in r.report)
    assert unset.count == 2 * WARPS and unset.kernel == "k"
    assert f"k, line {unset.line}: " in unset.report
    assert sum("race: " in r.report for r in reports) == len(reports) - 1 >= 1


def test_accesses_without_memory_are_reported_and_lost(capfd):
    """A read returns NaN, a write is discarded, for one lane as for all."""
    machine.reports()
    body = """ld.global.b32 %r5, [%d0+65536];
@%p2 st.global.b32 [%d0+65536], %r5;
ld.shared.b32 %r6, [%r2+1];
atom.global.add.u32 %r7, [%d0+65536], 1;
and.b32 %r5, %r5, %r6;
st.global.b32 [%d0], %r5;
"""
    with machine.options(on_fault="report"):
        data = run(body).view(np.uint32)
        with pytest.raises(MachineError, match="thread count 1 is no multiple of 32"):
            run("bar.sync 0, 1;\n")
    written = data.nonzero()[0]
    assert written.tolist() == [64 * warp for warp in range(WARPS)]
    assert (data[written] == 0xFFFFFFFF).all()
    reports = machine.reports()
    assert [report.count for report in reports] == [32 * WARPS, 1, 32 * WARPS, 32 * WARPS]
    words = "outside every", "outside every", "misaligned read: shared", "atomic"
    assert all(map(operator.contains, [report.report for report in reports], words))
    assert len(capfd.readouterr().err.splitlines()) == 4
    body = """atom.global.add.u32 %r7, [%d0+65536], 1;
and.b32 %r6, %r0, 31;
mad.wide.u32 %d1, %r6, 4, %d0;
"""
    with machine.options(on_fault="collect"):
        data = run(body + "st.global.b32 [%d1], %r7;\n").view(np.uint32)
    machine.reports()
    lanes = data.reshape(-1, 64)[:WARPS, :32]
    assert (lanes == 0xFFFFFFFF).all()  # no lane reads another lane's result


def test_blocks_do_not_meet():
    """Shared memory and registers are private to a block."""
    with machine.options(check=1):
        data = np.zeros(40 * WARPS * 64, np.float32)
        right = kernel(STORE + "bar.sync 0;\n" + LOAD_NEXT)
        machine.run(right, "k", data, grid=40, block=128)
        wrong = kernel(
            "mov.u32 %r7, %ctaid.x;\nsetp.lt.u32 %p3, %r7, 20;\n@%p3 "
            + STORE
            + "ld.shared.b32 %r5, [%r2];\n"
            + SINK
        )
        with pytest.raises(MachineError, match=r"uninitialised value.*block \(2\d, 0, 0\)"):
            machine.run(wrong, "k", data, grid=40, block=128)
