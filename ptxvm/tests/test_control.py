"""Control flow of the PTX machine: divergence, reconvergence, calls."""

from __future__ import annotations

import numpy as np
import pytest
from ints import BEGIN, run_ints
from machine import MachineError, machine


def collatz(x: int) -> int:
    steps = 0
    while x != 1:
        x = 3 * x + 1 if x & 1 else x >> 1
        steps += 1
    return steps


def test_data_dependent_loop() -> None:
    body = """
 ld.global.u32 %r3, [%in];
 mov.u32 %r4, 0;
LOOP:
 setp.eq.u32 %p1, %r3, 1;
 @%p1 bra DONE;
 and.b32 %r5, %r3, 1;
 setp.ne.u32 %p2, %r5, 0;
 add.u32 %r4, %r4, 1;
 @%p2 bra ODD;
 shr.u32 %r3, %r3, 1;
 bra.uni LOOP;
ODD:
 mad.lo.u32 %r3, %r3, 3, 1;
 bra.uni LOOP;
DONE:
 st.global.u32 [%out], %r4;
 ret;"""
    given = np.arange(1, 385)
    out = run_ints(body, given, block=128, grid=3)
    assert out.tolist() == [collatz(int(x)) for x in given]


def test_nested_loops_with_different_trip_counts() -> None:
    body = """
 ld.global.u32 %r3, [%in];
 mov.u32 %r4, 0; mov.u32 %r5, 0;
OUTER:
 setp.ge.u32 %p1, %r5, %r3;
 @%p1 bra DONE;
 mov.u32 %r6, 0;
INNER:
 setp.gt.u32 %p2, %r6, %r5;
 @%p2 bra NEXT;
 add.u32 %r4, %r4, %r6;
 add.u32 %r6, %r6, 1;
 bra.uni INNER;
NEXT:
 add.u32 %r5, %r5, 1;
 bra.uni OUTER;
DONE:
 st.global.u32 [%out], %r4;
 ret;"""
    given = np.array([(i * 7) % 13 for i in range(64)])
    expected = [sum(i for o in range(n) for i in range(o + 1)) for n in given]
    assert run_ints(body, given, block=64).tolist() == expected


def test_value_that_survives_a_guard_in_a_loop() -> None:
    """Registers that share slots: %r6 is live at a point where %r5 must be kept."""
    body = """
 ld.global.u32 %r3, [%in];
 mov.u32 %r4, 0; mov.u32 %r5, 100; mov.u32 %r7, 0;
LOOP:
 setp.eq.u32 %p1, %r7, %r3;
 @%p1 mov.u32 %r5, 7;
 add.u32 %r4, %r4, %r5;
 mul.lo.u32 %r6, %r7, 1000;
 xor.b32 %r4, %r4, %r6;
 add.u32 %r7, %r7, 1;
 setp.lt.u32 %p2, %r7, 5;
 @%p2 bra LOOP;
 st.global.u32 [%out], %r4;
 ret;"""
    given = np.arange(32) % 6
    expected = []
    for x in given:
        total, value = 0, 100
        for i in range(5):
            value = 7 if i == x else value
            total = (total + value) ^ (1000 * i)
        expected.append(total)
    assert run_ints(body, given).tolist() == expected


def test_early_return_leaves_other_lanes_running() -> None:
    body = """
 ld.global.u32 %r3, [%in];
 setp.eq.u32 %p1, %r3, 0;
 @%p1 ret;
 setp.eq.u32 %p2, %r3, 1;
 st.global.u32 [%out], %r3;
 @%p2 exit;
 add.u32 %r3, %r3, 100;
 st.global.u32 [%out], %r3;"""
    given = np.arange(32) % 3
    expected = [-1 if x == 0 else 1 if x == 1 else 102 for x in given]
    assert run_ints(body, given).tolist() == expected


def test_switch_by_table() -> None:
    body = """
 ld.global.u32 %r3, [%in];
 setp.gt.u32 %p1, %r3, 3;
 @%p1 bra OTHER;
TABLE: .branchtargets A, B, A, C;
 brx.idx %r3, TABLE;
A: mov.u32 %r4, 10; bra.uni DONE;
B: mov.u32 %r4, 20; bra.uni DONE;
C: mov.u32 %r4, 30; bra.uni DONE;
OTHER: mov.u32 %r4, 40;
DONE:
 st.global.u32 [%out], %r4;
 ret;"""
    given = np.arange(32) % 6
    assert run_ints(body, given).tolist() == [[10, 20, 10, 30, 40, 40][x] for x in given]
    with pytest.raises(MachineError, match="index 9 into a table of 4 targets"):
        run_ints(body.replace("3;\n @%p1", "9;\n @%p1"), np.full(32, 9))


