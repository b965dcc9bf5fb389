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
    functions. They take the arguments of the schema by position or name, and return a tuple, or
    NotImplemented for what is not an ordinary tensor."""
    if _C is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return {}
    return _C.operators(str(library))


def is_open() -> bool:
    """Whether a call may skip the dispatcher. Gradients are the caller's matter."""
    if torch.compiler.is_compiling():
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def environment_asks() -> bool:
    """Whether a variable of the environment chooses a backend or asks for checks."""
    assert _C
    return _C.environment_asks()
