"""Bulk copies of bytes: every direction and reduction, at every moment that PTX allows."""

from __future__ import annotations

import numpy as np
import pytest
from hopper import MODES, init, kernel, sm90, wait
from machine import MachineError, machine

LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.global.shared::cta.bulk_group"
SEND = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
FILL = """mul.wide.u32 %d10, %r0, 16; add.u64 %d11, %d0, %d10;
ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d11]; mad.lo.u32 %r4, %r0, 16, %r2;
st.shared.v4.u32 [%r4], {%r10, %r11, %r12, %r13};
fence.proxy.async.shared::cta; bar.sync 0;
"""
DRAIN = "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\n"


def expect(bytes_: int | str) -> str:
    return f"@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [bar], {bytes_};\n"


@pytest.mark.parametrize("mode", MODES)
def test_there_and_back(mode: str) -> None:
    """Global to shared memory in two phases into two buffers, with a prefetch and a cache hint;
    then back."""
    body = f"""{init(1)}
mov.b64 %d5, 0;
@%p0 cp.async.bulk.prefetch.L2.global [%d0], 512;
{expect(512)}
@%p0 {LOAD} [%r2], [%d0], 512, [bar];
{wait("0")}
bar.sync 0;
{expect(256)}
@%p0 {LOAD}.L2::cache_hint [data+512], [%d0+512], 240, [bar], %d5;
@%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [data+752], [%d0+752], 16, [bar];
{wait("1")}
@%p0 {STORE} [%d1], [%r2], 512;
@%p0 cp.async.bulk.commit_group;
@%p0 {STORE}.L2::cache_hint [%d1+512], [data+512], 256, %d5;
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group.read 1;
@%p0 st.shared.u32 [%r2], -1;
@%p0 cp.async.bulk.wait_group 0;
@%p0 ld.global.u32 %r5, [%d1+764];
@%p0 st.global.u32 [%d1+768], %r5;"""
    data = np.random.default_rng(0).integers(0, 2**32, 192, dtype=np.uint32)
    out = np.zeros(193, np.uint32)
    with sm90(**{"async": mode, "check": 1}):
        machine.run(kernel(body, 2), "k", data, out, block=64)
    assert np.array_equal(out, [*data, data[-1]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("space", ["shared", "global"])
def test_a_warp_that_polls_a_flag(space: str, mode: str) -> None:
    """Warp 0 polls without waiting, and the warp that sets its flag waits for a copy."""
    flag = "%r2+512" if space == "shared" else "%d0+512"
    body = f"""{init(1)}
@%p0 st.shared.u32 [%r2+512], 0;
bar.sync 0;
@%p2 bra COPY;
POLL: ld.relaxed.gpu.{space}.u32 %r5, [{flag}]; setp.eq.u32 %p4, %r5, 0; @%p4 bra POLL;
ret;
COPY: setp.eq.u32 %p3, %r0, 32;
@%p3 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 16;
@%p3 {LOAD} [%r2], [%d0], 16, [bar];
{wait("0")}
@%p3 st.relaxed.gpu.{space}.u32 [{flag}], 1;"""
    with sm90(**{"async": mode, "watchdog": 1, "fuel": 100}):
        machine.run(kernel(body), "k", np.zeros(129, np.uint32), block=64)


def test_moments() -> None:
    """A kernel without a wait sees the old bytes at the latest moment, the new ones at the
    earliest, either at a seeded one."""
    body = f"""{init(1)}
@!%p0 bra DONE;
st.shared.u32 [%r2], 7;
fence.proxy.async;
{expect(16)}
{LOAD} [%r2], [%d0], 16, [bar];
ld.shared.u32 %r5, [%r2];
{wait("0")}
ld.shared.u32 %r6, [%r2];
{STORE} [%d1+16], [%r2], 16;
cp.async.bulk.commit_group;
ld.global.u32 %r7, [%d1+16];
cp.async.bulk.wait_group 0;
ld.global.u32 %r8, [%d1+16];
st.global.v4.u32 [%d1], {{%r5, %r6, %r7, %r8}};
DONE:"""
    data = np.full(4, 5, np.uint32)
    seen = {}
    for mode in ["latest", "earliest", *(f"seed:{i}" for i in range(12))]:
        out = np.full(8, 9, np.uint32)
        with sm90(**{"async": mode}):
            machine.run(kernel(body, 2), "k", data, out)
        assert out[1] == out[3] == 5
        seen[mode] = out[0], out[2]
    assert seen["latest"] == (7, 9) and seen["earliest"] == (5, 5)
    assert {seen[f"seed:{i}"][0] for i in range(12)} == {5, 7}
    with sm90(check=1), pytest.raises(MachineError, match="a bulk copy of warp 0 into it is in fl"):
        machine.run(kernel(body, 2), "k", data, np.zeros(8, np.uint32))


@pytest.mark.parametrize("mode", MODES)
def test_between_blocks_and_multicast(mode: str) -> None:
    """Block 0 loads for all blocks of the mask, then each block sends its half to the next one."""
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
    body = f"""{init(1)}
{meet}
mov.u32 %r4, %cluster_ctarank; mov.b16 %h1, 5;
and.b32 %r5, %r4, 1; setp.eq.u32 %p3, %r5, 0; and.pred %p3, %p3, %p0;
@%p3 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 256;
setp.eq.u32 %p4, %r4, 0; and.pred %p4, %p4, %p0;
@%p4 {LOAD}.multicast::cluster [%r2], [%d0], 256, [bar], %h1;
setp.eq.u32 %p5, %r5, 1;
@%p5 bra HAVE;
{wait("0")}
HAVE:
{meet}
xor.b32 %r6, %r4, 1; mov.u32 %r7, data; mov.u32 %r8, bar;
mapa.shared::cluster.u32 %r9, %r7, %r6; mapa.shared::cluster.u32 %r10, %r8, %r6;
@%p3 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r9+256], [%r2], 256,
 [%r10];
setp.eq.u32 %p6, %r5, 1; and.pred %p6, %p6, %p0;
@%p6 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 256;
@!%p5 bra DONE;
{wait("0")}
mul.wide.u32 %d2, %r0, 4; mad.wide.u32 %d2, %r4, 256, %d2; add.u64 %d2, %d2, %d1;
mad.lo.u32 %r11, %r0, 4, %r2; ld.shared.u32 %r12, [%r11+256]; st.global.u32 [%d2], %r12;
DONE:
{meet}"""
    data, out = np.arange(64, dtype=np.uint32) + 1, np.zeros((4, 64), np.uint32)
    with sm90(**{"async": mode, "check": 1}):
        machine.run(kernel(body, 2, cluster=4), "k", data, out, grid=4, block=64)
    assert np.array_equal(out, data * np.array([[0], [1], [0], [1]], np.uint32))


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bf16 to nearest even, as bits."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def reduced(op: str, type_: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    if type_ == "bf16":
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (old, new))
        return bf16({"add": np.add, "min": np.minimum, "max": np.maximum}[op](a, b))
    match op:
        case "inc":
            return np.where(old >= new, 0, old + 1).astype(old.dtype)
        case "dec":
            return np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype)
        case "and" | "or" | "xor":
            return {"and": old & new, "or": old | new, "xor": old ^ new}[op]
        case _:
            return {"add": np.add, "min": np.minimum, "max": np.maximum}[op](old, new)


