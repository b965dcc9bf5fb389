"""The short way to a native operator: module _C calls it without torch's dispatcher, which has
nothing to do for plain tensors while nothing records, transforms or watches the call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    from . import _C
except ImportError:  # built for another Python
    _C = None  # type: ignore[assignment]


def functions(library: Path) -> dict[str, Callable[..., Any]]:
    """The operators of a loaded library by name; none where torch has no table of DLPack's C
    functions that we know. They take the arguments of the schema by position or name, and return a
    tuple, or NotImplemented for what is not an ordinary tensor."""
    if _C is None:
        return {}
    try:
        return _C.operators(str(library))
    except (AttributeError, ImportError):
        return {}


# Names of this module: an attribute of torch._C costs as much as the call.
_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_func_transforms = torch._C._are_functorch_transforms_active
_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled


def is_open() -> bool:
    """Whether a call may skip the dispatcher. Gradients are the caller's matter."""
    if _compiling():
        return False
    return not (
        _dispatch_modes()
        or _function_modes()
        or _func_transforms()
        or forward_ad._current_level >= 0
        or _autocast()
        or _tracing() is not None
        or _profiling()
    )


def environment_asks() -> bool:
    """Whether a variable of the environment chooses a backend or asks for checks."""
    assert _C
    return _C.environment_asks()
