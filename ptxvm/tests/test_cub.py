"""CUB scans with decoupled look-back, and mutants of them: faults in publishing and awaiting the
flags of a tile."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import toolchain
from judge import report_of, run_program
from ptxvm.mutate import mutants, sections, write_text
from tier import FULL

HERE = Path(__file__).parent
NVCC = toolchain.nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# Enough concurrent blocks that one looks back over more than 32 tiles without a prefix.
MODES = [
    {"ORDER": "forward"},
    {"ORDER": "reverse", "ASYNC": "earliest", "FUEL": "200", "RESIDENT_BLOCKS": "64"},
    {"ORDER": "seeded", "ASYNC": "seed:1", "FUEL": "50", "RESIDENT_BLOCKS": "64"},
]
KINDS = ("fence dropped", "order relaxed", "scope lowered", "value behind its flag")
# Faults in the flags of the last tile, which no block reads.
SILENT = {
    *(("order relaxed", number) for number in (2, 4)),
    *(("value behind its flag", number) for number in (2, 4)),
    *(("scope lowered", number) for number in (1, 12, 15, 21)),
}
DAILY = {("fence dropped", 0), ("order relaxed", 1), ("value behind its flag", 1)}
MIN = 30 if FULL else len(DAILY)  # number of places in the program; depends on the compiler
DEVICES = {"80": "sm_80", "90": "sm_90a"} if FULL else {"80": "sm_80"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("cub") / "cub_scan"
    flags = ["-std=c++17", "-O1", "-w", "-cudart=shared", "--compress-mode=none"]
    flags += [f"-gencode=arch=compute_{x},code=compute_{x}" for x in DEVICES]
    flags += ["-DFULL"] * FULL
    subprocess.run([NVCC, *flags, str(HERE / "cub_scan.cu"), "-o", str(program)], check=True)
    return program


def run(program: Path, mode: dict[str, str], *names: str) -> subprocess.CompletedProcess[str]:
    options = {"CHECK": "1", "DEVICE": "sm_80", "WATCHDOG": "50"} | mode
    return run_program(program, options, *names)


@pytest.mark.parametrize("device", DEVICES.values())
def test_results_are_right_and_nothing_is_reported(program: Path, device: str) -> None:
    for mode in MODES:
        done = run(program, mode | {"DEVICE": device})
        assert (done.returncode, done.stderr) == (0, ""), mode
        wrong = dict(line.split() for line in done.stdout.splitlines())
        assert len(wrong) == (4 if FULL else 2) and set(wrong.values()) == {"0"}, mode


def test_mutants_are_reported(program: Path) -> None:
    """Mutants of the sm_80 PTX that at least one mode reports; a wrong result without a report does
    not count."""
    texts = [text for _, text in sections(program.read_bytes())]
    at = next(i for i, text in enumerate(texts) if "sm_80" in text and "DeviceScan" in text)
    mutated = program.with_name("mutated")
    survived, reported = set(), set()
    for kind, number, text, _ in mutants(texts[at], KINDS):
        if not FULL and (kind, number) not in DAILY:
            continue
        shutil.copy(program, mutated)
        write_text(mutated, at, text)
        reports = (report_of(run(mutated, mode, "scan", "scan_of_pairs")) for mode in MODES)
        (reported if any(reports) else survived).add((kind, number))
    assert survived <= SILENT and reported >= DAILY
    assert len(survived) + len(reported) >= MIN
