"""Edits of a valid call that produce the malformed calls of an operator."""

from __future__ import annotations

from typing import Any


def set_argument(index: int, change: Any) -> Any:
    """Replaces a positional argument by `change` of it."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[index] = change(args[index])

    return edit


def set_options(**options: Any) -> Any:
    """Replaces keyword arguments."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        kwargs.update(options)

    return edit
