"""Calls that every backend must refuse: malformed/<family>/<op>.py lists those of an operator as
CALLS, and test_contract.py makes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokenmill.registry import OpSpec

Edit = Callable[[list[Any], dict[str, Any]], None]  # changes positional and keyword arguments


@dataclass(frozen=True)
class Malformed:
    """A call that every backend must refuse: `change` edits the arguments of the operator's first
    sample in place."""

    name: str
    error: str  # a piece of the message: argument, rule and value
    change: Edit
    values: bool = False  # breaks a rule on values inside tensors, not on metadata


def calls(spec: OpSpec) -> tuple[Malformed, ...]:
    """The malformed calls of an operator. ModuleNotFoundError if it has no file here."""
    return importlib.import_module(f"{__name__}.{spec.family}.{spec.name}").CALLS


def set_argument(index: int, change: Callable[[Any], Any]) -> Edit:
    """Replaces a positional argument by what `change` makes of it."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[index] = change(args[index])

    return edit


def set_options(**options: Any) -> Edit:
    """Replaces keyword arguments."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        kwargs.update(options)

    return edit


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor of ids, lengths or offsets."""
    return torch.tensor(values, dtype=dtype)
