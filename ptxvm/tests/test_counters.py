"""Counters of a launch against counts made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from machine import machine

DECLARATIONS = """
.reg .b16 %h<8>;
.reg .b32 %r<24>;
.reg .b64 %d<8>;
.reg .f32 %f<16>;
.reg .f64 %g<4>;
.reg .pred %p<8>;
.shared .align 16 .b8 tile[4096];
"""


def count(body: str, block: int = 32, grid: int = 1, shared: int = 0) -> dict[str, Any]:
    """Counters of a kernel after `ld.param` and `mov` of %d0 (global memory) and %r0 (thread)."""
    data = np.zeros(8192, np.uint32)
    start = -data.ctypes.data % 128 // 4
    text = f"""
.visible .entry k(.param .u64 p) {{
{DECLARATIONS}
ld.param.u64 %d0, [p];
mov.u32 %r0, %tid.x;
mov.b32 %f1, 0f3F800000;
{body}
ret;
}}
"""
    machine.reset_counters()
    with machine.options(count=1):
        module = machine.load(text)
        module.launch("k", data[start : start + 4096], block=block, grid=grid, shared=shared)
    (launch,) = machine.counters()
    return launch


def requests(row: dict[str, int]) -> tuple[int, ...]:
    return tuple(row.values())


def test_launch_and_totals():
    launch = count("add.u32 %r1, %r0, tile;\n", block=48, grid=3, shared=100)
    assert launch["kernel"] == "k"
    assert (launch["grid"], launch["block"]) == ([3, 1, 1], [48, 1, 1])
    assert (launch["dynamic_shared"], launch["static_shared"]) == (100, 4096)
    warps = 3 * 2
    assert launch["instructions"] == warps * 5
    assert launch["lanes"] == 3 * 48 * 5
    assert launch["instructions_without_moves"] == warps * 2
    assert launch["opcodes"]["add.u32"] == {"instructions": warps, "lanes": 3 * 48}
    assert launch["classes"]["integer"] == {"instructions": warps, "lanes": 3 * 48}
    assert launch["classes"]["control"] == {"instructions": warps, "lanes": 3 * 48}


def test_counting_off_counts_nothing():
    machine.reset_counters()
    machine.run(".visible .entry k() { ret; }", "k")
    assert machine.counters() == []


def test_launches_are_listed_in_order():
    machine.reset_counters()
    module = machine.load(
        ".visible .entry a() { ret; }\n"
        ".visible .entry b() { .reg .b32 %r<2>; mov.b32 %r1, 0; ret; }"
    )
    with machine.options(count=1):
        for name in "abba":
            module.launch(name)
    assert [x["kernel"] for x in machine.counters()] == list("abba")
    assert [x["instructions"] for x in machine.counters()] == [1, 2, 2, 1]
    machine.reset_counters()
    assert machine.counters() == []


CLASSES = [
    ("special", "ex2.approx.ftz.f32 %f2, %f1;", 1),
    ("special", "rcp.approx.f32 %f2, %f1;", 1),
    ("special", "div.full.f32 %f2, %f1, %f1;", 1),
    ("special", "tanh.approx.f32 %f2, %f1;", 1),
    ("special", "mov.b32 %r1, 0; ex2.approx.f16x2 %r2, %r1;", 2),
    ("fp32", "fma.rn.f32 %f2, %f1, %f1, %f1;", 1),
    ("fp32", "sub.ftz.f32 %f2, %f1, %f1;", 1),
    ("fp32", "neg.f32 %f2, %f1;", 1),
    ("select", "max.f32 %f2, %f1, %f1;", 1),
    ("select", "setp.lt.f32 %p1, %f1, %f1;", 1),
    ("select", "setp.lt.s32 %p1, %r0, 3; selp.b32 %r1, 1, 2, %p1;", 1),
    ("convert", "cvt.rn.f16x2.f32 %r1, %f1, %f1;", 1),
    ("convert", "cvt.rzi.s32.f32 %r1, %f1;", 1),
    ("integer", "cvt.u64.u32 %d1, %r0;", 1),
    ("integer", "mul.wide.u32 %d1, %r0, 4;", 1),
    ("integer", "max.s32 %r1, %r0, 4;", 1),
    ("integer", "setp.lt.s32 %p1, %r0, 3;", 1),
    ("integer", "shl.b32 %r1, %r0, 3;", 1),
    ("half", "mov.b32 %r1, 0; fma.rn.f16x2 %r2, %r1, %r1, %r1;", 1),
    ("fp64", "mov.b64 %g1, 0d0000000000000000; add.f64 %g2, %g1, %g1;", 1),
    ("warp", "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", 1),
    ("memory", "ld.global.b32 %r1, [%d0];", 1),
    ("control", "bar.sync 0;", 1),
]


@pytest.mark.parametrize(("name", "body", "weight"), CLASSES)
def test_classes(name, body, weight):
    empty, launch = count(""), count(body)
    added = {
        c: launch["classes"][c]["lanes"] - empty["classes"][c]["lanes"] for c in launch["classes"]
    }
    moves = body.count("mov.")
    setups = int("selp" in body)
    assert added.pop(name) == 32 * weight
    assert added.pop("move", 0) == 32 * moves
    assert added.pop("integer", 0) == 32 * setups
    assert not any(added.values())


def test_predicated_off_instructions_are_issued():
    launch = count("setp.gt.u32 %p1, %r0, 100;\n@%p1 add.u32 %r1, %r0, 1;\n")
    assert launch["opcodes"]["add.u32"] == {"instructions": 1, "lanes": 0}
    launch = count("setp.lt.u32 %p1, %r0, 5;\n@%p1 add.u32 %r1, %r0, 1;\n")
    assert launch["opcodes"]["add.u32"] == {"instructions": 1, "lanes": 5}


def test_divergent_groups_are_issued_one_by_one():
    body = """
