"""mma=hardware against a model in fractions: summation in the tensor cores of each device."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import test_wgmma
from machine import machine
from test_tiles import metadata, pack, places_of, run, sizes, thin_out, unpack

MIN = {"f16": -14, "bf16": -126, "tf32": -126, "e4m3": -6, "e5m2": -14}
# Device and kind of type: products per step, bits below the largest exponent, bits of the result.
ADDERS = {
    ("sm_80", 16): (8, 24, 23),
    ("sm_80", 32): (4, 24, 23),
    ("sm_89", 8): (16, 13, 13),
    ("sm_90a", 16): (16, 25, 23),
    ("sm_90a", 32): (8, 25, 23),
    ("sm_90a", 8): (16, 25, 23),
    ("sm_120", 16): (16, 25, 23),
    ("sm_120", 8): (32, 25, 23),
}
KIND = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}


def numbers(shape: tuple[int, int], type_: str, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Values and bits of numbers of widely different magnitudes in a type. Some are 0, some
    subnormal."""
    if KIND[type_] == 8:
        codes = rng.integers(0, 256, shape)
        codes[(codes & 0x7F) >= (0x7C if type_ == "e5m2" else 0x7F)] = 0
        if type_ == "e5m2":
            return (codes << 8).astype(np.uint16).view(np.float16).astype(float), codes
        exponent, fraction = codes >> 3 & 15, codes & 7
        size = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction / 512)
        return np.where(codes >> 7, -size, size), codes
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape)
    x[rng.random(shape) < 0.1] = 0
    x[rng.random(shape) < 0.1] *= 2.0 ** (-18 if type_ == "f16" else -130)
    if type_ == "f16":
        half = x.astype(np.float16)
        return half.astype(float), half.view(np.uint16)
    kept = {"bf16": 0xFFFF0000, "tf32": 0xFFFFE000}[type_]
    single = (x.astype(np.float32).view(np.uint32) & np.uint32(kept)).view(np.float32)
    bits = single.view(np.uint32)
    return single.astype(float), bits >> 16 if type_ == "bf16" else bits


def exponent(x: float, minimum: int) -> int:
    return max(math.frexp(x)[1] - 1, minimum)


def cut(x: Fraction, kept: int) -> float:
    """Truncates to a fraction of `kept` bits; subnormal numbers use the minimum exponent."""
    if x == 0:
        return 0.0
    unit = Fraction(2) ** (exponent(float(x), -126) - kept)
    return float(int(x / unit) * unit)  # int() truncates


def model(
    a: np.ndarray,
    b: np.ndarray,
    c: float,
    types: tuple[str, str],
    adder: tuple[int, int, int],
    half: bool,
) -> float:
    step, bits, kept = adder
    minimum = [MIN[t] for t in types]
    for begin in range(0, len(a), step):
        terms = [(exponent(c, -14 if half else -126), Fraction(c))] if c else []
        for x, y in zip(a[begin : begin + step], b[begin : begin + step], strict=True):
            if x and y:
                size = exponent(x, minimum[0]) + exponent(y, minimum[1])
                terms.append((size, Fraction(x) * Fraction(y)))
        unit = Fraction(2) ** (max((t[0] for t in terms), default=0) - bits)
        total = sum(int(value / unit) for _, value in terms) * unit
        c = float(np.float16(float(total))) if half else cut(total, kept)
    return c


def wanted(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    types: tuple[str, str],
    adder: tuple[int, int, int],
    half: bool,
) -> np.ndarray:
    return np.array(
        [
            [model(a[m], b[:, n], float(c[m, n]), types, adder, half) for n in range(b.shape[1])]
            for m in range(len(a))
        ]
    )


