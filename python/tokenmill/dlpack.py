"""The functions of the package for arrays of NumPy, JAX, CuPy and other DLPack libraries.

Arrays are passed and returned without copies: ``tokenmill.dlpack.f`` is ``tokenmill.f`` with arrays
instead of tensors, and results of the type of its first array. Gradients are not recorded.
Arguments that a call writes must be writable by others (not JAX's).

Example:
    >>> import numpy as np
    >>> from tokenmill import dlpack as tm
    >>> q = np.random.rand(1, 16, 2, 32).astype(np.float32)
    >>> type(tm.attention(q, q, q, causal=True)).__name__
    'ndarray'
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import tokenmill


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, torch.Tensor)


def _arrays(value: Any) -> Iterator[Any]:
    if _is_array(value):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _arrays(part)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(change, part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_mapped(change, part) for part in value)
    return change(value)


def _to_tensor(value: Any) -> Any:
    return torch.from_dlpack(value) if _is_array(value) else value


def _back_to(array: Any) -> Callable[[Any], Any]:
    """A function that converts tensors to the array type of the given array."""
    if hasattr(array, "__array_namespace__"):
        library = array.__array_namespace__()
    else:
        library = sys.modules[type(array).__module__.partition(".")[0]]
    return lambda value: library.from_dlpack(value) if isinstance(value, torch.Tensor) else value


def __getattr__(name: str) -> Callable[..., Any]:
    function = getattr(tokenmill, name) if name in tokenmill.__all__ else None
    if not callable(function) or isinstance(function, type):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

    @functools.wraps(function)
    def on_arrays(*args: Any, **kwargs: Any) -> Any:
        first = next(_arrays([args, kwargs]), None)
        with torch.no_grad():
            results = function(*_mapped(_to_tensor, args), **_mapped(_to_tensor, kwargs))
        return results if first is None else _mapped(_back_to(first), results)

    return on_arrays
