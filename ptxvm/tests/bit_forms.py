"""Forms of logic, shifts and bit fields, with models that follow the text of the ISA bit by bit."""

from __future__ import annotations

from functools import partial

from forms import PREDICATE, Form, Forms, bits_of, number, signed

U32 = 0xFFFFFFFF
WORDS = ("u32", "s32", "u64", "s64")
LOGIC = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}


def logic() -> list[Form]:
    forms = Forms()
    for t in ("b16", "b32", "b64"):
        u = f"u{bits_of(t)}"
        mask = (1 << bits_of(t)) - 1
        for name, f in LOGIC.items():
            forms.add(f"{name}.{t}", (u, u), f)
        forms.add(f"not.{t}", (u,), lambda a, m=mask: ~a & m)
        forms.add(f"cnot.{t}", (u,), lambda a: int(a == 0))
    load = "setp.ne.u32 %p, %a, 0; setp.ne.u32 %q, %b, 0; "
    for name, f in LOGIC.items():
        forms.add_form(
            Form(
                f"{load}{name}.pred %p, %p, %q;",
                32,
                ("pred", "pred"),
                lambda a, b, f=f: int(f(a != 0, b != 0)),
                after=PREDICATE,
                name=f"{name}.pred",
            )
        )
        forms.add_form(
            Form(
                f"{load}{name}.pred %p, !%p, !%q;",
                32,
                ("pred", "pred"),
                lambda a, b, f=f: int(f(a == 0, b == 0)),
                after=PREDICATE,
                name=f"{name}.pred !",
            )
        )
    forms.add_form(
        Form(
            f"{load}not.pred %p, %q;",
            32,
            ("pred", "pred"),
            lambda a, b: int(b == 0),
            after=PREDICATE,
            name="not.pred",
        )
    )
    return forms.rows


def table(a: int, b: int, c: int, lut: int) -> int:
    result = 0
    for k in range(8):
        if lut >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c) & U32
    return result


def tables() -> list[Form]:
    forms = Forms()
    kinds = ("u32",) * 3
    for lut in (0x00, 0x01, 0x1A, 0x40, 0x80, 0x96, 0xC0, 0xCA, 0xD8, 0xE8, 0xEA, 0xF8, 0xFE, 0xFF):
        text = f"lop3.b32 %d, %a, %b, %c, {hex(lut)};"
        forms.add_form(Form(text, 32, kinds, partial(table, lut=lut), name=f"lop3.b32 {lut:#x}"))
    for join, negated in (("or", ""), ("and", ""), ("and", "!")):
        forms.add_form(
            Form(
                f"setp.lt.u32 %q, %a, %b; lop3.{join}.b32 _|%p, %a, %b, %c, 0x96, {negated}%q;",
                32,
                kinds,
                partial(_joined, join=join, negated=bool(negated)),
                after=PREDICATE,
                name=f"lop3.{join}.b32 {negated}q",
            )
        )
    return forms.rows


def _joined(a: int, b: int, c: int, join: str, negated: bool) -> int:
    q = (a < b) != negated
    nonzero = a ^ b ^ c != 0
    return int(nonzero and q if join == "and" else nonzero or q)


def shifts() -> list[Form]:
    forms = Forms()
    for t in ("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64"):
        n = bits_of(t)
        kinds = (t.replace("b", "u"), "u32")
        if t[0] == "b":
            forms.add(
                f"shl.{t}", kinds, lambda a, b, n=n: (a << b) & ((1 << n) - 1) if b < n else 0
            )
        forms.add(
            f"shr.{t}",
            kinds,
            lambda a, b, n=n, t=t: (number(a, t) >> min(b, n)) & ((1 << n) - 1),
        )
    for way in "lr":
        for mode in ("clamp", "wrap"):
            forms.add(f"shf.{way}.{mode}.b32", ("u32",) * 3, partial(funnel, way=way, mode=mode))
    return forms.rows


def funnel(a: int, b: int, c: int, way: str, mode: str) -> int:
    n = min(c, 32) if mode == "clamp" else c & 31
    both = b << 32 | a
    return (both << n >> 32 if way == "l" else both >> n) & U32


