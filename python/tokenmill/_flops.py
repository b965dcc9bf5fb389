"""The operators' counts of operations, for torch.utils.flop_counter.FlopCounterMode.

That module imports Triton, so its registry is filled when somebody else imports it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

if TYPE_CHECKING:
    from ._library import TorchOp
    from .registry import OpSpec

COUNTER = "torch.utils.flop_counter"


def known(t: Tensor) -> bool:
    """Whether a count may depend on the values of t: not where tensors are shapes alone."""
    return not (t.is_meta or is_fake(t))


def band(rows: int, columns: int, left: int, right: int) -> float:
    """Pairs that a band leaves: row i, at column i + columns - rows, sees those from left before to
    right after it (-1: no limit)."""
    shift = columns - rows

    def below(start: int) -> float:
        """Sum over i of the columns from 0 to start + i."""
        return before(start + rows) - before(start)

    def before(x: int) -> float:
        """Sum of clamp(m, 0, columns) over m < x."""
        inside = min(max(x, 0), columns + 1)
        return inside * (inside - 1) / 2 + max(x - columns - 1, 0) * columns

    seen = float(rows * columns) if right < 0 else below(shift + right + 1)
    return seen - (0.0 if left < 0 else below(shift - left))


def install(specs: Sequence[OpSpec]) -> None:
    """Has the formulas of specs registered as soon as PyTorch's counter is there."""
    if COUNTER in sys.modules:
        _register(specs, sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported(specs))


class _WhenImported(importlib.abc.MetaPathFinder):
    def __init__(self, specs: Sequence[OpSpec]) -> None:
        self.specs = specs

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        if found and found.loader:
            run = found.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(self.specs, module)

            found.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return found


def _register(specs: Sequence[OpSpec], counter: ModuleType) -> None:
    from ._library import NAMESPACE, TRITON_NAMESPACE

    for spec in specs:
        for op in (*spec.torch_ops, *([spec.out] if spec.out else [])):
            formula = functools.partial(_count, spec, op)
            names = [NAMESPACE, *([TRITON_NAMESPACE] if op.triton else [])]
            packets = [getattr(getattr(torch.ops, name), op.name) for name in names]
            counter.register_flop_formula(packets, get_raw=True)(formula)


def _count(spec: OpSpec, op: TorchOp, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    given = dict(zip(op.arguments, op.bind(args, kwargs), strict=True))
    lowered = [given.get(name) for name in spec.forward.arguments]
    formula: Callable[..., float] = spec.flops
    if op is spec.backward:
        formula = spec.backward_flops or (lambda *lowered: 2.0 * spec.flops(*lowered))
    return round(formula(*lowered))