@pytest.mark.parametrize(
    ("device", "shape", "types"),
    [
        ("sm_80", "m16n8k16", "f32.f16.f16.f32"),
        ("sm_80", "m16n8k16", "f16.f16.f16.f16"),
        ("sm_80", "m16n8k8", "f32.bf16.bf16.f32"),
        ("sm_80", "m16n8k8", "f32.tf32.tf32.f32"),
        ("sm_80", "m16n8k4", "f32.tf32.tf32.f32"),
        ("sm_89", "m16n8k32", "f32.e4m3.e5m2.f32"),
        ("sm_90a", "m16n8k16", "f32.f16.f16.f32"),
        ("sm_90a", "m16n8k16", "f32.bf16.bf16.f32"),
        ("sm_90a", "m16n8k8", "f32.tf32.tf32.f32"),
        ("sm_90a", "m16n8k32", "f32.e5m2.e4m3.f32"),
        ("sm_120", "m16n8k16", "f16.f16.f16.f16"),
        ("sm_120", "m16n8k32", "f32.e4m3.e4m3.f32"),
    ],
)
def test_mma(device: str, shape: str, types: str) -> None:
    m, n, k = sizes(shape)
    d, *pair, _ = types.split(".")
    rng = np.random.default_rng(k)
    (a, a_bits), (b, b_bits) = (
        numbers(s, t, rng) for s, t in (((m, k), pair[0]), ((k, n), pair[1]))
    )
    c = (rng.standard_normal((m, n)) * 2.0 ** rng.integers(-9, 9, (m, n))).astype(
        np.float16 if d == "f16" else np.float32
    )
    operands = [
        pack(x, places_of(o, *x.shape, t), t)
        for x, o, t in (
            (a_bits, "a", pair[0]),
            (b_bits, "b", pair[1]),
            (c.view(np.uint16 if d == "f16" else np.uint32), "c", d),
        )
    ]
    got = {}
    for mode in ("exact", "hardware"):
        with machine.options(device=device, mma=mode):
            out = run(f"mma.sync.aligned.{shape}.row.col.{types}", d, operands, len(operands[2][0]))
        got[mode] = unpack(out, m, n, d)
    order = np.arange(k)
    if (
        device == "sm_90a" and KIND[pair[0]] == 8
    ):  # one mma for the lower two of four, one for the upper two
        order = np.concatenate([order[order % 4 < 2], order[order % 4 >= 2]])
    adder = ADDERS[device, KIND[pair[0]]]
    expected = wanted(a[:, order], b[order], c, (pair[0], pair[1]), adder, d == "f16")
    assert np.array_equal(got["hardware"], expected)
    assert d == "f16" or (got["exact"] != expected).any()


def test_sparse() -> None:
    rng = np.random.default_rng(0)
    a, _ = numbers((16, 16), "f16", rng)
    b, b_bits = numbers((16, 8), "f16", rng)
    a[a == 0] = 1
    _, left, bits = thin_out(a, "f16", True)
    columns = np.stack([bits % 4, bits // 4], 2).reshape(16, 8) + 4 * (np.arange(8) // 2)
    left_bits = left.astype(np.float16).view(np.uint16)
    operands = [
        pack(left_bits, places_of("a", 16, 8, "f16"), "f16"),
        pack(b_bits, places_of("b", 16, 8, "f16"), "f16"),
        np.zeros((32, 4), np.uint32),
        metadata(bits, "f16", 0),
    ]
    with machine.options(mma="hardware"):
        out = run("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "f32", operands, 4, ", 0")
    expected = [
        [
            model(left[r], b[columns[r], n], 0.0, ("f16", "f16"), (8, 24, 23), False)
            for n in range(8)
        ]
        for r in range(16)
    ]
    assert np.array_equal(unpack(out, 16, 8, "f32"), np.array(expected))


@pytest.mark.parametrize(("type_", "adder"), [("f16", (16, 25, 23)), ("e4m3", (32, 13, 13))])
def test_wgmma_adds(type_: str, adder: tuple[int, int, int]) -> None:
    """The accumulator is so large that products are truncated; 8-bit products at their 13 bits."""
    k, start = (64, 2**24 + 2) if type_ == "f16" else (128, 2**14 + 3)
    a, b = test_wgmma.operands(8, k, (type_, type_))
    bits = int(np.float32(start).view(np.uint32))
    got = test_wgmma.run(a, b, (type_, type_, "f32"), start=bits, mma="hardware")
    c = np.full((64, 8), float(start))
    assert np.array_equal(got, wanted(a, b.T, c, (type_, type_), adder, False))


def test_sums_that_are_not_finite() -> None:
    rng = np.random.default_rng(1)
    _, a_bits = numbers((16, 16), "bf16", rng)
    a_bits = a_bits.copy()
    a_bits[0, 0], a_bits[1, 3], a_bits[2] = 0x7F80, 0x7FC0, 0x7F7F
    a_bits[3, :2], a_bits[4, :2], a_bits[5, 0] = (0x7F80, 0x7F7F), (0x7F80, 0xFF80), 0x7F80
    b_bits = np.full((16, 8), 0x3F80)
    b_bits[:, 1], b_bits[1, 2], b_bits[0, 3] = 0x7F7F, 0xFF7F, 0
    operands = [
        pack(a_bits, places_of("a", 16, 16, "bf16"), "bf16"),
        pack(b_bits, places_of("b", 16, 8, "bf16"), "bf16"),
        np.zeros((32, 4), np.uint32),
    ]
    with machine.options(mma="hardware"):
        out = run("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "f32", operands, 4)
    d = unpack(out, 16, 8, "f32")
    assert d[0, 0] == np.inf and np.isnan(d[1]).all() and d[2, 1] == np.inf
    # Infinity together with a product below -2^128, infinities of both signs, infinity times 0.
    assert d[3, 2] == np.inf and np.isnan(d[4, 0]) and np.isnan(d[5, 3])
    assert np.isfinite(d[6:, 0]).all()