TYPES = {
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "b32": np.uint32,
    "b64": np.uint64,
    "f16": np.float16,
    "bf16": np.uint16,
    "f32": np.float32,
    "f64": np.float64,
}
TO_GLOBAL = [
    *(("add", t) for t in ("u32", "s32", "u64", "f32", "f64", "f16", "bf16")),
    *((op, t) for op in ("min", "max") for t in ("u32", "s32", "u64", "s64", "f16", "bf16")),
    *((op, t) for op in ("and", "or", "xor") for t in ("b32", "b64")),
    ("inc", "u32"),
    ("dec", "u32"),
]
TO_SHARED = [
    ("add", "u32"),
    ("add", "s32"),
    ("add", "u64"),
    ("min", "s32"),
    ("max", "u32"),
    ("and", "b32"),
    ("or", "b32"),
    ("xor", "b32"),
    ("inc", "u32"),
    ("dec", "u32"),
]


def operands(type_: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(len(type_))
    dtype = TYPES[type_]
    count = 512 // np.dtype(dtype).itemsize
    if type_ == "bf16":
        return tuple(bf16(random.standard_normal(count)) for _ in range(2))
    if type_[0] == "f":
        return tuple(random.standard_normal(count).astype(dtype) for _ in range(2))
    old, new = (random.integers(0, 256, 512, dtype=np.uint8).view(dtype) for _ in range(2))
    new[::4] = old[::4]
    old[1::4] = 0
    return old, new


@pytest.mark.parametrize(("op", "type_"), TO_GLOBAL)
def test_reductions_to_global_memory(op: str, type_: str) -> None:
    old, new = operands(type_)
    noftz = ".noftz" if type_ in ("f16", "bf16") and op == "add" else ""
    body = f"{FILL}@%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group{noftz}.{op}.{type_} "
    body += f"[%d1], [%r2], 512;\n{DRAIN}"
    for mode in ("latest", "earliest"):
        result = old.copy()
        with sm90(**{"async": mode, "check": 1}):
            machine.run(kernel(body, 2), "k", new, result)
        wanted = reduced(op, type_, old, new)
        assert np.array_equal(result.view(np.uint8), wanted.view(np.uint8))


def test_sums_of_f32_flush() -> None:
    tiny, minimum = np.float32(1e-40), np.finfo(np.float32).smallest_normal
    old = np.resize(np.array([tiny, -tiny, -0.0, 2 * minimum, 1], np.float32), 128)
    new = np.resize(np.array([tiny, -tiny, -tiny, -1.5 * minimum, tiny], np.float32), 128)
    body = f"{FILL}@%p0 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 "
    with sm90():
        machine.run(kernel(body + f"[%d1], [%r2], 512;\n{DRAIN}", 2), "k", new, old)
    wanted = np.array([0, -0.0, -0.0, 0, 1], np.float32)
    assert np.array_equal(old[:5].view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize(("op", "type_"), TO_SHARED)
def test_reductions_to_another_block(op: str, type_: str) -> None:
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
    old, new = operands(type_)
    both = np.concatenate([old.view(np.uint8), new.view(np.uint8)])
    body = f"""mad.wide.u32 %d0, %r1, 512, %d0; {FILL}{init(1)}
setp.eq.u32 %p3, %r1, 0;
and.pred %p4, %p3, %p0; @%p4 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 512;
{meet}
mov.u32 %r5, 0; mov.u32 %r6, bar; mapa.shared::cluster.u32 %r7, %r2, %r5;
mapa.shared::cluster.u32 %r8, %r6, %r5; not.pred %p5, %p3; and.pred %p5, %p5, %p0;
@%p5 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{op}.{type_}
 [%r7], [%r2], 512, [%r8];
@!%p3 bra DONE;
{wait("0")}
ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r4]; add.u64 %d11, %d1, %d10;
st.global.v4.u32 [%d11], {{%r10, %r11, %r12, %r13}};
DONE: {meet}"""
    result = np.zeros_like(old)
    with sm90(check=1):
        machine.run(kernel(body, 2, cluster=2), "k", both, result, grid=2)
    assert np.array_equal(result, reduced(op, type_, old, new))


def sums_in_block_0(blocks: int, unset: bool = False, **options: object) -> np.ndarray:
    """Each other block adds its 512 bytes to the bytes of block 0, which may be undefined."""
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
    fill = FILL.replace("st.shared", "@%p5 st.shared") if unset else FILL
    body = f"""setp.ne.u32 %p5, %r1, 0; {fill}{init(1)}
and.pred %p4, %p5, %p0; setp.eq.u32 %p6, %r1, 0; and.pred %p6, %p6, %p0;
@%p6 mbarrier.arrive.expect_tx.shared.b64 _, [bar], {512 * (blocks - 1)};
{meet}
mov.u32 %r5, 0; mov.u32 %r6, bar;
mapa.shared::cluster.u32 %r7, %r2, %r5; mapa.shared::cluster.u32 %r8, %r6, %r5;
@%p4 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32
 [%r7], [%r2], 512, [%r8];
@%p5 bra DONE;
{wait("0")}
ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r4]; add.u64 %d11, %d1, %d10;
st.global.v4.u32 [%d11], {{%r10, %r11, %r12, %r13}};
DONE: {meet}"""
    out = np.zeros(128, np.uint32)
    with sm90(check=1, **options):
        machine.run(
            kernel(body, 2, cluster=blocks), "k", np.arange(128, dtype=np.uint32), out, grid=blocks
        )
    return out


@pytest.mark.parametrize("mode", MODES)
def test_reductions_overlap(mode: str) -> None:
    assert np.array_equal(sums_in_block_0(4, **{"async": mode}), 4 * np.arange(128))


def test_reduction_into_bytes_without_a_value() -> None:
    with pytest.raises(MachineError, match="read of uninitialised shared address 0x0"):
        sums_in_block_0(2, unset=True)


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        (f"{LOAD} [%r2+8], [%d0], 16, [bar];", "shared address 8 must be a multiple of 16"),
        (f"{LOAD} [%r2], [%d0+8], 16, [bar];", "is not a multiple of 16 bytes"),
        (f"{LOAD} [%r2], [%d0], 24, [bar];", "must be a multiple of 16; got 24"),
        (f"{LOAD} [%r2], [%d0+496], 32, [bar];", "ends 16 bytes past its end"),
        (f"{LOAD} [%r2+1024], [%d0], 64, [bar];", "64 bytes at shared address 1024"),
        (f"{LOAD} [%r2], [%d0], 16, [bar+8];", "0x408: no mbarrier"),
        (f"{LOAD}.multicast::cluster [%r2], [%d0], 16, [bar], %h1;", "mask 6 in a cluster of 1"),
        (
            f"mov.b16 %h1, 0; {LOAD}.multicast::cluster [%r2], [%d0], 16, [bar], %h1;",
            "multicast to no block (mask 0)",
        ),
        (f"{STORE} [%d0+512], [%r2], 16;", "outside every allocation"),
        (f"{STORE} [%d0], [%r2], 16, [bar];", "wrong number of operands"),
        (f"{LOAD}.frob [%r2], [%d0], 16, [bar];", "unknown modifier .frob"),
        (
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%d0], [%r2], 16;",
            ".noftz belongs to .add of f16",
        ),
        (
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [%d0], [%r2], 16;",
            "no such reduction for type .f32",
        ),
        ("cp.async.bulk.wait_group.write 0;", "malformed"),
    ],
)
def test_misuse(statement: str, report: str) -> None:
    body = f"{init(1)}@!%p0 bra DONE;\nmov.b16 %h1, 6;\n{statement}\n{DRAIN}{wait('0')}DONE:"
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(kernel(body), "k", np.zeros(128, np.uint32))
    assert report in str(error.value)


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        (f"{STORE} [%d0], [%r5], 16;", "source of a bulk copy: in block 1"),
        (f"{LOAD.replace('::cluster', '::cta')} [%r5], [%d0], 16, [%r7];", "own block (.shared::c"),
        (f"{SEND} [%r5], [%r5+512], 16, [%r7];", "source of a bulk copy: in block 1 of the cluste"),
        (f"{SEND} [%r2], [%r2+512], 16, [bar];", "in block 0 of the cluster; must be in another"),
    ],
)
def test_blocks_of_the_operands(statement: str, report: str) -> None:
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
    body = f"""{init(1)}{meet}
mov.u32 %r4, 1; mov.u32 %r6, bar; setp.eq.u32 %p3, %r1, 0; and.pred %p3, %p3, %p0;
mapa.shared::cluster.u32 %r5, %r2, %r4; mapa.shared::cluster.u32 %r7, %r6, %r4;
@%p3 {statement}
{meet}"""
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(kernel(body, cluster=2), "k", np.zeros(16, np.uint32), grid=2)
    assert report in str(error.value)


