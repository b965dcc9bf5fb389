"""The error budget, bits of a request in any batch, and helpers for checking a kernel: oracle
access, instruction-set selection.

A result is correct if its error against the float64 oracle is at most `factor` times the error of
plain PyTorch in the same dtype, plus a floor that covers the rounding of one output element
(docs/numerics.md).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import _emulator, _explain, registry
from ._call import choose, library
from ._invariance import Piece, assert_batch_invariant, packed, padded, paged
from .registry import OpSpec, Sample

__all__ = [
    "FORWARD_FACTOR",
    "FORWARD_FLOOR",
    "GRADIENT_FACTOR",
    "GRADIENT_FLOOR",
    "LSE_FLOOR",
    "Comparison",
    "Piece",
    "assert_accurate",
    "assert_batch_invariant",
    "budget",
    "compare",
    "convert",
    "cpu_isa",
    "cpu_isas",
    "emulated_cuda",
    "error",
    "evaluate",
    "magnitude",
    "map_tensors",
    "oracle",
    "packed",
    "padded",
    "paged",
    "tensors_of",
    "without_side_effects",
]

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# In units of the largest magnitude of the result: roundings that a kernel has and plain PyTorch may
# by luck not have. Results: the output element (16 bits), a few roundings of exponent and
# reciprocal (float32). Gradients: one more rounding, of the weights (16 bits) or of the log-sum-exp
# from which they are recomputed (float32).
FORWARD_FLOOR = {
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
    torch.float32: 1e-6,
    torch.float64: 1e-14,
}
GRADIENT_FLOOR = {
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
    torch.float32: 3e-6,
    torch.float64: 3e-14,
}

# Float32 rounding of z, lse and their difference makes e^(z - lse) wrong by up to 3 times 2^-24
# |lse|.
LSE_FLOOR = 2.0**-22


def magnitude(x: Tensor) -> float:
    """The largest finite absolute value, 0 if there is none."""
    wide = x.double()
    finite = wide[torch.isfinite(wide)]
    return finite.abs().max().item() if finite.numel() else 0.0


def error(actual: Tensor, oracle: Tensor, scale: float | None = None) -> float:
    """Largest absolute difference in units of scale, by default the magnitude of the oracle.
    Infinite if only one of them has a NaN or an infinity somewhere.
    """
    a, o = actual.double(), oracle.double()
    if a.shape != o.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(o.shape)}")
    finite = torch.isfinite(o)
    same = torch.where(torch.isnan(o), torch.isnan(a), a == o)
    if not bool((finite | same).all()) or not bool(torch.isfinite(a[finite]).all()):
        return float("inf")
    worst = magnitude((a - o)[finite])
    scale = magnitude(o) if scale is None else scale
    return 0.0 if worst == 0 else worst / scale if scale > 0 else float("inf")


def budget(
    plain: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    scale: float | None = None,
    lse: float = 0.0,
) -> float:
    """The error allowed to a kernel on inputs of `dtype` if plain PyTorch returns `plain`. lse is
    the magnitude of the log-sum-exp from which a backward recomputes weights.
    """
    if gradient:
        floor = max(GRADIENT_FLOOR[dtype], LSE_FLOOR * lse)
        return GRADIENT_FACTOR * error(plain, oracle, scale) + floor
    return FORWARD_FACTOR * error(plain, oracle, scale) + FORWARD_FLOOR[dtype]


def assert_accurate(
    actual: Tensor,
    oracle: Tensor,
    plain: Tensor,
    *,
    gradient: bool = False,
    name: str = "result",
) -> None:
    """Raises unless actual is within the error budget.

    Args:
        actual: result of the kernel.
        oracle: the float64 reference.
        plain: result of plain PyTorch in the dtype of actual.
        gradient: gradients have a wider budget (3 times plain PyTorch) than results (2 times).
        name: names the tensor in the message.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(8, 8)
        >>> tm.testing.assert_accurate(x @ x, x.double() @ x.double(), x @ x)
    """
    measured = error(actual, oracle)
    allowed = budget(plain, oracle, actual.dtype, gradient=gradient)
    if not measured <= allowed:
        raise AssertionError(
            f"{name}: relative error {measured:.3g} exceeds the budget {allowed:.3g} "
            f"({str(actual.dtype)[6:]})"
        )


def convert(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors (also inside tuples) in another dtype, everything else unchanged.
    8-bit tensors, in which nothing is computed, are unchanged too.
    """

    def change(t: Tensor) -> Tensor:
        if not _is_float(t) or t.itemsize == 1:
            return t
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    return map_tensors(value, change)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Applies a change to tensors (also inside tuples, lists and dicts); everything else is
    unchanged.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.testing.map_tensors((torch.ones(2), {"topk": 3}), torch.Tensor.tolist)
        ([1.0, 1.0], {'topk': 3})
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors (also inside tuples, lists and dicts), in order.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.testing.tensors_of((torch.ones(2), (torch.zeros(1), None)))
        [tensor([1., 1.]), tensor([0.])]
    """
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def evaluate(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    cotangents: Sequence[Tensor] | Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a call (without absent ones) and, given cotangents or a function that draws them
    for the outputs, the gradients of all its floating-point tensors, in the order of the call.
    """
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        if cotangents is None or not _is_float(x):
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    args, kwargs = map_tensors((list(args), kwargs), leaf)
    outputs = [r for r in tensors_of(function(*args, **kwargs)) if r.shape != (0,)]
    if cotangents is None:
        return outputs, []
    if callable(cotangents):
        cotangents = cotangents(outputs)
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [c.to(o) for o, c in pairs], allow_unused=True
    )
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return [o.detach() for o in outputs], filled


