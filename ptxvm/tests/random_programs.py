"""Random structured programs over registers of every width, as PTX and in a model.

They branch, loop (with a trip count per thread), break, continue and exit, under guards and with
short-lived registers: interference between lanes, or registers that wrongly share a slot, give a
wrong value. In the model every register is an array of its own, with one element per thread, and
statements write the active threads.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import numpy as np

# A program is a list of statements: tuples that begin with their kind. A register is a pair of its
# kind and its number.
Program = list[tuple]
Register = tuple[str, int]

REGISTERS = 8  # per kind
DTYPES: dict[str, Any] = {
    "p": np.bool_,
    "c": np.uint8,
    "h": np.uint16,
    "e": np.float16,
    "x": np.uint32,
    "f": np.float32,
    "l": np.uint64,
    "d": np.float64,
}
DECLARED = {"p": "pred", "c": "b8", "h": "b16", "e": "b16", "x": "b32", "f": "f32", "l": "b64"}
DECLARED["d"] = "f64"
TYPES = {"h": "u16", "e": "f16", "x": "u32", "f": "f32", "l": "u64", "d": "f64"}
BITS = {"h": 16, "e": 16, "x": 32, "f": 32, "l": 64, "d": 64}
INTEGERS = "hxl"

OPERATIONS: dict[str, Callable] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
INTEGER_OPERATIONS = {**OPERATIONS, "xor": operator.xor, "and": operator.and_, "min": np.minimum}
FLOAT_OPERATIONS = {**OPERATIONS, "min": np.fmin, "max": np.fmax}
COMPARISONS: dict[str, Callable] = {"lt": operator.lt, "ge": operator.ge, "eq": operator.eq}
LOGIC: dict[str, Callable] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
# Kinds of source and result, with a rounding modifier if the result is narrower, as PTX requires.
CONVERSIONS = [
    ("h", "x", "cvt.u32.u16"),
    ("x", "h", "cvt.u16.u32"),
    ("x", "l", "cvt.u64.u32"),
    ("l", "x", "cvt.u32.u64"),
    ("e", "f", "cvt.f32.f16"),
    ("f", "e", "cvt.rn.f16.f32"),
    ("f", "d", "cvt.f64.f32"),
    ("d", "f", "cvt.rn.f32.f64"),
    ("x", "f", "cvt.rn.f32.u32"),
    ("h", "e", "cvt.rn.f16.u16"),
]
HALVES = {"h": "c", "x": "h", "l": "x"}  # kind of the two elements of a packed register


def ptx_operation(kind: str, name: str) -> str:
    if kind in INTEGERS:
        if name in ("xor", "and"):
            return f"{name}.b{BITS[kind]}"
        return f"mul.lo.{TYPES[kind]}" if name == "mul" else f"{name}.{TYPES[kind]}"
    rounded = name in OPERATIONS and kind != "e"
    return f"{name}.rn.{TYPES[kind]}" if rounded else f"{name}.{TYPES[kind]}"


class Writer:
    """Writes a program in which every register has a value on every path before it is read."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.known: set[Register] = {("x", 0)}
        self.counters = 0
        self.exits: list[tuple[list[set[Register]], list[set[Register]]]] = []  # per open loop
        first = [self.convert("x", "h"), self.convert("x", "f"), self.convert("x", "l")]
        first += [self.convert("h", "e"), self.convert("f", "d"), self.unpack("h"), self.compare()]
        self.program: Program = first + self.block(3, 16)
        pool = sorted(self.known)
        self.results = self.random.sample(pool, min(len(pool), 6))

    def one_of(self, kind: str) -> Register | None:
        able = sorted(r for r in self.known if r[0] == kind)
        return self.random.choice(able) if able else None

    def target(self, kind: str) -> Register:
        return (kind, self.random.randrange(REGISTERS))

    def guarded(self, *targets: Register) -> tuple[Register, bool] | None:
        """A guard, if the targets already have a value for lanes that it masks off."""
        predicate = self.one_of("p")
        if predicate is None or not self.known.issuperset(targets) or self.random.random() < 0.6:
            self.known.update(targets)
            return None
        return (predicate, self.random.random() < 0.5)

    def convert(self, source: str, result: str) -> tuple:
        opcode = next(c for c in CONVERSIONS if c[:2] == (source, result))[2]
        given, target = self.one_of(source), self.target(result)
        return ("convert", self.guarded(target), opcode, target, given)

    def unpack(self, kind: str) -> tuple:
        given = self.one_of(kind)
        low, high = self.random.sample(range(REGISTERS), 2)
        targets = (HALVES[kind], low), (HALVES[kind], high)
        return ("unpack", self.guarded(*targets), targets, given)

    def compare(self) -> tuple:
        kind = self.random.choice([k for k in TYPES if self.one_of(k)])
        a, b = self.one_of(kind), self.one_of(kind)
        target = self.target("p")
        name = self.random.choice(list(COMPARISONS))
        return ("compare", self.guarded(target), name, target, a, b)

    def simple(self) -> tuple:
        choice = self.random.random()
        if choice < 0.45:
            kind = self.random.choice([k for k in TYPES if self.one_of(k)])
            a, b, target = self.one_of(kind), self.one_of(kind), self.target(kind)
            operations = INTEGER_OPERATIONS if kind in INTEGERS else FLOAT_OPERATIONS
            name = self.random.choice(list(operations))
            return ("operate", self.guarded(target), name, target, a, b)
        if choice < 0.6:
            source, result, _ = self.random.choice([c for c in CONVERSIONS if self.one_of(c[0])])
            return self.convert(source, result)
        if choice < 0.68:
            kind = self.random.choice([k for k in HALVES if self.one_of(k)])
            return self.unpack(kind)
        if choice < 0.74:
            kind = self.random.choice([k for k in HALVES if self.one_of(HALVES[k])])
            low, high = (self.one_of(HALVES[kind]) for _ in range(2))
            target = self.target(kind)
            return ("pack", self.guarded(target), target, low, high)
        if choice < 0.84 and self.one_of("p"):
            kind = self.random.choice([k for k in TYPES if self.one_of(k)])
            a, b, p = self.one_of(kind), self.one_of(kind), self.one_of("p")
            target = self.target(kind)
            return ("select", self.guarded(target), target, a, b, p)
        if choice < 0.9 and self.one_of("p"):
            a, b, target = self.one_of("p"), self.one_of("p"), self.target("p")
            name = self.random.choice(list(LOGIC))
            return ("logic", self.guarded(target), name, target, a, b)
        return self.compare()

    def block(self, depth: int, length: int) -> Program:
        statements: Program = []
        for _ in range(length):
            choice = self.random.random()
            predicate = self.one_of("p")
            if choice < 0.7 or depth == 0 or predicate is None:
                statements.append(self.simple())
            elif choice < 0.8:
                statements.append(self.branch(depth, predicate))
            elif choice < 0.92:
                statements.append(self.loop(depth))
            else:
                kind = self.random.choice(["break", "continue"]) if self.exits else "leave"
                if self.exits and self.random.random() < 0.1:
                    kind = "leave"
                if kind != "leave":
                    self.exits[-1][kind == "continue"].append(set(self.known))
                statements.append((kind, predicate, self.random.random() < 0.5))
        return statements

    def branch(self, depth: int, predicate: Register) -> tuple:
        before = set(self.known)
        first = self.block(depth - 1, self.random.randrange(1, 5))
        after, self.known = self.known, before
        other = self.block(depth - 1, self.random.randrange(0, 4))
        self.known &= after
        return ("if", predicate, first, other)

    def loop(self, depth: int) -> tuple:
        """Loop: its body runs one to four times, or zero to three times."""
        number = self.counters
        self.counters += 1
        count, at_least_once = self.one_of("x"), self.random.random() < 0.8
        before = set(self.known)
        self.exits.append(([], []))
        body = self.block(depth - 1, self.random.randrange(4, 12))
        breaks, continues = self.exits.pop()
        for known in continues:
            self.known &= known
        for known in breaks:
            self.known &= known
        if not at_least_once:
            self.known = before
        return ("loop", number, count, at_least_once, body)