def test_jump_into_a_loop() -> None:
    body = """
 ld.global.u32 %r3, [%in];
 mov.u32 %r4, 0;
 and.b32 %r5, %r3, 1;
 setp.ne.u32 %p1, %r5, 0;
 @%p1 bra MIDDLE;
TOP:
 add.u32 %r4, %r4, 1000;
MIDDLE:
 add.u32 %r4, %r4, 1;
 setp.eq.u32 %p2, %r3, 0;
 @%p2 bra DONE;
 sub.u32 %r3, %r3, 1;
 bra.uni TOP;
DONE:
 st.global.u32 [%out], %r4;
 ret;"""
    given = np.arange(32)
    expected = [(x + 1) + 1000 * (x + 1 - x % 2) for x in given]
    assert run_ints(body, given).tolist() == expected


@pytest.mark.parametrize("other", ["", "ELSE: sub.u32 %r3, %r3, 1;"])
def test_lanes_meet_again_behind_a_branch(other: str) -> None:
    """After an if, with or without else, all lanes have reconverged."""
    body = f"""
 ld.global.u32 %r3, [%in];
 setp.lt.u32 %p1, %r3, 16;
 @%p1 bra {"ELSE" if other else "BEHIND"};
 add.u32 %r3, %r3, 1;
 bra.uni BEHIND;
 {other}
BEHIND:
 activemask.b32 %r4;
 st.global.u32 [%out], %r4;
 ret;"""
    assert run_ints(body, np.arange(32)).tolist() == [-1] * 32


def test_shuffles_of_parts_of_a_warp() -> None:
    """Half warps in different branches, and with different masks at one instruction."""
    apart = """
 and.b32 %r3, %t, 16;
 setp.ne.u32 %p1, %r3, 0;
 @%p1 bra HIGH;
 shfl.sync.bfly.b32 %r4, %t, 1, 0x1f, 0x0000ffff;
 bra.uni DONE;
HIGH:
 shfl.sync.bfly.b32 %r4, %t, 2, 0x1f, 0xffff0000;
DONE:
 st.global.u32 [%out], %r4;
 ret;"""
    expected = [lane ^ 1 if lane < 16 else lane ^ 2 for lane in range(32)]
    assert run_ints(apart, np.arange(32)).tolist() == expected
    together = """
 and.b32 %r3, %t, 16;
 shl.b32 %r5, 0xffff, %r3;
 shfl.sync.bfly.b32 %r4, %t, 1, 0x1f, %r5;
 st.global.u32 [%out], %r4;
 ret;"""
    assert run_ints(together, np.arange(32)).tolist() == [lane ^ 1 for lane in range(32)]


def test_shuffle_waits_for_lanes_in_another_branch() -> None:
    body = """
 ld.global.u32 %r3, [%in];
LOOP:
 setp.eq.u32 %p1, %r3, 0;
 @%p1 bra MEET;
 sub.u32 %r3, %r3, 1;
 bra.uni LOOP;
MEET:
 shfl.sync.down.b32 %r4, %t, 1, 0x1f, -1;
 st.global.u32 [%out], %r4;
 ret;"""
    expected = [min(lane + 1, 31) for lane in range(32)]
    assert run_ints(body, (np.arange(32) * 5) % 17).tolist() == expected


def test_lane_outside_its_own_member_mask() -> None:
    body = " shfl.sync.bfly.b32 %r4, %t, 1, 0x1f, 0x7fffffff; ret;"
    with pytest.raises(MachineError, match=r"not in its own member mask 0x7fffffff.*lane 31"):
        run_ints(body, np.arange(32))


def test_warp_barrier_at_two_places() -> None:
    body = """
 and.b32 %r3, %t, 1;
 setp.ne.u32 %p1, %r3, 0;
 @%p1 bra ODD;
 st.global.u32 [%out], 1;
 bar.warp.sync -1;
 ld.global.u32 %r4, [%out+4];
 bra.uni DONE;
ODD:
 st.global.u32 [%out], 2;
 bar.warp.sync -1;
 ld.global.u32 %r4, [%out+-4];
DONE:
 bar.warp.sync -1;
 st.global.u32 [%out], %r4;
 ret;"""
    assert run_ints(body, np.arange(32)).tolist() == [2, 1] * 16


