"""Random structured programs against a model that runs one thread at a time.

They branch, loop, break out of loops and write under guards, with registers that live for a while
only: lanes that others disturb, or registers that wrongly share a slot, give a wrong sum.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from ints import run_ints
from machine import machine

REGISTERS = 24
PREDICATES = 6
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "min.u32": min,
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}

# A program is a list of statements: tuples that begin with their kind.
Program = list[tuple]


class Writer:
    """Writes a program in which no register is read before it has a value on every path."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.registers = {0}
        self.predicates: set[int] = set()
        self.loops = 0

    def operand(self) -> tuple[str, int]:
        if self.random.random() < 0.25:
            return ("constant", self.random.randrange(10))
        return ("register", self.random.choice(sorted(self.registers)))

    def assign(self) -> tuple:
        guard = None
        target = self.random.randrange(REGISTERS)
        operation = self.random.choice(list(OPERATIONS))
        operands = (self.operand(), self.operand())
        if self.predicates and target in self.registers and self.random.random() < 0.5:
            guard = (self.random.choice(sorted(self.predicates)), self.random.random() < 0.5)
        self.registers.add(target)
        return ("assign", guard, operation, target, *operands)

    def compare(self) -> tuple:
        target = self.random.randrange(PREDICATES)
        comparison = self.random.choice(list(COMPARISONS))
        result = ("compare", comparison, target, self.operand(), self.operand())
        self.predicates.add(target)
        return result

    def block(self, depth: int, in_loop: bool, length: int) -> Program:
        statements: Program = []
        for _ in range(length):
            kind = self.random.random()
            if kind < 0.5 or depth == 0:
                statements.append(self.assign())
            elif kind < 0.65 or not self.predicates:
                statements.append(self.compare())
            elif kind < 0.8:
                statements.append(self.branch(depth, in_loop))
            elif kind < 0.95:
                statements.append(self.loop(depth))
            else:
                which = "break" if in_loop and self.random.random() < 0.7 else "leave"
                predicate = self.random.choice(sorted(self.predicates))
                statements.append((which, predicate, self.random.random() < 0.5))
        return statements

    def branch(self, depth: int, in_loop: bool) -> tuple:
        predicate = self.random.choice(sorted(self.predicates))
        before = set(self.registers), set(self.predicates)
        first = self.block(depth - 1, in_loop, self.random.randrange(1, 5))
        after = self.registers, self.predicates
        self.registers, self.predicates = set(before[0]), set(before[1])
        other = self.block(depth - 1, in_loop, self.random.randrange(0, 4))
        self.registers &= after[0]
        self.predicates &= after[1]
        return ("if", predicate, first, other)

    def loop(self, depth: int) -> tuple:
        number = self.loops
        self.loops += 1
        count = self.random.choice(sorted(self.registers))
        before = set(self.registers), set(self.predicates)
        body = self.block(depth - 1, True, self.random.randrange(4, 14))
        self.registers, self.predicates = before  # the body may not run at all
        return ("loop", number, count, body)


class Left(Exception):
    pass


class Broken(Exception):
    pass


def run_model(program: Program, x: int) -> int:
    """What one thread leaves: the registers, weighted and summed. Missing ones count as 0."""
    registers = {0: x}
    predicates: dict[int, bool] = {}

    def value(operand: tuple[str, int]) -> int:
        return operand[1] if operand[0] == "constant" else registers[operand[1]]

    def run(statements: Program) -> None:
        for kind, *rest in statements:
            if kind == "assign":
                guard, operation, target, a, b = rest
                if guard is None or predicates[guard[0]] != guard[1]:
                    registers[target] = OPERATIONS[operation](value(a), value(b)) % 2**32
            elif kind == "compare":
                comparison, target, a, b = rest
                predicates[target] = COMPARISONS[comparison](value(a), value(b))
            elif kind == "if":
                predicate, first, other = rest
                run(first if predicates[predicate] else other)
            elif kind == "loop":
                _, count, body = rest
                try:
                    for _ in range(registers[count] & 3):
                        run(body)
                except Broken:
                    pass
            elif predicates[rest[0]] != rest[1]:
                raise Broken if kind == "break" else Left

    try:
        run(program)
    except Left:
        return registers[0]
    return registers[0] + 1


def to_ptx(program: Program, loops: int) -> str:
    lines = [f".reg .b32 %x<{REGISTERS}>, %n<{loops + 1}>; .reg .pred %q<{PREDICATES}>, %m;"]
    lines.append("ld.global.u32 %x0, [%in];")
    labels = 0

    def text(operand: tuple[str, int]) -> str:
        return str(operand[1]) if operand[0] == "constant" else f"%x{operand[1]}"

    def guard_of(predicate: int, negated: bool) -> str:
        return f"@{'!' if negated else ''}%q{predicate}"

    def write(statements: Program, end_of_loop: str) -> None:
        nonlocal labels
        for kind, *rest in statements:
            labels += 1
            here = labels
            if kind == "assign":
                guard, operation, target, a, b = rest
                prefix = guard_of(*guard) + " " if guard else ""
                lines.append(f"{prefix}{operation} %x{target}, {text(a)}, {text(b)};")
            elif kind == "compare":
                comparison, target, a, b = rest
                lines.append(f"setp.{comparison}.u32 %q{target}, {text(a)}, {text(b)};")
            elif kind == "if":
                predicate, first, other = rest
                lines.append(f"@!%q{predicate} bra ELSE{here};")
                write(first, end_of_loop)
                lines.append(f"bra.uni END{here};\nELSE{here}:")
                write(other, end_of_loop)
                lines.append(f"END{here}:")
            elif kind == "loop":
                number, count, body = rest
                lines.append(f"and.b32 %n{number}, %x{count}, 3;\nTOP{here}:")
                lines.append(f"setp.eq.u32 %m, %n{number}, 0;\n@%m bra OUT{here};")
                lines.append(f"sub.u32 %n{number}, %n{number}, 1;")
                write(body, f"OUT{here}")
                lines.append(f"bra.uni TOP{here};\nOUT{here}:")
            else:
                target = end_of_loop if kind == "break" else "LEAVE"
                lines.append(f"{guard_of(*rest)} bra {target};")

    write(program, "")
    lines += ["add.u32 %x0, %x0, 1;", "LEAVE:", "st.global.u32 [%out], %x0;", "ret;"]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(60))
def test_random_program(seed: int) -> None:
    writer = Writer(seed)
    program = [writer.assign(), writer.compare(), *writer.block(3, False, 40)]
    # Few registers count in the end, so that the others die on the way.
    for register in writer.random.sample(sorted(writer.registers), min(4, len(writer.registers))):
        program.append(("assign", None, "mul.lo.u32", 0, ("register", 0), ("constant", 3)))
        program.append(("assign", None, "add.u32", 0, ("register", 0), ("register", register)))
    given = np.random.default_rng(seed).integers(0, 2**32, 80, dtype=np.uint32)
    given[:40] %= 16
    expected = [run_model(program, int(x)) % 2**32 for x in given]
    body = to_ptx(program, writer.loops)
    for options in ({}, {"check": 1}, {"order": "seeded", "seed": seed, "fuel": 7}):
        with machine.options(**options):
            out = run_ints(body, given.view(np.int32), block=40, grid=2)
        assert out.view(np.uint32).tolist() == expected