class Model:
    """Runs a program for many threads, each with its own input number."""

    def __init__(self, writer: Writer, given: np.ndarray) -> None:
        self.registers: dict[Register, np.ndarray] = {("x", 0): given.copy()}
        self.threads = len(given)
        self.open: list[list[np.ndarray]] = []  # per loop: threads that broke, that continue
        self.finished = self.run(writer.program, np.ones(self.threads, bool))

    def assign(self, register: Register, value: np.ndarray, mask: np.ndarray) -> None:
        if register not in self.registers:
            self.registers[register] = np.zeros(self.threads, DTYPES[register[0]])
        np.copyto(self.registers[register], value, where=mask)

    def run(self, statements: Program, mask: np.ndarray) -> np.ndarray:
        """Mask of the threads that reach the end of the statements."""
        get = self.registers.get
        for kind, *rest in statements:
            if not mask.any():
                break
            if kind == "if":
                predicate, first, other = rest
                holds = get(predicate).copy()
                mask = self.run(first, mask & holds) | self.run(other, mask & ~holds)
            elif kind == "loop":
                mask = self.loop(mask, *rest)
            elif kind in ("break", "continue", "leave"):
                predicate, negated = rest
                go = mask & (get(predicate) ^ negated)
                if kind != "leave":
                    self.open[-1][kind == "continue"] |= go
                mask = mask & ~go
            else:
                guard, *rest = rest
                active = mask if guard is None else mask & (get(guard[0]) ^ guard[1])
                self.step(kind, rest, active)
        return mask

    def step(self, kind: str, rest: list, active: np.ndarray) -> None:
        get = self.registers.__getitem__
        if kind == "unpack":
            targets, given = rest
            half = np.dtype(DTYPES[targets[0][0]])
            both = get(given).view(half).reshape(-1, 2).copy()
            for i in range(2):
                self.assign(targets[i], both[:, i], active)
        elif kind == "pack":
            target, low, high = rest
            both = np.stack([get(low), get(high)], axis=1)
            self.assign(target, both.view(DTYPES[target[0]])[:, 0], active)
        elif kind == "select":
            target, a, b, p = rest
            self.assign(target, np.where(get(p), get(a), get(b)), active)
        elif kind == "convert":
            _, target, given = rest
            self.assign(target, get(given).astype(DTYPES[target[0]]), active)
        else:
            name, target, a, b = rest
            tables = {"compare": COMPARISONS, "logic": LOGIC}
            usual = INTEGER_OPERATIONS if target[0] in INTEGERS else FLOAT_OPERATIONS
            self.assign(target, tables.get(kind, usual)[name](get(a), get(b)), active)

    def loop(
        self,
        mask: np.ndarray,
        number: int,
        count: Register,
        at_least_once: bool,
        body: Program,
    ) -> np.ndarray:
        turns = (self.registers[count] & 3) + at_least_once
        nobody = np.zeros(self.threads, bool)
        left = nobody
        for turn in range(4):
            left = left | (mask & (turns == turn))
            mask = mask & (turns > turn)
            if not mask.any():
                return left
            self.open.append([nobody.copy(), nobody.copy()])
            mask = self.run(body, mask)
            broke, continues = self.open.pop()
            mask = mask | continues
            left = left | broke
        return left | mask


