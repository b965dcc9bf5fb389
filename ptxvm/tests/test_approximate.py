"""Functions that PTX defines by an error bound (PTX ISA 9.0, sections 9.7.3 and 9.7.4)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from forms import SENTINEL, Form, draw, edges, module
from machine import Module, machine

Array = np.ndarray
COUNT = 10240
ALL = np.inf


@dataclass(frozen=True)
class Function:
    op: str
    kind: str
    exact: Callable[[Array], Array]  # in float64
    bound: Callable[[Array, Array], Array]  # on |result - exact|, from the operand and `exact`
    checksum: int  # of all results: the same on every host and instruction set
    within: tuple[float, float] = (-ALL, ALL)  # operands for which the bound holds
    special: tuple[tuple[int, int], ...] = ()  # rows of the ISA's tables

    def __str__(self) -> str:
        return f"{self.op}.{self.kind}"


def spacing(y: Array, fraction: int = 23, minimum: int = -126) -> Array:
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(y)))
    return np.exp2(np.maximum(exponent, minimum) - fraction)


def angle_bound(x: Array, _: Array) -> Array:
    return np.where(np.abs(x) <= 2 * np.pi, 2**-20.5, 2**-14.7)


def log_bound(x: Array, y: Array) -> Array:
    return np.where((x > 0.5) & (x < 2), 2**-22, np.abs(y) * 2**-22)


INF, NAN, ONE = 0x7F800000, 0x7FFFFFFF, 0x3F800000
MINUS = 0x80000000
NANS = ((INF + 1, NAN), (MINUS | INF + 1, NAN), (NAN, NAN))
ROOT_ROWS = ((MINUS | INF, NAN), (MINUS | ONE, NAN), (INF, INF), *NANS)

FUNCTIONS = [
    Function(
        "ex2.approx",
        "f32",
        np.exp2,
        lambda x, y: 2 * spacing(y),
        0x821FAF97,
        special=((MINUS | INF, 0), (MINUS, ONE), (0, ONE), (INF, INF), *NANS),
    ),
    Function(
        "lg2.approx",
        "f32",
        np.log2,
        log_bound,
        0x632ACD32,
        within=(0, ALL),
        special=((MINUS, MINUS | INF), (0, MINUS | INF), *ROOT_ROWS),
    ),
    Function(
        "rcp.approx",
        "f32",
        lambda x: 1 / x,
        lambda x, y: spacing(y),
        0xD92BB3E4,
        special=((MINUS | INF, MINUS), (MINUS, MINUS | INF), (0, INF), (INF, 0), *NANS),
    ),
    Function(
        "sqrt.approx",
        "f32",
        np.sqrt,
        lambda x, y: y * 2**-23,
        0x5A7B0995,
        within=(0, ALL),
        special=((MINUS, MINUS), (0, 0), *ROOT_ROWS),
    ),
    Function(
        "rsqrt.approx",
        "f32",
        lambda x: 1 / np.sqrt(x),
        lambda x, y: y * 2**-22.9,
        0xFB3557A8,
        within=(0, ALL),
        special=(
            *((MINUS, MINUS | INF), (0, INF), (INF, 0)),
            *((MINUS | INF, NAN), (MINUS | ONE, NAN), *NANS),
        ),
    ),
    Function(
        "sin.approx",
        "f32",
        np.sin,
        angle_bound,
        0x55ECF497,
        within=(-100 * np.pi, 100 * np.pi),
        special=((MINUS | INF, NAN), (MINUS, MINUS), (0, 0), (INF, NAN), *NANS),
    ),
    Function(
        "cos.approx",
        "f32",
        np.cos,
        angle_bound,
        0xE127BD34,
        within=(-100 * np.pi, 100 * np.pi),
        special=((MINUS | INF, NAN), (MINUS, ONE), (0, ONE), (INF, NAN), *NANS),
    ),
    Function(
        "tanh.approx",
        "f32",
        np.tanh,
        lambda x, y: np.abs(y) * 2**-11,
        0xC065DC17,
        special=((MINUS | INF, MINUS | ONE), (MINUS, MINUS), (0, 0), (INF, ONE), *NANS),
    ),
    Function(
        "ex2.approx",
        "f16",
        np.exp2,
        lambda x, y: np.maximum(y * 2**-9.9, 2**-24),
        0x116120AE,
        special=((0xFC00, 0), (0x8000, 0x3C00), (0, 0x3C00), (0x7C00, 0x7C00), (0x7C01, 0x7FFF)),
    ),
    Function(
        "ex2.approx.ftz",
        "bf16",
        np.exp2,
        lambda x, y: np.maximum(y * 2**-7, 2**-126),
        0x5F68ECCC,
        special=((0xFF80, 0), (0x8001, 0x3F80), (1, 0x3F80), (0x7F80, 0x7F80), (0x7F81, 0x7FFF)),
    ),
    Function(
        "tanh.approx",
        "f16",
        np.tanh,
        lambda x, y: np.full_like(x, 2**-10.987),
        0xAB0F9256,
        special=((0xFC00, 0xBC00), (0x8000, 0x8000), (0, 0), (0x7C00, 0x3C00), (0x7C01, 0x7FFF)),
    ),
    Function(
        "tanh.approx",
        "bf16",
        np.tanh,
        lambda x, y: np.full_like(x, 2**-8),
        0xAB5AD6D2,
        special=((0xFF80, 0xBF80), (0x8000, 0x8000), (0, 0), (0x7F80, 0x3F80), (0x7F81, 0x7FFF)),
    ),
]


def to_float(raw: Array, kind: str) -> Array:
    if kind == "f64":
        return raw.astype(np.uint64).view(np.float64)
    if kind == "f16":
        return raw.astype(np.uint16).view(np.float16).astype(np.float64)
    wide = raw.astype(np.uint32) << (16 if kind == "bf16" else 0)
    with np.errstate(invalid="ignore"):
        return wide.view(np.float32).astype(np.float64)


def run(loaded: Module, form: Form, *columns: Array) -> Array:
    types = {16: np.uint16, 32: np.uint32, 64: np.uint64}
    count = len(columns[0])
    out = np.full(count, SENTINEL & ((1 << form.result) - 1), dtype=types[form.result])
    inputs = [c.astype(types[form.result]) for c in columns]
    inputs += [np.zeros(1, dtype=np.uint32)] * (3 - len(inputs))
    loaded.launch("plain", out, *inputs, np.uint32(count), grid=-(-count // 128), block=128)
    return out


def one_source(op: str, kind: str) -> Form:
    bits = {"f16": 16, "bf16": 16, "f64": 64}.get(kind, 32)
    return Form(f"{op}.{kind} %d, %a;", bits, (kind,), lambda a: a)


def samples(function: Function) -> Array:
    random = np.random.default_rng(7)
    if function.kind in ("f16", "bf16"):
        return np.arange(1 << 16, dtype=np.uint64)
    raw = np.concatenate([np.array(edges("f32"), dtype=np.uint64), draw("f32", COUNT, random)])
    small = random.uniform(-130, 130, COUNT).astype(np.float32).view(np.uint32)
    return np.concatenate([raw, small.astype(np.uint64)])


@pytest.fixture(autouse=True)
def newest_device() -> Iterator[None]:
    """Some forms require a newer device than sm_80."""
    with machine.options(device="sm_90a"):
        yield


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_error_is_within_the_bound(function: Function) -> None:
    form = one_source(function.op, function.kind)
    loaded = machine.load(module(form))
    raw = samples(function)
    x = to_float(raw, function.kind)
    rounded = run(loaded, form, raw)
    low, high = function.within
    with np.errstate(all="ignore"):
        exact = function.exact(x)
        largest = {"f16": 65504.0, "bf16": 3.38e38}.get(function.kind, 3.4e38)
        judged = np.isfinite(x) & (x != 0) & (x >= low) & (x <= high) & (np.abs(exact) < largest)
        bound = function.bound(x, exact)
        fraction, minimum = {"f16": (10, -14), "bf16": (7, -126)}.get(function.kind, (23, -126))
        half = 0.501 * spacing(exact, fraction, minimum)
        got = to_float(rounded, function.kind)
        # A result flushed to zero exceeds the bound by itself.
        flushed = (got == 0) & ("ftz" in function.op)
        assert (np.abs(got - exact) <= half)[judged & ~flushed].all()
        moved_enough = []
        for direction in (-1, 1):
            with machine.options(approximate=direction):
                moved = to_float(run(loaded, form, raw), function.kind)
            wrong = judged & ~(np.abs(moved - exact) <= bound)
            assert not wrong.any(), (x[wrong][:5], moved[wrong][:5], exact[wrong][:5])
            assert (direction * (moved - got) >= 0)[judged].all()
            moved_enough.append((moved != got)[judged].mean())
        assert min(moved_enough) > 0.05


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_bits_are_those_of_every_host(function: Function) -> None:
    form = one_source(function.op, function.kind)
    raw = np.arange(1 << 16, dtype=np.uint64)
    if form.result == 32:
        raw = raw * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)
    got = run(machine.load(module(form)), form, raw)
    assert hex(zlib.crc32(got.tobytes())) == hex(function.checksum)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("direction", [-1, 0, 1])
def test_tables_of_special_operands(function: Function, direction: int) -> None:
    form = one_source(function.op, function.kind)
    operands, expected = (np.array(c, dtype=np.uint64) for c in zip(*function.special, strict=True))
    with machine.options(approximate=direction):
        got = run(machine.load(module(form)), form, operands)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("op", ["ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos"])
def test_ftz_flushes_operands_and_results(op: str) -> None:
    plain, ftz = (one_source(f"{op}.approx{z}", "f32") for z in ("", ".ftz"))
    raw = np.concatenate(
        [np.array(edges("f32"), dtype=np.uint64), draw("f32", COUNT, np.random.default_rng(3))]
    )

    def flush(v: Array) -> Array:
        return np.where(v & np.uint64(INF), v, v & np.uint64(MINUS))

    expected = flush(run(machine.load(module(plain)), plain, flush(raw)).astype(np.uint64))
    assert np.array_equal(run(machine.load(module(ftz)), ftz, raw), expected)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["ex2.approx", "tanh.approx"])
def test_pairs_are_two_halves(op: str, kind: str) -> None:
    ftz = ".ftz" if (op, kind) == ("ex2.approx", "bf16") else ""
    single = one_source(op + ftz, kind)
    pair = Form(f"{op}{ftz}.{kind}x2 %d, %a;", 32, (f"{kind}x2",), lambda a: a)
    raw = np.arange(1 << 16, dtype=np.uint64)
    other = raw[::-1] ^ np.uint64(0x1234)
    halves = machine.load(module(single))
    got = run(machine.load(module(pair)), pair, raw | other << np.uint64(16))
    assert np.array_equal(got & 0xFFFF, run(halves, single, raw))
    assert np.array_equal(got >> 16, run(halves, single, other))


@pytest.mark.parametrize("op", ["div.approx", "div.full"])
@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("direction", [-1, 0, 1])
def test_division(op: str, ftz: str, direction: int) -> None:
    form = Form(f"{op}{ftz}.f32 %d, %a, %b;", 32, ("f32", "f32"), lambda a, b: a)
    random = np.random.default_rng(11)
    a, b = draw("f32", COUNT, random), draw("f32", COUNT, random)
    with machine.options(approximate=direction):
        got = to_float(run(machine.load(module(form)), form, a, b), "f32")
    x, y = to_float(a, "f32"), to_float(b, "f32")
    with np.errstate(all="ignore"):
        exact = x / y
        normal = (np.abs(exact) >= 2**-125) & (np.abs(exact) < 3.4e38)
        normal &= (np.abs(y) >= 2**-126) & (np.abs(y) <= 2**126) & (np.abs(x) >= 2**-126)
        assert (np.abs(got - exact) <= 2 * spacing(exact))[normal].all()
        assert normal.mean() > 0.4


def test_division_by_large_numbers() -> None:
    form = Form("div.approx.f32 %d, %a, %b;", 32, ("f32", "f32"), lambda a, b: a)
    large = 0x7E800001  # slightly above 2^126
    rows = [(ONE, large, 0), (MINUS | ONE, large, MINUS), (INF, large, NAN), (ONE, INF, 0)]
    rows += [(0, 0, NAN), (ONE, 0, INF), (ONE, MINUS, MINUS | INF), (INF, INF, NAN)]
    a, b, expected = (np.array(c, dtype=np.uint64) for c in zip(*rows, strict=True))
    assert run(machine.load(module(form)), form, a, b).tolist() == expected.tolist()


@pytest.mark.parametrize("op", ["rcp.approx.ftz", "rsqrt.approx.ftz", "rsqrt.approx"])
def test_reciprocals_of_f64(op: str) -> None:
    form = one_source(op, "f64")
    raw = np.concatenate([np.array(edges("f64"), dtype=np.uint64)])
    raw = np.concatenate([raw, draw("f64", COUNT, np.random.default_rng(5))])
    got = run(machine.load(module(form)), form, raw)
    gross = "ftz" in op
    if gross:
        assert not (got & np.uint64(0xFFFFFFFF)).any()
    cut = raw & np.uint64(0xFFFFFFFF00000000) if gross else raw
    x = to_float(cut, "f64")
    with np.errstate(all="ignore"):
        exact = 1 / x if op.startswith("rcp") else 1 / np.sqrt(x)
        normal = (np.abs(x) >= 2.0**-1022) & (np.abs(exact) >= 2.0**-1022) & np.isfinite(exact)
        error = np.abs(to_float(got, "f64") / exact - 1)[normal]
    assert (error <= (2**-20 if gross else 2**-52)).all()
    subnormal = (raw & np.uint64(0x7FF0000000000000)) == 0
    nan = np.isnan(exact) & ~subnormal
    assert np.isnan(to_float(got, "f64"))[nan].all()
    if gross:
        signs = raw[subnormal] >> np.uint64(63)
        if op.startswith("rcp"):
            infinity = np.uint64(0x7FF0000000000000)
            assert np.array_equal(got[subnormal], infinity | signs << np.uint64(63))
        assert (got[np.isnan(x)] == np.uint64(0x7FFFFFFF00000000)).all()