def extract(a: int, b: int, c: int, t: str) -> int:
    last, position, length = bits_of(t) - 1, b & 0xFF, c & 0xFF
    sign = 0
    if t[0] == "s" and length:
        sign = a >> min(position + length - 1, last) & 1
    result = 0
    for i in range(last + 1):
        inside = i < length and position + i <= last
        result |= (a >> (position + i) & 1 if inside else sign) << i
    return result


def insert(a: int, b: int, c: int, d: int, n: int) -> int:
    position, length = c & 0xFF, d & 0xFF
    for i in range(length):
        if position + i < n:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def find(a: int, t: str, amount: bool) -> int:
    n = bits_of(t)
    if t[0] == "s" and a >> (n - 1):
        a = ~a & ((1 << n) - 1)
    if a == 0:
        return U32
    return n - a.bit_length() if amount else a.bit_length() - 1


def fields() -> list[Form]:
    forms = Forms()
    for t in WORDS:
        n = bits_of(t)
        forms.add(f"bfe.{t}", (t, "u32", "u32"), partial(extract, t=t))
        forms.add(f"bfind.{t}", (t,), partial(find, t=t, amount=False), 32)
        forms.add(f"bfind.shiftamt.{t}", (t,), partial(find, t=t, amount=True), 32)
    for n in (32, 64):
        u = f"u{n}"
        # Position and length are two bytes of one operand.
        forms.add_form(
            Form(
                f"shr.b32 %r6, %c, 8; bfi.b{n} %d, %a, %b, %c, %r6;",
                n,
                (u, u, "u32"),
                lambda a, b, c, n=n: insert(a, b, c, c >> 8, n),
                name=f"bfi.b{n}",
            )
        )
        forms.add(f"brev.b{n}", (u,), lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2))
        forms.add(f"clz.b{n}", (u,), lambda a, n=n: n - a.bit_length(), 32)
        forms.add(f"popc.b{n}", (u,), lambda a: bin(a).count("1"), 32)
    forms.add_form(
        Form(
            "and.b32 %b, %b, 31; fns.b32 %d, %a, %b, %c;",
            32,
            ("u32", "u32", "s32"),
            nth,
            name="fns.b32",
        )
    )
    for mode in ("clamp", "wrap"):
        for t in ("u32", "s32"):
            forms.add(f"szext.{mode}.{t}", (t, "u32"), partial(extend, t=t, wrap=mode == "wrap"))
        forms.add(f"bmsk.{mode}.b32", ("u32", "u32"), partial(field_mask, wrap=mode == "wrap"))
    return forms.rows


def nth(mask: int, base: int, offset: int) -> int:
    base, offset = base & 31, signed(offset, 32)
    if offset == 0:
        return base if mask >> base & 1 else U32
    places = range(base, 32) if offset > 0 else range(base, -1, -1)
    found = [i for i in places if mask >> i & 1]
    return found[abs(offset) - 1] if abs(offset) <= len(found) else U32


def extend(a: int, b: int, t: str, wrap: bool) -> int:
    if not wrap and b >= 32:
        return a
    n = b & 31
    if n == 0:
        return 0
    low = a & ((1 << n) - 1)
    return (signed(low, n) if t == "s32" else low) & U32


def field_mask(a: int, b: int, wrap: bool) -> int:
    if wrap:
        a, b = a & 31, b & 31
    elif a >= 32:
        return 0
    return sum(1 << i for i in range(a, min(a + b, 32)))


def permute(a: int, b: int, c: int) -> int:
    source = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
    result = 0
    for i in range(4):
        control = c >> 4 * i & 15
        byte = source[control & 7]
        if control & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * i
    return result


# Source of bytes 3, 2, 1, 0 of the result, by c[1:0] (PTX ISA table).
MODES = {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


def permutes() -> list[Form]:
    forms = Forms()
    kinds = ("u32",) * 3
    forms.add("prmt.b32", kinds, permute)
    for mode, rows in MODES.items():
        forms.add(
            f"prmt.b32.{mode}",
            kinds,
            lambda a, b, c, rows=rows: permute(a, b, int(rows[c & 3], 16)),
        )
    return forms.rows


def bit_forms() -> list[Form]:
    return [*logic(), *tables(), *shifts(), *fields(), *permutes()]