def test_lock_between_lanes_of_a_warp() -> None:
    """Lanes that spin at a lower program counter must not starve the lock's holder."""
    body = """
 mov.u64 %rd1, %all;
 ld.param.u64 %rd2, [p_in];
SPIN:
 atom.global.cas.b32 %r3, [%rd2], 0, 1;
 setp.ne.u32 %p1, %r3, 0;
 @%p1 bra SPIN;
 ld.volatile.global.u32 %r4, [%rd1];
 add.u32 %r4, %r4, 1;
 st.volatile.global.u32 [%rd1], %r4;
 membar.gl;
 atom.global.exch.b32 %r5, [%rd2], 0;
 ret;"""
    out = np.zeros(1, np.int32)
    with machine.options(fuel=50):
        machine.run(BEGIN + body + "}", "k", np.zeros(1, np.int32), out, block=64, grid=2)
    assert out[0] == 128


FUNCTIONS = """
.func (.param .b32 result) twice(.param .b32 value)
{
 .reg .b32 %r<3>; .reg .pred %p1;
 ld.param.u32 %r1, [value];
 setp.gt.u32 %p1, %r1, 20;
 shl.b32 %r2, %r1, 1;
 st.param.b32 [result], %r2;
 @%p1 ret;
 add.u32 %r2, %r2, 1000;
 st.param.b32 [result+0], %r2;
 ret;
}
.func (.param .b32 result) thrice(.param .b32 value)
{
 .reg .b32 %r<4>;
 ld.param.u32 %r1, [value];
 { .param .b32 p0; st.param.b32 [p0], %r1; .param .b32 q0;
   call.uni (q0), twice, (p0); ld.param.b32 %r2, [q0]; }
 add.u32 %r3, %r2, %r1;
 st.param.b32 [result], %r3;
 ret;
}
"""


def call(function: str, guard: str = "") -> str:
    return f"""
 ld.global.u32 %r3, [%in];
 setp.gt.u32 %p1, %r3, 4;
 mov.u32 %r4, 5;
 {{ .param .b32 p0; st.param.b32 [p0], %r3; .param .b32 q0; st.param.b32 [q0], 9;
   {guard} call (q0), {function}, (p0); ld.param.b32 %r4, [q0]; }}
 st.global.u32 [%out], %r4;
 ret;"""


@pytest.mark.parametrize("guard", ["", "@%p1", "@!%p1"])
def test_calls_of_functions(guard: str) -> None:
    def thrice(x: int) -> int:
        return 3 * x + (0 if x > 20 else 1000)

    given = np.arange(32)
    out = np.full(32, -1, np.int32)
    text = FUNCTIONS + BEGIN + call("thrice", guard) + "}"
    machine.run(text, "k", given.astype(np.int32), out)
    calls = {"": given >= 0, "@%p1": given > 4, "@!%p1": given <= 4}[guard]
    assert out.tolist() == [thrice(int(x)) if c else 9 for x, c in zip(given, calls, strict=True)]


def test_calls_that_cannot_be_inlined() -> None:
    out = np.zeros(32, np.int32)
    recursive = FUNCTIONS.replace("call.uni (q0), twice", "call.uni (q0), thrice")
    with pytest.raises(MachineError, match=r"nested too deeply, or recursive"):
        machine.run(recursive + BEGIN + call("thrice") + "}", "k", out, out)
    with pytest.raises(MachineError, match=r"k, line 15: call .*nothing is not defined"):
        machine.run(BEGIN + call("nothing") + "}", "k", out, out)


def test_assertion_and_printf() -> None:
    text = """
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d,
                           .param .b64 e) .noreturn;
.extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);
.global .align 1 .b8 message[6] = {97, 32, 60, 32, 98, 0};
.global .align 1 .b8 file[5] = {120, 46, 99, 117};
"""
    body = """
 { .param .b64 f; st.param.b64 [f], message; .param .b64 v; st.param.b64 [v], 0; .param .b32 r;
   call.uni (r), vprintf, (f, v); ld.param.b32 %r3, [r]; }
 st.global.u32 [%out], %r3;
 setp.ne.u32 %p1, %t, 9;
 @%p1 bra DONE;
 { .param .b64 m; st.param.b64 [m], message; .param .b64 f; st.param.b64 [f], file;
   .param .b32 l; st.param.b32 [l], 77; .param .b64 g; st.param.b64 [g], file;
   .param .b64 s; st.param.b64 [s], 1;
   call.uni __assertfail, (m, f, l, g, s); }
DONE:
 ret;"""
    out = np.full(32, -1, np.int32)
    with pytest.raises(MachineError, match=r"'a < b' failed at x\.cu:77 .*thread 9"):
        machine.run(text + BEGIN + body + "}", "k", out, out)
    assert out.tolist() == [0] * 32


def test_trap_leaves_the_machine_usable() -> None:
    with pytest.raises(MachineError, match="the kernel stopped itself"):
        run_ints(" trap;", np.zeros(32))
    assert run_ints(" st.global.u32 [%out], %t; ret;", np.zeros(32)).tolist() == list(range(32))
