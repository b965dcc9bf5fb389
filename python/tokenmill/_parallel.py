"""What stands in for attention while a sequence lies on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

# Set by tokenmill.distributed.context_parallel; integrations ask for it.
sharded_attention: ContextVar[Callable[..., Any] | None] = ContextVar(
    "sharded_attention", default=None
)
