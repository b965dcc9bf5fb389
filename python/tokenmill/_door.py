"""The short way to a native operator: module _C calls it without torch's dispatcher, which has
nothing to do for plain tensors while nothing records, transforms or watches the call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    from . import _C
except ImportError:  # built for another Python
    _C = None  # type: ignore[assignment]


class Door(NamedTuple):
    """An operator. call takes the arguments of the schema by position or name, and returns a tuple,
    or NotImplemented for what is not an ordinary tensor. plain takes all of them as one tuple, and
    how many of the results to make. It also returns NotImplemented for float64, which the reference
    runs, where a variable of the environment chooses a backend or asks for checks, and where torch
    would do more than to run the call; None where it would record a gradient."""

    call: Callable[..., Any]
    plain: Callable[[tuple[Any, ...], int], Any]


def functions(library: Path) -> dict[str, Door]:
    """The operators of a loaded library by name; none where torch has no table of DLPack's C
    functions that we know, or cannot be asked what it does with a call."""
    if _C is None:
        return {}
    try:
        return {name: Door(*found) for name, found in _C.operators(str(library)).items()}
    except (AttributeError, ImportError):
        return {}


compiling = torch.compiler.is_compiling  # an attribute of torch.compiler costs as much as the call


def is_open() -> bool:
    """Whether a call may skip the dispatcher. Gradients are the caller's matter."""
    return not (compiling() or _C.is_watched())
