"""Kernels whose blocks wait for each other, and their mutants: the checks accept the kernels, and
report every mutant in at least one order of warps."""

from __future__ import annotations

import numpy as np
import pytest
from grid_kernels import BLOCKS, KERNELS, MUTANTS, THREADS, Kernel, mutant
from machine import MachineError, machine

MODES = [
    {"order": "forward"},
    {"order": "reverse"},
    *({"order": "seeded", "seed": seed, "fuel": 3} for seed in range(3)),
]
X = np.random.default_rng(0).integers(0, 1000, BLOCKS * THREADS, np.uint32)


def judge(kernel: Kernel, text: str) -> tuple[str, str]:
    """survived; report: the machine's report; wrong: a wrong result without a report."""
    verdict = ("survived", "")
    for mode in MODES:
        work, out = np.zeros(kernel.work, np.uint32), np.zeros(kernel.outputs, np.uint32)
        x = X.copy()
        x.flags.writeable = False
        with machine.options(check=1, watchdog=5, **mode):
            try:
                machine.run(text, "k", x, work, out, grid=BLOCKS, block=THREADS)
            except MachineError as error:
                return "report", f"{mode}: {error}".splitlines()[0]
        if not np.array_equal(out, kernel.expected(X)):
            verdict = ("wrong", str(mode))
    return verdict


@pytest.mark.parametrize("name", KERNELS)
def test_the_original_kernels_are_right_and_clean(name: str) -> None:
    assert judge(KERNELS[name], KERNELS[name].text) == ("survived", "")


def test_mutants_are_reported() -> None:
    verdicts = {key: judge(KERNELS[key[0]], mutant(*key)) for key in MUTANTS}
    missed = {key: v for key, v in verdicts.items() if v[0] != "report"}
    assert not missed, "\n".join(map(str, missed.items()))
