"""Synchronisation faults in kernels of compute capability 9.0a: Triton's matmul and attention, and
CUTLASS GEMMs. Survivors and reasons are in docs/notebook.md."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from judge import FAULTS, report_of, run_program
from machine import MachineError
from ptxvm.mutate import Change, mutants, sections, write_text
from test_third_party import compile_gemm, compile_programs, run_attention, run_matmul
from tier import FULL, full_only

MODES = [
    {"order": "forward", "async": "latest"},
    {"order": "reverse", "async": "earliest"},
    {"order": "seeded", "async": "seed:1", "fuel": 200},
]
TRITON_KINDS = (
    "barrier dropped",
    "wait weakened",
    "wait dropped",
    "proxy fence dropped",
    "products awaited late",
    "products not awaited",
)
CUTLASS_KINDS = (
    "arrive dropped",
    "bytes not expected",
    "arrivals",
    "phase",
    "wait skipped",
    "barrier dropped",
    "cluster barrier dropped",
    "proxy fence dropped",
    "products awaited late",
    "products not awaited",
    "bulk wait dropped",
)
# Faults without observable effect, by program, kind and number of the place; reasons are in the
# notebook.
WITHOUT_EFFECT = {
    ("matmul_fp16", "wait weakened", 1),
    ("attention_fp16", "barrier dropped", 1),
    ("attention_fp16", "barrier dropped", 2),
    ("attention_fp16", "wait weakened", 1),
    ("attention_fp16", "proxy fence dropped", 1),
    ("cluster", "arrivals", 10),
    *(("cluster", "phase", number) for number in (12, 13)),
    *(("cluster", "wait skipped", number) for number in (0, 2, 10, 11, 12)),
    *(("cluster", "barrier dropped", number) for number in (1, 3)),
    ("pingpong", "arrivals", 10),
    *(("pingpong", "phase", number) for number in (9, 11, 12, 13, 17)),
    *(("pingpong", "wait skipped", number) for number in (3, 7, 9, 10, 11, 14, 15, 16)),
    *(("pingpong", "barrier dropped", number) for number in (1, 3)),
    ("pingpong", "bulk wait dropped", 0),
}
# By default no fence is asked for between copies of cp.async and the products that read them.
STRICT = {("matmul_fp16", "proxy fence dropped", 0)}
DRAWN = 5  # Triton faults tested every day
MIN = {"triton": 25 if FULL else DRAWN, "cluster": 45, "pingpong": 70}  # minimum number of mutants
Fault = tuple[str, str, int]
Row = tuple[Fault, Change, str, str]  # fault, change, verdict, report


def judge(
    programs: Path, program: str, text: str, folder: Path, proxy: str = "usual"
) -> tuple[str, str]:
    """Runs a text in place of a Triton program's, in each mode until one reports."""
    folder.mkdir(exist_ok=True)
    shutil.copy(programs / f"{program}.json", folder)
    (folder / f"{program}.ptx").write_text(text)
    verdict = ("survived", "")
    for mode in MODES:
        options = {"device": "sm_90a", "check": 1, "proxy": proxy, "watchdog": 50, **mode}
        try:
            if program.startswith("matmul"):
                run_matmul(folder, torch.float16, 1e-6, options)
            else:
                run_attention(folder, torch.float16, 200, options)
        except MachineError as error:
            assert error.code in FAULTS, error
            return "report", f"{mode}: {str(error).splitlines()[0]}"
        except AssertionError:
            verdict = ("wrong", str(mode))
    return verdict


def assert_reported(rows: Sequence[Row], minimum: int) -> None:
    """At least nine in ten of the faults with an effect: place numbers depend on the compiler."""
    assert len(rows) >= minimum
    missed = [row for row in rows if row[2] != "report" and row[0] not in WITHOUT_EFFECT]
    assert 10 * len(missed) <= len(rows), "\n".join(map(str, missed))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_programs(tmp_path_factory, 90)


def test_mutants_of_triton_are_reported(programs: Path, tmp_path: Path) -> None:
    texts = {n: (programs / f"{n}.ptx").read_text() for n in ("matmul_fp16", "attention_fp16")}
    faults = [(n, *fault) for n, text in texts.items() for fault in mutants(text, TRITON_KINDS)]
    if not FULL:
        faults = random.Random(5).sample(faults, DRAWN)
    rows = []
    for name, kind, number, text, change in faults:
        proxy = "strict" if (name, kind, number) in STRICT else "usual"
        verdict = judge(programs, name, text, tmp_path / "mutant", proxy)
        rows.append(((name, kind, number), change, *verdict))
    assert_reported(rows, MIN["triton"])


def judge_program(path: Path) -> tuple[str, str]:
    """Like judge. The program prints its number of wrong results."""
    verdict = ("survived", "")
    for mode in MODES:
        done = run_program(path, {"check": 1, "device": "sm_90a", "watchdog": 50} | mode)
        if report := report_of(done):
            return "report", f"{mode}: {report}"
        if any(line.split()[3] != "0" for line in done.stdout.splitlines()):
            verdict = ("wrong", str(mode))
    return verdict


@full_only
@pytest.mark.parametrize("name", ["cluster", "pingpong"])
def test_mutants_of_cutlass_are_reported(name: str, tmp_path: Path) -> None:
    program, mutated = compile_gemm(name, tmp_path), tmp_path / "mutated"
    texts = [text for _, text in sections(program.read_bytes())]
    (at,) = (i for i, text in enumerate(texts) if ".entry" in text)
    rows = []
    for kind, number, text, change in mutants(texts[at], CUTLASS_KINDS):
        shutil.copy(program, mutated)
        write_text(mutated, at, text)
        rows.append(((name, kind, number), change, *judge_program(mutated)))
    assert_reported(rows, MIN[name])
