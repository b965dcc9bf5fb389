"""IEEE arithmetic on bit patterns with Python's integers, independent of any floating-point unit.

A finite number is n * 2**e with integers n and e; results are rounded once, in any direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

ROUNDINGS = ("rn", "rz", "rm", "rp")


@dataclass(frozen=True)
class Format:
    bits: int
    fraction: int
    nan: int  # result of an operation that gives NaN; for f64 any NaN matches

    @property
    def bias(self) -> int:
        return (1 << (self.bits - self.fraction - 2)) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return ((1 << (self.bits - 1 - self.fraction)) - 1) << self.fraction

    @property
    def minimum(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias


F16 = Format(16, 10, 0x7FFF)
BF16 = Format(16, 7, 0x7FFF)
F32 = Format(32, 23, 0x7FFFFFFF)
F64 = Format(64, 52, 0xFFF8000000000000)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def is_nan(x: int, f: Format) -> bool:
    return (x & ~f.sign) > f.infinity


def is_inf(x: int, f: Format) -> bool:
    return (x & ~f.sign) == f.infinity


def is_zero(x: int, f: Format) -> bool:
    return (x & ~f.sign) == 0


def flush(x: int, f: Format) -> int:
    return x if x & f.infinity else x & f.sign


def value(x: int, f: Format) -> tuple[int, int]:
    """(n, e) of a finite number."""
    exponent = (x & f.infinity) >> f.fraction
    n = x & ((1 << f.fraction) - 1)
    if exponent:
        n += 1 << f.fraction
    e = max(exponent, 1) - f.bias - f.fraction
    return (-n if x & f.sign else n), e


def rounded(n: int, e: int, f: Format, mode: str, zero: int = 0) -> int:
    """n * 2**e in format f; `zero` is the sign bit of an exact zero. rna: ties away from zero."""
    if n == 0:
        return zero
    sign = f.sign if n < 0 else 0
    n = abs(n)
    unit = max(n.bit_length() - 1 + e, f.minimum) - f.fraction
    shift = unit - e
    if shift <= 0:
        kept, up = n << -shift, False
    else:
        kept, rest, half = n >> shift, n & ((1 << shift) - 1), 1 << (shift - 1)
        up = {
            "rn": rest > half or (rest == half and bool(kept & 1)),
            "rna": rest >= half,
            "rz": False,
            "rm": bool(sign) and rest > 0,
            "rp": not sign and rest > 0,
        }[mode]
    kept += up
    # Adding the hidden bit to the exponent field carries correctly.
    exponent = unit + f.fraction - f.minimum
    result = (exponent << f.fraction) + kept if kept else 0
    if result < f.infinity:
        return sign | result
    inward = mode == "rz" or mode == ("rp" if sign else "rm")
    return sign | (f.infinity - 1 if inward else f.infinity)


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    e = min(a[1], b[1])
    return (a[0] << (a[1] - e)) + (b[0] << (b[1] - e)), e


def add(a: int, b: int, f: Format, mode: str = "rn") -> int:
    return fma(a, None, b, f, mode)


def sub(a: int, b: int, f: Format, mode: str = "rn") -> int:
    return fma(a, None, b if is_nan(b, f) else b ^ f.sign, f, mode)


def mul(a: int, b: int, f: Format, mode: str = "rn") -> int:
    if is_nan(a, f) or is_nan(b, f):
        return f.nan
    sign = (a ^ b) & f.sign
    if is_inf(a, f) or is_inf(b, f):
        return f.nan if is_zero(a, f) or is_zero(b, f) else sign | f.infinity
    (n, d), (m, e) = value(a, f), value(b, f)
    return rounded(n * m, d + e, f, mode, sign)


def fma(a: int, b: int | None, c: int, f: Format, mode: str = "rn") -> int:
    """a * b + c; a + c without b."""
    factors = [a] if b is None else [a, b]
    if any(is_nan(x, f) for x in [*factors, c]):
        return f.nan
    sign = a & f.sign if b is None else (a ^ b) & f.sign
    if any(is_inf(x, f) for x in factors):
        if any(is_zero(x, f) for x in factors):
            return f.nan
        return f.nan if is_inf(c, f) and (c & f.sign) != sign else sign | f.infinity
    if is_inf(c, f):
        return c
    n, e = value(a, f)
    if b is not None:
        m, d = value(b, f)
        n, e = n * m, e + d
    total, e = _sum((n, e), value(c, f))
    both = n == 0 and (c & ~f.sign) == 0 and sign == (c & f.sign)
    zero = sign if both else (f.sign if mode == "rm" else 0)
    return rounded(total, e, f, mode, zero)


def div(a: int, b: int, f: Format, mode: str = "rn") -> int:
    if is_nan(a, f) or is_nan(b, f):
        return f.nan
    sign = (a ^ b) & f.sign
    if is_inf(a, f):
        return f.nan if is_inf(b, f) else sign | f.infinity
    if is_inf(b, f):
        return sign
    if is_zero(b, f):
        return f.nan if is_zero(a, f) else sign | f.infinity
    (n, d), (m, e) = value(a, f), value(b, f)
    quotient, rest = divmod(abs(n) << 160, abs(m))
    n = quotient << 1 | (rest != 0)
    return rounded(-n if sign else n, d - e - 161, f, mode, sign)


def sqrt(a: int, f: Format, mode: str = "rn") -> int:
    if is_nan(a, f) or (a & f.sign and not is_zero(a, f)):
        return f.nan
    if is_inf(a, f) or is_zero(a, f):
        return a
    n, e = value(a, f)
    n <<= 160 + (e & 1)
    e -= 160 + (e & 1)
    root = math.isqrt(n)
    return rounded(root << 1 | (root * root != n), e // 2 - 1, f, mode)


def saturate(x: int, f: Format) -> int:
    """Limits to [0, 1]; NaN gives 0."""
    if is_nan(x, f) or x & f.sign:
        return 0
    return min(x, f.bias << f.fraction)


def extreme(a: int, b: int, f: Format, greatest: bool, nan: bool, magnitude: bool = False) -> int:
    if (is_nan(a, f) and is_nan(b, f)) or (nan and (is_nan(a, f) or is_nan(b, f))):
        return f.nan
    sign = (a ^ b) & f.sign if magnitude else 0
    if magnitude:
        a, b = a & ~f.sign, b & ~f.sign
    if is_nan(a, f) or is_nan(b, f):
        return (b if is_nan(a, f) else a) | sign

    def key(x: int) -> int:
        return -1 - (x & ~f.sign) if x & f.sign else x

    return (max if greatest else min)(a, b, key=key) | sign


def compare(name: str, a: int, b: int, f: Format) -> bool:
    unordered = is_nan(a, f) or is_nan(b, f)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if unordered:
        return name.endswith("u")
    (n, d), (m, e) = value(a, f), value(b, f)
    difference = _sum((n, d), (-m, e))[0]
    tests: dict[str, Callable[[int], bool]] = {
        "eq": lambda x: x == 0,
        "ne": lambda x: x != 0,
        "lt": lambda x: x < 0,
        "le": lambda x: x <= 0,
        "gt": lambda x: x > 0,
        "ge": lambda x: x >= 0,
    }
    return tests[name.removesuffix("u")](difference)


def convert(a: int, source: Format, target: Format, mode: str = "rn") -> int:
    if is_nan(a, source):
        return target.nan
    sign = target.sign if a & source.sign else 0
    if is_inf(a, source):
        return sign | target.infinity
    return rounded(*value(a, source), target, mode, sign)


def to_integer(a: int, f: Format, mode: str) -> int:
    """A finite number as an integer: rni, rzi, rmi or rpi."""
    n, e = value(a, f)
    if e >= 0:
        return n << e
    floor, rest, half = n >> -e, n & ((1 << -e) - 1), 1 << (-e - 1)
    return (
        floor
        + {
            "rni": rest > half or (rest == half and bool(floor & 1)),
            "rzi": n < 0 and rest > 0,
            "rmi": False,
            "rpi": rest > 0,
        }[mode]
    )


def integral(a: int, f: Format, mode: str) -> int:
    """A number rounded to an integer, in its own format."""
    if is_nan(a, f):
        return f.nan
    if is_inf(a, f):
        return a
    return rounded(to_integer(a, f, mode), 0, f, "rn", a & f.sign)
