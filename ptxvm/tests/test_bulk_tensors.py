"""Bulk copies of boxes of tensors against NumPy: ranks, swizzles, out-of-bounds parts,
reductions."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hopper import MODES, init, kernel, sm90, wait
from machine import MachineError, machine

# CUtensorMapDataType of cuda.h.
TYPES = {
    "u8": (0, np.uint8),
    "u16": (1, np.uint16),
    "u32": (2, np.uint32),
    "s32": (3, np.int32),
    "u64": (4, np.uint64),
    "s64": (5, np.int64),
    "f16": (6, np.float16),
    "f32": (7, np.float32),
    "f64": (8, np.float64),
    "bf16": (9, np.uint16),
    "tf32": (11, np.float32),
}


def driver(name: str) -> Any:
    pointer, result = ctypes.c_void_p(), ctypes.c_int()
    machine.library.cudaGetDriverEntryPointByVersion(
        name.encode(), ctypes.byref(pointer), 12000, ctypes.c_ulonglong(0), ctypes.byref(result)
    )
    return ctypes.CFUNCTYPE(ctypes.c_int)(pointer.value) if pointer.value else None


def encode(
    array: np.ndarray,
    box: tuple[int, ...],
    type_: str = "u32",
    swizzle: int = 0,
    nan: bool = False,
    **changes: Any,
) -> tuple[int, np.ndarray]:
    """Error and tensor map of an array, whose last dimension is the map's first."""
    space = np.zeros(256, np.uint8)
    place = space[-space.ctypes.data % 64 :][:128]
    rank = changes.get("rank", array.ndim)
    extents = (ctypes.c_uint64 * 8)(*array.shape[::-1])
    strides = (ctypes.c_uint64 * 8)(*changes.get("strides", array.strides[::-1][1:]))
    boxes, steps = (ctypes.c_uint32 * 8)(*box[::-1]), (ctypes.c_uint32 * 8)(*[1] * 8)
    steps[0] = changes.get("step", 1)
    error = driver("cuTensorMapEncodeTiled")(
        place.ctypes.data_as(ctypes.c_void_p),
        TYPES[type_][0] if type_ in TYPES else int(type_),
        rank,
        ctypes.c_void_p(array.ctypes.data + changes.get("shift", 0)),
        extents,
        strides,
        boxes,
        steps,
        changes.get("interleave", 0),
        swizzle,
        changes.get("promotion", 0),
        int(nan),
    )
    return error, place


def aligned(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    """Random contents at an address that is a multiple of 16 bytes."""
    random = np.random.default_rng(seed)
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    space = random.integers(0, 256, count + 16, dtype=np.uint8)
    view = space[-space.ctypes.data % 16 :][:count].view(dtype).reshape(shape)
    if np.dtype(dtype).kind == "f":
        view[...] = random.standard_normal(shape)
    return view


def cut(array: np.ndarray, box: tuple[int, ...], at: tuple[int, ...], fill: Any) -> np.ndarray:
    """The box at a position that may be partly out of bounds."""
    out = np.full(box, fill, array.dtype)
    for index in np.ndindex(*box):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, array.shape, strict=True)):
            out[index] = array[place]
    return out


def swizzle_rows(data: np.ndarray, mode: int) -> np.ndarray:
    """Permutes the 16-byte units of each row of 32, 64 or 128 bytes by XOR with the number of the
    128-byte row."""
    if not mode:
        return data
    units = data.reshape(-1, 8, 16).copy()
    count = 1 << mode
    for row in range(len(units)):
        for unit in range(8):
            other = unit // count * count + (unit % count ^ row % count)
            units[row, other] = data.reshape(-1, 8, 16)[row, unit]
    return units.ravel()


