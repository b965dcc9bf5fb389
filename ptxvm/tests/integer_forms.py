"""Forms of integers, bits, moves and selection, without warp-level instructions."""

from __future__ import annotations

from functools import partial

from forms import PREDICATE, PREDICATES, Form, Forms, bits_of, number, signed

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
JOINS = {
    "and": lambda t, c: t and c,
    "or": lambda t, c: t or c,
    "xor": lambda t, c: t != c,
}


def clamp(x: int, kind: str) -> int:
    bits = bits_of(kind)
    low = -(1 << (bits - 1)) if kind[0] == "s" else 0
    return min(max(x, low), low + (1 << bits) - 1)


def wrap(kind: str, f, *raw: int) -> int:
    """f of the decoded numbers, as a bit pattern."""
    return f(*(number(x, kind) for x in raw)) & ((1 << bits_of(kind)) - 1)


def quotient(a: int, b: int) -> int:
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return a if b == 0 else a - b * quotient(a, b)


def arithmetic() -> list[Form]:
    forms = Forms()
    for t in INTEGERS:
        bits = bits_of(t)
        two, three = (t, t), (t, t, t)
        forms.add(f"add.{t}", two, partial(wrap, t, lambda a, b: a + b))
        forms.add(f"sub.{t}", two, partial(wrap, t, lambda a, b: a - b))
        forms.add(f"mul.lo.{t}", two, partial(wrap, t, lambda a, b: a * b))
        forms.add(f"mul.hi.{t}", two, partial(wrap, t, lambda a, b, n=bits: a * b >> n))
        forms.add(f"mad.lo.{t}", three, partial(wrap, t, lambda a, b, c: a * b + c))
        forms.add(f"mad.hi.{t}", three, partial(wrap, t, lambda a, b, c, n=bits: (a * b >> n) + c))
        forms.add(f"min.{t}", two, partial(wrap, t, min))
        forms.add(f"max.{t}", two, partial(wrap, t, max))
        forms.add(f"div.{t}", two, partial(wrap, t, quotient))
        forms.add(f"rem.{t}", two, partial(wrap, t, remainder))
        forms.add(f"sad.{t}", three, partial(wrap, t, lambda a, b, c: c + abs(a - b)))
        if t[0] == "s":
            forms.add(f"neg.{t}", (t,), partial(wrap, t, lambda a: -a))
            forms.add(f"abs.{t}", (t,), partial(wrap, t, abs))
        if bits < 64:
            wide = t[0] + str(2 * bits)
            mask = (1 << 2 * bits) - 1
            forms.add(
                f"mul.wide.{t}",
                two,
                lambda a, b, t=t, m=mask: number(a, t) * number(b, t) & m,
                2 * bits,
            )
            forms.add(
                f"mad.wide.{t}",
                (t, t, wide),
                lambda a, b, c, t=t, m=mask: (number(a, t) * number(b, t) + c) & m,
                2 * bits,
            )
    s = "s32"
    forms.add("add.sat.s32", (s, s), partial(wrap, s, lambda a, b: clamp(a + b, s)))
    forms.add("sub.sat.s32", (s, s), partial(wrap, s, lambda a, b: clamp(a - b, s)))
    forms.add(
        "mad.hi.sat.s32", (s, s, s), partial(wrap, s, lambda a, b, c: clamp((a * b >> 32) + c, s))
    )
    for t in ("u32", "s32"):

        def low24(x: int, t: str = t) -> int:
            return signed(x, 24) if t == "s32" else x & 0xFFFFFF

        for part, shift in (("lo", 0), ("hi", 16)):
            forms.add(
                f"mul24.{part}.{t}",
                (t, t),
                lambda a, b, n=shift, f=low24: (f(a) * f(b) >> n) & 0xFFFFFFFF,
            )
            forms.add(
                f"mad24.{part}.{t}",
                (t, t, t),
                lambda a, b, c, n=shift, f=low24: ((f(a) * f(b) >> n) + c) & 0xFFFFFFFF,
            )
    return forms.rows


def dot(a: int, b: int, c: int, at: str, bt: str, first: int, width: int, count: int) -> int:
    def part(x: int, index: int, bits: int, kind: str) -> int:
        raw = x >> (bits * index) & ((1 << bits) - 1)
        return signed(raw, bits) if kind == "s32" else raw

    return (
        c + sum(part(a, i, width, at) * part(b, first + i, 8, bt) for i in range(count))
    ) & 0xFFFFFFFF


def dot_products() -> list[Form]:
    forms = Forms()
    for at in ("u32", "s32"):
        for bt in ("u32", "s32"):
            kinds = (at, bt, "u32")
            forms.add(
                f"dp4a.{at}.{bt}", kinds, partial(dot, at=at, bt=bt, first=0, width=8, count=4)
            )
            for part, first in (("lo", 0), ("hi", 2)):
                forms.add(
                    f"dp2a.{part}.{at}.{bt}",
                    kinds,
                    partial(dot, at=at, bt=bt, first=first, width=16, count=2),
                )
    return forms.rows


