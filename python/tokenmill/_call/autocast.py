"""Casting of floating-point arguments under torch.autocast.

Queries, keys and values are cast to the autocast dtype, as scaled_dot_product_attention casts them.
A cache is never cast, and queries take its dtype. Rows combined into one result are cast to the
widest of their dtypes, as in torch.cat. float64 is never cast, nor are arguments that a call
writes: as in PyTorch, a call with out= casts nothing. Within an operator autocast is off.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

enabled = torch._C._is_any_autocast_enabled  # on any device


@dataclass(frozen=True)
class Autocast:
    """The casting rule of one operator, by argument names.

    lower: cast to the autocast dtype, or to the dtype of cache, if given; with paged, cache only
    counts as a cache together with a block_table. wide: arguments in lower that are not cast if
    they are float32. promote: cast to the widest dtype among them. If the first of these is float64
    or not a floating-point tensor, nothing is cast.
    """

    lower: tuple[str, ...] = ()
    promote: tuple[str, ...] = ()
    cache: str | None = None
    paged: bool = False
    wide: tuple[str, ...] = ()

    def apply(self, given: dict[str, Any]) -> dict[str, Any]:
        """The cast arguments, in order."""
        names = [n for n in (*self.lower, *self.promote) if _castable(given.get(n))]
        if not names or names[0] != (*self.lower, *self.promote)[0]:
            return given
        dtype = self._target(given, names)
        names = [n for n in names if n not in self.wide or given[n].dtype != torch.float32]
        return {n: t.to(dtype) if n in names else t for n, t in given.items()}

    def _target(self, given: dict[str, Any], names: list[str]) -> torch.dtype:
        first: torch.Tensor = given[names[0]]
        if self.promote:
            return functools.reduce(torch.promote_types, (given[n].dtype for n in names))
        if self.cache and (not self.paged or given.get("block_table") is not None):
            cache = given.get(self.cache)
            return cache.dtype if _castable(cache) else first.dtype
        return torch.get_autocast_dtype(first.device.type)

    def applied(self, function: F) -> F:
        """Decorates a function composed of operators: under autocast its arguments are cast by this
        rule and it runs without autocast.
        """
        names = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not enabled():
                return function(*args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            device = device_of(given.values())
            if device is None:
                return function(*args, **kwargs)
            given = self.apply(given)
            positional = (*(given[n] for n in names[: len(args)]), *args[len(names) :])
            with torch.autocast(device, enabled=False):
                return function(*positional, **{n: given[n] for n in kwargs})

        return cast(F, run)


def device_of(values: Iterable[Any]) -> str | None:
    """Device type of the first tensor, if autocast is enabled for it."""
    for value in values:
        if isinstance(value, torch.Tensor):
            device = value.device.type
            on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
            return device if on else None
    return None


def _castable(value: Any) -> TypeGuard[torch.Tensor]:
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return isinstance(value, torch.Tensor) and value.dtype in narrow
