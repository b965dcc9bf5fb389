"""Calls with every tensor flush against a protected page, and a line before each call: target,
sample and call by number, then in words. Arguments of python -m fuzz.guarded_calls:
TARGET SAMPLE: all calls from that sample on
TARGET SAMPLE CALL ARGUMENT: one call, with only that argument guarded"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import tokenmill as tm
from fuzz.guard import Guard, tensors
from fuzz.targets import NoCall, Target, targets
from tokenmill.registry import Sample

HOSTILE = (-1, -(2**31), 2**31 - 1, "behind", "descending")
FULL = os.environ.get("TOKENMILL_TEST_FULL") == "1"  # otherwise half of the calls of each sample
WHOLE = (torch.int32, torch.int64)


class Call(NamedTuple):
    target: Target
    given: dict[str, Any]
    isa: str
    end: str
    argument: str = ""  # argument with hostile values
    values: int | str = ""


def fuzzed() -> list[Target]:
    """Fuzz targets; the raw operator stands for its public function."""
    found = [t for t in targets("cpu") if not t.compared and t.name != "explain"]
    return [t for i, t in enumerate(found) if t.name not in [other.name for other in found[:i]]]


def calls(target: Target, sample: Sample) -> Iterator[Call]:
    isas = tm.testing.cpu_isas() if target.raw else [tm.testing.cpu_isas()[-1]]
    for dtype in (torch.float32, torch.bfloat16):
        try:
            given = target.arguments(sample, dtype, torch.Generator().manual_seed(0))
        except NoCall:
            return
        for isa in isas if dtype == torch.float32 else isas[-1:]:
            for end in ("front", "back"):
                yield Call(target, given, isa, end)
        if dtype == torch.bfloat16:
            return
        for n, (name, value) in enumerate(given.items()):
            ids = isinstance(value, torch.Tensor) and value.dtype in WHOLE and value.numel()
            for i, values in enumerate(HOSTILE if ids else ()):
                if FULL or (i + n + target.samples.index(sample)) % 2 == 0:
                    yield Call(target, given, isas[-1], ("front", "back")[i % 2], name, values)


def hostile(value: torch.Tensor, values: int | str) -> torch.Tensor:
    if values == "descending":
        return value.flatten().sort(descending=True).values.view(value.shape)
    changed = value.clone(memory_format=torch.contiguous_format)
    behind = min(int(value.max()), torch.iinfo(value.dtype).max - 1) + 1
    changed.view(-1)[1::2] = behind if values == "behind" else values
    return changed


def make(call: Call, only: str | None) -> None:
    given = dict(call.given)
    if call.argument:
        given[call.argument] = hostile(given[call.argument], call.values)
    for name in call.target.written:  # one call, on a copy
        if given.get(name) is not None:
            given[name] = given[name].clone()
    with tm.testing.cpu_isa(call.isa), Guard(call.end) as guard:
        placed = guard(given) if only is None else {**given, only: guard(given[only])}
        try:
            call.target.run(placed, None)
        except RuntimeError:
            if not call.argument:
                raise


def main() -> None:
    torch.set_num_threads(2)
    first = int(sys.argv[1]), int(sys.argv[2])
    one = (int(sys.argv[3]), sys.argv[4]) if len(sys.argv) > 4 else None
    for t, target in enumerate(fuzzed()):
        for s, sample in enumerate(target.samples):
            if (t, s) < first:
                continue
            for c, call in enumerate(calls(target, sample)):
                if one and c != one[0]:
                    continue
                names = [name for name, value in call.given.items() if [*tensors(value)]]
                words = (target.name, sample.name, call.isa, call.end, call.argument, call.values)
                os.write(1, f"{t} {s} {c} {' '.join(names)} | {words}\n".encode())
                make(call, one and one[1])
            if one:
                return
    print("end")


if __name__ == "__main__":
    main()
