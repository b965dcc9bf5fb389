"""Calls on DTensors find their rules here, which cost an import that other calls do not need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch


def sharding_of(arguments: Sequence[Any]) -> Any:
    """The module that runs calls on DTensors, if this is one; None in a graph, where the rules are
    there once tokenmill.distributed is imported."""
    if torch.compiler.is_compiling():
        return None
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not any(isinstance(t, tensors.DTensor) for t in arguments):
        return None
    return importlib.import_module(f"{__package__}.distributed.sharding")
