"""ld, st and cp.async in every form, against NumPy."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from machine import MachineError, machine
from memory_kernels import (
    BYTES,
    FILL,
    LANES,
    MASK,
    bits,
    kernel,
    masks,
    offsets_of,
    random_bytes,
    register,
    space_base,
)

TYPES = [
    "b8",
    "u8",
    "s8",
    "b16",
    "u16",
    "s16",
    "b32",
    "u32",
    "s32",
    "f32",
    "b64",
    "u64",
    "s64",
    "f64",
]
SPACES = [
    "global",
    "shared",
    "local",
    "const",
    "param",
    "generic global",
    "generic shared",
    "generic local",
]
# PTX has no vectors above 16 bytes.
VECTORS = [(t, v) for t in TYPES for v in (1, 2, 4) if bits(t) * v <= 128]


def expected_load(data: np.ndarray, offset: int, type_: str, width: int, vector: int) -> list[int]:
    size = bits(type_) // 8
    values = []
    for j in range(vector):
        raw = bytes(data[offset + j * size : offset + (j + 1) * size])
        values.append(int.from_bytes(raw, "little", signed=type_[0] == "s") % (1 << width))
    return values


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("type_", "vector"), VECTORS)
def test_load(type_, vector, space):
    size = bits(type_) // 8 * vector
    data = random_bytes(1)
    widths = [w for w in (16, 32, 64) if w >= bits(type_)]
    if type_[0] == "f":
        widths = [bits(type_)]
    state_space = "" if space.startswith("generic") else "." + space
    suffix = {1: "", 2: ".v2", 4: ".v4"}[vector]
    limit = 16 if "local" in space else BYTES
    for width in widths:
        names = [f"{register(width)}{30 + j}" for j in range(vector)]
        listed = names[0] if vector == 1 else "{" + ", ".join(names) + "}"
        move = f"mov.b{width}"
        body = FILL + MASK + space_base(space) + "\nadd.s64 %d24, %d20, %d22;\n"
        body += "".join(f"{move} {name}, 21845;\n" for name in names)
        body += f"@%p0 ld{state_space}{suffix}.{type_} {listed}, [%d24];\n"
        body += f"mul.wide.u32 %d25, %r0, {vector * 8};\nadd.s64 %d25, %d25, %d2;\n"
        for j, name in enumerate(names):
            body += f"st.global.b{width} [%d25+{8 * j}], {name};\n"
        table = ", ".join(str(x) for x in data)
        module = machine.load(
            kernel(
                body,
                extra=f", .param .align 16 .b8 data[{BYTES}]",
                outside=f".const .align 16 .b8 table[{BYTES}] = {{{table}}};",
            )
        )
        for pattern, mask in itertools.product(
            ["consecutive", "reversed", "equal", "mixed"], masks()
        ):
            offsets = offsets_of(pattern, size, limit)
            selection = np.concatenate([np.array([mask], np.uint32), offsets])
            out = np.zeros((LANES, vector), np.uint64)
            struct = (ctypes.c_uint8 * BYTES)(*data)
            module.launch("k", data, selection, out, struct)
            for lane in range(LANES):
                base = 16 * lane if "local" in space else 0
                wanted = expected_load(data, base + int(offsets[lane]), type_, width, vector)
                if not mask >> lane & 1:
                    wanted = [0x5555] * vector
                assert [int(x) for x in out[lane]] == wanted, (width, pattern, hex(mask), lane)


@pytest.mark.parametrize(
    "space", ["global", "shared", "local", "generic global", "generic shared", "generic local"]
)
@pytest.mark.parametrize(("type_", "vector"), VECTORS)
def test_store(type_, vector, space):
    size = bits(type_) // 8 * vector
    data = random_bytes(2)
    widths = [bits(type_)] if type_[0] == "f" else [w for w in (16, 32, 64) if w >= bits(type_)]
    state_space = "" if space.startswith("generic") else "." + space
    suffix = {1: "", 2: ".v2", 4: ".v4"}[vector]
    limit = 16 if "local" in space else BYTES
    values = np.random.default_rng(3).integers(0, 2**64, (LANES, vector), dtype=np.uint64)
    for width in widths:
        names = [f"{register(width)}{30 + j}" for j in range(vector)]
        listed = names[0] if vector == 1 else "{" + ", ".join(names) + "}"
        body = FILL + MASK + space_base(space) + "\nadd.s64 %d24, %d20, %d22;\n"
        body += f"mul.wide.u32 %d25, %r0, {vector * 8};\nadd.s64 %d25, %d25, %d2;\n"
        for j, name in enumerate(names):
            body += f"ld.global.b{width} {name}, [%d25+{8 * j}];\n"
        body += f"@%p0 st{state_space}{suffix}.{type_} [%d24], {listed};\nbar.sync 0;\n"
        body += """