def tensor_kernel(rank: int, move: str) -> str:
    """Copies 4096 bytes between shared memory and a1 around `move`, with 256 threads; coordinates
    in a3."""
    coordinates = ", ".join(f"%r{20 + d}" for d in range(rank))
    loads = "".join(f"ld.global.u32 %r{20 + d}, [%d2+{4 * d}];\n" for d in range(rank))
    place = f"[%d0, {{{coordinates}}}]"
    copy = """mul.wide.u32 %d10, %r0, 16; add.u64 %d11, %d1, %d10; mad.lo.u32 %r4, %r0, 16, %r2;
"""
    if move == "load":
        body = f"""{init(1)}{loads}ld.global.u32 %r5, [%d2+20];
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [bar], %r5;
@%p0 cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile {place};
@%p0 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
 [%r2], {place}, [bar];
{wait("0")}{copy}ld.global.u32 %r5, [%d2+20]; mul.lo.u32 %r6, %r0, 16; setp.ge.u32 %p3, %r6, %r5;
@%p3 ret;
ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r4];
st.global.v4.u32 [%d11], {{%r10, %r11, %r12, %r13}};"""
    else:
        op = move.partition(".")[2]
        name = f"cp.reduce.async.bulk.tensor.{rank}d" if op else f"cp.async.bulk.tensor.{rank}d"
        words = f"{'.' + op if op else ''}.tile.bulk_group"
        body = f"""{loads}{copy}ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d11];
st.shared.v4.u32 [%r4], {{%r10, %r11, %r12, %r13}};
fence.proxy.async.shared::cta; bar.sync 0;
@%p0 {name}.global.shared::cta{words} {place}, [%r2];
@%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;"""
    return kernel(body, 4, shared=4096)


def run(
    map_: np.ndarray,
    memory: np.ndarray,
    at: tuple[int, ...],
    array: np.ndarray,
    bytes_: int,
    move: str,
    **options: Any,
) -> None:
    numbers = np.zeros(6, np.int32)
    numbers[: len(at)] = at[::-1]
    numbers[5] = bytes_
    with sm90(**options):
        machine.run(tensor_kernel(len(at), move), "k", map_, memory, numbers, array, block=256)


# type, shape, box, position, swizzle
BOXES = [
    ("u8", (500,), (256,), (-17,), 0),
    ("f16", (300,), (64,), (270,), 3),
    ("f16", (40, 72), (16, 64), (30, 40), 3),
    ("f16", (40, 72), (16, 32), (-3, -5), 2),
    ("u16", (40, 24), (13, 16), (20, 0), 1),
    ("f32", (9, 12), (8, 8), (-8, 20), 0),
    ("u32", (5, 6, 8), (3, 4, 4), (3, -1, 2), 0),
    ("bf16", (3, 9, 64), (1, 8, 64), (2, 4, 0), 3),
    ("u64", (3, 4, 5, 6), (2, 2, 3, 4), (2, 3, -1, 5), 1),
    ("f64", (2, 3, 3, 3, 4), (2, 1, 2, 3, 2), (-1, 2, 2, 0, 3), 0),
    ("s32", (2, 2, 3, 4, 8), (1, 2, 3, 2, 8), (1, 0, -1, 3, -4), 1),
]


@pytest.mark.parametrize(("type_", "shape", "box", "at", "swizzle"), BOXES)
def test_load_and_store(
    type_: str, shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], swizzle: int
) -> None:
    dtype = TYPES[type_][1]
    array = aligned(shape, dtype)
    nan = type_[0] == "f" and swizzle != 2
    error, map_ = encode(array, box, type_, swizzle, nan)
    assert error == 0
    wanted = cut(array, box, at, np.nan if nan else 0)
    bytes_ = wanted.nbytes
    padded = np.zeros(-(-bytes_ // 1024) * 1024, np.uint8)
    padded[:bytes_] = wanted.view(np.uint8).ravel()
    for mode in MODES[:3]:
        memory = np.zeros(4096, np.uint8)
        run(map_, memory, at, array, bytes_, "load", **{"async": mode, "check": 1})
        got = swizzle_rows(memory[: len(padded)], swizzle)  # the swizzle is its own inverse
        got = got[:bytes_].view(dtype).reshape(box)
        assert np.array_equal(got, wanted, equal_nan=nan), mode
    # Shared to global memory: out-of-bounds elements are not written, the rest is the box in order.
    new = aligned(box, dtype, 1)
    padded[:bytes_] = new.view(np.uint8).ravel()
    memory[: len(padded)] = swizzle_rows(padded, swizzle)
    after = array.copy()
    for index in np.ndindex(*box):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, shape, strict=True)):
            after[place] = new[index]
    run(map_, memory, at, array, bytes_, "store", check=1)
    assert np.array_equal(array.view(np.uint8), after.view(np.uint8))


