"""The files of malformed calls belong to operators: nothing else reads one."""

from __future__ import annotations

from pathlib import Path

import pytest

from malformed import calls
from tokenmill import registry

SPECS = registry.ops().values()


def test_every_operator_has_a_file_and_every_file_an_operator():
    files = Path(__file__).parent.glob("*/*.py")
    assert {(path.parent.name, path.stem) for path in files} == {(s.family, s.name) for s in SPECS}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_malformed_calls_break_different_rules(spec):
    errors = [call.error for call in calls(spec)]
    assert errors and len(errors) == len(set(errors))