add.s64 %d11, %d3, %d10;
ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%d12];
@P st.global.v4.b32 [%d11], {%r10, %r11, %r12, %r13};
ld.local.v4.b32 {%r10, %r11, %r12, %r13}, [%d13];
@Q st.global.v4.b32 [%d11], {%r10, %r11, %r12, %r13};
""".replace("@P ", "" if "shared" in space else "@!%p7 ").replace(
            "@Q ", "" if "local" in space else "@!%p7 "
        )
        body = "setp.eq.b32 %p7, %r0, %r0;\n" + body
        module = machine.load(kernel(body, parameters=4))
        for pattern, mask in itertools.product(["consecutive", "reversed"], masks()):
            if size * LANES > limit and "local" not in space:
                continue
            offsets = offsets_of(pattern, size, limit)
            selection = np.concatenate([np.array([mask], np.uint32), offsets])
            memory = data.copy()
            out = np.zeros(BYTES, np.uint8)
            module.launch("k", memory, selection, values, out)
            wanted = data.copy()
            for lane in range(LANES):
                if mask >> lane & 1:
                    at = (16 * lane if "local" in space else 0) + int(offsets[lane])
                    for j in range(vector):
                        raw = (int(values[lane, j]) % (1 << bits(type_))).to_bytes(8, "little")
                        step = bits(type_) // 8
                        wanted[at + j * step : at + (j + 1) * step] = list(raw[:step])
            got = memory if "global" in space else out
            assert np.array_equal(got, wanted), (width, pattern, hex(mask))


def test_partial_vectors_and_strides():
    """A column of a matrix, and a vector of which only two elements are used."""
    body = """
mul.wide.u32 %d10, %r0, 64;
add.s64 %d10, %d10, %d0;
ld.global.v4.b32 {_, %r1, _, %r2}, [%d10+16];
mul.wide.u32 %d11, %r0, 8;
add.s64 %d11, %d11, %d1;
st.global.v2.b32 [%d11], {%r1, %r2};
"""
    data = np.arange(LANES * 16, dtype=np.uint32).reshape(LANES, 16)
    out = np.zeros((LANES, 2), np.uint32)
    machine.load(kernel(body, parameters=2)).launch("k", data, out)
    assert np.array_equal(out, data[:, [5, 7]])


COPY = """
mul.lo.u32 %r1, %r0, {size};
cvt.u64.u32 %d10, %r1;
add.s64 %d11, %d0, %d10;
mov.u32 %r2, tile;
add.u32 %r2, %r2, %r1;
mov.b32 %r3, 286331153;
st.shared.b32 [%r2], %r3;
{more}
cp.async.{op}.shared.global{level} [%r2], [%d11], {written}{last};
cp.async.commit_group;
ld.shared.b32 %r4, [%r2];
cp.async.wait_group 0;
add.s64 %d12, %d1, %d10;
ld.shared.b32 %r5, [%r2];
st.global.b32 [%d12], %r5;
mul.wide.u32 %d13, %r0, 4;
add.s64 %d13, %d13, %d2;
st.global.b32 [%d13], %r4;
{rest}
"""


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("last", ["", ", %r6", ", %p2", "hex"])
@pytest.mark.parametrize("level", ["", ".L2::128B"])
def test_copy(size, last, level):
    rest = "".join(
        f"ld.shared.b32 %r5, [%r2+{4 * j}];\nst.global.b32 [%d12+{4 * j}], %r5;\n"
        for j in range(1, size // 4)
    )
    more = f"rem.u32 %r6, %r0, {size + 1};\nsetp.gt.u32 %p2, %r6, 3;\n"
    written = hex(size) if last == "hex" else str(size)
    sources = {"hex": f", {hex(size)}"}.get(last, last)
    body = COPY.format(
        size=size,
        more=more,
        op="cg" if size == 16 else "ca",
        level=level,
        written=written,
        last=sources,
        rest=rest,
    )
    data, out = random_bytes(8, LANES * size), np.zeros(LANES * size, np.uint8)
    before = np.zeros(LANES, np.uint32)
    machine.load(kernel(body)).launch("k", data, out, before)
    assert (before == 0x11111111).all()  # the copy had not landed
    wanted = data.reshape(LANES, size).copy()
    for lane in range(LANES):
        small = lane % (size + 1)
        kept = {", %r6": small, ", %p2": 0 if small > 3 else size}.get(last, size)
        wanted[lane, kept:] = 0
    assert np.array_equal(out, wanted.ravel())


def test_copies_land_group_by_group():
    """Lanes below 16 commit one group less: groups are counted per thread."""
    body = """