def without_side_effects(spec: OpSpec, function: Callable[..., Any]) -> Callable[..., Any]:
    """function, which takes the arguments of spec's public function, run on copies of the arguments
    that a call writes. These are appended to the results.
    """
    if not spec.written:
        return function
    names = list(inspect.signature(spec.function).parameters)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        written = [name for name in spec.written if given.get(name) is not None]
        for name in written:
            t = given[name]
            given[name] = torch.empty_strided(
                t.shape, t.stride(), dtype=t.dtype, device=t.device
            ).copy_(t)
        changed = [given[name] for name, _ in zip(names, args, strict=False)]
        results = function(*changed, **{name: given[name] for name in kwargs})
        results = results if isinstance(results, tuple) else (results,)
        return (*results, *(given[name] for name in written))

    return run


@dataclass(frozen=True)
class Comparison:
    """One tensor of one call against its error budget."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a fraction of the budget: 0 if there is no error."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed > 0 else float("inf")


def compare(
    spec: OpSpec,
    sample: Sample,
    backend: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
    draws: int | None = None,
) -> list[Comparison]:
    """Outputs and gradients of one sample on one backend, each against its error budget. Only
    outputs if the backend has no gradients for such a call.

    The magnitude of a tensor, which is the unit of its errors, and the error of plain PyTorch are
    the largest over a few draws of the sample: one draw of a small tensor may cancel to nearly
    nothing, and plain PyTorch may be lucky in one.

    Args:
        draws: number of draws. None: four, unless the first decides: further draws only widen a
            budget, so a result within the first budget is within all.
    """
    if draws is None:
        again = functools.partial(compare, spec, sample, backend, dtype, device=device, seed=seed)
        found = again(draws=1)
        # The budget is infinite where plain PyTorch has an error and the oracle has magnitude 0.
        sure = all(c.error == 0 or c.error <= c.allowed < float("inf") for c in found)
        return found if sure else again(draws=4)
    several = [_draw(spec.name, sample, dtype, seed + i) for i in range(draws)]
    first = several[0]
    there, options = map_tensors((first.args, first.kwargs), lambda t: t.to(device))
    run = without_side_effects(spec, functools.partial(spec.function, backend=backend))
    learns = bool(spec.gradients_of(sample)) and not _explain.unsupported_gradients(
        spec, backend, spec.lower(*first.args, **first.kwargs)
    )
    weights = first.cotangents if learns else None
    actual = chain(*evaluate(run, there, options, weights))

    parameters = inspect.signature(spec.function).parameters
    given = [*zip(parameters, first.args, strict=False), *first.kwargs.items()]
    names = [f"output {i}" for i in range(len(first.cotangents))]
    if learns:
        names += [
            f"gradient of {n}" for n, value in given for t in tensors_of(value) if _is_float(t)
        ]
    logarithms = [i for i in spec.logarithms if i < len(first.cotangents)]
    lse = max((magnitude(d.wide[i]) for d in several for i in logarithms), default=0.0)
    result = []
    for i, (name, tensor) in enumerate(zip(names, actual, strict=True)):
        unit = max(magnitude(d.wide[i]) for d in several)
        if i in logarithms:
            unit = max(unit, 1.0)
        gradient = name.startswith("gradient")
        allowed = 0.0  # integers
        if tensor.is_floating_point():
            allowed = max(
                budget(d.plain[i], d.wide[i], dtype, gradient=gradient, scale=unit, lse=lse)
                for d in several
            )
        result.append(Comparison(name, error(tensor.cpu(), first.wide[i], unit), allowed))
    return result


@dataclass(frozen=True)
class _Draw:
    """Arguments of a call, with its outputs and gradients from the oracle and from plain
    PyTorch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cotangents: list[Tensor]
    wide: list[Tensor]
    plain: list[Tensor]


