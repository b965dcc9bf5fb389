"""Malformed calls, and defects that the fuzzer itself must detect."""

from __future__ import annotations

import faulthandler
import inspect
import os
import sys

import pytest
import torch
from conftest import backends
from tier import FULL

import tokenmill as tm
from fuzz import case, runner
from fuzz.compositions import COMPOSITIONS
from fuzz.guard import Guard
from fuzz.modules import MODULES
from fuzz.policies import POLICIES
from fuzz.targets import NoCall, Target, targets
from tokenmill import registry
from tokenmill.registry import Sample

CALLS = {"cpu": (2000, 100_000), "emulated": (300, 20_000)}


@pytest.mark.parametrize("backend", [b for b in backends() if b in CALLS])
def test_malformed_calls_are_refused(backend):
    report = runner.fuzz(CALLS[backend][FULL], backend=backend)
    assert not report.findings, "\n".join(map(str, report.findings))
    assert report.counts["done"] > 0 and report.counts["refused"] > 0


def test_everything_public_is_called():
    functions = {f for n in tm.__all__ if inspect.isfunction(f := getattr(tm, n))}
    called = {spec.function for spec in registry.ops().values()} | set(COMPOSITIONS)
    assert functions - called == {tm.backends, tm.build_info, tm.evaluate, tm.explain}
    classes = {c for n in tm.nn.__all__ if issubclass(c := type_of(tm.nn, n), torch.nn.Module)}
    # The encoder wraps layers of the caller.
    assert classes - {tm.nn.FocusEncoder} == {kind for kind, _, _ in MODULES}
    kinds = {type_of(tm.policies, n) for n in tm.policies.__all__} - {tm.policies.Policy}
    assert {k for k in kinds if issubclass(k, tm.policies.Policy)} == set(POLICIES)


def type_of(module, name):
    found = getattr(module, name)
    return found if isinstance(found, type) else object


@pytest.mark.parametrize("target", targets("cpu"), ids=lambda t: t.name)
def test_calls_are_valid_before_they_are_changed(target):
    made = 0
    for sample in target.samples[:3]:
        try:
            given = target.arguments(sample, torch.float32, torch.Generator().manual_seed(0))
        except NoCall:
            continue
        target.run(given, None)
        made += 1
    assert made


@pytest.mark.parametrize("target", targets("cpu"), ids=lambda t: t.name)
def test_an_array_is_refused_in_words(target):
    """A comparison with an array returns an array, whose truth value raises a NumPy error."""
    array = pytest.importorskip("numpy").array([1.0, 2.0])
    try:
        given = target.arguments(target.samples[0], torch.float32, torch.Generator().manual_seed(0))
    except NoCall:
        return
    call = case.Case(target, None, "", lambda: given, None)
    for name in target.known:
        try:
            target.run({**given, name: array}, None)
        except Exception as error:
            wrong = case._wrong_error(error, call, False)
            assert not wrong, f"{name}: {wrong}"


def planted(run, written=(), **given):
    def arguments(sample, dtype, g):
        return {"x": torch.ones(3), **given}

    target = Target(
        "planted", run, (Sample("one", lambda *_: ((), {})),), arguments, ("x",), written
    )
    make = lambda words=None: arguments(None, None, None)  # noqa: E731
    return case._judge(case.Case(target, None, "planted", make, None), lambda x: x)


def unwritten(arguments, backend):
    out = torch.empty(5, dtype=torch.int32)
    out[1:] = 0
    return out


def raises(error):
    def run(arguments, backend):
        raise error

    return run


def test_a_valid_call_passes():
    assert planted(lambda arguments, backend: arguments["x"] * 2) == ("done", "")
    rule = "tokenmill.planted: x: must be a tensor; got 3"
    assert planted(raises(tm.InputError(rule))) == ("refused", "")


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (unwritten, "1 of 5 elements"),
        (lambda arguments, backend: arguments["x"].zero_(), "x was written"),
        (raises(RuntimeError("shape mismatch")), "shape mismatch"),
        (raises(AssertionError("")), "AssertionError"),
        (raises(RuntimeError("tokenmill.a: b: c INTERNAL ASSERT; got d")), "INTERNAL ASSERT"),
    ],
    ids=["unwritten", "input", "message", "assertion", "internal"],
)
def test_a_defect_is_seen(run, why):
    verdict, said = planted(run)
    assert verdict == "wrong" and why in said


@pytest.mark.parametrize("value", [1e30, float("nan"), torch.tensor(1e5), torch.tensor(1e30)])
def test_numbers_that_overflow_are_not_compared(value):
    assert case._small({"x": torch.ones(3), "scale": 0.5, "blocks": 2**19})
    assert not case._small({"x": torch.ones(3), "scale": value})


WORKER = """
import json, os, sys, time
out = int(sys.argv[-1])
say = lambda *m: os.write(out, (json.dumps(m) + "\\n").encode())
say("ready")
first, count = map(int, sys.stdin.readline().split())
for number in range(first, first + count):
    say("begin", number)
    say("words", f"call {number}")
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(60)
    say("end", "done", "")
"""


def test_a_dead_and_a_late_process_are_replaced(monkeypatch):
    monkeypatch.setattr(runner, "COMMAND", (sys.executable, "-c", WORKER))
    monkeypatch.setattr(runner, "SECONDS", 0.5)
    report = runner.fuzz(5)
    assert report.counts == {"done": 3, "wrong": 2}
    assert [(f.number, f.call) for f in report.findings] == [(1, "call 1"), (3, "call 3")]
    assert "status -6" in report.findings[0].why and "more than" in report.findings[1].why
    assert report.findings[0].command == ("python tests/fuzz 1 --seed 0 --first 1 --backend cpu")


def test_a_call_is_made_again_by_its_number():
    first, again = (case.choose(3, 17, "cpu") for _ in range(2))
    assert first.words == again.words and first.words != case.choose(3, 18, "cpu").words


@pytest.mark.parametrize("end", ["front", "back"])
def test_an_access_beyond_a_guarded_tensor_kills(end):
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        with Guard(end) as guard:
            x = guard(torch.ones(5))
            step = -1 if end == "front" else 5
            torch.as_strided(x, (1,), (1,), 0)  # stays inside the storage
            import ctypes

            ctypes.c_float.from_address(x.data_ptr() + 4 * step).value  # noqa: B018
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -11
