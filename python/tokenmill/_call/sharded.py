"""Hooks through which single-process calls reach the distributed implementation, without importing
it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch

# Replacement for attention: set by tokenmill.distributed.context_parallel, read by integrations.
sharded_attention: ContextVar[Callable[..., Any] | None] = ContextVar(
    "sharded_attention", default=None
)

# Imports and returns the module that runs calls on DTensors; set by the package's __init__, as
# distributed is above this folder.
load: Callable[[], Any] | None = None


def sharding_of(arguments: Sequence[Any]) -> Any:
    """The module that runs calls on DTensors, if an argument is one; None in a graph, where the
    rules are registered once tokenmill.distributed is imported.
    """
    if torch.compiler.is_compiling():
        return None
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not any(isinstance(t, tensors.DTensor) for t in arguments):
        return None
    assert load
    return load()