@pytest.mark.parametrize(
    ("type_", "op"),
    [
        ("f32", "add"),
        ("f16", "max"),
        ("f16", "add"),
        ("s32", "min"),
        ("u32", "inc"),
        ("u64", "xor"),
        ("s64", "max"),
        ("bf16", "add"),
    ],
)
def test_reductions(type_: str, op: str) -> None:
    dtype = TYPES[type_][1]
    array, new = aligned((6, 16), dtype), aligned((4, 16), dtype, 2)
    if type_ == "bf16":  # powers of two, with exact sums
        array[...], new[...] = 0x3F80, 0x4000
    error, map_ = encode(array, (4, 16), type_)
    assert error == 0
    memory = np.zeros(4096, np.uint8)
    memory[: new.nbytes] = new.view(np.uint8).ravel()
    after = array.copy()
    old = after[3:6]
    part = new[:3]
    with np.errstate(over="ignore"):
        old[...] = {
            "add": lambda: old + part if type_ != "bf16" else np.full_like(old, 0x4040),
            "max": lambda: np.maximum(old, part),
            "min": lambda: np.minimum(old, part),
            "xor": lambda: old ^ part,
            "inc": lambda: np.where(old >= part, 0, old + 1).astype(dtype),
        }[op]()
    run(map_, memory, (3, 0), array, new.nbytes, f"reduce.{op}")
    assert np.array_equal(array.view(np.uint8), after.view(np.uint8))


@pytest.mark.parametrize(
    ("type_", "op"),
    [("f32", "min"), ("f64", "add"), ("f16", "inc"), ("s32", "inc"), ("u8", "add"), ("s64", "add"),
     ("u16", "max"), ("bf16", "and"), ("tf32", "add")],
)  # fmt: skip
def test_reductions_that_do_not_exist(type_: str, op: str) -> None:
    array = aligned((4, 16), TYPES[type_][1])
    _, map_ = encode(array, (4, 16), type_)
    before, memory = array.tobytes(), np.zeros(4096, np.uint8)
    with pytest.raises(MachineError, match=f"no such reduction for a tensor of .*{type_}"):
        run(map_, memory, (0, 0), array, array.nbytes, f"reduce.{op}")
    assert array.tobytes() == before


def test_tf32_is_rounded() -> None:
    array = aligned((8, 8), np.float32)
    error, map_ = encode(array, (8, 8), "tf32")
    assert error == 0
    memory = np.zeros(4096, np.uint8)
    run(map_, memory, (0, 0), array, 256, "load")
    got = memory[:256].view(np.float32).reshape(8, 8)
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    assert (np.abs(got - array) <= np.abs(array) * 2.0**-11).all()


@pytest.mark.parametrize(
    ("changes", "error", "report"),
    [
        ({"type_": "7777"}, 801, "data type 7777 is not supported"),
        ({"rank": 6}, 1, "rank: must be from 1 to 5; got 6"),
        ({"interleave": 1}, 801, "interleaved layouts are not supported"),
        ({"shift": 4}, 1, "the address of the tensor must be a multiple of 16 bytes"),
        ({"box": (4, 300)}, 1, "box of dimension 0: must be from 1 to 256; got 300"),
        ({"box": (4, 6)}, 1, "a row of the box must be a multiple of 16 bytes; got 24"),
        ({"swizzle": 1, "box": (4, 16)}, 1, "must not exceed the 32 bytes of the swizzle; got 64"),
        ({"swizzle": 2}, 801, "shorter than the 64 bytes of the swizzle is not supported; got 32"),
        (
            {"strides": (40,)},
            1,
            "stride of dimension 1: must be a multiple of 16 below 2^40; got 4",
        ),
        ({"step": 2}, 801, "element stride of dimension 0: only 1 is supported; got 2"),
        ({"nan": True}, 1, "NaN fills floating-point tensors only"),
    ],
)
def test_rules_of_a_map(changes: dict[str, Any], error: int, report: str) -> None:
    arguments: dict[str, Any] = {"box": (4, 8)} | changes
    assert encode(aligned((8, 32), np.uint32), **arguments)[0] == error
    assert report in machine.library.ptxvm_last_report().decode()
    assert machine.library.cudaGetLastError() == 0


