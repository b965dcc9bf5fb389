"""Records the operators that the code under test calls, and the kernel that takes each call: on a
CPU, and on GPUs without running there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

import tokenmill as tm
from tokenmill import _explain, registry
from tokenmill._call import choose


class Call(NamedTuple):
    """A call of one operator, with the arguments of its public function except backend."""

    op: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    def explained(self, backend: str) -> Any:
        return tm.explain(self.op, *self.args, backend=backend, **self.options)

    def lowered(self) -> tuple[registry.OpSpec, tuple[Any, ...]]:
        """The operator that runs, and its arguments in schema order."""
        spec = registry.get(self.op)
        options = {name: value for name, value in self.options.items() if name != "out"}
        if spec.over_cache and options.get("seqlens_k") is not None:
            spec = registry.get(spec.over_cache)
            options.setdefault("causal", False)
        return spec, spec.lower(*self.args, **options)

    @property
    def packed(self) -> bool:
        return self.options.get("cu_seqlens_q") is not None


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Records the operator calls of the block in order, from any module of the package. They run on
    the CPU, whatever backend they request."""
    calls: list[Call] = []
    specs = registry.ops()
    operators = {spec.function: name for name, spec in specs.items()}
    # attention runs its calls with a cache as attention_decode: one call.
    inner = {(spec.function.__module__, spec.over_cache) for spec in specs.values()}
    replaced: list[tuple[Any, str, Any]] = []

    def wrap(function: Any, op: str) -> Any:
        def record(*args: Any, backend: Any = None, **options: Any) -> Any:
            calls.append(Call(op, _detached(args), _detached(options)))
            return function(*args, **options)

        return record

    for path, module in [*sys.modules.items()]:
        if path.split(".")[0] != "tokenmill" or module is None:
            continue
        for name, value in [*vars(module).items()]:
            op = operators.get(value) if callable(value) and _hashable(value) else None
            if op is None or (path, op) in inner or hasattr(module, "__path__"):
                continue
            if value.__module__ != path:
                replaced.append((module, name, value))
                setattr(module, name, wrap(value, op))
    by_name = {op: replace(spec, function=wrap(spec.function, op)) for op, spec in specs.items()}
    try:
        with mock.patch.dict(registry._specs, by_name):
            yield calls
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def kernels(calls: list[Call]) -> list[str]:
    """The CPU kernel of each call: `dense/attention`. It must be a native kernel."""
    found = []
    for call in calls:
        explained = call.explained("cpu")
        assert explained.error is None, explained.error
        assert explained.backend == "cpu" and explained.kernel.startswith("csrc/")
        found.append(explained.kernel.split(",")[0].removeprefix("csrc/"))
    return found


def cuda_kernels(calls: list[Call], sm90: bool = True) -> list[str]:
    """Kernel of each call on a GPU of compute capability 9.0 or another:
    `dense/attention/kernel_sm90`
    or `dense/attention (not kernel_sm90: NAME)` with the first argument that breaks a rule."""
    found = []
    capability = 90 if sm90 else 80
    with mock.patch.object(_explain, "_current_capability", lambda *call: capability):
        for call in calls:
            spec, lowered = call.lowered()
            assert not choose.unsupported(spec, "cuda", lowered)
            name = _explain.kernel_name(spec, "emulated", lowered, call.options.get("out"))
            name = name.removeprefix("csrc/").rsplit(" in the PTX machine", 1)[0]
            head, _, why = name.partition(" (not kernel_sm90: ")
            found.append(f"{head} (not kernel_sm90: {why.split(':')[0]})" if why else name)
    return found


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _detached(arguments: Any) -> Any:
    """Detaches tensors from autograd: a call that needs a gradient is another call."""
    if isinstance(arguments, dict):
        return {name: _detached(value) for name, value in arguments.items()}
    if isinstance(arguments, tuple) and type(arguments) is tuple:
        return tuple(_detached(value) for value in arguments)
    return arguments.detach() if isinstance(arguments, torch.Tensor) else arguments
