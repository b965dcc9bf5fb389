"""wgmma against NumPy: types, both sources of A, every descriptor layout, moments, checks. Operands
are small integers, so that every sum is exact."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import toolchain
from hopper import MODES, kernel, sm90, wait
from machine import MachineError, machine
from test_bulk_tensors import swizzle_rows

HERE = Path(__file__).parent
ONE = {"e4m3": {0: 0, 1: 0x38, 2: 0x40}, "e5m2": {0: 0, 1: 0x3C, 2: 0x40}}  # bits of 0, 1, 2
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}


def bits(values: np.ndarray, type_: str) -> np.ndarray:
    """Small integers as the bytes of a type: [..., bytes]."""
    if type_ in ONE:
        code = np.vectorize(lambda x: ONE[type_][abs(int(x))] | (0x80 if x < 0 else 0))(values)
        encoded = code.astype(np.uint8)
    elif type_ == "bf16":
        encoded = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        dtype = {"f16": np.float16, "tf32": np.float32, "s8": np.int8, "u8": np.uint8}[type_]
        encoded = values.astype(dtype)
    return np.ascontiguousarray(encoded)[..., None].view(np.uint8)


class Image:
    """A matrix [mn, k] in shared memory: its bytes, and the descriptor of a slice of 32 bytes of
    k."""

    def __init__(self, values: np.ndarray, type_: str, swizzle: int, transposed: bool) -> None:
        size = BYTES[type_]
        data = bits(values, type_)
        mn, k = values.shape
        self.mode = swizzle
        pitch = 16 << swizzle  # bytes per row
        per = pitch // size  # elements per row
        if transposed and swizzle:  # [block of mn, k, mn]
            blocks = data.reshape(mn // per, per, k, size).transpose(0, 2, 1, 3)
            self.leading, self.stride, self.step = k * pitch, 8 * pitch, 16 * pitch
        elif transposed:  # [group of k, group of mn, k, mn]
            blocks = data.reshape(mn // 8, 8, k // 8, 8, size).transpose(2, 0, 3, 1, 4)
            self.leading, self.stride, self.step = mn * 16, 128, 2 * mn * 16
        elif swizzle:  # [block of k, mn, k]
            blocks = data.reshape(mn, k // per, per, size).transpose(1, 0, 2, 3)
            self.leading, self.stride, self.step = 16, 8 * pitch, 32
        else:  # [group of 16 bytes of k, mn, k]
            blocks = data.reshape(mn, k // per, per, size).transpose(1, 0, 2, 3)
            self.leading, self.stride, self.step = mn * 16, 128, 2 * mn * 16
        flat = np.ascontiguousarray(blocks).ravel()
        self.bytes = np.zeros(-(-len(flat) // 1024) * 1024, np.uint8)
        self.bytes[: len(flat)] = flat
        self.bytes = swizzle_rows(self.bytes, swizzle)
        self.row = pitch if swizzle and not transposed else 0
        self.block = mn * pitch

    def descriptor(self, base: int, slice_: int) -> int:
        code = {0: 0, 1: 3, 2: 2, 3: 1}[self.mode]
        address = base + slice_ * self.step
        if self.row:  # rows longer than a slice, in blocks
            address = base + slice_ * 32 // self.row * self.block + slice_ * 32 % self.row
        return address >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | code << 62


class CuteImage:
    """A matrix of 16-bit elements in CuTe's layout, with its descriptor."""

    def __init__(self, values: np.ndarray, offsets: list[int], descriptor: int) -> None:
        self.bytes = np.zeros(values.size * 2, np.uint8)
        self.bytes.view(np.float16)[offsets] = values.ravel()
        self.said = descriptor

    def descriptor(self, base: int, slice_: int) -> int:
        assert slice_ == 0
        return self.said + (base >> 4)


