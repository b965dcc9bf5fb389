"""tensormap.replace and tensormap.cp_fenceproxy: tensor maps that a kernel makes."""

from __future__ import annotations

import numpy as np
import pytest
from hopper import init, kernel, sm90, wait
from machine import MachineError, machine

# Fields of a map of 32-bit words, 32 x 8, of which a copy moves 8 x 4.
FIELDS = {
    "global_address": ("b64", "%d1"),
    "rank": ("b32", "1"),
    "box_dim 0": ("b32", "8"),
    "box_dim 1": ("b32", "4"),
    "global_dim 0": ("b32", "32"),
    "global_dim 1": ("b32", "8"),
    "global_stride 0": ("b64", "128"),
    "element_stride 0": ("b32", "1"),
    "element_stride 1": ("b32", "1"),
    "elemtype": ("b32", "2"),
    "interleave_layout": ("b32", "0"),
    "swizzle_mode": ("b32", "0"),
    "fill_mode": ("b32", "0"),
}
COPY = (
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
    "[%d0], [%r2], 128;"
)
# Block 0 makes a map in shared memory and copies it to a0; block 1 reads a box at (16, 6), of which
# two rows lie outside of a1, and stores it to a2. a3 is a flag.
MAKER = """
setp.eq.u32 %p3, %r1, 1; @%p3 bra READER;
shl.b32 %r4, %r0, 2; add.u32 %r4, %r4, %r2; st.shared.u32 [%r4], 0;
bar.warp.sync 0xffffffff;
FIELDS
bar.warp.sync 0xffffffff;
COPY
@%p0 st.relaxed.gpu.global.u32 [%d3], 1;
ret;
READER:
"""
READER = """
@!%p0 bra WAIT;
SPIN: ld.relaxed.gpu.global.u32 %r5, [%d3]; setp.eq.u32 %p4, %r5, 0; @%p4 bra SPIN;
ACQUIRE
mov.u32 %r6, 16; mov.u32 %r7, 6;
mbarrier.arrive.expect_tx.shared.b64 _, [bar], 128;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
 [%r2], [%d0, {%r6, %r7}], [bar];
WAIT:
"""
STORE = """
shl.b32 %r4, %r0, 2; add.u32 %r4, %r4, %r2; ld.shared.u32 %r5, [%r4];
mul.wide.u32 %d5, %r0, 4; add.u64 %d5, %d5, %d2; st.global.u32 [%d5], %r5;
"""


def run(fields: dict[str, tuple[str, str]], copy: str = COPY, **options: str) -> np.ndarray:
    replaced = "".join(
        f"@%p0 tensormap.replace.tile.{name.split()[0]}.shared::cta.b1024.{type_} [%r2], "
        f"{', '.join([*name.split()[1:], value])};\n"
        for name, (type_, value) in fields.items()
    )
    maker = MAKER.replace("FIELDS", replaced).replace("COPY", copy)
    reader = READER.replace("ACQUIRE", "fence.proxy.tensormap::generic.acquire.gpu [%d0], 128;")
    text = kernel(maker + init(1) + reader + wait("0") + STORE, 4)
    space = np.zeros(256, np.uint8)
    place = space[-space.ctypes.data % 64 :][:128]
    words = np.arange(256 + 4, dtype=np.uint32)
    array = words[-words.ctypes.data % 16 // 4 :][:256]
    array[:] = np.arange(256)
    out, flag = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
    with sm90(check=1, **options):
        machine.run(text, "k", place, array, out, flag, grid=2, block=32)
    return out.reshape(4, 8)


@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
def test_a_map_that_the_kernel_made(order: str) -> None:
    out = run(FIELDS, order=order)
    rows = np.arange(256).reshape(8, 32)[6:8, 16:24]
    assert np.array_equal(out, np.concatenate([rows, np.zeros((2, 8))]))
    out = run(FIELDS | {"global_dim 0": ("b32", "18"), "global_dim 1": ("b32", "7")}, order=order)
    assert out[0].tolist() == [208, 209, 0, 0, 0, 0, 0, 0] and not out[1:].any()


@pytest.mark.parametrize(
    ("changes", "report"),
    [
        ({"rank": ("b32", "5")}, "rank: must be the rank less 1, from 0 to 4; got 5"),
        ({"rank": ("b32", "2")}, "a tensor map of 3 dimensions where the opcode has 2"),
        ({"box_dim 1": ("b32", "0")}, "box_dim: must be from 1 to 256; got 0"),
        ({"global_stride 0": ("b64", "40")}, "must be a multiple of 16 below 2.40; got 40"),
        ({"global_stride 4": ("b64", "16")}, "global_stride: has 4 dimensions"),
        ({"element_stride 0": ("b32", "2")}, "element_stride: must be 1 here; got 2"),
        ({"elemtype": ("b32", "13")}, "elemtype: must be a type that the machine knows; got 13"),
        ({"interleave_layout": ("b32", "1")}, "interleave_layout: must be 0 here; got 1"),
        ({"swizzle_mode": ("b32", "4")}, "swizzle_mode: must be from 0 to 3; got 4"),
        ({"swizzle_mode": ("b32", "3")}, "a row of 32 bytes under a swizzle of 128"),
        ({"elemtype": ("b32", "%r0")}, "unknown form of tensormap.replace"),
        ({"box_dim": ("b32", "4")}, "unknown form of tensormap.replace"),
        ({"rank": ("b64", "%d1")}, "unknown form of tensormap.replace"),
    ],
)
def test_errors(changes: dict[str, tuple[str, str]], report: str) -> None:
    with pytest.raises(MachineError, match=report):
        run(FIELDS | changes)


def test_a_map_that_is_not_published_races() -> None:
    plain = """mul.wide.u32 %d6, %r0, 4; add.u64 %d6, %d6, %d0;
ld.shared.u32 %r8, [%r4]; st.global.u32 [%d6], %r8;"""
    with pytest.raises(MachineError, match="race: read of global address"):
        run(FIELDS, plain)
