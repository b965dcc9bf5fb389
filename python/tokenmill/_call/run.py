"""Runs a call on its backend."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch

from .._check import synchronising_checks
from . import autocast, choose, library
from .autograd import below_autograd, note_writes, record, recorders, refuse_gradient, transformed
from .door import compiling
from .operator import TorchOp
from .sharded import sharding_of
from .spec import OpSpec
from .strides import strided, with_rows

ALL_RESULTS = 99
_recorders = recorders[library.NAMESPACE]


def call(
    spec: OpSpec,
    values: tuple[Any, ...],
    given: dict[str, Any] | None = None,
    backend: str | None = None,
    out: torch.Tensor | None = None,
    used: int = ALL_RESULTS,
) -> tuple[Any, ...]:
    """Runs a call of a public function on its backend; the first result is written into out.
    values: the first arguments; given: the keywords that the call names, but for out and backend,
    or None if values are lowered. used: number of results that the caller uses; a plain call
    computes no others.
    """
    if backend is None and choose.asked is None and not compiling():
        if given is not None and (spec.sugar is None or not spec.sugar.isdisjoint(given)):
            values, given = spec.lower(*values, **given), None
        op, named, wanted = spec.forward, {} if given is None else given, used
        if out is not None and spec.out is not None:
            op, named, wanted = spec.out, {**named, "out": out}, used - 1
        try:
            recorder = _recorders.get(op.name)
            results = op.short(values, named, wanted, recorder) if op.short else NotImplemented
            if results is None:
                results = NotImplemented
            elif op.written and results is not NotImplemented:
                note_writes(op, op.named(values, named))
        # reading strides costs as much as a check, so they are only read after a refusal
        except RuntimeError:
            if not strided(spec, op.named(values, named)):
                raise
            results = NotImplemented
        if results is not NotImplemented:
            return results if out is None else (out, *results)
    lowered = values if given is None else spec.lower(*values, **given)
    lowered = with_rows(spec, lowered, torch.Tensor.contiguous)
    if autocast.enabled() and (device := autocast.device_of(lowered)):
        if out is None:
            lowered = spec.forward.cast(lowered)
        with torch.autocast(device, enabled=False):
            return call(spec, lowered, None, backend, out)
    chosen = choose.choose(spec, lowered, backend)
    if chosen == "reference" and choose.wanted(backend) is None and not compiling():
        _warn_of_missing_kernel(spec, lowered)
    sharding = sharding_of(lowered)
    checked, arguments = spec.forward, lowered
    if out is not None:
        assert spec.out is not None
        checked, arguments = spec.out, (*lowered, out)
    autograd = needs_autograd(arguments)
    if autograd:
        refuse_gradient(checked, arguments)
    if chosen == "reference":
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in lowered):
            # Shapes only: the reference checks values, and the operator has a fake kernel.
            checked.check(*arguments, float64=True)
            return _results(spec.forward.run(library.NAMESPACE, lowered), out)
        if not torch.compiler.is_compiling():  # otherwise the dispatcher does so before a kernel
            lowered = checked.resolve_views(lowered)
            arguments = lowered if out is None else (*lowered, out)
        if sharding:
            with _mode_of_reference(spec, checked, arguments):
                return _results(sharding.run_reference(spec, lowered, checked, arguments), out)
        checked.check(*arguments, float64=True)
        a = spec.forward.record(*lowered)
        spec.forward.check_values(a)
        with _mode_of_reference(spec, checked, arguments):
            return _results(spec.reference(a), out)
    if chosen != "cpu" and synchronising_checks() and not sharding:
        checked.check(*arguments)
        spec.forward.check_values(spec.forward.record(*lowered))
    if out is not None and not _has_out(spec, chosen):
        checked.check(*arguments)
        return _results(call(spec, lowered, None, chosen), out)
    if torch.compiler.is_compiling() or transformed():
        return _results(checked.run(choose.namespace(chosen), arguments), None, out)
    # The dispatcher's autograd costs 10 us per call, as much as the rest of the dispatch.
    if autograd:
        results = record(checked, choose.namespace(chosen), checked.named(arguments, {}))
        if results is not NotImplemented:
            return _results(results, None, out)
    results = below_autograd(checked, choose.namespace(chosen), arguments)
    note_writes(checked, checked.named(arguments, {}))
    return _results(results, None, out)


_warned: set[tuple[str, str]] = set()


def _warn_of_missing_kernel(spec: OpSpec, lowered: tuple[Any, ...]) -> None:
    """Warns once per operator and device if its kernel was left out of the build."""
    first = next(t for t in lowered if isinstance(t, torch.Tensor))
    device = first.device.type
    missing = device in ("cpu", "cuda") and not spec.forward.has_native(device.upper())
    if missing and first.dtype != torch.float64 and (spec.name, device) not in _warned:
        _warned.add((spec.name, device))
        warnings.warn(
            f"tokenmill.{spec.name}: this build has no native {device.upper()} kernel of it, so "
            "the reference runs, in plain PyTorch and slowly (tokenmill.explain says why; a build "
            "without TOKENMILL_OPS has every kernel)",
            stacklevel=4,
        )


def _mode_of_reference(
    spec: OpSpec, op: TorchOp, arguments: tuple[Any, ...]
) -> contextlib.AbstractContextManager[Any]:
    """Matches the kernels: results without a gradient have none on the reference either, and
    arguments that kernels write may be inference tensors, which PyTorch only lets inference mode
    write.
    """
    if spec.differentiable and not op.written:
        return contextlib.nullcontext()
    written = [arguments[op.arguments.index(name)] for name in op.written]
    written = [t for t in written if t is not None]
    if not torch.compiler.is_compiling() and any(t.is_inference() for t in written):
        return torch.inference_mode()
    return torch.no_grad()


def _results(
    results: Any, copy_to: torch.Tensor | None, written: torch.Tensor | None = None
) -> tuple[Any, ...]:
    if results is None:
        results = ()
    results = results if isinstance(results, tuple) else (results,)
    if copy_to is not None:
        return copy_to.copy_(results[0]), *results[1:]
    return results if written is None else (written, *results)


def _has_out(spec: OpSpec, backend: str) -> bool:
    assert spec.out is not None
    if backend == "emulated":
        return spec.out.has_emulated()
    if backend == "triton":
        return spec.out.triton is not None
    return backend in ("cpu", "cuda") and spec.out.has_native(backend.upper())


def needs_autograd(lowered: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for t in lowered:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return True
    return False