@pytest.mark.parametrize(
    ("body", "report"),
    [
        (
            f"{expect(16)}@%p0 {LOAD} [%r2], [%d0], 16, [bar];\n@%p0 ld.shared.u32 %r5, [%r2];",
            "in flight",
        ),
        (
            f"{expect(16)}@%p0 {LOAD} [%r2], [%d0], 16, [bar];\n@%p0 st.shared.u32 [%r2], 1;",
            "in flight",
        ),
        (f"{expect(16)}@%p0 {LOAD} [%r2], [%d0], 16, [bar];", "the blocks finished while"),
        (f"@%p0 {STORE} [%d0], [data+512], 16;\n{DRAIN}", "read of uninitialised shared address"),
        (f"@%p0 {STORE} [%d0+2048], [%r2], 16;", "the block finished while this copy had to read"),
        (
            f"{expect(16)}bar.sync 0;\n@%p2 ld.shared.u32 %r5, [%r2];\n"
            f"@%p0 {LOAD} [%r2], [%d0], 16, [bar];",
            "race: write to shared address 0x0, read by warp 1",
        ),
    ],
)
def test_checks(body: str, report: str) -> None:
    order = "reverse" if "race" in report else "forward"
    for check in (0, 1):
        data = np.zeros(1024, np.uint32)
        with sm90(check=check, order=order):
            if not check:
                machine.run(
                    kernel(FILL[: FILL.index("fence")] + init(1) + body), "k", data, block=64
                )
                continue
            with pytest.raises(MachineError) as error:
                filled = FILL[: FILL.index("bar.sync")]
                half = f"setp.lt.u32 %p3, %r0, 32; @!%p3 bra NOT; {filled} NOT:"
                machine.run(kernel(half + init(1) + body), "k", data, block=64)
            assert report in str(error.value)


