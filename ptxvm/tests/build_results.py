"""Results in which two builds of the machine must agree, in addition to the results of
test_determinism.py: products of wgmma with and without checks, and reports of racing kernels, word
for word."""

from __future__ import annotations

import re

import numpy as np
from hopper import sm90
from machine import MachineError
from test_races import CASES, Case, run
from test_races_of_writes import CASES as CASES_OF_WRITES
from test_wgmma import run as run_wgmma

TYPES = ["f16", "bf16", "tf32"]


def products() -> bytes:
    """D as bytes, with rounded sums, for every type whose products are vectorised."""
    random = np.random.default_rng(3)
    a, b = random.standard_normal((64, 64)), random.standard_normal((24, 64))
    a[5, 7], b[9, 3] = np.nan, np.inf
    return b"".join(
        run_wgmma(a, b, (kind, kind, "f32"), registers=registers, check=check).tobytes()
        for kind in TYPES
        for registers in (False, True)
        for check in (0, 1)
    )


def _said(case: Case, text: str) -> str:
    try:
        run(case, text)
    except MachineError as error:
        return re.sub(r"(?<=global address )0x[0-9a-f]+", "", str(error))
    return ""


def reports() -> list[str]:
    """Reports of the right and the wrong kernel of each race case."""
    cases = [*CASES.items(), *CASES_OF_WRITES.items()]
    with sm90(check=1, watchdog=1, **{"async": "seed:1"}):
        return [
            f"{name}: {_said(case, text)}"
            for name, case in cases
            for text in (case.right, case.wrong)
        ]
