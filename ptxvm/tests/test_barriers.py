"""Barriers, blocks that wait for each other, and reports of deadlocks and hangs."""

from __future__ import annotations

import numpy as np
import pytest
from ints import run_ints
from machine import MachineError, machine


@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
def test_blocks_wait_for_each_other(order: str) -> None:
    """Block i waits for block i+1 or i-1, with more blocks than are resident at first."""
    body = """
 setp.ne.u32 %p1, %r2, 0;
 @%p1 ret;
 mov.u32 %r3, %nctaid.x;
 sub.u32 %r4, %r3, 1;
 setp.eq.u32 %p2, %r0, LAST;
 @%p2 bra GO;
 shl.b32 %r5, %r0, 2;
 cvt.u64.u32 %rd1, %r5;
 add.u64 %rd2, %all, %rd1;
SPIN:
 ld.acquire.gpu.global.u32 %r6, [%rd2+OFFSET];
 setp.eq.u32 %p3, %r6, -1;
 @%p3 bra SPIN;
GO:
 mul.wide.u32 %rd3, %r0, 4;
 add.u64 %rd4, %all, %rd3;
 st.release.gpu.global.u32 [%rd4], %r0;
 ret;"""
    for last, offset in (("%r4", "4"), ("0", "-4")):
        with machine.options(order=order, seed=5, resident_blocks=3):
            text = body.replace("LAST", last).replace("OFFSET", offset)
            out = run_ints(text, np.zeros(32), grid=40, size=40)
        assert out.tolist() == list(range(40))


def test_barrier_of_a_block() -> None:
    body = """
 .shared .align 4 .b32 buffer[128];
 mov.u32 %r3, buffer;
 shl.b32 %r4, %r2, 2;
 add.u32 %r5, %r3, %r4;
 st.shared.u32 [%r5], %t;
 bar.sync 0;
 xor.b32 %r6, %r4, 508;
 add.u32 %r6, %r6, %r3;
 ld.shared.u32 %r7, [%r6];
 st.global.u32 [%out], %r7;
 ret;"""
    for order in ("forward", "reverse", "seeded"):
        with machine.options(order=order, check=1):
            out = run_ints(body, np.zeros(128), block=128)
        assert out.tolist() == list(range(127, -1, -1))


def test_barrier_does_not_wait_for_threads_that_exited() -> None:
    body = """
 setp.lt.u32 %p1, %r2, 40;
 @%p1 ret;
 bar.sync 0;
 st.global.u32 [%out], 7;
 ret;"""
    for order in ("forward", "reverse"):
        with machine.options(order=order):
            out = run_ints(body, np.zeros(128), block=128)
        assert out.tolist() == [-1] * 40 + [7] * 88


def test_named_barriers_of_producers_and_consumers() -> None:
    """Warp 0 produces, warp 1 consumes, with arrive and sync pairs over several rounds."""
    body = """
 .shared .align 4 .b32 buffer[32];
 and.b32 %r3, %r2, 31;
 shl.b32 %r3, %r3, 2;
 mov.u32 %r4, buffer;
 add.u32 %r4, %r4, %r3;
 mov.u32 %r5, 0; mov.u32 %r8, 0;
 setp.ge.u32 %p1, %r2, 32;
 @%p1 bra CONSUMER;
PRODUCER:
 mad.lo.u32 %r6, %r5, 100, %r2;
 st.shared.u32 [%r4], %r6;
 bar.arrive 1, 64;
 barrier.cta.sync.aligned 2, 64;
 add.u32 %r5, %r5, 1;
 setp.lt.u32 %p2, %r5, 5;
 @%p2 bra PRODUCER;
 ret;
CONSUMER:
 bar.sync 1, 64;
 ld.shared.u32 %r7, [%r4];
 add.u32 %r8, %r8, %r7;
 barrier.arrive 2, 64;
 add.u32 %r5, %r5, 1;
 setp.lt.u32 %p2, %r5, 5;
 @%p2 bra CONSUMER;
 st.global.u32 [%out], %r8;
 ret;"""
    for order in ("forward", "reverse", "seeded"):
        with machine.options(order=order, seed=9):
            out = run_ints(body, np.zeros(64), block=64)
        assert out[32:].tolist() == [1000 + 5 * lane for lane in range(32)]


def test_barrier_reductions() -> None:
    body = """
 ld.global.u32 %r3, [%in];
 setp.ne.u32 %p1, %r3, 0;
 bar.red.popc.u32 %r4, 0, %p1;
 barrier.cta.red.and.pred %p2, 1, !%p1;
 bar.red.or.pred %p3, 0, 96, %p1;
 selp.u32 %r5, 1000, 0, %p2;
 selp.u32 %r6, 10000, 0, %p3;
 add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6;
 st.global.u32 [%out], %r4;
 ret;"""
    given = np.arange(96) % 5 == 0
    assert run_ints(body, given, block=96).tolist() == [10000 + given.sum()] * 96
    assert run_ints(body, np.zeros(96), block=96).tolist() == [1000] * 96


def test_deadlock_is_reported_with_all_that_wait() -> None:
    body = """
 setp.lt.u32 %p1, %r2, 32;
 @%p1 bra FIRST;
 bar.sync 3, 96;
 ret;
FIRST:
 setp.eq.u32 %p2, %r2, 5;
 @%p2 bra ALONE;
 shfl.sync.bfly.b32 %r3, %t, 1, 0x1f, -1;
 ret;
ALONE:
 bar.warp.sync 32;
 bar.sync 4, 64;
 ret;"""
    with pytest.raises(MachineError) as error:
        run_ints(body, np.zeros(64), block=64)
    report = str(error.value)
    assert report.startswith("k: deadlock in block (0, 0, 0)")
    assert "warp 0, lanes 0x00000020, line 22: bar.sync 4, 64" in report
    assert "warp 0, lanes 0xffffffdf, line 18: shfl.sync.bfly.b32 %r3, %t, 1, 0x1f, -1" in report
    assert "warp 1, lanes 0xffffffff, line 13: bar.sync 3, 96: waits at barrier 3" in report
    assert "barrier 3: 32 of 96 threads have arrived, 64 are missing\n" in report


def test_barrier_divergence() -> None:
    body = """
 setp.lt.u32 %p1, %r2, 16;
 @%p1 bra LOW;
 bar.sync 0;
 ret;
LOW:
 bar.sync 0;
 ret;"""
    with pytest.raises(MachineError, match=r"barrier divergence: lanes 0x.* at line "):
        run_ints(body, np.zeros(32))


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("bar.sync 16;", "barrier 16 of 0 to 15"),
        ("bar.sync 1, 33;", "thread count 33 is no multiple of 32"),
        ("bar.sync %t;", "barrier number differs within the warp"),
        (
            "bar.arrive 1, 64; bar.sync 1, 32;",
            "thread count 32 where others arrived at barrier 1 with 64",
        ),
        (
            "setp.lt.u32 %p1, %t, 16; @%p1 barrier.cta.arrive 1, 32; barrier.cta.sync 1, 32;",
            "48 threads at barrier 1, which expects 32",
        ),
    ],
)
def test_misuse_of_barriers(body: str, report: str) -> None:
    with pytest.raises(MachineError, match=report):
        run_ints(body + " ret;", np.zeros(32))


def test_hang_is_reported() -> None:
    body = " SPIN: ld.volatile.global.u32 %r3, [%in]; bra.uni SPIN;"
    with (
        machine.options(watchdog=1),
        pytest.raises(MachineError, match=r"no block finished within 1 million(.|\n)*warp 0"),
    ):
        run_ints(body, np.zeros(32))