def test_copy_into_a_block_that_finished() -> None:
    """Block 0 copies to block 1, which does not wait, and then waits for a copy of its own."""
    body = f"""{init(1)}
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
setp.eq.u32 %p3, %r1, 0; and.pred %p4, %p3, %p0; mov.u32 %r6, bar; mov.u32 %r4, 1;
mapa.shared::cluster.u32 %r5, %r2, %r4; mapa.shared::cluster.u32 %r7, %r6, %r4;
@%p4 {LOAD} [%r5], [%d0], 16, [%r7];
mov.u32 %r8, 0; @%p3 bra WAIT;
SPIN: add.u32 %r8, %r8, 1; setp.lt.u32 %p5, %r8, 20000; @%p5 bra SPIN;
ret;
WAIT:
@%p4 mbarrier.arrive.expect_tx.shared.b64 _, [bar], 16;
@%p4 {LOAD} [%r2], [%d0], 16, [bar];
{wait("0")}"""
    with sm90(check=1), pytest.raises(MachineError, match="block 1 of the cluster finished while"):
        machine.run(kernel(body, cluster=2), "k", np.zeros(4, np.uint32), grid=2)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("vector", [False, True])
def test_a_copy_over_a_flag_releases_nothing(order: str, vector: bool) -> None:
    """Warp 1 waits for the copy and acquires its data, not an earlier release by warp 0."""
    v4, one, five, flag, read = (
        (".v4", "{1, 1, 1, 1}", "{5, 5, 5, 5}", "{%r4, %r6, %r7, %r8}", "{%r5, %r9, %r10, %r11}")
        if vector
        else ("", "1", "5", "%r4", "%r5")
    )
    word = f"@%p0 st.shared{v4}.u32 [%r2+512], {five};\n"

    def body(first: str, then: str) -> str:
        return f"""{init(1)}@%p2 bra READ;
{first}{expect(16)}{then}
@%p0 st.release.cta.shared{v4}.u32 [%r2], {one};
fence.proxy.async;
@%p0 {LOAD} [%r2], [%d0], 16, [bar];
ret;
READ: {wait("0")}
ld.acquire.cta.shared{v4}.u32 {flag}, [%r2]; ld.shared{v4}.u32 {read}, [%r2+512];"""

    data = np.ones(4, np.uint32)
    for mode in MODES[:2]:
        with sm90(check=1, order=order, **{"async": mode}):
            machine.run(kernel(body(word, "")), "k", data, block=64)
            with pytest.raises(MachineError, match="race: read of shared address 0x200"):
                machine.run(kernel(body("", word)), "k", data, block=64)


def test_counters() -> None:
    body = f"""{init(1)}{expect(512)}
@%p0 {LOAD} [%r2], [%d0], 512, [bar];
{wait("0")}
@%p0 {STORE} [%d1], [%r2], 256;
{DRAIN}"""
    machine.reset_counters()
    with sm90(count=1):
        machine.run(kernel(body, 2), "k", *(np.zeros(128, np.uint32) for _ in range(2)))
    (launch,) = machine.counters()
    one = {"requests": 2, "lanes": 2, "bytes": 768}
    assert launch["global"]["bulk"] == one | {"sectors": 24, "ideal": 24}
    assert launch["shared"]["bulk"] == one | {"waves": 6, "ideal": 6}
