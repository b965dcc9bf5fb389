"""Warp-level instructions under full and partial member masks, against Python models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from forms import signed
from hypothesis import given
from hypothesis import strategies as st
from machine import MachineError, machine

FULL = 0xFFFFFFFF
KERNEL = """
.visible .entry k(.param .u64 out, .param .u64 taken, .param .u64 in, .param .u32 members)
{{
  .reg .b32 %r<9>;
  .reg .b64 %rd<8>;
  .reg .pred %p, %q, %in;
  .reg .b{bits} %a, %b, %c;
  mov.u32 %r0, %laneid;
  ld.param.u32 %r1, [members];
  ld.param.u64 %rd0, [out];
  ld.param.u64 %rd1, [taken];
  ld.param.u64 %rd2, [in];
  mul.wide.u32 %rd3, %r0, 4;
  add.s64 %rd0, %rd0, %rd3;
  add.s64 %rd1, %rd1, %rd3;
  mul.wide.u32 %rd3, %r0, {bytes};
  add.s64 %rd2, %rd2, %rd3;
  ld.global.b{bits} %a, [%rd2];
  ld.global.b{bits} %b, [%rd2+{second}];
  ld.global.b{bits} %c, [%rd2+{third}];
  setp.ne.b{bits} %q, %a, 0;
  shr.b32 %r2, %r1, %r0;
  and.b32 %r2, %r2, 1;
  setp.eq.b32 %in, %r2, 0;
  @%in bra DONE;
  setp.eq.b32 %p, 0, 1;
  mov.b32 %r3, 0;
  {text}
  selp.b32 %r4, 1, 0, %p;
  st.global.b32 [%rd0], %r3;
  st.global.b32 [%rd1], %r4;
DONE:
  ret;
}}
"""


def run(text: str, values: np.ndarray, members: int) -> tuple[list[int], list[int]]:
    """%r3 and %p of the lanes in `members`; `values` are 3 x 32 operands."""
    bits = values.dtype.itemsize * 8
    size = values.dtype.itemsize
    ptx = KERNEL.format(text=text, bits=bits, bytes=size, second=32 * size, third=64 * size)
    out, taken = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    machine.load(ptx).launch("k", out, taken, values, np.uint32(members))
    lanes = [i for i in range(32) if members >> i & 1]
    return [int(out[i]) for i in lanes], [int(taken[i]) for i in lanes]


masks = st.one_of(st.just(FULL), st.integers(1, FULL), st.integers(0, 31).map(lambda i: 1 << i))
words = st.lists(st.integers(0, FULL), min_size=96, max_size=96)
few = st.lists(st.integers(0, 3), min_size=96, max_size=96)


def array(values: list[int], dtype: type = np.uint32) -> np.ndarray:
    return np.array(values, dtype=dtype)


def lanes_of(members: int) -> list[int]:
    return [i for i in range(32) if members >> i & 1]


SHUFFLES: dict[str, Callable[[int, int, int, int], tuple[int, bool]]] = {
    "up": lambda lane, b, first, last: (lane - b, lane - b >= last),
    "down": lambda lane, b, first, last: (lane + b, lane + b <= last),
    "bfly": lambda lane, b, first, last: (lane ^ b, (lane ^ b) <= last),
    "idx": lambda lane, b, first, last: (first | b, (first | b) <= last),
}


@pytest.mark.parametrize("mode", SHUFFLES)
@given(values=words, small=st.integers(0, 31), vary=st.booleans())
def test_shfl(mode: str, values: list[int], small: int, vary: bool) -> None:
    if not vary:  # one offset and the clamp of a whole warp, as in common kernels
        values[32:64] = [small] * 32
        values[64:] = [0 if mode == "up" else 31] * 32
    out, taken = run(f"shfl.sync.{mode}.b32 %r3|%p, %a, %b, %c, %r1;", array(values), FULL)
    for lane in range(32):
        segment, clamp = values[64 + lane] >> 8 & 31, values[64 + lane] & 31
        first = lane & segment
        last = first | clamp & ~segment
        b = values[32 + lane] & 31
        if mode == "idx":
            b &= ~segment
        source, inside = SHUFFLES[mode](lane, b, first, last)
        assert taken[lane] == inside
        assert out[lane] == values[source if inside else lane]


@given(values=words, members=masks)
def test_shfl_among_members(values: list[int], members: int) -> None:
    """Every member reads from the next member, cyclically."""
    lanes = lanes_of(members)
    for lane, following in zip(lanes, lanes[1:] + lanes[:1], strict=True):
        values[32 + lane], values[64 + lane] = following, 31
    with machine.options(check=1):
        out, taken = run("shfl.sync.idx.b32 %r3|%p, %a, %b, %c, %r1;", array(values), members)
    assert out == [values[values[32 + lane]] for lane in lanes]
    assert all(taken)


@given(values=few, members=masks, negated=st.booleans())
def test_vote(values: list[int], members: int, negated: bool) -> None:
    lanes = lanes_of(members)
    holds = [(values[i] != 0) != negated for i in lanes]
    q = "!%q" if negated else "%q"
    for mode, expected in (
        ("all", all(holds)),
        ("any", any(holds)),
        ("uni", all(holds) or not any(holds)),
    ):
        _, taken = run(f"vote.sync.{mode}.pred %p, {q}, %r1;", array(values), members)
        assert taken == [expected] * len(lanes)
    out, _ = run(f"vote.sync.ballot.b32 %r3, {q}, %r1;", array(values), members)
    ballot = sum(1 << i for i, t in zip(lanes, holds, strict=True) if t)
    assert out == [ballot] * len(lanes)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@given(values=few, members=masks, same=st.booleans())
def test_match(dtype: type, values: list[int], members: int, same: bool) -> None:
    high = 1 << (np.dtype(dtype).itemsize * 8 - 2)
    values = [v * high for v in values]
    if same:
        values = [values[0]] * 96
    bits = np.dtype(dtype).itemsize * 8
    lanes = lanes_of(members)
    out, _ = run(f"match.any.sync.b{bits} %r3, %a, %r1;", array(values, dtype), members)
    assert out == [sum(1 << k for k in lanes if values[k] == values[i]) for i in lanes]
    text = f"match.all.sync.b{bits} %r3|%p, %a, %r1;"
    out, taken = run(text, array(values, dtype), members)
    equal = len({values[i] for i in lanes}) == 1
    assert out == [members if equal else 0] * len(lanes)
    assert taken == [equal] * len(lanes)


def reduced(op: str, kind: str, values: list[int]) -> int:
    result = values[0]
    for v in values[1:]:
        if kind == "s32" and op in ("min", "max"):
            result = {"min": min, "max": max}[op](result, v, key=lambda x: signed(x, 32))
        else:
            result = {
                "add": lambda a, b: (a + b) & FULL,
                "min": min,
                "max": max,
                "and": lambda a, b: a & b,
                "or": lambda a, b: a | b,
                "xor": lambda a, b: a ^ b,
            }[op](result, v)
    return result


@pytest.mark.parametrize(
    ("op", "kind"),
    [(op, kind) for op in ("add", "min", "max") for kind in ("u32", "s32")]
    + [(op, "b32") for op in ("and", "or", "xor")],
)
@given(values=words, members=masks)
def test_redux(op: str, kind: str, values: list[int], members: int) -> None:
    out, _ = run(f"redux.sync.{op}.{kind} %r3, %a, %r1;", array(values), members)
    lanes = lanes_of(members)
    assert out == [reduced(op, kind, [values[i] for i in lanes])] * len(lanes)


@given(members=masks)
def test_elect_and_activemask(members: int) -> None:
    zeros = np.zeros(96, np.uint32)
    lanes = lanes_of(members)
    with machine.options(device="sm_90a"):
        out, taken = run("elect.sync %r3|%p, %r1;", zeros, members)
    assert len(set(out)) == 1 and out[0] in lanes
    assert taken == [lane == out[0] for lane in lanes]
    out, _ = run("activemask.b32 %r3;", zeros, members)
    assert out == [members] * len(lanes)


def test_nanosleep_changes_nothing() -> None:
    values = np.arange(96, dtype=np.uint32)
    out, _ = run("mov.b32 %r3, %a; nanosleep.u32 %b; nanosleep.u32 100;", values, FULL)
    assert out == list(range(32))


def test_a_lane_outside_its_member_mask_is_a_fault() -> None:
    with pytest.raises(MachineError, match=r"not in its own member mask"):
        run("vote.sync.any.pred %p, %q, 1;", np.zeros(96, np.uint32), 3)


def test_a_register_of_an_absent_lane_is_a_fault_when_checking() -> None:
    text = "shfl.sync.idx.b32 %r3, %a, 5, 31, %r1;"
    with machine.options(check=1), pytest.raises(MachineError, match=r"reads .* of lane 5"):
        run(text, np.zeros(96, np.uint32), 3)


REFUSED = [
    "add.f32.rn %r3, %r3, %r3;",
    "add.rn.s32 %r3, %r3, %r3;",
    "add.b32 %r3, %r3, %r3;",
    "add.sat.u32 %r3, %r3, %r3;",
    "mul.s32 %r3, %r3, %r3;",
    "mul.lo.sat.s32 %r3, %r3, %r3;",
    "fma.f32 %r3, %r3, %r3, %r3;",
    "fma.rn.oob.f16x2 %r3, %r3, %r3, %r3;",
    "div.f32 %r3, %r3, %r3;",
    "min.xorsign.f32 %r3, %r3, %r3;",
    "setp.lt.b32 %p, %r3, %r3;",
    "setp.lo.s32 %p, %r3, %r3;",
    "setp.equ.s32 %p, %r3, %r3;",
    "setp.lt.and.s32 %p, %r3, %r3;",
    "cvt.f32.s32 %r3, %r3;",
    "cvt.s32.f32 %r3, %r3;",
    "cvt.rn.s32.f32 %r3, %r3;",
    "cvt.rni.f32.s32 %r3, %r3;",
    "cvt.rn.satfinite.e4m3x2.f32 %r3, %r3, %r3;",
    "cvt.f16x2.f32 %r3, %r3, %r3;",
    "cvt.rm.f16x2.f32 %r3, %r3, %r3;",
    "ex2.f32 %r3, %r3;",
    "ex2.approx.bf16x2 %r3, %r3;",
    "tanh.approx.ftz.f32 %r3, %r3;",
    "lg2.approx.f64 %rd3, %rd3;",
    "shl.u32 %r3, %r3, 1;",
    "shf.l.b32 %r3, %r3, %r3, 1;",
    "lop3.b32 %r3, %r3, %r3, %r3, 256;",
    "prmt.b32.x4 %r3, %r3, %r3, 1;",
    "mov.b32 {%r3, %r4}, %r5;",
    "cvta.texture.u64 %rd3, %rd3;",
    "shfl.idx.b32 %r3, %r3, 1, 31;",
    "shfl.sync.b32 %r3, %r3, 1, 31, -1;",
    "vote.sync.all.b32 %r3, %p, -1;",
    "redux.sync.add.b32 %r3, %r3, -1;",
    "match.sync.b32 %r3, %r3, -1;",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_understood_is_refused_by_line(text: str) -> None:
    with pytest.raises(MachineError) as error:
        run(text, np.zeros(96, np.uint32), FULL)
    message = str(error.value)
    assert "line" in message and text.rstrip(";") in message
