"""Functions of the package in JAX, under jit, grad and vmap, on the CPU.

A call is a callback of the compiled program: it runs the function of the same name in
:mod:`tokenmill`, with its arguments, checks and messages; shapes are inferred, and wrong arguments
refused, while JAX traces. Reverse-mode gradients are the function's, which is rerun for them;
forward mode and second derivatives raise errors of JAX. vmap runs calls sequentially.
:mod:`tokenmill.dlpack` is faster where neither jit nor grad is needed.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from tokenmill.integrations.jax import attention
    >>> q = jax.random.normal(jax.random.key(0), (1, 16, 2, 32))
    >>> loss = jax.jit(lambda q: jnp.sum(attention(q, q, q, causal=True) ** 2))
    >>> jax.grad(loss)(q).shape
    (1, 16, 2, 32)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tokenmill

from .._check import check, needs

try:
    import jax
    import numpy as np
except ModuleNotFoundError as missing:
    raise needs("jax", missing) from missing

__all__ = ["attention", "linear_attention", "sigmoid_attention", "topk_select"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64,
        torch.bool,
    )
}  # fmt: skip


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _in_jax(name: str, *, differentiable: bool = True) -> Callable[..., Any]:
    function = getattr(tokenmill, name)
    signature = inspect.signature(function)
    public = f"integrations.jax.{name}"

    @functools.wraps(function)
    def on_arrays(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        arrays = {key: value for key, value in given.items() if _is_array(value)}
        fixed = {key: value for key, value in given.items() if key not in arrays}
        for key, value in fixed.items():
            known = value is None or isinstance(value, bool | int | float | str | tuple)
            rule = "must be an array, a number, a text or a tuple of numbers"
            check(known and not _holds_tensor(value), public, key, rule, type(value).__name__)
        for key, value in arrays.items():
            rule = f"must be one of {', '.join(DTYPES)}"
            check(str(value.dtype) in DTYPES, public, key, rule, str(value.dtype))
        # As in JAX: float64 of NumPy becomes float32 unless jax_enable_x64 is set.
        arrays = {key: jax.numpy.asarray(value) for key, value in arrays.items()}
        check("out" not in arrays, public, "out", "must be None, as arrays are not written", "out")
        if not differentiable:
            arrays = {key: jax.lax.stop_gradient(value) for key, value in arrays.items()}
        return _call(function, arrays, fixed)

    on_arrays.__module__ = __name__
    return on_arrays


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, tuple) and any(
        _is_array(part) or isinstance(part, Tensor) for part in value
    )


def _call(function: Any, arrays: dict[str, Any], fixed: dict[str, Any]) -> Any:
    names = list(arrays)

    def run(tensors: list[Tensor]) -> Any:
        return function(**dict(zip(names, tensors, strict=True)), **fixed)

    like = [
        torch.empty(x.shape, dtype=DTYPES[str(x.dtype)], device="meta") for x in arrays.values()
    ]
    found = run(like)
    several = isinstance(found, tuple)
    shapes = [_shape(t) for t in (found if several else (found,))]
    floats = [t.is_floating_point() for t in like]

    def forward(*values: Any) -> list[Any]:
        with torch.no_grad():
            out = run([_tensor(value) for value in values])
        return [_array(t) for t in (out if several else (out,))]

    def backward(values: Any, cotangents: Any) -> list[Any]:
        tensors = [
            _tensor(value).requires_grad_(real) for value, real in zip(values, floats, strict=True)
        ]
        with torch.enable_grad():
            out = run(tensors)
        real = [
            (t, _tensor(cotangent))
            for t, cotangent in zip(out if several else (out,), cotangents, strict=True)
            if t.requires_grad
        ]
        wanted = [t for t in tensors if t.requires_grad]
        grads = torch.autograd.grad(
            [t for t, _ in real], wanted, [grad for _, grad in real], allow_unused=True
        )
        return [
            _array(torch.zeros_like(t) if grad is None else grad)
            for t, grad in zip(wanted, grads, strict=True)
        ]

    @jax.custom_vjp
    def operator(*values: Any) -> Any:
        out = jax.pure_callback(forward, shapes, *values, vmap_method="sequential")
        return tuple(out) if several else out[0]

    def with_inputs(*values: Any) -> Any:
        return operator(*values), values

    def gradients(values: Any, cotangents: Any) -> tuple[Any, ...]:
        cotangents = list(cotangents if several else (cotangents,))
        for i, shape in enumerate(shapes):
            if cotangents[i].dtype == jax.dtypes.float0:  # integer outputs
                cotangents[i] = np.zeros(shape.shape, shape.dtype)
        inputs = [_shape(t) for t, real in zip(like, floats, strict=True) if real]
        found = iter(
            jax.pure_callback(backward, inputs, list(values), cotangents, vmap_method="sequential")
        )
        return tuple(next(found) if real else None for real in floats)

    operator.defvjp(with_inputs, gradients)
    return operator(*arrays.values())


def _shape(t: Tensor) -> Any:
    return jax.ShapeDtypeStruct(tuple(t.shape), str(t.dtype).removeprefix("torch."))


def _tensor(value: Any) -> Tensor:
    """A copy of a callback's array: JAX's memory must not be written."""
    value = np.array(value)
    if value.dtype.name == "bfloat16":  # not a native dtype of NumPy
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _array(t: Tensor) -> Any:
    t = t.detach().contiguous()
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(jax.numpy.bfloat16)
    return t.numpy()


attention = _in_jax("attention")
sigmoid_attention = _in_jax("sigmoid_attention")
linear_attention = _in_jax("linear_attention")
topk_select = _in_jax("topk_select", differentiable=False)
