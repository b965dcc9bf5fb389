"""Accesses and forms that the machine refuses: memory faults, and unknown modifiers."""

from __future__ import annotations

import re

import numpy as np
import pytest
from machine import MachineError, machine
from memory_kernels import kernel


def run_one(statement: str, block: int = 32, shared: int = 0, data=None, outside: str = "") -> None:
    """Runs a statement on thread 0 with %d0 pointing to 64 bytes of global memory."""
    body = f"""
setp.ne.u32 %p1, %r0, 0;
@%p1 bra DONE;
mov.b32 %r1, 0;
mov.b32 %r2, 0;
mov.b32 %r3, 0;
mov.b32 %r4, 0;
mov.b16 %h1, 0;
mov.b64 %d1, 0;
mov.b64 %d2, 0;
mov.u64 %d5, tile;
mov.u64 %d6, mine;
cvta.shared.u64 %d7, %d5;
{statement}
DONE:
"""
    data = np.zeros(16, np.uint32) if data is None else data
    machine.load(kernel(body, parameters=1, outside=outside)).launch("k", data, block=block)


FAULTS = [
    (
        "ld.global.b32 %r1, [%d0+2];",
        "misaligned read: global address 0x[0-9a-f]+ is not a multiple of 4",
    ),
    ("ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%d0+8];", "not a multiple of 16"),
    ("ld.global.v2.b32 {%r1,%r2}, [%d0+4];", "not a multiple of 8"),
    ("st.global.b16 [%d0+1], %h1;", "misaligned write"),
    ("st.shared.b64 [%d5+4], %d1;", "misaligned write: shared address 0x4 is not a multiple of 8"),
    ("ld.shared.b16 %h1, [%d7+1];", "misaligned read: shared"),
    ("ld.local.b32 %r1, [%d6+1];", "misaligned read: local"),
    ("ld.b32 %r1, [%d7+2];", "misaligned read: shared"),
    ("atom.global.add.u64 %d1, [%d0+4], %d2;", "misaligned atomic access"),
    ("cp.async.cg.shared.global [%d5+8], [%d0], 16;", "misaligned write: shared"),
    ("cp.async.cg.shared.global [%d5], [%d0+8], 16;", "misaligned"),
    ("ld.global.b32 %r1, [%d0+64];", "begins 0 bytes past its end"),
    ("ld.global.b32 %r1, [%d0+164];", "of 64 bytes, the access begins 100 bytes past its end"),
    ("ld.global.b32 %r1, [%d0+-8];", "begins 8 bytes before it"),
    ("st.global.v4.b32 [%d0+64], {%r1,%r2,%r3,%r4};", "write of 16 bytes at global address"),
    ("red.global.add.f32 [%d0+64], %r1;", "atomic access of 4 bytes"),
    ("cp.async.cg.shared.global [%d5], [%d0+64], 16;", "cp.async.cg.*outside every allocation"),
    ("mov.b32 %r1, 17; cp.async.cg.shared.global [%d5], [%d0], 16, %r1;", "source size of 17"),
    (
        "ld.shared.b32 %r1, [%d5+512];",
        "shared memory of the block has 512 bytes, the access ends 4 ",
    ),
    ("st.shared.b8 [%d5+-1], %h1;", "shared address 0xf+"),
    ("ld.b32 %r1, [%d7+1024];", "at shared address 0x400"),
    ("cp.async.ca.shared.global [%d5+512], [%d0], 4;", "write of 4 bytes at shared address 0x200"),
    ("ld.local.b32 %r1, [%d6+16];", "local memory of the thread has 16 bytes"),
    ("ld.param.b32 %r1, [p0+16];", "parameter memory"),
    ("ld.param.v2.b64 {%d1,%d2}, [p0];", "memory of the block has 8 bytes, the access ends 8 "),
    ("ld.global.b32 %r1, [%d1];", "global address 0x0"),
]


@pytest.mark.parametrize(("statement", "message"), FAULTS)
def test_fault(statement, message):
    with pytest.raises(MachineError) as error:
        run_one(statement)
    text = str(error.value)
    assert re.search(message, text), text
    assert re.match(r"k, line \d+: ", text)
    assert "block (0, 0, 0), thread 0, warp 0, lane 0" in text


def test_a_fault_in_one_lane_of_many_names_it():
    body = """
mul.wide.u32 %d10, %r0, 4;
add.s64 %d10, %d10, %d0;
ld.global.b32 %r1, [%d10];
"""
    with pytest.raises(
        MachineError, match=r"begins 0 bytes past its end.*thread 16, warp 0, lane 16"
    ):
        machine.load(kernel(body, parameters=1)).launch("k", np.zeros(16, np.uint32))


def test_read_only_memory_is_not_written():
    data = np.zeros(16, np.uint32)
    data.setflags(write=False)
    run_one("ld.global.b32 %r1, [%d0];", data=data)
    with pytest.raises(MachineError, match="the allocation is read-only"):
        run_one("st.global.b32 [%d0], %r1;", data=data)


def test_overlapping_and_touching_extents():
    """Views of one tensor form one extent; adjacent extents stay separate."""
    data = np.zeros(64, np.uint32)
    body = "ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%d0+24];"
    with pytest.raises(MachineError, match="the access ends 8 bytes past its end"):
        machine.load(kernel(body.replace("24", "16").replace("16]", "32]"), parameters=2)).launch(
            "k", data[:10], data[10:20]
        )
    aligned = np.zeros(64, np.uint32)
    shift = -aligned.ctypes.data % 16 // 4
    view = aligned[shift:]
    module = machine.load(kernel("ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%d0+32];", parameters=2))
    module.launch("k", view[:10], view[9:20])
    with pytest.raises(MachineError, match="the access ends 8 bytes past its end"):
        module.launch("k", view[:10], view[10:20])


