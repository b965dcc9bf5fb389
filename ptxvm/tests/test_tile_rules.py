"""mma, mma.sp and wmma: refused forms, discarded results, undefined values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from machine import MachineError, machine

EIGHT = "{" + ", ".join(f"%r{i}" for i in range(1, 9)) + "}"
REFUSED = [
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1,%d2}, {_}, {%d4}, {%d5,%d6};",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1},"
    " {%r1,%r2,%r3,_};",
    "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2},"
    " {%r1,%r2,%r3,%r4}, _, 0;",
    f"wmma.mma.sync.aligned.row.col.m16n16k16.f32.f16.f16.f32 {EIGHT}, {EIGHT}, {EIGHT}, {EIGHT};",
    f"wmma.store.d.sync.aligned.row.m16n16k16.global.f32 [%d1], {EIGHT}, _;",
    "mma.sync.aligned.m8n8k4.row.row.f64.f64.f64.f64 {%d1,%d2}, {%d3}, {%d4}, {%d5,%d6};",
    "mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2},"
    " {%r1,%r2,%r3,%r4,%r5,%r6,%r7,%r8};",
    "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1},"
    " {%r1,%r2,%r3,%r4};",
    "mma.sp.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1}, {%r1},"
    " {%r1,%r2,%r3,%r4}, %r1, 0;",
    "wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.u8.s32 {%r1}, {%r1}, {%r1}, {%r1};",
    "wmma.mma.sync.aligned.row.col.m16n16k8.f32.f32 {%r1}, {%r1}, {%r1}, {%r1};",
    "wmma.load.a.sync.aligned.col.m8n8k32.s4 {%r1}, [%d1], 32;",
    "wmma.load.a.sync.aligned.row.m16n16k16.local.f16 {%r1}, [%d1], 16;",
    "wmma.load.a.sync.aligned.row.m16n16k16.f16 {%r1,%r2,%r3,%r4}, [%d1], 16;",
]


@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_ptxas_refuses(form: str) -> None:
    text = f".visible .entry k() {{ .reg .b32 %r<9>; .reg .b64 %d<9>; ret; {form} }}"
    with pytest.raises(MachineError, match=r"k, line 1: w?mma"):
        machine.run(text, "k")


def test_undefined_values_spread_by_row_and_column() -> None:
    """An undefined element of A or B of an f64 mma reaches its row or its column of D."""
    for operand, lost in itertools.product("ab", (0, 13)):
        text = f""".visible .entry k(.param .u64 out) {{
.reg .b32 %r<4>; .reg .b64 %d<12>; .reg .pred %p<3>;
ld.param.u64 %d0, [out]; mov.u32 %r0, %tid.x; mad.wide.u32 %d1, %r0, 16, %d0;
mov.b64 %d4, 0; mov.b64 %d6, 0; mov.b64 %d7, 0;
setp.eq.u32 %p0, %r0, {lost};
@!%p0 mov.b64 %d5, 0;
mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {{%d8, %d9}},
 {{{"%d5" if operand == "a" else "%d4"}}}, {{{"%d5" if operand == "b" else "%d4"}}}, {{%d6, %d7}};
setp.eq.u32 %p1, %r0, {{}};
@%p1 st.global.v2.b64 [%d1], {{%d8, %d9}};
ret; }}"""
        for lane in range(32):
            reached = lane // 4 == lost // 4 if operand == "a" else lane % 4 == lost // 8
            program, out = text.replace("{}", str(lane)), np.zeros((32, 2))
            with machine.options(check=1):
                if not reached:
                    machine.run(program, "k", out)
                    continue
                with pytest.raises(MachineError, match=r"has none since line .*mma\.sync"):
                    machine.run(program, "k", out)


def test_undefined_metadata() -> None:
    """Metadata is required only from the lanes that the selector names."""
    text = """.visible .entry k(.param .u64 out) {
.reg .b32 %r<9>; .reg .b64 %d<2>; .reg .pred %p<2>;
ld.param.u64 %d0, [out]; mov.u32 %r0, %tid.x; mad.wide.u32 %d1, %r0, 4, %d0;
and.b32 %r1, %r0, 3; setp.eq.u32 %p0, %r1, 2; mov.b32 %r2, 0;
@%p0 mov.b32 %r6, 0;
or.b32 %r3, %r6, 0x44444444;
mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r4, _, %r5, _}, {%r2, %r2}, {%r2, %r2},
 {%r2, %r2, %r2, %r2}, %r3, {};
st.global.b32 [%d1], %r4; ret; }"""
    out = np.ones(32, np.float32)
    with machine.options(check=1):
        machine.run(text.replace("{}", "2"), "k", out)
        assert not out.any()
        with pytest.raises(MachineError, match="uninitialised value"):
            machine.run(text.replace("{}", "1"), "k", out)


def test_sinks() -> None:
    """Results written to "_" are discarded without changing the others."""
    body = """mov.b32 %r1, 0x3C003C00; mov.b32 %r2, 0;
mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {_, _, _, %r3}, {%r1, %r1}, {%r1},
 {%r2, %r2, %r2, %r2};
mov.u32 _, %r1; add.u32 _, %r1, %r2; vabsdiff4.u32.u32.u32 _, %r1, %r2, %r2;
mov.b64 %d1, 0x4100000000; mov.b64 {_, %r4}, %d1;
ld.global.v2.b32 {%r5, _}, [%d0]; atom.global.add.u32 _, [%d0], 1;"""
    text = f""".visible .entry k(.param .u64 out) {{ .reg .b32 %r<9>; .reg .b64 %d<3>;
ld.param.u64 %d0, [out]; {body}
st.global.b32 [%d0], %r3; st.global.v2.b32 [%d0+8], {{%r4, %r5}}; ret; }}"""
    out = np.array([5, 7, 0, 0], np.uint32)
    with machine.options(check=1):
        machine.run(text, "k", out)
    assert out.view(np.float32)[0] == 8 and out[1:].tolist() == [7, 0x41, 5]
