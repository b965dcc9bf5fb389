"""examples/tome_image.py runs, and tokens that are alike are better ones to merge than others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tome_image.py"
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="not a source tree")


def test_tome_image(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plots" / "merged.png"
    command = [sys.executable, EXAMPLE, "--quick", "--plot", plot]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ +(\d+) tokens: ([\d.]+) dB, at random ([\d.]+) dB", done.stdout, re.M)
    counts = [int(row[0]) for row in rows]
    assert len(rows) == 8 and counts == sorted(counts, reverse=True)
    assert all(float(like) > float(random) + 3 for _, like, random in rows)
    assert len(re.findall(r"tokens: merging [\d.]+ ms, eager merging", done.stdout)) == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