def carries() -> list[Form]:
    """Two-word arithmetic: the result is the upper word, which shows the carry."""
    forms = Forms()
    for t in ("u32", "s32", "u64", "s64"):
        n = bits_of(t)
        m = (1 << n) - 1

        def chain(text: str, model, t: str = t, n: int = n) -> None:
            forms.add_form(Form(text.replace("T", t), n, (t, t, t), model, name=text.split(";")[0]))

        chain(
            "add.cc.T %d, %a, %b; addc.T %d, %c, %b;",
            lambda a, b, c, n=n, m=m: (c + b + (a + b >> n)) & m,
        )
        chain(
            "add.cc.T %d, %a, %b; addc.cc.T %d, %c, %b; addc.T %d, %d, 0;",
            lambda a, b, c, n=n, m=m: (
                (((c + b + (a + b >> n)) & m) + (c + b + (a + b >> n) >> n)) & m
            ),
        )
        chain("sub.cc.T %d, %a, %b; subc.T %d, %c, %b;", lambda a, b, c, m=m: (c - b - (a < b)) & m)
        chain(
            "sub.cc.T %d, %a, %b; subc.cc.T %d, %c, %b; subc.T %d, %d, 0;",
            lambda a, b, c, m=m: (((c - b - (a < b)) & m) - (c - b - (a < b) < 0)) & m,
        )
        # a * b + c in two words.
        chain(
            "mad.lo.cc.T %d, %a, %b, %c; madc.hi.T %d, %a, %b, %c;",
            lambda a, b, c, n=n, m=m, t=t: (
                ((number(a, t) * number(b, t) >> n) + c + (((a * b & m) + c) >> n)) & m
            ),
        )
        chain(
            "mad.hi.cc.T %d, %a, %b, %c; madc.lo.cc.T %d, %a, %b, %c; addc.T %d, %d, 0;",
            partial(_mad_chain, t=t, n=n),
        )
    return forms.rows


def _mad_chain(a: int, b: int, c: int, t: str, n: int) -> int:
    m = (1 << n) - 1
    high = (number(a, t) * number(b, t) >> n) & m
    second = (a * b & m) + c + (high + c >> n)
    return ((second & m) + (second >> n)) & m


def comparisons() -> list[Form]:
    forms = Forms()
    for t in (*INTEGERS, "b16", "b32", "b64"):
        names = dict(COMPARISONS)
        if t[0] == "b":
            names = {name: COMPARISONS[name] for name in ("eq", "ne")}
        if t[0] == "u":
            names |= {new: COMPARISONS[old] for new, old in UNSIGNED_NAMES.items()}
        for name, f in names.items():
            test = partial(lambda a, b, f, t: int(f(number(a, t), number(b, t))), f=f, t=t)
            forms.add_form(Form(f"setp.{name}.{t} %p, %a, %b;", 32, (t, t), test, after=PREDICATE))
            forms.add_form(
                Form(
                    f"set.{name}.u32.{t} %d, %a, %b;",
                    32,
                    (t, t),
                    lambda a, b, test=test: 0xFFFFFFFF * test(a, b),
                )
            )
        for join, g in JOINS.items():
            forms.add_form(
                Form(
                    f"setp.ne.u32 %p, %c, 0; setp.ne.{join}.{t} %p|%q, %a, %b, !%p;",
                    32,
                    (t, t, "pred"),
                    lambda a, b, c, g=g: g(a != b, not c) + 2 * g(a == b, not c),
                    after=PREDICATES,
                    name=f"setp.ne.{join}.{t}|",
                )
            )
            forms.add_form(
                Form(
                    f"setp.ne.u32 %p, %c, 0; set.eq.{join}.f32.{t} %d, %a, %b, %p;",
                    32,
                    (t, t, "pred"),
                    lambda a, b, c, g=g: 0x3F800000 * g(a == b, c != 0),
                    name=f"set.eq.{join}.f32.{t}",
                )
            )
    for t in ("b16", "u16", "b32", "s32", "f32", "b64", "s64", "f64"):
        kinds = (f"u{bits_of(t)}",) * 2
        forms.add_form(
            Form(
                f"setp.ne.u32 %p, %c, 0; selp.{t} %d, %a, %b, %p;",
                bits_of(t),
                (*kinds, "pred"),
                lambda a, b, c: a if c else b,
                name=f"selp.{t}",
            )
        )
        forms.add(
            f"slct.{t}.s32",
            (*kinds, "s32"),
            lambda a, b, c: a if signed(c, 32) >= 0 else b,
        )
        for ftz in ("", ".ftz"):
            forms.add(f"slct{ftz}.{t}.f32", (*kinds, "f32"), partial(_by_sign, ftz=bool(ftz)))
    return forms.rows


def _by_sign(a: int, b: int, c: int, ftz: bool) -> int:
    magnitude = c & 0x7FFFFFFF
    zero = magnitude == 0 or (ftz and magnitude < 1 << 23)
    return a if zero or c <= 0x7F800000 else b