mul.lo.u32 %r1, %r0, 4;
cvt.u64.u32 %d10, %r1;
add.s64 %d11, %d0, %d10;
mov.u32 %r2, tile;
add.u32 %r2, %r2, %r1;
setp.ge.u32 %p1, %r0, 16;
cp.async.ca.shared.global [%r2], [%d11], 4;
cp.async.commit_group;
@%p1 cp.async.commit_group;
cp.async.wait_group 1;
ld.shared.b32 %r3, [%r2];
add.s64 %d12, %d1, %d10;
st.global.b32 [%d12], %r3;
cp.async.ca.shared.global [%r2], [%d11+128], 4;
cp.async.wait_all;
ld.shared.b32 %r3, [%r2];
st.global.b32 [%d12+128], %r3;
"""
    data, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    machine.load(kernel(body, parameters=2)).launch("k", data, out)
    assert (out[:16] == 0xFFFFFFFF).all()  # shared memory is initialised to NaN
    assert np.array_equal(out[16:], data[16:])


def test_lanes_wait_for_their_own_copies():
    """Only lanes below 16 wait; the copies of the other lanes have not landed for any lane."""
    body = """
mul.lo.u32 %r1, %r0, 4;
cvt.u64.u32 %d10, %r1;
add.s64 %d11, %d0, %d10;
mov.u32 %r2, tile;
add.u32 %r2, %r2, %r1;
cp.async.ca.shared.global [%r2], [%d11], 4;
cp.async.commit_group;
setp.lt.u32 %p1, %r0, 16;
@%p1 cp.async.wait_group 0;
ld.shared.b32 %r3, [%r2];
add.s64 %d12, %d1, %d10;
st.global.b32 [%d12], %r3;
"""
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    machine.load(kernel(body, parameters=2)).launch("k", data, out)
    assert np.array_equal(out[:16], data[:16])
    assert (out[16:] == 0xFFFFFFFF).all()


def test_a_stack_of_each_lane():
    """alloca with a different size per lane; stackrestore resets to the saved stack."""
    text = """.visible .entry k(.param .u64 p, .param .u64 extra) {
.reg .b32 %r<8>; .reg .b64 %d<12>; .reg .pred %p<2>; .local .align 8 .b8 mine[8];
ld.param.u64 %d0, [p]; ld.param.u64 %d9, [extra]; mov.u32 %r0, %tid.x;
mad.wide.u32 %d1, %r0, 16, %d0; mul.wide.u32 %d2, %r0, 8; add.u64 %d2, %d2, %d9;
stacksave.u64 %d3;
alloca.u64 %d4, %d2;
alloca.u64 %d5, 4, 64;
st.local.u32 [%d5], %r0; st.local.u64 [mine], %d2;
stackrestore.u64 %d3;
alloca.u64 %d6, 12, 4;
st.local.u32 [%d6+8], 7;
ld.local.u32 %r1, [%d5]; ld.local.u32 %r2, [%d6+8];
sub.u64 %d7, %d6, %d4; cvt.u32.u64 %r3, %d7; and.b64 %d8, %d5, 63; cvt.u32.u64 %r4, %d8;
st.global.v4.u32 [%d1], {%r1, %r2, %r3, %r4};
ret; }"""
    out = np.zeros((32, 4), np.uint32)
    with machine.options(check=1):
        machine.run(text, "k", out, np.uint64(16))
    assert (out == np.stack([np.arange(32), *np.full((3, 32), [[7], [0], [0]])], 1)).all()
    with pytest.raises(MachineError, match=r"alloca of 4097 bytes: a stack has 4096, 0 of them"):
        machine.run(text, "k", out, np.uint64(4097))