# for one sample: backends and instruction sets are tested in succession
@functools.lru_cache(maxsize=4)
def _draw(op: str, sample: Sample, dtype: torch.dtype, seed: int) -> _Draw:
    spec = registry.get(op)
    reference = without_side_effects(spec, oracle(op))
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = sample.make(dtype, generator)
    wide_args, wide_kwargs = convert((args, kwargs), torch.float64)
    cotangents: list[Tensor] = []

    def weigh(outputs: list[Tensor]) -> list[Tensor]:
        cotangents.extend(torch.randn(o.shape, generator=generator) for o in outputs)
        return cotangents

    if spec.gradients_of(sample):
        wide = evaluate(reference, wide_args, wide_kwargs, weigh)
    else:
        wide = evaluate(reference, wide_args, wide_kwargs)
        weigh(wide[0])
    names = list(inspect.signature(spec.function).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    returned = len(cotangents) - sum(given.get(name) is not None for name in spec.written)

    def plainly(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return spec.plain(spec.record(*args, **kwargs))[:returned]

    weights = cotangents if spec.gradients_of(sample) else None
    plain = evaluate(without_side_effects(spec, plainly), args, kwargs, weights)
    return _Draw(args, kwargs, cotangents, [*chain(*wide)], [*chain(*plain)])


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels of another instruction set: "baseline", "avx2", "avx512",
    "avx512_bf16" or "avx512_amx", if it was built and the machine supports it.

    Example:
        >>> import tokenmill as tm
        >>> with tm.testing.cpu_isa("baseline"):
        ...     print(torch.ops.tokenmill.cpu_isa())
        baseline
    """
    before = library.native.cpu_isa()
    library.native.cpu_isa(name)
    try:
        yield
    finally:
        library.native.cpu_isa(before)


def cpu_isas() -> list[str]:
    """The instruction sets that this machine can run, narrowest first."""
    before = library.native.cpu_isa()
    found = []
    for name in ("baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx"):
        with contextlib.suppress(RuntimeError):
            library.native.cpu_isa(name)
            found.append(name)
    library.native.cpu_isa(before)
    return found


@contextlib.contextmanager
def emulated_cuda(device: str | None = None) -> Iterator[None]:
    """Runs every call on CPU tensors that names no backend through the compiled CUDA kernels, in
    the PTX machine. Only in development builds (TOKENMILL_PTXVM=1).

    Args:
        device: device whose limits apply: sm_80, sm_86, sm_89, sm_90a or sm_120 (shared memory,
            multiprocessors and compute capability). sm_90a also runs the sm_90a kernels; all others
            run the sm_80 kernels. None keeps the device named by PTXVM_DEVICE, else sm_80.

    Raises:
        ValueError: for another device.
        RuntimeError: for a device in a build without the machine.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 16, 2, 64)
        >>> if "emulated" in tm.backends():
        ...     with tm.testing.emulated_cuda():
        ...         out = tm.merge_attention_states(x[None], None)
    """
    limits = _emulator.configured(f"device={device}") if device else contextlib.nullcontext()
    before = choose.asked
    with limits:
        choose.asked = "emulated"
        try:
            yield
        finally:
            choose.asked = before


def oracle(op: str) -> Callable[..., Any]:
    """The public function of an operator on the reference backend."""
    spec = registry.get(op)
    return lambda *args, **kwargs: spec.function(*args, backend="reference", **kwargs)