def moves() -> list[Form]:
    forms = Forms()
    for t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
        forms.add(f"mov.{t}", (f"u{bits_of(t)}",), lambda a: a)
    forms.add_form(
        Form(
            "mov.b32 %d, {%a, %b};", 32, ("u16", "u16"), lambda a, b: a | b << 16, name="pack 2x16"
        )
    )
    forms.add_form(
        Form(
            "mov.b64 %d, {%a, %b};", 64, ("u32", "u32"), lambda a, b: a | b << 32, name="pack 2x32"
        )
    )
    forms.add_form(
        Form(
            "mov.b64 %d, {%a, %b, %c, %a};",
            64,
            ("u16",) * 3,
            lambda a, b, c: a | b << 16 | c << 32 | a << 48,
            name="pack 4x16",
        )
    )
    for i, text in enumerate(("{%d, _}", "{_, %d}")):
        forms.add_form(
            Form(
                f"mov.b32 {text}, %a;",
                16,
                ("u32",),
                lambda a, i=i: a >> 16 * i & 0xFFFF,
                name=f"unpack 2x16 [{i}]",
            )
        )
        forms.add_form(
            Form(
                f"mov.b64 {text}, %a;",
                32,
                ("u64",),
                lambda a, i=i: a >> 32 * i & 0xFFFFFFFF,
                name=f"unpack 2x32 [{i}]",
            )
        )
    for i in range(4):
        places = ", ".join("%d" if k == i else f"%h{k}" for k in range(4))
        forms.add_form(
            Form(
                f"mov.b64 {{{places}}}, %a;",
                16,
                ("u64",),
                lambda a, i=i: a >> 16 * i & 0xFFFF,
                name=f"unpack 4x16 [{i}]",
            )
        )
    forms.add_form(
        Form(
            "setp.ne.u32 %q, %a, 0; mov.pred %p, %q;",
            32,
            ("u32",),
            lambda a: int(a != 0),
            after=PREDICATE,
            name="mov.pred",
        )
    )
    _add_address_conversions(forms)
    return forms.rows


def _add_address_conversions(forms: Forms) -> None:
    windows = {"shared": 1 << 60, "shared::cta": 1 << 60, "local": 2 << 60, "param": 3 << 60}
    for space, window in windows.items():
        forms.add_form(
            Form(
                f"cvt.u64.u32 %d, %a; cvta.{space}.u64 %d, %d;",
                64,
                ("u32",),
                lambda a, w=window: a | w,
                name=f"cvta.{space}",
            )
        )
        forms.add_form(
            Form(
                f"cvt.u64.u32 %d, %a; cvta.{space}.u64 %d, %d; cvta.to.{space}.u64 %d, %d;",
                64,
                ("u32",),
                lambda a: a,
                name=f"cvta.to.{space}",
            )
        )
    for space in ("global", "const"):
        forms.add(f"cvta.{space}.u64", ("u64",), lambda a: a)
        forms.add(f"cvta.to.{space}.u64", ("u64",), lambda a: a)


def conversions() -> list[Form]:
    """Conversions between integers: into a 64-bit register, which shows the extension, or into one
    of the type's width."""
    forms = Forms()
    kinds = ("u8", "s8", *INTEGERS)
    for to in kinds:
        for of in kinds:
            held = {8: 32, 16: 16, 32: 32, 64: 64}[bits_of(of)]
            for sat in ("", ".sat"):
                model = partial(_integer_cvt, to=to, of=of, sat=bool(sat))
                forms.add_form(Form(f"cvt{sat}.{to}.{of} %d, %a;", 64, (f"u{held}",), model))
                if bits_of(to) in (16, 32):
                    mask = (1 << bits_of(to)) - 1
                    forms.add_form(
                        Form(
                            f"cvt{sat}.{to}.{of} %d, %a;",
                            bits_of(to),
                            ("u64",),
                            lambda a, f=model, m=mask: f(a) & m,
                            name=f"cvt{sat}.{to}.{of} from b64",
                        )
                    )
    for to in ("u16", "s16"):
        forms.add(
            f"cvt.pack.sat.{to}.s32",
            ("s32", "s32"),
            lambda a, b, to=to: (
                (clamp(signed(a, 32), to) & 0xFFFF) << 16 | clamp(signed(b, 32), to) & 0xFFFF
            ),
        )
    for to in ("u8", "s8"):
        forms.add(
            f"cvt.pack.sat.{to}.s32.b32",
            ("s32", "s32", "u32"),
            lambda a, b, c, to=to: (
                (c << 16 & 0xFFFF0000)
                | (clamp(signed(a, 32), to) & 0xFF) << 8
                | clamp(signed(b, 32), to) & 0xFF
            ),
        )
    return forms.rows


def _integer_cvt(a: int, to: str, of: str, sat: bool) -> int:
    x = number(a & ((1 << bits_of(of)) - 1), of)
    if sat:
        x = clamp(x, to)
    bits = bits_of(to)
    x = signed(x, bits) if to[0] == "s" else x & ((1 << bits) - 1)
    return x & 0xFFFFFFFFFFFFFFFF


def integer_forms() -> list[Form]:
    return [
        *arithmetic(),
        *dot_products(),
        *carries(),
        *comparisons(),
        *moves(),
        *conversions(),
    ]
