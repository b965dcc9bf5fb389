"""Malformed calls of the whole public API, in processes that a crash may kill.

A call starts from a valid one (the samples of the registry, compositions.py) and has one to three
of its arguments changed: dtypes, ranks, sizes, strides, values of ids and lengths, types. It must
return or raise `tokenmill.<op>: <argument>: <rule>; got <value>`. Defects are: a crash, a call that
takes some gigabytes, or more than 20 seconds for tensors of a size that fits memory, any other
error, a write to an argument that should not be written, and a result that differs between two
equal calls or from the reference in shape, dtype or positions of NaN. Uninitialised memory differs
between calls: it is filled with NaN and the largest integers in one of two equal calls.

A call is identified by seed and number; `python tests/fuzz 1 --seed S --first N` runs only this
call.
"""

from __future__ import annotations

import os
from pathlib import Path


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports this package, with other variables."""
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return {**found, **variables}
