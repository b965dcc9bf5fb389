"""atom and red in every form, against NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from machine import machine
from memory_kernels import LANES, MASK, kernel, masks, register, space_base

INTEGER = {
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "b16": np.uint16,
}
FLOAT = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": np.uint16,
    "f16x2": np.float16,
    "bf16x2": np.uint16,
}
ATOMICS = (
    [("add", t) for t in ("u32", "s32", "u64", "f32", "f64", "f16", "bf16", "f16x2", "bf16x2")]
    + [(op, t) for op in ("min", "max") for t in ("u32", "s32", "u64", "s64")]
    + [(op, t) for op in ("and", "or", "xor", "exch", "cas") for t in ("b32", "b64")]
    + [("cas", "b16"), ("inc", "u32"), ("dec", "u32")]
)

FORMS = [(op, t, True) for op, t in ATOMICS] + [
    (op, t, False) for op, t in ATOMICS if op not in ("exch", "cas")
]


def bfloat(x: np.ndarray) -> np.ndarray:
    """f32 values of bf16 bits."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bfloat(x: np.ndarray) -> np.ndarray:
    raw = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)


def apply_atomic(op: str, type_: str, old, b, c):
    if op == "add":
        if type_.startswith("bf16"):
            return to_bfloat(bfloat(old) + bfloat(b))
        if type_.startswith("f16"):
            return (old.astype(np.float32) + b.astype(np.float32)).astype(np.float16)
        return old + b
    if op == "inc":
        return np.where(old >= b, 0, old + 1).astype(old.dtype)
    if op == "dec":
        return np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype)
    functions = {
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if op == "exch":
        return b
    return np.where(old == b, c, old) if op == "cas" else functions[op](old, b)


def atomic_operands(op: str, type_: str):
    """(initial memory of 8 cells, b, c) with one value per cell or lane, pairs for x2 types."""
    rng = np.random.default_rng(5)
    per = 2 if type_.endswith("x2") else 1
    if type_ in INTEGER:
        dtype = INTEGER[type_]
        info = np.iinfo(dtype)
        low, high = (0, 9) if op in ("inc", "dec", "cas") else (info.min, info.max)
        draw = [
            rng.integers(low, high, (n, 1), dtype=dtype, endpoint=True) for n in (8, LANES, LANES)
        ]
    else:
        draw = [rng.standard_normal((n, per)).astype(np.float32) * 4 for n in (8, LANES, LANES)]
        if type_.startswith("bf16"):
            draw = [to_bfloat(x) for x in draw]
        else:
            draw = [x.astype(FLOAT[type_]) for x in draw]
    return draw


@pytest.fixture(autouse=True)
def newest_device() -> Iterator[None]:
    """Some forms require a newer device than sm_80."""
    with machine.options(device="sm_90a"):
        yield


@pytest.mark.parametrize("space", ["global", "shared", "generic global", "generic shared"])
@pytest.mark.parametrize(("op", "type_", "returns"), FORMS)
def test_atomic(op, type_, returns, space):
    memory, b, c = atomic_operands(op, type_)
    width = memory.itemsize * memory.shape[1] * 8
    step = width // 8
    state_space = "" if space.startswith("generic") else "." + space
    noftz = ".noftz" if "f16" in type_ else ""
    name = ("atom" if returns else "red") + state_space + f".{op}{noftz}.{type_}"
    reg = register(width)
    body = f"""
mul.wide.u32 %d10, %r0, {step};
add.s64 %d11, %d0, %d10;
mov.u64 %d12, tile;
add.s64 %d13, %d12, %d10;
setp.lt.u32 %p1, %r0, 8;
@%p1 ld.global.b{width} {reg}30, [%d11];
@%p1 st.shared.b{width} [%d13], {reg}30;
bar.sync 0;
{MASK}
{space_base(space)}
add.s64 %d24, %d20, %d22;
add.s64 %d14, %d2, %d10;
ld.global.b{width} {reg}31, [%d14];
add.s64 %d15, %d3, %d10;
ld.global.b{width} {reg}32, [%d15];
@%p0 {name} {f"{reg}33, " if returns else ""}[%d24], {reg}31{f", {reg}32" if op == "cas" else ""};
add.s64 %d16, %d4, %d10;
{f"@%p0 st.global.b{width} [%d16], {reg}33;" if returns else ""}
bar.sync 0;
{
        f"@%p1 ld.shared.b{width} {reg}34, [%d13]; @%p1 st.global.b{width} [%d11], {reg}34;"
        if "shared" in space
        else ""
    }
"""
    module = machine.load(kernel(body, parameters=5))
    for mask in masks():
        cells = np.random.default_rng(mask % 97).integers(0, 8, LANES)
        selection = np.concatenate([np.array([mask], np.uint32), (cells * step).astype(np.uint32)])
        got, old = memory.copy(), np.zeros_like(b)
        module.launch("k", got, selection, b, c, old)
        wanted, wanted_old = memory.copy(), np.zeros_like(b)
        with np.errstate(over="ignore"):
            for lane in range(LANES):
                if mask >> lane & 1:
                    wanted_old[lane] = wanted[cells[lane]]
                    wanted[cells[lane]] = apply_atomic(
                        op, type_, wanted[cells[lane]], b[lane], c[lane]
                    )
        assert got.tobytes() == wanted.tobytes(), hex(mask)
        if returns:
            assert old.tobytes() == wanted_old.tobytes(), hex(mask)


@pytest.mark.parametrize(
    ("type_", "vector"),
    [
        ("f32", 2),
        ("f32", 4),
        ("f16", 2),
        ("f16", 4),
        ("f16", 8),
        ("bf16", 8),
        ("f16x2", 4),
        ("bf16x2", 2),
    ],
)
def test_vector_reduction(type_, vector):
    noftz = ".noftz" if "f16" in type_ else ""
    width = 32 if type_ in ("f32", "f16x2", "bf16x2") else 16
    names = [f"{register(width)}{20 + j}" for j in range(vector)]
    step = width // 8 * vector
    loads = "".join(
        f"ld.global.b{width} {n}, [%d12+{j * width // 8}];\n" for j, n in enumerate(names)
    )
    body = f"""
mul.wide.u32 %d10, %r0, {step};
and.b32 %r1, %r0, 3;
mul.wide.u32 %d11, %r1, {step};
add.s64 %d12, %d1, %d10;
add.s64 %d13, %d0, %d11;
{loads}
red.global.add{noftz}.v{vector}.{type_} [%d13], {{{", ".join(names)}}};
"""
    rng = np.random.default_rng(7)
    per = step // (4 if type_ == "f32" else 2)
    memory, b = (rng.standard_normal((n, per)).astype(np.float32) for n in (4, LANES))
    if type_.startswith("bf16"):
        memory, b = to_bfloat(memory), to_bfloat(b)
    elif type_.startswith("f16"):
        memory, b = memory.astype(np.float16), b.astype(np.float16)
    wanted = memory.copy()
    for lane in range(LANES):
        wanted[lane % 4] = apply_atomic("add", type_, wanted[lane % 4], b[lane], None)
    machine.load(kernel(body, parameters=2)).launch("k", memory, b)
    assert memory.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(("space", "flushes"), [("global", True), ("shared", False)])
def test_atomic_add_flushes_subnormals_in_global_memory_only(space, flushes):
    body = f"""
{space_base(space)}
mov.b32 %r1, 0f00000000;
setp.eq.u32 %p1, %r0, 0;
@!%p1 bra DONE;
ld.global.b32 %r2, [%d0];
st{"." + space}.b32 [%d20], %r2;
red.{space}.add.f32 [%d20], %r1;
ld.{space}.b32 %r3, [%d20];
st.global.b32 [%d0], %r3;
DONE:
"""
    value = np.array([1e-40], np.float32)
    machine.load(kernel(body, parameters=1)).launch("k", value)
    assert value[0] == (0 if flushes else np.float32(1e-40))
