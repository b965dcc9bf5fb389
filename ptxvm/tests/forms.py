"""Scalar forms of PTX instructions, each with a model in plain Python.

A form is one or more lines of PTX over the registers %d (result), %a, %b, %c (sources) and the
predicates %p, %q; its model takes and returns bit patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Model = Callable[..., int]


@dataclass(frozen=True)
class Form:
    text: str  # guarded as a whole in the second kernel
    result: int  # bits
    sources: tuple[str, ...]  # types, which determine the operands: u32, s16, f16x2, ...
    model: Model
    after: str = ""  # not guarded: computes %d from predicates
    name: str = ""
    nan: int | None = None  # all results above this magnitude match as NaN

    def __str__(self) -> str:
        return self.name or self.text.split(";")[0].split(" ")[0]

    @property
    def kept(self) -> int:
        """%d if the guard is false: predicates start as true."""
        if not self.after:
            return SENTINEL & ((1 << self.result) - 1)
        return 3 if "%q" in self.after else 1


SENTINEL = 0x5A5A1234A5A5C3C3

PREDICATE = "selp.b32 %d, 1, 0, %p;"
PREDICATES = (
    "{ .reg .b32 %low, %high; selp.b32 %low, 1, 0, %p; selp.b32 %high, 2, 0, %q;"
    " or.b32 %d, %low, %high; }"
)


def bits_of(kind: str) -> int:
    if kind == "pred":
        return 32
    if kind.endswith("x2"):
        return 32
    return int(kind.lstrip("bfsu"))


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def number(x: int, kind: str) -> int:
    """The number that a bit pattern encodes."""
    return signed(x, bits_of(kind)) if kind[0] == "s" else x


# ---- Operands

FLOAT_FIELDS = {"f16": (10, 5), "bf16": (7, 8), "f32": (23, 8), "f64": (52, 11)}


def edges(kind: str) -> list[int]:
    """Boundary values of a type."""
    bits = bits_of(kind)
    if kind.endswith("x2"):
        half = edges(kind[:-2])
        return [x | y << 16 for x, y in zip(half, half[::-1], strict=True)]
    if kind in FLOAT_FIELDS:
        fraction, exponent = FLOAT_FIELDS[kind]
        bias = (1 << (exponent - 1)) - 1
        infinity, one = ((1 << exponent) - 1) << fraction, bias << fraction
        positive = [
            *(0, 1, 2, (1 << fraction) - 1, 1 << fraction, (1 << fraction) + 1),
            *(one - 1, one, one + 1, one + (1 << fraction), one - (1 << fraction)),
            *(one | 1 << (fraction - 1), one + (2 << fraction) + 1),
            *(infinity - 1, infinity, infinity + 1, infinity | 1 << (fraction - 1)),
        ]
        positive.append(infinity | ((1 << fraction) - 1))
        return positive + [x | 1 << (bits - 1) for x in positive]
    top = 1 << (bits - 1)
    values = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, top - 1]
    values += [top, top + 1, 2 * top - 1, 2 * top - 2, 2 * top - 128, 0x5555555555555555]
    values += [1 << 24, 1 << 31, (1 << 31) - 1, 0x8000, 0x7FFF, 0xFFFF]
    return sorted({x & (2 * top - 1) for x in values})


def draw(kind: str, count: int, random: np.random.Generator) -> np.ndarray:
    """Random bit patterns: half of them uniform, half of moderate size."""
    bits = bits_of(kind)
    uniform = random.integers(0, 1 << bits, count, dtype=np.uint64, endpoint=False)
    if bits == 64:
        uniform = random.integers(0, (1 << 64) - 1, count, dtype=np.uint64, endpoint=True)
    if kind.endswith("x2"):
        low = draw(kind[:-2], count, random)
        return low | draw(kind[:-2], count, random) << np.uint64(16)
    if kind in FLOAT_FIELDS:
        fraction, exponent = FLOAT_FIELDS[kind]
        bias = (1 << (exponent - 1)) - 1
        near = random.integers(bias - 6, bias + 7, count, dtype=np.uint64)
        moderate = uniform & np.uint64((1 << (bits - 1)) | ((1 << fraction) - 1))
        moderate |= near << np.uint64(fraction)
    else:
        moderate = uniform >> random.integers(0, bits, count, dtype=np.uint64)
    return np.where(random.random(count) < 0.5, uniform, moderate)


def operands(form: Form, count: int, seed: int) -> list[np.ndarray]:
    """At least `count` rows: all combinations of boundary values (a sample for three sources),
    random rows, and random rows in which one source is a boundary value."""
    random = np.random.default_rng(seed)
    columns = [np.array(edges(kind), dtype=np.uint64) for kind in form.sources]
    grid = [x.ravel() for x in np.meshgrid(*columns, indexing="ij")]
    if len(grid[0]) > count // 2:
        chosen = random.choice(len(grid[0]), count // 2, replace=False)
        grid = [x[chosen] for x in grid]
    rest = count - len(grid[0])
    rows = []
    for fixed, (kind, edge) in enumerate(zip(form.sources, columns, strict=True)):
        mixed = draw(kind, rest, random)
        replace = random.integers(0, 2 * len(columns), rest) == fixed
        rows.append(np.where(replace, random.choice(edge, rest), mixed))
    return [np.concatenate(pair) for pair in zip(grid, rows, strict=True)]


# ---- PTX

KERNEL = """
.visible .entry {name}(.param .u64 out, .param .u64 in_a, .param .u64 in_b, .param .u64 in_c,
                       .param .u32 count)
{{
  .reg .b16 %h<4>;
  .reg .b32 %r<8>;
  .reg .b64 %rd<12>;
  .reg .pred %p, %q, %guard, %past;
  .reg .b{bits} %d;
{declarations}
  mov.u32 %r0, %ctaid.x;
  mov.u32 %r1, %ntid.x;
  mov.u32 %r2, %tid.x;
  mad.lo.u32 %r3, %r0, %r1, %r2;
  ld.param.u32 %r4, [count];
  setp.ge.u32 %past, %r3, %r4;
  @%past ret;
{loads}
  setp.eq.u32 %p, %r3, %r3;
  setp.eq.u32 %q, %r3, %r3;
  mov.b{bits} %d, {sentinel};
{body}
{after}
  ld.param.u64 %rd0, [out];
  mul.wide.u32 %rd1, %r3, {bytes};
  add.s64 %rd2, %rd0, %rd1;
  st.global.b{bits} [%rd2], %d;
  ret;
}}
"""

# Lanes with bit 0 or 3 of the index set execute a guarded form.
GUARD = "  and.b32 %r5, %r3, 9;\n  setp.ne.u32 %guard, %r5, 0;\n"


def guarded(index: np.ndarray) -> np.ndarray:
    return (index & 9) != 0


def kernel(form: Form, name: str, guard: bool) -> str:
    declarations, loads = "", ""
    for i, kind in enumerate(form.sources):
        register, bits = f"%{'abc'[i]}", bits_of(kind)
        declarations += f"  .reg .b{bits} {register};\n"
        loads += (
            f"  ld.param.u64 %rd3, [in_{'abc'[i]}];\n  mul.wide.u32 %rd4, %r3, {bits // 8};\n"
            f"  add.s64 %rd5, %rd3, %rd4;\n  ld.global.b{bits} {register}, [%rd5];\n"
        )
    lines = [line.strip() for line in form.text.split(";") if line.strip()]
    prefix = "  @%guard " if guard else "  "
    body = (GUARD if guard else "") + "".join(f"{prefix}{line};\n" for line in lines)
    return KERNEL.format(
        name=name,
        bits=form.result,
        bytes=form.result // 8,
        sentinel=hex(SENTINEL & ((1 << form.result) - 1)),
        declarations=declarations,
        loads=loads,
        body=body,
        after=form.after,
    )


def module(form: Form) -> str:
    head = ".version 8.0\n.target sm_80\n.address_size 64\n"
    return head + kernel(form, "plain", False) + kernel(form, "guarded", True)


# ---- Building forms


def simple(op: str, kinds: Sequence[str], model: Model, result: int = 0, **more: object) -> Form:
    """The form `op %d, %a, ...;`."""
    sources = ", ".join(f"%{x}" for x in "abc"[: len(kinds)])
    bits = result or bits_of(kinds[0])
    return Form(f"{op} %d, {sources};", bits, tuple(kinds), model, **more)  # type: ignore[arg-type]


@dataclass
class Forms:
    rows: list[Form] = field(default_factory=list)

    def add(self, op: str, kinds: Sequence[str], model: Model, result: int = 0, **more: object):
        self.rows.append(simple(op, kinds, model, result, **more))

    def add_form(self, form: Form) -> None:
        self.rows.append(form)
