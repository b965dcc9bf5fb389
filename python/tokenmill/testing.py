"""The error budget, and what tests and users need to check a kernel: oracle access, instruction-set
selection, timing.

A result is right if its error against the float64 oracle is at most `factor` times the error that
plain PyTorch makes in the same dtype, plus a floor that covers the rounding of one output element
(docs/numerics.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import library, registry

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# In units of the largest magnitude of the result: one rounding of an output element in 16 bits; in
# float32 the few roundings of exponent and reciprocal that plain PyTorch also has, by luck or not.
FLOOR = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}


def error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, relative to the largest finite magnitude of the oracle. Infinite
    where one has NaN or an infinity that the other has not."""
    a, o = actual.double(), oracle.double()
    if a.shape != o.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(o.shape)}")
    if not a.numel():
        return 0.0
    finite = torch.isfinite(o)
    same = torch.where(torch.isnan(o), torch.isnan(a), a == o)
    if not bool((finite | same).all()) or not bool(torch.isfinite(a[finite]).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = o[finite].abs().max().item()
    worst = (a[finite] - o[finite]).abs().max().item()
    return worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))


def assert_accurate(
    actual: Tensor,
    oracle: Tensor,
    plain: Tensor,
    *,
    factor: float = FORWARD_FACTOR,
    name: str = "result",
) -> None:
    """Raises unless actual keeps the error budget.

    Args:
        actual: what the kernel returned.
        oracle: the float64 reference.
        plain: what plain PyTorch returns in the dtype of actual.
        factor: 2 for results, 3 for gradients.
        name: names the tensor in the message.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(8, 8)
        >>> tm.testing.assert_accurate(x @ x, x.double() @ x.double(), x @ x)
    """
    measured, allowed = error(actual, oracle), factor * error(plain, oracle) + FLOOR[actual.dtype]
    if not measured <= allowed:
        raise AssertionError(
            f"{name}: relative error {measured:.3g} exceeds the budget {allowed:.3g} "
            f"({factor:g} x plain PyTorch + floor, {str(actual.dtype)[6:]})"
        )


def convert(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors (also inside tuples) in another dtype, everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    if isinstance(value, tuple | list):
        return type(value)(convert(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: convert(v, dtype) for k, v in value.items()}
    return value


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels of another instruction set: "baseline", "avx2", "avx512" or
    "avx512_bf16", up to what the machine has.

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
    """The instruction sets that this machine can run, slowest first."""
    before = library.native.cpu_isa()
    found = []
    for name in ("baseline", "avx2", "avx512", "avx512_bf16"):
        with contextlib.suppress(RuntimeError):
            library.native.cpu_isa(name)
            found.append(name)
    library.native.cpu_isa(before)
    return found


def oracle(op: str) -> Callable[..., Any]:
    """The public function of an operator on the reference backend."""
    spec = registry.get(op)
    return lambda *args, **kwargs: spec.function(*args, backend="reference", **kwargs)