def test_layout_of_a_map() -> None:
    """As nvidia-cutlass-dsl 4.8.1 writes one: bf16, box 64 x 128, 128-byte swizzle."""
    array = aligned((2, 8, 1024, 128), np.uint16)
    error, map_ = encode(
        array, (1, 1, 128, 64), "bf16", 3, strides=(2048, 256, 1 << 21), promotion=2
    )
    assert error == 0
    words = map_.view(np.uint64).tolist()
    assert words[0] == array.ctypes.data and words[8:] == [0] * 8
    assert words[1:8] == [
        0x0000008000246532,
        0x0002000000000010,
        0,
        0x000003FF0000007F,
        0x0000000100000007,
        0x3F00000000000000,
        0x7F,
    ]


@pytest.mark.parametrize(
    ("word", "bit", "report"),
    [
        (1, 21, None),  # as CUTLASS clears it for older drivers
        (9, 5, None),
        (1, 0, "no tensor map"),
        (1, 6, "the tensor map at its address: rank 6"),
        (1, 16, "the tensor map at its address: element type 2"),  # tf32 of integers
        (1, 11, "bits 0x800 of word 1 are unknown"),
        (6, 33, "bits 0x200000000 of word 6 are unknown"),
        (6, 56, "base and rows must be multiples of 16 bytes"),
        (1, 13, None),  # 32 bytes, as the row has
        (1, 14, "a row of 32 bytes under a swizzle of 64"),
    ],
)
def test_a_map_that_host_code_changed(word: int, bit: int, report: str | None) -> None:
    array = aligned((8, 32), np.uint32)
    _, map_ = encode(array, (8, 8), promotion=2)
    map_.view(np.uint64)[word] ^= np.uint64(1 << bit)
    memory = np.zeros(4096, np.uint8)
    if report:
        with pytest.raises(MachineError, match=report):
            run(map_, memory, (0, 0), array, 256, "load")
        return
    run(map_, memory, (0, 0), array, 256, "load")
    if bit != 13:
        assert np.array_equal(memory[:256].view(np.uint32).reshape(8, 8), array[:, :8])


def test_im2col_is_refused() -> None:
    assert driver("cuTensorMapEncodeIm2col")() == 801
    assert b"im2col is not supported" in machine.library.ptxvm_last_report()
    assert machine.library.cudaGetLastError() == 0
    assert driver("cuTensorMapReplaceAddress") is None
    form = "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
    text = kernel(f"{form} [%r2], [%d0, {{%r1, %r1, %r1, %r1}}], [bar], {{%h1, %h1}};")
    with sm90(), pytest.raises(MachineError, match="im2col is not supported"):
        machine.run(text, "k", np.zeros(16, np.uint64))


def test_box_of_4_gib() -> None:
    array = aligned((2, 2, 2, 32), np.uint8)
    error, map_ = encode(array, (256, 256, 256, 256), "u8")
    assert error == 0
    with pytest.raises(MachineError, match="a box of 4294967296 bytes: the shared memory of the"):
        run(map_, np.zeros(4096, np.uint8), (0, 0, 0, 0), array, 0, "load")


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("3d.X [%r2], [%d0, {%r1, %r1, %r1}], [bar];", "a tensor map of 2 dimensions where"),
        ("2d.X [%r2+64], [%d0, {%r1, %r1}], [bar];", "shared address 64 must be a multiple of 128"),
        ("2d.X [%r2+896], [%d0, {%r1, %r1}], [bar];", "256 bytes at shared address 896"),
        ("2d.X [%r2], [%d0+64, {%r1, %r1}], [bar];", "no tensor map"),
        ("2d.X [%r2], [%d0+8, {%r1, %r1}], [bar];", "must be a multiple of 64"),
        ("2d.X [%r2], [%d0, {%r1}], [bar];", "the vector of coordinates does not have the size"),
        ("6d.X [%r2], [%d0, {%r1}], [bar];", "unknown modifier .6d"),
    ],
)
def test_misuse(body: str, report: str) -> None:
    array = aligned((8, 32), np.uint32)
    _, map_ = encode(array, (8, 8))
    form = body.replace("X", "shared::cluster.global.mbarrier::complete_tx::bytes")
    twice = np.concatenate([map_, map_])
    place = np.zeros(320, np.uint8)
    place = place[-place.ctypes.data % 64 :][:256]
    place[:] = twice
    text = kernel(f"{init(1)}@!%p0 bra DONE;\ncp.async.bulk.tensor.{form}\n{wait('0')}DONE:", 2)
    with sm90(), pytest.raises(MachineError) as error:
        machine.run(text, "k", place, array)
    assert report in str(error.value)
