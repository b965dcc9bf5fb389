"""The fast path to a native operator: module _C calls it without torch's dispatcher, which is not
needed for plain tensors while nothing records, transforms or observes the call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import tokenmill._C as _C
except ImportError:  # built for another Python version
    _C = None  # type: ignore[assignment]


class Door(NamedTuple):
    """Fast path of one operator. call takes the arguments of the schema by position or name, and
    returns the results as torch.ops does, or NotImplemented for anything but ordinary tensors.
    plain takes the first arguments as a tuple, others by name as a dict, the number of results to
    compute, and a function; it returns a tuple. It also returns NotImplemented for float64, which
    the reference runs, for a value of another kind, if an environment variable selects a backend or
    requests checks, and if torch would do more than run the call. If torch would only record a
    gradient, it returns the results of function(call, number of results, names of tensors, other
    arguments by name, *tensors), or None without a function.
    """

    call: Callable[..., Any]
    plain: Callable[[tuple[Any, ...], dict[str, Any], int, Callable[..., Any] | None], Any]


def functions(library: Path) -> dict[str, Door]:
    """The operators of a loaded library by name; none if torch has no table of DLPack's C functions
    in a known version, or its handling of a call cannot be queried.
    """
    if _C is None:
        return {}
    try:
        return {name: Door(*found) for name, found in _C.operators(str(library)).items()}
    except (AttributeError, ImportError):
        return {}


# reading an attribute of torch.compiler costs as much as the call
compiling = torch.compiler.is_compiling


def is_open() -> bool:
    """Whether a call may skip the dispatcher. Gradients are the caller's responsibility."""
    return not (compiling() or _C.is_watched())