setp.lt.u32 %p1, %r0, 5;
@%p1 bra A;
add.u32 %r1, %r0, 1;
bra B;
A:
add.u32 %r1, %r0, 2;
B:
sub.u32 %r2, %r0, 1;
"""
    launch = count(body)
    assert launch["opcodes"]["add.u32"] == {"instructions": 2, "lanes": 32}
    assert launch["opcodes"]["sub.u32"] == {"instructions": 1, "lanes": 32}
    assert launch["opcodes"]["bra"] == {"instructions": 2, "lanes": 32}


MMA = [
    ("m16n8k16.row.col.f32.f16.f16.f32", (4, 4, 2, 4), 1),
    ("m16n8k16.row.col.f16.f16.f16.f16", (2, 4, 2, 2), 1),
    ("m16n8k8.row.col.f32.bf16.bf16.f32", (4, 2, 1, 4), 0.5),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", (4, 4, 2, 4), 1),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", (4, 2, 1, 4), 0.5),
    ("m16n8k32.row.col.s32.s8.u8.s32", (4, 4, 2, 4), 1),
    ("m16n8k16.row.col.satfinite.s32.s8.s8.s32", (4, 2, 1, 4), 0.5),
    ("m16n8k64.row.col.s32.s4.u4.s32", (4, 4, 2, 4), 1),
    ("m16n8k256.row.col.s32.b1.b1.s32.xor.popc", (4, 4, 2, 4), 1),
    ("m8n8k4.row.col.f32.f16.f16.f32", (8, 2, 2, 8), 0.5),
]
WHOLE = [
    *((f"mma.sync.aligned.{form}", *rest, "") for form, *rest in MMA),
    ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", (2, 1, 1, 2), 0.5, ""),
    ("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", (4, 2, 2, 4), 0.5, ", %r6, 0"),
    ("wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32", (8, 8, 8, 8), 2, ""),
]


@pytest.mark.parametrize(("opcode", "registers", "weight", "tail"), WHOLE)
def test_mma(opcode, registers, weight, tail):
    name = "%d5" if "f64" in opcode else "%r5"
    lists = ", ".join("{" + ", ".join([name] * n) + "}" for n in registers)
    body = f"mov.b32 %r5, 0;\nmov.b64 %d5, 0;\nmov.b32 %r6, 0x44444444;\n{opcode} {lists}{tail};\n"
    launch = count(body * 3, block=64)
    assert launch["mma"] == 2 * 3 * weight
    assert launch["classes"]["tensor"] == {"instructions": 6, "lanes": 6 * 32}


SHARED = "mov.u32 %r3, tile;\nmov.u64 %d1, tile;\nmov.b32 %r5, 0;\nmov.b32 %r6, 0;\n"


def address(step: int) -> str:
    return SHARED + f"mad.lo.u32 %r4, %r0, {step}, %r3;\n"


# body, row, (requests, lanes, bytes, waves, ideal)
SHARED_CASES = [
    (address(4) + "ld.shared.b32 %r5, [%r4];", "load", (1, 32, 128, 1, 1)),
    (address(8) + "ld.shared.b32 %r5, [%r4];", "load", (1, 32, 128, 2, 1)),
    (address(128) + "ld.shared.b32 %r5, [%r4];", "load", (1, 32, 128, 32, 1)),
    (address(132 - 128) + "ld.shared.b8 %r5, [%r4];", "load", (1, 32, 32, 1, 1)),
    (address(1) + "ld.shared.b8 %r5, [%r4];", "load", (1, 32, 32, 1, 1)),
    (address(0) + "ld.shared.b32 %r5, [%r4];", "load", (1, 32, 128, 1, 1)),
    (address(8) + "ld.shared.b64 %d1, [%r4];", "load", (1, 32, 256, 2, 2)),
    (address(16) + "ld.shared.v2.b32 {%r5, %r6}, [%r4];", "load", (1, 32, 256, 4, 2)),
    (
        address(16) + "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4];",
        "load",
        (1, 32, 512, 4, 4),
    ),
    (address(64) + "st.shared.v4.b32 [%r4], {%r5, %r5, %r5, %r5};", "store", (1, 32, 512, 16, 4)),
    (
        address(4) + "setp.lt.u32 %p1, %r0, 7;\n@%p1 st.shared.b32 [%r4], %r5;",
        "store",
        (1, 7, 28, 1, 1),
    ),
    (
        address(16)
        + "setp.eq.u32 %p1, %r0, 31;\n@%p1 ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4];",
        "load",
        (1, 1, 16, 1, 1),
    ),
    (address(0) + "red.shared.add.u32 [%r4], %r5;", "atomic", (1, 32, 128, 1, 1)),
    (
        address(16) + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r4];",
        "matrix",
        (1, 32, 512, 4, 4),
    ),
    (
        address(64) + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r4];",
        "matrix",
        (1, 32, 512, 16, 4),
    ),
    (
        address(0) + "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r4];",
        "matrix",
        (1, 16, 256, 16, 2),
    ),
    (
        address(128) + "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r5, %r6}, [%r4];",
        "matrix",
        (1, 16, 256, 16, 2),
    ),
    (
        address(4)
        + "cvta.shared.u64 %d1, %d1;\nmul.wide.u32 %d2, %r0, 4;\nadd.s64 %d1, %d1, %d2;\n"
        + "ld.b32 %r5, [%d1];",
        "load",
        (1, 32, 128, 1, 1),
    ),
]


@pytest.mark.parametrize(("body", "row", "wanted"), SHARED_CASES)
def test_shared_memory(body, row, wanted):
    launch = count(body)
    assert requests(launch["shared"].pop(row)) == wanted
    assert not any(any(r.values()) for r in launch["shared"].values())
    assert not any(any(r.values()) for r in launch["global"].values())


def global_address(step: int, offset: int = 0) -> str:
    return f"mul.wide.u32 %d1, %r0, {step};\nadd.s64 %d1, %d1, %d0;\nadd.s64 %d1, %d1, {offset};\n"


# body, row, (requests, lanes, bytes, sectors, ideal); %d0 is a multiple of 128
GLOBAL_CASES = [
    (global_address(4) + "ld.global.b32 %r5, [%d1];", "load", (1, 32, 128, 4, 4)),
    (global_address(4, 16) + "ld.global.b32 %r5, [%d1];", "load", (1, 32, 128, 5, 4)),
    (global_address(32) + "ld.global.b32 %r5, [%d1];", "load", (1, 32, 128, 32, 4)),
    (global_address(0) + "ld.global.b32 %r5, [%d1];", "load", (1, 32, 128, 1, 1)),
    (global_address(2) + "ld.global.b16 %h1, [%d1];", "load", (1, 32, 64, 2, 2)),
    (
        global_address(16) + "ld.global.nc.v4.b32 {%r5, %r6, %r7, %r8}, [%d1];",
        "load",
        (1, 32, 512, 16, 16),
    ),
    (global_address(4) + "st.global.b32 [%d1], %r0;", "store", (1, 32, 128, 4, 4)),
    (
        global_address(4) + "setp.lt.u32 %p1, %r0, 9;\n@%p1 st.global.b32 [%d1], %r0;",
        "store",
        (1, 9, 36, 2, 2),
    ),
    (global_address(64) + "red.global.add.u32 [%d1], %r0;", "atomic", (1, 32, 128, 32, 4)),
    (global_address(4) + "ld.b32 %r5, [%d1];", "load", (1, 32, 128, 4, 4)),
]


@pytest.mark.parametrize(("body", "row", "wanted"), GLOBAL_CASES)
def test_global_memory(body, row, wanted):
    launch = count(body)
    assert requests(launch["global"].pop(row)) == wanted
    assert not any(any(r.values()) for r in launch["global"].values())
    assert not any(any(r.values()) for r in launch["shared"].values())


def test_asynchronous_copies_count_in_both_memories():
    """Lanes with an ignored source write zeros to shared memory and cause no global traffic."""
    body = (
        global_address(16)
        + address(16).replace("%d1", "%d3")
        + "setp.lt.u32 %p1, %r0, 8;\nselp.b32 %r7, 16, 0, %p1;\n"
        + "cp.async.cg.shared.global [%r4], [%d1], 16, %r7;\ncp.async.wait_all;\n"
    )
    launch = count(body)
    assert requests(launch["global"]["copy"]) == (1, 8, 128, 4, 4)
    assert requests(launch["shared"]["copy"]) == (1, 32, 512, 4, 4)
    assert launch["shared"]["store"]["requests"] == 0
    assert launch["global"]["load"]["requests"] == 0


def test_barriers_are_warp_executions_and_arrivals_are_none():
    body = "bar.sync 0;\nbar.sync 0;\nbar.arrive 1, 128;\nbar.warp.sync -1;\n"
    launch = count(body.replace("bar.arrive 1, 128;", "bar.arrive 1, 64;"), block=64)
    assert launch["barriers"] == 4
    assert count("barrier.cta.sync.aligned 0;\n", block=96)["barriers"] == 3
    reduction = "setp.eq.u32 %p1, %r0, 0;\nbar.red.popc.u32 %r1, 0, %p1;\n"
    assert count(reduction, block=96)["barriers"] == 3


def test_local_memory():
    body = ".local .align 4 .b8 mine[8];\nst.local.b32 [mine], %r0;\nld.local.b32 %r1, [mine];\n"
    launch = count(body, block=64)
    assert launch["local_requests"] == 4
    assert launch["local_bytes"] >= 8
    assert launch["classes"]["memory"]["instructions"] == 4
