"""How calls of one process find what runs them on several ranks, which most need not import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch

# Stands in for attention: set by tokenmill.distributed.context_parallel, asked for by integrations.
sharded_attention: ContextVar[Callable[..., Any] | None] = ContextVar(
    "sharded_attention", default=None
)


def sharding_of(arguments: Sequence[Any]) -> Any:
    """The module that runs calls on DTensors, if this is one; None in a graph, where the rules are
    there once tokenmill.distributed is imported."""
    if torch.compiler.is_compiling():
        return None
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not any(isinstance(t, tensors.DTensor) for t in arguments):
        return None
    return importlib.import_module(f"{__package__}.distributed.sharding")
