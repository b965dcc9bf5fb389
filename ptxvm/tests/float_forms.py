"""Forms of f32, f64, f16 and bf16 whose result is uniquely defined."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import exact_float as exact
from exact_float import BF16, F32, F64, FORMATS, ROUNDINGS, Format
from forms import PREDICATE, PREDICATES, Form, Forms, bits_of, signed

Model = Callable[..., int]
HALVES = ("f16", "f16x2", "bf16", "bf16x2")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu")


def flushed(f: Format, model: Model) -> Model:
    """The model with subnormal operands and results flushed to zero."""
    return lambda *raw: exact.flush(model(*(exact.flush(x, f) for x in raw)), f)


def saturated(f: Format, model: Model) -> Model:
    return lambda *raw: exact.saturate(model(*raw), f)


def paired(model: Model) -> Model:
    def both(*raw: int) -> int:
        low, high = model(*(x & 0xFFFF for x in raw)), model(*(x >> 16 for x in raw))
        return low | high << 16

    return both


def relu(model: Model) -> Model:
    def limited(*raw: int) -> int:
        x = model(*raw)
        return x if x == 0x7FFF or not x & 0x8000 else 0

    return limited


NAN64 = F64.infinity  # magnitudes above are NaN


def arithmetic() -> list[Form]:
    forms = Forms()
    operations: dict[str, tuple[int, Callable[..., int]]] = {
        "add": (2, exact.add),
        "sub": (2, exact.sub),
        "mul": (2, exact.mul),
        "fma": (3, exact.fma),
        "mad": (3, exact.fma),
        "div": (2, exact.div),
        "rcp": (1, lambda a, f, mode: exact.div(f.bias << f.fraction, a, f, mode)),
        "sqrt": (1, exact.sqrt),
    }
    for op, (count, f) in operations.items():
        for mode in ROUNDINGS:
            forms.add(f"{op}.{mode}.f64", ("f64",) * count, partial(f, f=F64, mode=mode), nan=NAN64)
            model = partial(f, f=F32, mode=mode)
            forms.add(f"{op}.{mode}.f32", ("f32",) * count, model)
            forms.add(f"{op}.{mode}.ftz.f32", ("f32",) * count, flushed(F32, model))
            if op in ("add", "sub", "mul", "fma", "mad"):
                forms.add(f"{op}.{mode}.sat.f32", ("f32",) * count, saturated(F32, model))
                forms.add(
                    f"{op}.{mode}.ftz.sat.f32",
                    ("f32",) * count,
                    saturated(F32, flushed(F32, model)),
                )
        if op in ("add", "sub", "mul"):
            forms.add(f"{op}.f32", ("f32",) * 2, partial(f, f=F32))
            forms.add(f"{op}.f64", ("f64",) * 2, partial(f, f=F64), nan=NAN64)
    return forms.rows


def half_arithmetic() -> list[Form]:
    forms = Forms()
    operations = {
        "add": (2, exact.add),
        "sub": (2, exact.sub),
        "mul": (2, exact.mul),
        "fma.rn": (3, exact.fma),
    }
    for t in HALVES:
        f = FORMATS[t.removesuffix("x2")]
        wrap = paired if t.endswith("x2") else (lambda model: model)
        for op, (count, operation) in operations.items():
            kinds = (t,) * count
            model = partial(operation, f=f)
            forms.add(f"{op}.{t}", kinds, wrap(model))
            if op == "add":
                forms.add(f"add.rn.{t}", kinds, wrap(model))
            if f is not BF16:
                forms.add(f"{op}.ftz.{t}", kinds, wrap(flushed(f, model)))
                forms.add(f"{op}.sat.{t}", kinds, wrap(saturated(f, model)))
                forms.add(f"{op}.ftz.sat.{t}", kinds, wrap(saturated(f, flushed(f, model))))
            if op == "fma.rn":
                forms.add(f"{op}.relu.{t}", kinds, wrap(relu(model)))
    return forms.rows


def signs_and_extremes() -> list[Form]:
    forms = Forms()
    for t in ("f32", "f64", *HALVES):
        f = FORMATS[t.removesuffix("x2")]
        wrap = paired if t.endswith("x2") else (lambda model: model)
        flushes = ["", ".ftz"] if t in ("f32", "f16", "f16x2") else [""]
        for ftz in flushes:
            limit = partial(flushed, f) if ftz else (lambda model: model)

            def negate(a: int, f: Format = f) -> int:
                return a ^ f.sign

            def absolute(a: int, f: Format = f) -> int:
                return a & ~f.sign

            forms.add(f"neg{ftz}.{t}", (t,), wrap(limit(negate)))
            forms.add(f"abs{ftz}.{t}", (t,), wrap(limit(absolute)))
            for nan in ("", ".NaN") if t != "f64" else ("",):
                for magnitude in ("", ".xorsign.abs") if t != "f64" else ("",):
                    for op in ("min", "max"):
                        model = partial(
                            exact.extreme,
                            f=f,
                            greatest=op == "max",
                            nan=bool(nan),
                            magnitude=bool(magnitude),
                        )
                        forms.add(
                            f"{op}{ftz}{nan}{magnitude}.{t}",
                            (t, t),
                            wrap(limit(model)),
                            nan=NAN64 if t == "f64" else None,
                        )
    for t in ("f32", "f64"):
        f = FORMATS[t]
        forms.add(f"copysign.{t}", (t, t), lambda a, b, f=f: a & f.sign | b & ~f.sign)
        tests = {
            "finite": lambda m, f: m < f.infinity,
            "infinite": lambda m, f: m == f.infinity,
            "number": lambda m, f: m <= f.infinity,
            "notanumber": lambda m, f: m > f.infinity,
            "normal": lambda m, f: m == 0 or 1 << f.fraction <= m < f.infinity,
            "subnormal": lambda m, f: 0 < m < 1 << f.fraction,
        }
        for name, test in tests.items():
            forms.add_form(
                Form(
                    f"testp.{name}.{t} %p, %a;",
                    32,
                    (t,),
                    lambda a, f=f, test=test: int(test(a & ~f.sign, f)),
                    after=PREDICATE,
                )
            )
    return forms.rows


def comparisons() -> list[Form]:
    forms = Forms()
    for t in ("f32", "f64", *HALVES):
        f = FORMATS[t.removesuffix("x2")]
        pair = t.endswith("x2")
        for ftz in ("", ".ftz") if t in ("f32", "f16", "f16x2") else ("",):
            for name in (*COMPARISONS, "num", "nan"):

                def test(a: int, b: int, name: str = name, f: Format = f, z: str = ftz) -> int:
                    if z:
                        a, b = exact.flush(a, f), exact.flush(b, f)
                    return int(exact.compare(name, a, b, f))

                if pair:
                    forms.add_form(
                        Form(
                            f"setp.{name}{ftz}.{t} %p|%q, %a, %b;",
                            32,
                            (t, t),
                            lambda a, b, test=test: (
                                test(a & 0xFFFF, b & 0xFFFF) + 2 * test(a >> 16, b >> 16)
                            ),
                            after=PREDICATES,
                        )
                    )
                    continue
                forms.add_form(
                    Form(
                        f"setp.{name}{ftz}.{t} %p|%q, %a, %b;",
                        32,
                        (t, t),
                        lambda a, b, test=test: 1 if test(a, b) else 2,
                        after=PREDICATES,
                    )
                )
        one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}
        less = partial(exact.compare, "lt", f=f)
        if pair:
            value = one[t.removesuffix("x2")]
            forms.add(f"set.lt.{t}.{t}", (t, t), paired(lambda a, b, m=less, v=value: v * m(a, b)))
            continue
        forms.add(f"set.lt.u32.{t}", (t, t), lambda a, b, m=less: 0xFFFFFFFF * m(a, b), 32)
        forms.add(f"set.lt.s32.{t}", (t, t), lambda a, b, m=less: 0xFFFFFFFF * m(a, b), 32)
        forms.add(f"set.lt.f32.{t}", (t, t), lambda a, b, m=less: 0x3F800000 * m(a, b), 32)
        if t in ("f16", "bf16"):
            forms.add(f"set.lt.{t}.{t}", (t, t), lambda a, b, m=less, v=one[t]: v * m(a, b))
            forms.add(f"set.lt.u16.{t}", (t, t), lambda a, b, m=less: 0xFFFF * m(a, b), 16)
    return forms.rows


def _cvt(a: int, of: Format, to: Format, mode: str, limits: str) -> int:
    """`limits` is a string of modifiers."""
    if ".ftz" in limits and of is F32:
        a = exact.flush(a, F32)
    x = exact.integral(a, of, mode) if mode.endswith("i") else exact.convert(a, of, to, mode)
    if ".ftz" in limits and to is F32:
        x = exact.flush(x, F32)
    if ".sat." in limits + ".":
        return exact.saturate(x, to)
    if ".satfinite" in limits and exact.is_inf(x, to):
        x -= 1
    if ".relu" in limits and x & to.sign and not exact.is_nan(x, to):
        return 0
    return x


def float_conversions() -> list[Form]:
    forms = Forms()
    for of_name, of in FORMATS.items():
        for to_name, to in FORMATS.items():
            lossy = to.bits < of.bits or (to.bits == 16 and of.bits == 16 and to is not of)
            ftz = [".ftz"] if F32 in (of, to) else []
            for limits in ("", ".sat", *ftz, *(f"{x}.sat" for x in ftz)):
                for mode in ROUNDINGS if lossy else ("",):
                    dot = f".{mode}" if mode else ""
                    forms.add(
                        f"cvt{dot}{limits}.{to_name}.{of_name}",
                        (of_name,),
                        partial(_cvt, of=of, to=to, mode=mode or "rn", limits=limits),
                        to.bits,
                        nan=NAN64 if to is F64 else to.infinity if of is BF16 else None,
                    )
        for mode in ("rni", "rzi", "rmi", "rpi"):
            for limits in ("", ".sat", *([".ftz"] if of is F32 else [])):
                forms.add(
                    f"cvt.{mode}{limits}.{of_name}.{of_name}",
                    (of_name,),
                    partial(_cvt, of=of, to=of, mode=mode, limits=limits),
                    nan=NAN64 if of is F64 else None,
                )
    for name in ("f16", "bf16"):
        to = FORMATS[name]
        for mode in ("rn", "rz"):
            for limits in ("", ".relu", ".satfinite", ".relu.satfinite"):
                model = partial(_cvt, of=F32, to=to, mode=mode, limits=limits)
                if limits:
                    forms.add(f"cvt.{mode}{limits}.{name}.f32", ("f32",), model, 16)
                forms.add(
                    f"cvt.{mode}{limits}.{name}x2.f32",
                    ("f32", "f32"),
                    lambda a, b, m=model: m(a) << 16 | m(b),
                    32,
                )
    for mode in ("rna", "rn", "rz"):
        for limits in ("", ".relu", ".satfinite"):
            forms.add(f"cvt.{mode}{limits}.tf32.f32", ("f32",), partial(_tf32, mode=mode, m=limits))
    return forms.rows


TF32 = Format(32, 10, 0)


def _tf32(a: int, mode: str, m: str) -> int:
    if exact.is_nan(a, F32):
        return F32.nan
    if exact.is_inf(a, F32):
        x = a
    else:
        # tf32 has the exponents of f32: a format of 19 bits, shifted left by 13.
        x = exact.rounded(*exact.value(a, F32), Format(19, 10, 0), mode, 0) << 13
        if exact.is_zero(x, F32):
            x = a & F32.sign
    if ".satfinite" in m and exact.is_inf(x, F32):
        x -= 1 << 13
    return 0 if ".relu" in m and x & F32.sign else x


def _to_integer(a: int, of: Format, to: str, mode: str, ftz: bool) -> int:
    bits = bits_of(to)
    low = -(1 << (bits - 1)) if to[0] == "s" else 0
    if ftz:
        a = exact.flush(a, of)
    if exact.is_nan(a, of):
        x = 1 << (bits - 1) if of is F64 or bits == 64 else 0
    elif exact.is_inf(a, of):
        x = low if a & of.sign else low + (1 << bits) - 1
    else:
        x = min(max(exact.to_integer(a, of, mode), low), low + (1 << bits) - 1)
    return x & ((1 << bits) - 1)


def _from_integer(a: int, of: str, to: Format, mode: str, sat: bool) -> int:
    bits = bits_of(of)
    x = exact.rounded(signed(a, bits) if of[0] == "s" else a, 0, to, mode)
    return exact.saturate(x, to) if sat else x


def integer_conversions() -> list[Form]:
    forms = Forms()
    kinds = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
    for kind in kinds:
        bits = bits_of(kind)
        for name, f in FORMATS.items():
            for mode in ("rni", "rzi", "rmi", "rpi"):
                for ftz in ("", ".ftz") if f is F32 and mode == "rzi" else ("",):
                    model = partial(_to_integer, of=f, to=kind, mode=mode, ftz=bool(ftz))
                    if bits == 8:  # read through a wider register, sign-extended

                        def model(a: int, m: Model = model, k: str = kind) -> int:
                            return (signed(m(a), 8) if k == "s8" else m(a)) & 0xFFFF

                    forms.add(f"cvt.{mode}{ftz}.{kind}.{name}", (name,), model, max(bits, 16))
            for mode in ROUNDINGS:
                for sat in ("", ".sat") if mode == "rn" else ("",):
                    if bits == 8:
                        model = partial(
                            lambda a, m: m(a & 0xFF),
                            m=partial(_from_integer, of=kind, to=f, mode=mode, sat=bool(sat)),
                        )
                    else:
                        model = partial(_from_integer, of=kind, to=f, mode=mode, sat=bool(sat))
                    forms.add(
                        f"cvt.{mode}{sat}.{name}.{kind}", (f"u{max(bits, 16)}",), model, f.bits
                    )
    return forms.rows


def float_forms() -> list[Form]:
    return [
        *arithmetic(),
        *half_arithmetic(),
        *signs_and_extremes(),
        *comparisons(),
        *float_conversions(),
        *integer_conversions(),
    ]
