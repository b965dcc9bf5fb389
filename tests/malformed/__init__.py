"""Calls that every backend must refuse: malformed/<family>/<op>.py lists those of an operator as
CALLS, and test_contract.py makes them. The message names a call."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokenmill.registry import OpSpec

Call = dict[str, Any]  # the arguments of a call by name
Edit = Callable[[Call], None]


@dataclass(frozen=True)
class Malformed:
    """A call that every backend must refuse: `edits` change the arguments of the operator's first
    sample in place; then `changes` replace arguments, by a value or by a function of the old one.
    """

    error: str  # a piece of the message: argument, rule and value
    edits: tuple[Edit, ...]
    changes: Call
    values: bool = False  # breaks a rule on values inside tensors, not on metadata

    def __call__(self, spec: OpSpec, args: Any, kwargs: Call) -> tuple[list[Any], Call]:
        names = list(inspect.signature(spec.function).parameters)[: len(args)]
        call = dict(zip(names, args, strict=True)) | kwargs
        for edit in self.edits:
            edit(call)
        for name, change in self.changes.items():
            call[name] = change(call[name]) if callable(change) else change
        return [call.pop(name) for name in names], call


def calls(spec: OpSpec) -> tuple[Malformed, ...]:
    """The malformed calls of an operator. ModuleNotFoundError if it has no file here."""
    return importlib.import_module(f"{__name__}.{spec.family}.{spec.name}").CALLS


def refused(error: str, /, *edits: Edit, **changes: Any) -> Malformed:
    """A call that breaks a rule on metadata."""
    return Malformed(error, edits, changes)


def refused_values(error: str, /, *edits: Edit, **changes: Any) -> Malformed:
    """A call that breaks a rule on values inside tensors."""
    return Malformed(error, edits, changes, values=True)


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor of ids, lengths or offsets."""
    return torch.tensor(values, dtype=dtype)
