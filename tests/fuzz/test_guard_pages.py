"""No operator touches memory outside its tensors, for any ids and lengths."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import backends

from fuzz import environment

MAX = 5  # max defects to report


def run(*arguments: object) -> tuple[int, list[str], str]:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.guarded_calls", *map(str, arguments)],
        env=environment(), capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr[-1000:]


@pytest.mark.skipif("cpu" not in backends(), reason="of the CPU kernels")
def test_nothing_is_touched_beside_a_tensor():
    first, wrong = (0, 0), []
    while len(wrong) < MAX:
        status, lines, errors = run(*first)
        if status == 0:
            assert lines[-1] == "end" and len(lines) > 1
            break
        assert lines, f"status {status}: {errors}"
        numbers, words = lines[-1].split(" | ")
        t, s, c, *names = numbers.split()
        alone = [name for name in names if run(t, s, c, name)[0] != 0]
        wrong.append(f"{words}: status {status}, by {alone or 'several together'}\n{errors}")
        first = int(t), int(s) + 1
    assert not wrong, "\n".join(wrong)
