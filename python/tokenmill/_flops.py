"""Operation counts of the operators, for torch.utils.flop_counter.FlopCounterMode.

That module imports Triton, so its registry is filled when other code imports it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._call.library import NAMESPACE, TRITON_NAMESPACE
from ._call.operator import TorchOp
from ._call.spec import OpSpec

COUNTER = "torch.utils.flop_counter"


def known(t: Tensor) -> bool:
    """Whether a count may depend on the values of t; false for tensors without data."""
    return not (t.is_meta or is_fake(t))


def band(rows: int, columns: int, left: int, right: int) -> float:
    """Number of pairs in a band: row i, at column i + columns - rows, sees from left columns before
    it to right after it (-1: no limit).
    """
    shift = columns - rows

    def below(start: int) -> float:
        """Sum over i of the number of columns from 0 to start + i."""
        return before(start + rows) - before(start)

    def before(x: int) -> float:
        """Sum of clamp(m, 0, columns) over m < x."""
        inside = min(max(x, 0), columns + 1)
        return inside * (inside - 1) / 2 + max(x - columns - 1, 0) * columns

    seen = float(rows * columns) if right < 0 else below(shift + right + 1)
    return seen - (0.0 if left < 0 else below(shift - left))


def masked_pairs(
    ranges: Tensor | None, q_spans: Tensor | None, k_spans: Tensor | None, batch: int, keys: int
) -> float:
    """Upper bound on the visible pairs under a mask, for `batch` sequences and one head."""
    bounds = [math.inf]
    if ranges is not None and known(ranges):
        begin, end = ranges.clamp(0, keys).unbind(-1)
        seen = (end - begin).clamp(min=0).sum(-1).clamp(max=keys)
        bounds.append(float(seen.sum()) / seen.shape[1] * (batch / max(seen.shape[0], 1)))
    if q_spans is not None and k_spans is not None and known(q_spans):
        (first_q, last_q), (first_k, last_k) = (
            (t[..., 0].contiguous(), t[..., 1].contiguous()) for t in (q_spans, k_spans)
        )
        n = max(len(q_spans), len(k_spans), 1)
        # Spans do not meet where the key's begins after the query's ends, or ends before it begins.
        first_k, last_k = (t.sort(-1)[0].expand(n, -1).contiguous() for t in (first_k, last_k))
        first_q, last_q = (t.expand(n, -1).contiguous() for t in (first_q, last_q))
        begun = torch.searchsorted(first_k, last_q, right=True)
        ended = torch.searchsorted(last_k, first_q)
        bounds.append(float((begun - ended).clamp(min=0).sum()) * (batch / n))
    return min(bounds)


def install(specs: Sequence[OpSpec]) -> None:
    """Registers the formulas of specs as soon as PyTorch's counter is imported."""
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
    for spec in specs:
        for op in (*spec.torch_ops, *([spec.out] if spec.out else [])):
            formula = functools.partial(_count, spec, op)
            names = [NAMESPACE, *([TRITON_NAMESPACE] if op.triton else [])]
            packets = [getattr(getattr(torch.ops, name), op.name) for name in names]
            counter.register_flop_formula(packets, get_raw=True)(formula)


def _count(spec: OpSpec, op: TorchOp, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    given = dict(zip(op.arguments, op.bind(args, kwargs), strict=True))
    record = spec.forward.record(*(given.get(name) for name in spec.forward.arguments))
    formula: Callable[..., float] = spec.flops
    if op is spec.backward:
        formula = spec.backward_flops or (lambda record: 2.0 * spec.flops(record))
    return round(formula(record))