def fragments_of_a(values: np.ndarray, type_: str) -> np.ndarray:
    """Registers [thread, slice, 4] of A [64, k]."""
    size = BYTES[type_]
    data = bits(values, type_).reshape(64, -1)  # bytes
    out = np.zeros((128, data.shape[1] // 32, 4, 4), np.uint8)
    for thread, part, i in np.ndindex(*out.shape[:3]):
        warp, lane = divmod(thread, 32)
        row = warp * 16 + lane // 4 + 8 * (i % 2)
        at = part * 32 + lane % 4 * 4 + 16 * (i // 2)
        out[thread, part, i] = data[row, at : at + 4]
    assert size
    return out.view(np.uint32)[..., 0]


def unpack(registers: np.ndarray, n: int, d: str) -> np.ndarray:
    """D [64, n] of registers [thread, n / 2 or n / 4]."""
    values = registers.view({"f16": np.float16, "f32": np.float32, "s32": np.int32}[d])
    out = np.zeros((64, n), np.float64)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            row = warp * 16 + lane // 4 + 8 * (i // 2 % 2)
            out[row, i // 4 * 8 + lane % 4 * 2 + i % 2] = values[thread, i]
    return out


def run(
    a: np.ndarray,
    b: np.ndarray,
    types: tuple[str, str, str],
    *,
    swizzles: tuple[int, int] = (3, 3),
    transposed: tuple[bool, bool] = (False, False),
    registers: bool = False,
    signs: tuple[int, int] = (1, 1),
    start: int | None = None,
    saturates: bool = False,
    image: CuteImage | None = None,
    after: str = "",
    **options,
) -> np.ndarray:
    """D of A [64, k] and B [n, k], one slice of 32 bytes of k after the other; the first slice does
    not accumulate unless D starts with a value."""
    type_a, type_b, d = types
    n, slices = len(b), a.shape[1] * BYTES[type_a] // 32
    image_a = Image(a, type_a, swizzles[0], transposed[0])
    image_b = image or Image(b, type_b, swizzles[1], transposed[1])
    memory = np.concatenate([image_a.bytes, image_b.bytes])
    count = n // 4 if d == "f16" else n // 2
    names = ", ".join(f"%f{i}" for i in range(count))
    shape = f"m64n{n}k{32 // BYTES[type_a]}{'.satfinite' * saturates}.{d}.{type_a}.{type_b}"
    body = f"""mov.u32 %r5, %r0;
COPY: mul.wide.u32 %d10, %r5, 16; add.u64 %d11, %d0, %d10; mad.lo.u32 %r4, %r5, 16, %r2;
ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d11];
st.shared.v4.u32 [%r4], {{%r10, %r11, %r12, %r13}};
add.u32 %r5, %r5, 128; setp.lt.u32 %p3, %r5, {len(memory) // 16}; @%p3 bra COPY;
fence.proxy.async.shared::cta; bar.sync 0;
{"".join(f"mov.b32 %f{i}, {start or 0};" for i in range(count))}
wgmma.fence.sync.aligned;
"""
    immediates = "".join(f", {s}" for s in signs) if d != "s32" else ""
    if BYTES[type_a] == 2:
        immediates += "" if registers else f", {int(transposed[0])}"
        immediates += f", {int(transposed[1])}"
    fragments = fragments_of_a(a, type_a)
    for i in range(slices):
        body += f"mov.b64 %d5, {image_a.descriptor(0, i)};\n"
        body += f"mov.b64 %d6, {image_b.descriptor(len(image_a.bytes), i)};\n"
        body += f"setp.ne.u32 %p4, {int(i > 0 or start is not None)}, 0;\n"
        if registers:
            body += f"""mad.wide.u32 %d7, %r0, {16 * slices}, %d2;
ld.global.v4.u32 {{%r20, %r21, %r22, %r23}}, [%d7+{16 * i}];
wgmma.fence.sync.aligned;
"""
        source = "{%r20, %r21, %r22, %r23}" if registers else "%d5"
        body += (
            f"wgmma.mma_async.sync.aligned.{shape} {{{names}}}, {source}, %d6, %p4{immediates};\n"
        )
        if registers:
            body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
    body += f"""wgmma.commit_group.sync.aligned;
{after or "wgmma.wait_group.sync.aligned 0;"}
mad.wide.u32 %d8, %r0, {4 * count}, %d1;
"""
    body += "".join(f"st.global.b32 [%d8+{4 * i}], %f{i};\n" for i in range(count))
    out = np.zeros((128, count), np.uint32)
    with sm90(**options):
        machine.run(kernel(body, 3, shared=len(memory)), "k", memory, out, fragments, block=128)
    return unpack(out, n, d)


def operands(n: int, k: int, types: tuple[str, str], seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    low = {t: 0 if t == "u8" else -2 for t in types}
    return (
        random.integers(low[types[0]], 3, (64, k)).astype(np.float64),
        random.integers(low[types[1]], 3, (n, k)).astype(np.float64),
    )


TYPES = [
    ("f16", "f16", "f32"),
    ("f16", "f16", "f16"),
    ("bf16", "bf16", "f32"),
    ("tf32", "tf32", "f32"),
    *((a, b, d) for a, b in itertools.product(ONE, ONE) for d in ("f32", "f16")),
    *((a, b, "s32") for a, b in itertools.product(("s8", "u8"), ("s8", "u8"))),
]


@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("types", TYPES, ids=".".join)
def test_types(types: tuple[str, str, str], registers: bool) -> None:
    a, b = operands(16, 128 // BYTES[types[0]], types[:2])
    for mode in MODES[:3]:
        got = run(a, b, types, registers=registers, **{"async": mode, "check": 1})
        assert np.array_equal(got, a @ b.T), mode


@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("swizzle", range(4))
def test_descriptors(swizzle: int, a_transposed: bool, b_transposed: bool) -> None:
    """Different swizzles for A and B."""
    a, b = operands(64, 64, ("f16", "f16"), swizzle)
    for other in (swizzle, (swizzle + 1) % 4):
        got = run(
            a,
            b,
            ("f16", "f16", "f32"),
            swizzles=(swizzle, other),
            transposed=(a_transposed, b_transposed),
        )
        assert np.array_equal(got, a @ b.T)


@pytest.mark.parametrize("swizzle", range(4))
def test_descriptors_of_other_sizes(swizzle: int) -> None:
    for type_, d in (("tf32", "f32"), ("s8", "s32")):
        a, b = operands(24, 128 // BYTES[type_], (type_, type_))
        got = run(a, b, (type_, type_, d), swizzles=(swizzle, swizzle))
        assert np.array_equal(got, a @ b.T)


@pytest.mark.parametrize("n", [8, 40, 96, 176, 256])
def test_columns(n: int) -> None:
    a, b = operands(n, 64, ("bf16", "bf16"))
    for mode in MODES[:3]:
        got = run(a, b, ("bf16", "bf16", "f32"), **{"async": mode, "check": 1})
        assert np.array_equal(got, a @ b.T)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("type_", ["f16", "bf16", "tf32", "e4m3", "e5m2"])
def test_negation(type_: str, registers: bool) -> None:
    a, b = operands(8, 128 // BYTES[type_], (type_, type_))
    for signs in ((-1, 1), (1, -1), (-1, -1)):
        got = run(a, b, (type_, type_, "f32"), registers=registers, signs=signs)
        assert np.array_equal(got, a @ b.T * signs[0] * signs[1])


@pytest.mark.parametrize("sign", [1, -1])
def test_saturation(sign: int) -> None:
    a, b = np.ones((64, 128)), np.full((8, 128), sign)
    start = sign * (2**31 - 20)
    types = ("s8", "s8", "s32")
    assert (
        run(a, b, types, start=start, saturates=True) == (2**31 - 1 if sign > 0 else -(2**31))
    ).all()
    assert (run(a, b, types, start=start) == start + sign * 128 - sign * 2**32).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("type_", ["f16", "bf16", "tf32"])
def test_bits_with_and_without_checks(type_: str, registers: bool) -> None:
    """The product for a whole warpgroup at once has the same bits as 8 columns at a time."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((64, 64)), rng.standard_normal((64, 64))
    a[3, 5], b[7, 9], b[8, 11] = np.inf, -np.inf, np.nan
    if type_ == "bf16":  # bits() truncates
        a, b = (x.astype(np.float32) for x in (a, b))
    types, form = (type_, type_, "f32"), {"registers": registers, "signs": (1, -1)}
    for transposed in (False, True)[: 1 + (type_ != "tf32")]:
        form["transposed"] = (False, transposed)
        got = run(a, b, types, **form)
        with np.errstate(invalid="ignore"):
            assert np.allclose(got, -(a @ b.T), atol=0.3, equal_nan=True)
        for options in ({"check": 1}, {"async": "earliest"}, {"async": "seed:3"}):
            again = run(a, b, types, **form, **options)
            assert np.array_equal(again.view(np.uint64), got.view(np.uint64))


def test_moments() -> None:
    """Accumulators read without a wait: old values at the latest moment; undefined in check
    mode."""
    a, b = operands(8, 64, ("f16", "f16"))
    none = "wgmma.wait_group.sync.aligned 1;"
    types = ("f16", "f16", "f32")
    assert np.array_equal(run(a, b, types, after=none, **{"async": "earliest"}), a @ b.T)
    assert not np.array_equal(run(a, b, types, after=none), a @ b.T)
    with pytest.raises(MachineError, match=r"has none since line .*wgmma\.mma_async"):
        run(a, b, types, after=none, check=1)


def test_counters() -> None:
    a, b = operands(64, 64, ("f16", "f16"))
    machine.reset_counters()
    run(a, b, ("f16", "f16", "f32"), count=1)
    (launch,) = machine.counters()
    assert launch["mma"] == 4 * 4 * 64 / 8
    assert launch["wgmma"] == {"a_bytes": 4 * 64 * 32, "b_bytes": 4 * 64 * 32}
    assert launch["classes"]["tensor"]["instructions"] == 4 * 4


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        ("m64n12k16.f32.f16.f16 {%f0}, %d1, %d2, %p0, 1, 1, 0, 0;", "no wgmma of this shape"),
        ("m64n8k8.f32.f16.f16 {%f0}, %d1, %d2, %p0, 1, 1, 0, 0;", "no wgmma of this shape"),
        ("m64n40k32.s32.s8.s8 {%f0}, %d1, %d2, %p0;", "no wgmma of this shape"),
        ("m64n8k16.f16.bf16.bf16 {%f0}, %d1, %d2, %p0, 1, 1, 0, 0;", "no wgmma of these types"),
        ("m64n8k32.f32.e4m3.f16 {%f0}, %d1, %d2, %p0, 1, 1;", "no wgmma of these types"),
        ("m64n8k16.f32.f16.f16 {%f0}, %d1, %d2, %p0, 1, 1, 0, 0;", "D needs 4 registers"),
        (
            "m64n8k16.f32.f16.f16 {_,%f1,%f2,%f3}, %d1, %d2, %p0, 1, 1, 0, 0;",
            "D needs a register, not '_'",
        ),
        (
            "m64n8k16.f32.f16.f16 {%f0,%f1,%f2,%f3}, {%r1,_,%r1,%r1}, %d2, %p0, 1, 1, 0;",
            "A needs a register, not '_'",
        ),
        ("m64n8k16.f32.f16.f16 {%f0,%f1,%f2,%f3}, %d1, %d2, %p0, 2, 1, 0, 0;", "1 or -1; got 2"),
        ("m64n8k8.f32.tf32.tf32 {%f0,%f1,%f2,%f3}, %d1, %d2, %p0, 1, 1, 0;", "number of operands"),
    ],
)
def test_refusals(statement: str, report: str) -> None:
    text = kernel(f"ret;\nwgmma.mma_async.sync.aligned.{statement}")
    with sm90(), pytest.raises(MachineError, match=report):
        machine.run(text, "k", np.zeros(1))
    with pytest.raises(MachineError, match="this form needs sm_90a; this is sm_80"):
        machine.run(text, "k", np.zeros(1))


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("mov.b64 %d5, 0x3fff; X", "read of 16 bytes at shared address 0x3fff0"),
        ("mov.b64 %d5, 0x4002000000000000; X", "base offset is not supported"),
        ("cvt.u64.u32 %d5, %r0; X", "the descriptor differs within the warp"),
        ("mov.b64 %d5, 0; setp.lt.u32 %p0, %r0, 9; X", "scale-d differs within the warp"),
        ("mov.b64 %d5, 0; setp.lt.u32 %p3, %r0, 9; @%p3 ret; X", "without all 32 lanes"),
    ],
)
def test_misuse(body: str, report: str) -> None:
    form = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
    text = kernel(
        body.replace("X", f"{form} {{%f0,%f1,%f2,%f3}}, %d5, %d5, %p0, 1, 1, 0, 0;")
        + "\nwgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    ).replace("setp.eq.u32 %p0, %r0, 0;", "setp.eq.u32 %p0, 0, 0;")
    with sm90(), pytest.raises(MachineError, match=report):
        machine.run(text, "k", np.zeros(1), block=128)


@pytest.mark.parametrize("block", [32, 96, 160])
def test_warpgroup_of_fewer_warps(block: int) -> None:
    text = kernel("wgmma.fence.sync.aligned;")
    with sm90(), pytest.raises(MachineError, match="by a warpgroup of fewer than four warps"):
        machine.run(text, "k", np.zeros(1), block=block)


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("shr.u32 %r9, %r0, 5; cvt.u64.u32 %d5, %r9; X", "differ in a descriptor or scale-d"),
        ("setp.ge.u32 %p5, %r0, 32; X", "differ in a descriptor or scale-d"),
        ("@!%p2 ret; X", "executed by 1 of the 4 warps of the warpgroup"),
        ("@!%p2 ret; setmaxnreg.dec.sync.aligned.u32 24;", "executed by 1 of the 4 warps"),
        (
            "@%p2 setmaxnreg.dec.sync.aligned.u32 24; @!%p2 setmaxnreg.dec.sync.aligned.u32 32;",
            "another executed line",
        ),
    ],
)
def test_warps_of_a_warpgroup_differ(body: str, report: str) -> None:
    form = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
    body = body.replace(
        "X",
        f"{form} {{%f0,%f1,%f2,%f3}}, %d5, %d5, %p5, 1, 1, 0, 0;\n"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
    )
    text = kernel(f"mov.b64 %d5, 0; setp.eq.u32 %p5, 0, 1;\n{body}")
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(text, "k", np.zeros(1), block=128)
    assert report in str(error.value)


def test_warps_that_have_exited_are_not_waited_for() -> None:
    """Warp 1 exits when the other warps already wait for its product."""
    body = """@%p2 bra GONE;
wgmma.fence.sync.aligned; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
@%p0 st.global.u32 [%d0], 1;
ret;
GONE: mov.u32 %r5, 0;
SPIN: add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, 100; @%p3 bra SPIN;"""
    out = np.zeros(1, np.uint32)
    with sm90():
        machine.run(kernel(body), "k", out, block=128)
    assert out[0] == 1


@pytest.mark.parametrize("mode", MODES[:3])
def test_one_warp_frees_the_stage_of_all(mode: str) -> None:
    """Only thread 0 tells the producer, after its own wait, that B has been read, while the other
    warps of its warpgroup may lag."""
    tiles = 6
    random = np.random.default_rng(0)
    a = random.integers(-2, 3, (64, 16)).astype(np.float64)
    b = random.integers(-2, 3, (tiles, 8, 16)).astype(np.float64)
    image = Image(a, "f16", 0, False)
    images = [Image(x, "f16", 0, False) for x in b]
    size = len(image.bytes)
    memory = np.concatenate([image.bytes, *(x.bytes[:256] for x in images)])
    load = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    form = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
    body = f"""
@%p0 mbarrier.init.shared.b64 [bar], 1; @%p0 mbarrier.init.shared.b64 [bar+8], 1;
@%p0 mbarrier.init.shared.b64 [bar+16], 1; bar.sync 0;
setp.ge.u32 %p4, %r0, 128; mov.u32 %r5, 0;
@%p4 bra PRODUCE;
{"".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(4))}
{wait("0", "bar+16")}
setp.eq.u32 %p5, 0, 0;
mov.b64 %d5, {image.descriptor(0, 0)}; mov.b64 %d6, {images[0].descriptor(size, 0)};
CONSUME: and.b32 %r6, %r5, 1;
{wait("%r6")}
wgmma.fence.sync.aligned;
{form} {{%f0,%f1,%f2,%f3}}, %d5, %d6, %p5, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
@%p0 mbarrier.arrive.shared.b64 _, [bar+8];
add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, {tiles}; @%p3 bra CONSUME;
mad.wide.u32 %d8, %r0, 16, %d1; st.global.v4.f32 [%d8], {{%f0,%f1,%f2,%f3}};
ret;
PRODUCE: setp.eq.u32 %p6, %r0, 128; @!%p6 ret;
mbarrier.arrive.expect_tx.shared.b64 _, [bar+16], {size};
{load} [data], [%d0], {size}, [bar+16];
add.u64 %d3, %d0, {size};
NEXT: and.b32 %r6, %r5, 1; xor.b32 %r6, %r6, 1;
{wait("%r6", "bar+8")}
mbarrier.arrive.expect_tx.shared.b64 _, [bar], 256;
{load} [data+{size}], [%d3], 256, [bar];
add.u64 %d3, %d3, 256; add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, {tiles}; @%p3 bra NEXT;"""
    text = kernel(body, 2, shared=size + 256)
    for seed in range(6):
        out = np.zeros((128, 4), np.uint32)
        with sm90(**{"async": mode, "check": 1, "order": "seeded", "seed": seed, "fuel": 8}):
            machine.run(text, "k", memory, out, block=160)
        assert np.array_equal(unpack(out, 8, "f32"), sum(a @ x.T for x in b)), seed


def test_layouts_are_what_cute_says(tmp_path: Path) -> None:
    """B in CuTe's layouts, with CuTe's descriptors."""
    nvcc, include = toolchain.nvcc(), toolchain.cutlass_include()
    if nvcc is None or include is None:
        pytest.skip("needs nvcc and the CUTLASS headers")
    program = tmp_path / "layouts"
    flags = ["-std=c++17", "-w", f"-I{include}", "-gencode=arch=compute_90a,code=compute_90a"]
    source = HERE / "layouts_sm90.cu"
    subprocess.run([nvcc, *flags, "-o", program, source], check=True, capture_output=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    assert len(lines) == 8
    for line in lines:
        said = json.loads(line)
        n, k = said["shape"]
        a, b = operands(n, k, ("f16", "f16"))
        image = CuteImage(b, said["offsets"], said["descriptor"])
        got = run(
            a[:, :16],
            b[:, :16],
            ("f16", "f16", "f32"),
            swizzles=(0, 0),
            transposed=(False, said["transposed"]),
            image=image,
        )
        assert np.array_equal(got, a[:, :16] @ b[:, :16].T), line[:80]