def test_memory_is_out_of_reach_after_the_launch():
    data = np.zeros(16, np.uint32)
    keep = np.array([data.ctypes.data], np.uint64)
    body = "ld.global.u64 %d1, [%d0]; ld.global.b32 %r1, [%d1];"
    module = machine.load(kernel(body, parameters=1))
    with pytest.raises(MachineError, match="outside every allocation"):
        module.launch("k", keep)


MODIFIERS = [
    *(
        f"ld.global.{m}.b32 %r1, [%d0];"
        for m in (
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "nc",
            "volatile",
            "nc.L1::no_allocate",
            "L1::evict_last",
            "L2::128B",
            "L2::64B",
            "L2::256B",
            "nc.L1::evict_first.L2::256B",
            "ca.L2::evict_last",
        )
    ),
    "ld.volatile.global.b32 %r1, [%d0];",
    "ld.relaxed.gpu.global.b32 %r1, [%d0];",
    "ld.acquire.sys.global.b32 %r1, [%d0];",
    "ld.weak.global.b32 %r1, [%d0];",
    "ld.global.L2::cache_hint.b32 %r1, [%d0], %d1;",
    "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%r1,_,%r3,_}, [%d0], %d1;",
    "ldu.global.b32 %r1, [%d0];",
    *(f"st.global.{m}.b32 [%d0], %r1;" for m in ("wb", "cg", "cs", "wt", "L1::no_allocate")),
    "st.volatile.global.b32 [%d0], %r1;",
    "st.release.gpu.global.b32 [%d0], %r1;",
    "st.relaxed.cta.shared::cta.b32 [%d5], %r1;",
    "st.global.L2::cache_hint.b32 [%d0], %r1, %d1;",
    "atom.acq_rel.gpu.global.add.u32 %r1, [%d0], %r2;",
    "atom.global.gpu.relaxed.cas.b32 %r1, [%d0], %r2, %r3;",
    "red.release.sys.global.add.u32 [%d0], %r2;",
    "red.async.relaxed.cluster.global.add.u32 [%d0], %r2;//refused",
    "cp.async.ca.shared::cta.global.L2::cache_hint [%d5], [%d0], 4, %d1;",
    "cp.async.ca.shared.global [%d5], [%d0], 4, %r1; cp.async.wait_all;",
    "cp.async.cg.shared.global [%d5], [%d0], 8;//refused",
    "cp.async.ca.shared.global [%d5], [%d0], 12;//refused",
    "cp.async.bulk.commit_group;//refused",
    "cp.async.wait_group;//refused",
    "cp.async.wait_group many;//refused",
    "cp.async.ca.shared.global [%d5], [%d0], %r1;//refused",
    "cp.async.ca.shared.global [%d5], [%d0];//refused",
    "ld.global.b32 %r1, %d0;//refused",
    "ld.global.b32 %r1;//refused",
    "ld.global %r1, [%d0];//refused",
    "st.global.b32 [%d0], {%r1, %r2};//refused",
    "membar.gl;",
    "membar.cta;",
    "membar.sys;",
    "membar.gpu;//refused",
    "fence.acq_rel.gpu;",
    "fence.sc.sys;",
    "fence.cta;",
    "fence.acq_rel;//refused",
    "prefetch.global.L2 [%d0];",
    "prefetch.global.L1 [%d0+4096];",
    "prefetchu.L1 [%d0];",
    "prefetch.global.L3 [%d0];//refused",
    "discard.global.L2 [%d0], 128;",
    "applypriority.global.L2::evict_normal [%d0], 128;",
    "createpolicy.fractional.L2::evict_first.b64 %d1, 0f3F800000;",
    "ld.global.zz.b32 %r1, [%d0];//refused",
    "ld.global.v3.b32 {%r1,%r2,%r3}, [%d0];//refused",
    "ld.global.v2.b32 {%r1,%r2,%r3}, [%d0];//refused",
    "ld.global.b64 %r1, [%d0];//refused",
    "ld.global.v4.b64 {%d1,%d2,%d1,%d2}, [%d0];//refused",
    "ld.global.b32 %r1, [%r2];//refused",
    "atom.global.add.s64 %d1, [%d0], %d2;//refused",
    "atom.global.add.f16x2 %r1, [%d0], %r2;//refused",
    "atom.global.add.noftz.f32 %r1, [%d0], %r2;//refused",
    "red.shared.add.v2.f32 [%d5], {%r1,%r2};//refused",
    "red.global.exch.b32 [%d0], %r1;//refused",
]


@pytest.mark.parametrize("statement", MODIFIERS)
def test_modifiers(statement):
    text, _, refused = statement.partition("//")
    if refused:
        with pytest.raises(MachineError, match=r"k, line \d+: "):
            run_one(text)
    else:
        run_one(text)


def test_isspacep():
    spaces = ["global", "shared", "local", "const", "param"]
    body = "mov.u64 %d5, tile;\ncvta.shared.u64 %d6, %d5;\n"
    body += "mov.u64 %d7, mine;\ncvta.local.u64 %d8, %d7;\n"
    for i, address in enumerate(["%d0", "%d6", "%d8"]):
        for j, space in enumerate(spaces):
            body += f"isspacep.{space} %p1, {address};\nselp.b32 %r1, 1, 0, %p1;\n"
            body += f"st.global.b32 [%d0+{4 * (5 * i + j)}], %r1;\n"
    out = np.zeros((3, 5), np.uint32)
    machine.load(kernel(body, parameters=1)).launch("k", out)
    assert np.array_equal(out, np.eye(3, 5, dtype=np.uint32))
