"""Litmus programs of the memory model: small threads, what the PTX ISA allows, what the machine
does. A thread is a list of steps in the words of PTX: "st.release.gpu f 1", "ld.acquire.gpu r0 f",
"atom.relaxed.gpu.add r1 x 1", "fence.sc.gpu", "bar", and "if r0 1", which ends the thread unless
the register holds the value. `main` writes docs/litmus.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from litmus_model import Step, allows, judge, steps
from litmus_programs import Litmus, programs
from machine import machine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "litmus.md"
UNREAD = 0xFFFFFFFF
PLACES = ("x", "y", "z", "d", "f", "g")
GLOBAL = ("f", "g")  # always in global memory
REGISTERS = 8
STRIDE = 64  # bytes between places
SEEDS = 12
MODES: list[dict[str, object]] = [
    {"order": "forward"},
    {"order": "reverse"},
    {"order": "forward", "async": "earliest"},
    *({"order": "seeded", "seed": s, "async": f"seed:{s}", "fuel": 4} for s in range(SEEDS)),
    *({"order": "weak", "seed": s, "async": f"seed:{s}"} for s in range(3 * SEEDS)),
]

HEAD = """.visible .entry k(.param .u64 memory, .param .u64 out) {cluster} {{
.reg .b32 %r<{registers}>, %thread, %which, %lane, %value;
.reg .b64 %memory, %out;
.reg .pred %lead, %done, %is, %odd;
.shared .align 128 .b8 data[512];
.shared .align 8 .b64 bar;
ld.param.u64 %memory, [memory]; ld.param.u64 %out, [out];
mov.u32 %thread, %tid.x; mov.u32 %lane, %laneid; setp.eq.u32 %lead, %lane, 0;
"""


def operand(name: str, shared: bool) -> str:
    at = PLACES.index(name) * STRIDE
    return f"[data+{at}]" if shared and name not in GLOBAL else f"[%memory+{at}]"


def value(text: str) -> str:
    return f"%{text}" if text.startswith("r") else text


def memory_step(step: Step, shared: bool) -> str:
    parts, place = list(step.parts), str(step.place)
    own = "shared" if shared and place not in GLOBAL else "global"
    operation = [parts.pop()] if step.kind in ("atom", "red") else []
    opcode = ".".join([*parts, own, *operation, "b32" if "exch" in operation else "u32"])
    values = [value(v) for v in step.operands if v != place]
    at = operand(place, shared)
    operands = [at, *values] if step.register is None else [values[0], at, *values[1:]]
    return f"@%lead {opcode} {', '.join(operands)};"


def other_step(step: Step, shared: bool, label: str) -> str:
    at = [operand(name, shared) for name in step.operands if name in PLACES]
    order = "".join(f".{part}" for part in step.parts[2:])
    match step.text.split(".")[0], ".".join(step.parts[:2]):
        case "bar", _:
            return "bar.sync 0;"
        case _, "arrive.mbarrier":
            return f"@%lead mbarrier.arrive{order}.shared::cta.b64 _, [bar];"
        case _, "wait.mbarrier":
            return (
                f"@!%lead bra {label}_DONE;\n{label}: "
                f"mbarrier.try_wait.parity{order}.shared::cta.b64 %done, [bar], 0;\n"
                f"@!%done bra {label};\n{label}_DONE:"
            )
        case _, "load.bulk":
            return (
                "@%lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 16;\n"
                "@%lead cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                f"{at[0]}, {at[1]}, 16, [bar];"
            )
        case _, "store.bulk":
            return (
                f"@%lead cp.async.bulk.global.shared::cta.bulk_group {at[0]}, {at[1]}, 16;\n"
                "@%lead cp.async.bulk.commit_group;"
            )
        case _, "wait.bulk":
            return f"@%lead cp.async.bulk.wait_group{order} 0;"
        case _, "copy.async":
            return f"@%lead cp.async.ca.shared.global {at[0]}, {at[1]}, 4;"
        case _, "arrive.async":
            return "@%lead cp.async.mbarrier.arrive.noinc.shared.b64 [bar];"
        case _, "wait.async":
            return "cp.async.wait_all;"
        case _:
            return f"@%lead {step.text};"  # a fence


def thread_text(number: int, program: str, shared: bool) -> str:
    lines = []
    for i, step in enumerate(steps(program)):
        if step.kind == "if":
            register, wanted = step.operands
            lines.append(f"setp.ne.u32 %is, %{register}, {wanted}; @%is bra END;")
        elif step.place:
            lines.append(memory_step(step, shared))
        else:
            lines.append(other_step(step, shared, f"S{number}_{i}"))
    return "\n".join([f"T{number}:", *lines, "bra END;"])


def text_of(test: Litmus) -> str:
    """The PTX of a program: thread i is lane 0 of warp i or of block i."""
    count = len(test.threads)
    cluster = f".explicitcluster .reqnctapercluster {count}, 1, 1" * (test.where == "cluster")
    lines = [HEAD.format(cluster=cluster, registers=REGISTERS)]
    lines += [f"mov.u32 %r{i}, {UNREAD};" for i in range(REGISTERS)]
    source = "shr.u32 %which, %thread, 5;" if test.where == "warps" else "mov.u32 %which, %ctaid.x;"
    if test.shared:
        zeros = " ".join(
            f"@%odd st.shared.v4.u32 [data+{i * STRIDE}], {{%value, %value, %value, %value}};"
            for i in range(len(PLACES))
        )
        lines.append(
            f"setp.eq.u32 %odd, %thread, 0; mov.u32 %value, 0; {zeros}\n"
            "@%odd mbarrier.init.shared::cta.b64 [bar], 1; fence.proxy.async; bar.sync 0;"
        )
    lines.append(source)
    lines += [f"setp.eq.u32 %is, %which, {i}; @%is bra T{i};" for i in range(count)]
    lines += [thread_text(i, program, test.shared) for i, program in enumerate(test.threads)]
    own = {
        step.register: number
        for number, program in enumerate(test.threads)
        for step in steps(program)
        if step.register
    }
    lines.append("END:")
    for register, number in own.items():
        lines.append(f"setp.eq.and.u32 %is, %which, {number}, %lead;")
        lines.append(f"@%is st.global.u32 [%out+{4 * int(register[1:])}], %{register};")
    return "\n".join([*lines, "ret;", "}"])


@dataclass(frozen=True)
class Result:
    seen: bool  # the outcome, in some mode
    race: bool  # reported, in some mode
    outside: bool  # some outcome that the ISA does not allow


@dataclass(frozen=True)
class Expected:
    allowed: bool
    race: bool


@cache
def expected(test: Litmus) -> Expected:
    """By the axioms, or by the paragraph for what they do not describe."""
    if test.by_hand is not None:
        return Expected(*test.by_hand)
    verdict = judge(
        test.threads, {"warps": "cta", "cluster": "cluster", "blocks": "gpu"}[test.where]
    )
    return Expected(allows(verdict, test.outcome), verdict.race)


def outcomes(test: Litmus) -> Iterator[tuple[set[tuple[str, int]], bool]]:
    """Values and whether a race was reported, in each mode."""
    module = machine.load(text_of(test))
    count = len(test.threads)
    shape = {"grid": 1, "block": 32 * count} if test.where == "warps" else {"grid": count}
    for mode in MODES:
        memory = np.zeros(len(PLACES) * STRIDE // 4, np.uint32)
        out = np.full(REGISTERS, UNREAD, np.uint32)
        with machine.options(device="sm_90a", check=1, watchdog=1, **mode, **test.options):
            machine.reports()
            with machine.options(on_fault="collect"):
                module.launch("k", memory, out, **shape)
            reports = machine.reports()
        values = {(f"r{i}", int(v)) for i, v in enumerate(out) if v != UNREAD}
        values |= {(p, int(memory[i * STRIDE // 4])) for i, p in enumerate(PLACES)}
        yield values, any(not report.rule.startswith("note") for report in reports)


def run(test: Litmus) -> Result:
    want = {(n, int(v)) for n, v in (pair.split("=") for pair in test.outcome.split())}
    found = list(outcomes(test))
    seen = any(want <= values for values, _ in found)
    race = any(reported for _, reported in found)
    return Result(seen, race, seen and not expected(test).allowed)


def row(test: Litmus, result: Result) -> str:
    ideal = expected(test)
    cells = [
        test.name,
        "<br>".join(f"`{program}`" for program in test.threads),
        test.where + (", shared" if test.shared else ""),
        test.outcome.replace(" ", ", "),
        ("allowed" if ideal.allowed else "forbidden") + (", race" if ideal.race else ""),
        test.paragraph,
        ("seen" if result.seen else "not seen") + (", race" if result.race else ""),
        test.remark,
    ]
    return f"| {' | '.join(cells)} |"


def page(tests: Sequence[Litmus]) -> str:
    head = PAGE.read_text().split("| program |")[0]
    lines = ["| program | threads | place | outcome | PTX ISA | paragraph | machine | remark |"]
    lines.append("|" + "---|" * 8)
    lines += [row(test, run(test)) for test in tests]
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(programs()))
    sys.exit(0)
