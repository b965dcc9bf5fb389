"""Fuzz targets: the whole public API, each function with valid calls to start from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenmill import _explain, registry, testing
from tokenmill._call import choose
from tokenmill._call.operator import TorchOp
from tokenmill.registry import OpSpec, Sample

Arguments = dict[str, Any]  # arguments of a call, by name


class NoCall(Exception):
    """A sample that does not apply to this target."""


@dataclass(frozen=True)
class Target:
    """A callable under test.

    run(arguments, backend) calls it; arguments(sample, dtype, generator) is a valid call. known:
    names of all arguments that may be changed; written: arguments that a call writes. raw: an
    operator in torch.ops, where PyTorch's dispatcher may refuse a call itself. products: uses
    PyTorch's matrix products, whose bits depend on memory alignment.
    """

    name: str
    run: Callable[[Arguments, str | None], Any]
    samples: tuple[Sample, ...]
    arguments: Callable[[Sample, torch.dtype, torch.Generator], Arguments]
    known: tuple[str, ...]
    written: tuple[str, ...] = ()
    raw: bool = False
    compared: bool = False  # compared with the reference backend
    products: bool = False


def targets(backend: str) -> list[Target]:
    """Every target of a backend; targets with many arguments occur several times."""
    from fuzz.compositions import compositions
    from fuzz.modules import modules
    from fuzz.policies import policy_targets

    found = []
    for spec in registry.ops().values():
        found += 3 * [_function(spec)]
        for op in (spec.forward, spec.out, spec.backward):
            if op is not None and _has(op, backend):
                found.append(_raw(spec, op, backend))
    found += 2 * compositions() + modules() + policy_targets() + [_explaining()]
    return found


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def with_backend(
    function: Callable[..., Any],
) -> tuple[Callable[[Arguments, str | None], Any], tuple[str, ...]]:
    """run and known for a public function."""
    parameters = inspect.signature(function).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    if len(names) < len(parameters):  # the function forwards its other keywords to one of these
        whole = registry.get("linear_attention" if "slopes" in names else "attention").function
        names += tuple(n for n in inspect.signature(whole).parameters if n not in names)
    if "backend" not in names:
        return (lambda arguments, backend: function(**arguments)), names
    # A mutation may already have set a backend.
    return (lambda arguments, backend: function(**{"backend": backend, **arguments})), names


def _function(spec: OpSpec) -> Target:
    run, known = with_backend(spec.function)

    def arguments(sample: Sample, dtype: torch.dtype, g: torch.Generator) -> Arguments:
        args, kwargs = sample.make(dtype, g)
        found = by_name(spec.function, args, kwargs)
        if "out" in known and torch.randint(4, (), generator=g) == 0:
            result = spec.function(**found)
            found["out"] = torch.zeros_like(result if isinstance(result, Tensor) else result[0])
        return found

    written = (*spec.written, *(["out"] if spec.out else []))
    return Target(spec.name, run, spec.samples, arguments, known, written, compared=True)


def _explaining() -> Target:
    specs = registry.ops()
    samples = tuple(
        Sample(f"{spec.name}, {sample.name}", sample.make)
        for spec in specs.values()
        for sample in spec.samples[:2]
    )

    def arguments(sample: Sample, dtype: torch.dtype, g: torch.Generator) -> Arguments:
        name = sample.name.split(",")[0]
        return {"op": name, **by_name(specs[name].function, *sample.make(dtype, g))}

    def run(arguments: Arguments, backend: str | None) -> Any:
        str(_explain.explain(**{"backend": backend, **arguments}))
        return ()

    names = {n for spec in specs.values() for n in inspect.signature(spec.function).parameters}
    return Target("explain", run, samples, arguments, tuple(sorted(names)))


def _has(op: TorchOp, backend: str) -> bool:
    return op.has_emulated() if backend == "emulated" else op.has_native("CPU")


def _raw(spec: OpSpec, op: TorchOp, backend: str) -> Target:
    namespace = choose.namespace(backend)
    overload = op.overload(namespace)

    def arguments(sample: Sample, dtype: torch.dtype, g: torch.Generator) -> Arguments:
        args, kwargs = sample.make(dtype, g)
        if op is spec.backward:
            return _of_backward(spec, op, args, kwargs)
        lowered = spec.record(*args, **kwargs)
        if op is spec.out:
            result = spec.function(*args, **kwargs)
            out = torch.zeros_like(result if isinstance(result, Tensor) else result[0])
            lowered = (*lowered, spec.lower_out(out, lowered))
        return dict(zip(op.arguments, lowered, strict=True))

    samples = spec.samples
    if op is spec.backward:
        samples = tuple(sample for sample in samples if spec.gradients_of(sample))
    return Target(
        f"torch.ops.{namespace}.{op.name}",
        lambda arguments, _: overload(**arguments),
        samples,
        arguments,
        op.arguments,
        op.written,
        raw=True,
    )


class _Seen(TorchDispatchMode):
    """Records the arguments of the last call of an operator."""

    def __init__(self, op: TorchOp):
        super().__init__()
        self.op = op
        self.found: Arguments | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.op.overload():
            values = self.op.bind(args, kwargs or {})
            self.found = dict(zip(self.op.arguments, values, strict=True))
        return func(*args, **(kwargs or {}))


def _of_backward(spec: OpSpec, op: TorchOp, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    run = testing.without_side_effects(spec, spec.function)
    with _Seen(op) as seen:
        testing.evaluate(run, args, kwargs, lambda out: [torch.ones_like(o) for o in out])
    if seen.found is None:
        raise NoCall
    # Detached from the autograd inputs' base: leaves of their own.
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in seen.found.items()}