# Input and output of one thread: .in is an array of u32, .out holds RESULTS 64-bit words.
RESULTS = 6
HEAD = """
.visible .entry {name}(.param .u64 p_in, .param .u64 p_out)
{{
 .reg .b32 %t, %u; .reg .b64 %in, %out, %wide; .reg .pred %m; .reg .b32 %n<{counters}>;
 mov.u32 %t, %ctaid.x; mov.u32 %u, %ntid.x; mad.lo.u32 %t, %t, %u, 0; mov.u32 %u, %tid.x;
 add.u32 %t, %t, %u; ld.param.u64 %in, [p_in]; ld.param.u64 %out, [p_out];
 mad.wide.u32 %in, %t, 4, %in; mad.wide.u32 %out, %t, {bytes}, %out; ld.global.u32 %x0, [%in];
"""


class Ptx:
    """Writes the text of a kernel."""

    def __init__(self, writer: Writer, name: str) -> None:
        declared = [f".reg .{DECLARED[k]} %{k}<{REGISTERS}>;" for k in DTYPES]
        head = HEAD.format(name=name, counters=writer.counters + 1, bytes=8 * RESULTS)
        begin, rest = head.split("{\n", 1)
        self.lines = [begin + "{\n " + " ".join(declared), rest]
        self.labels = 0
        self.write(writer.program, "", "")
        for i, register in enumerate(writer.results):
            self.store(register, 8 * i)
        self.lines.append("LEAVE:\n ret;\n}")

    def text(self) -> str:
        return "\n".join(self.lines)

    def store(self, register: Register, offset: int) -> None:
        kind, name = register[0], text(register)
        if kind == "p":
            self.lines.append(f"selp.u32 %u, 1, 0, {name};")
            kind, name = "x", "%u"
        bits = "8" if kind == "c" else str(BITS[kind])
        self.lines.append(f"st.global.b{bits} [%out+{offset}], {name};")

    def write(self, program: Program, end_of_turn: str, end_of_loop: str) -> None:
        out = self.lines.append
        for kind, *rest in program:
            self.labels += 1
            here = self.labels
            if kind == "if":
                predicate, first, other = rest
                out(f"@!{text(predicate)} bra ELSE{here};")
                self.write(first, end_of_turn, end_of_loop)
                out(f"bra.uni END{here};\nELSE{here}:")
                self.write(other, end_of_turn, end_of_loop)
                out(f"END{here}:")
            elif kind == "loop":
                number, count, at_least_once, body = rest
                out(f"and.b32 %n{number}, {text(count)}, 3;")
                check = f"setp.eq.u32 %m, %n{number}, 0;\n@%m bra OUT{here};"
                check += f"\nsub.u32 %n{number}, %n{number}, 1;"
                out(f"TOP{here}:" if at_least_once else f"TOP{here}:\n{check}")
                self.write(body, f"NEXT{here}", f"OUT{here}")
                out(f"NEXT{here}:" + (f"\n{check}" if at_least_once else ""))
                out(f"bra.uni TOP{here};\nOUT{here}:")
            elif kind in ("break", "continue", "leave"):
                target = {"break": end_of_loop, "continue": end_of_turn, "leave": "LEAVE"}[kind]
                out(f"{guard_text(*rest)} bra {target};")
            else:
                guard, *rest = rest
                out((guard_text(*guard) + " " if guard else "") + self.instruction(kind, *rest))

    @staticmethod
    def instruction(kind: str, *rest: Any) -> str:
        if kind == "unpack":
            (low, high), given = rest
            return f"mov.b{BITS[given[0]]} {{{text(low)}, {text(high)}}}, {text(given)};"
        if kind == "pack":
            target, low, high = rest
            return f"mov.b{BITS[target[0]]} {text(target)}, {{{text(low)}, {text(high)}}};"
        if kind == "select":
            target, a, b, p = rest
            names = ", ".join(text(r) for r in (target, a, b, p))
            return f"selp.b{BITS[target[0]]} {names};"
        if kind == "convert":
            opcode, target, given = rest
            return f"{opcode} {text(target)}, {text(given)};"
        name, target, a, b = rest
        opcode = {
            "operate": lambda: ptx_operation(target[0], name),
            "compare": lambda: f"setp.{name}.{TYPES[a[0]]}",
            "logic": lambda: f"{name}.pred",
        }[kind]()
        return f"{opcode} {text(target)}, {text(a)}, {text(b)};"


def text(register: Register) -> str:
    return f"%{register[0]}{register[1]}"


def guard_text(predicate: Register, negated: bool) -> str:
    return f"@{'!' if negated else ''}{text(predicate)}"
