"""Errors that name operator, argument, rule and value.

csrc/core/check.h writes the same text for the native backends; tests/test_contract.py compares the
two on every call of tests/malformed.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_STRIDED = torch.strided


class InputError(RuntimeError, ValueError):
    """A call that breaks a rule of its operator. Native kernels raise RuntimeError, same text."""


def show(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return "cpu" if value.type == "cpu" else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {show(value.shape)}"
    if isinstance(value, int | torch.SymInt):
        return str(value)
    if hasattr(value, "__dlpack__"):  # arrays, whose elements do not belong in an error message
        library = type(value).__module__.partition(".")[0]
        library = {"numpy": "NumPy", "jaxlib": "JAX", "jax": "JAX", "cupy": "CuPy"}.get(
            library, library
        )
        return f"a {library} array (tokenmill.dlpack takes arrays)"
    if isinstance(value, Sequence):
        return "[" + ", ".join(show(v) for v in value) + "]"
    return " ".join(str(value).split())


def fail(op: str, argument: str, rule: str, value: Any) -> NoReturn:
    raise InputError(f"tokenmill.{op}: {argument}: {rule}; got {show(value)}")


def check(ok: bool, op: str, argument: str, rule: str, value: Any) -> None:
    if not ok:
        fail(op, argument, rule, value)


def is_any(value: Any, *values: Any) -> bool:
    """value in values. Dynamo (torch 2.13) evaluates `in` wrongly where value is a static size and
    one of values is a dynamic size.
    """
    return any(value == v for v in values)


def check_tensor(op: str, argument: str, value: Any, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        fail(op, argument, "must be a tensor" + (" or None" if optional else ""), value)
    if value.layout is not _STRIDED:
        fail(op, argument, "must be a tensor with strides; layout", value.layout)


def as_int(
    op: str,
    argument: str,
    value: Any,
    rule: str = "must be an integer",
    *,
    minimum: int | None = None,
    maximum: int | None = None,
) -> int:
    """An int from an int, a NumPy integer or any other index-like object; bools and tensors are
    refused. A SymInt is kept. maximum requires a minimum.
    """
    if type(value) is int:
        found = value
    elif isinstance(value, torch.SymInt):
        found = value  # type: ignore[assignment]
    elif isinstance(value, bool | torch.Tensor):
        fail(op, argument, rule, value)
    else:
        try:
            found = operator.index(value)
        except TypeError:
            fail(op, argument, rule, value)
    if type(found) is int and not -(2**63) <= found < 2**63:
        fail(op, argument, "must fit 64 bits", found)
    if minimum is not None and (found < minimum or (maximum is not None and found > maximum)):
        fail(op, argument, _range_rule(minimum, maximum), found)
    return found


def _range_rule(minimum: int, maximum: int | None) -> str:
    if maximum is None:
        return f"must be at least {minimum}" if minimum else "must not be negative"
    bits = maximum.bit_length()
    power = bits >= 15 and maximum == 2**bits - 1
    return f"must be {minimum} to " + (f"2^{bits} - 1" if power else str(maximum))


def as_number(op: str, argument: str, value: Any, rule: str = "must be a number") -> float:
    """A float from a real number of Python or NumPy; bools are refused."""
    if type(value) is float:
        return value
    if not isinstance(value, Real | torch.SymInt | torch.SymFloat) or isinstance(value, bool):
        fail(op, argument, rule, value)
    try:
        return float(value)
    except OverflowError:
        fail(op, argument, "must fit a float", value)


def check_float32(op: str, argument: str, value: float, why: str = "") -> None:
    """For numbers converted by PyTorch, which has its own error for larger values."""
    fits = abs(value) <= torch.finfo(torch.float32).max
    check(fits, op, argument, f"must be finite in float32{why}", value)


def is_scale(scale: float) -> bool:
    """Whether x is a valid scale of scores: finite in float32 after multiplication by log2(e)."""
    return abs(scale) <= 2.0**127


def check_scale(op: str, scale: float) -> None:
    check(is_scale(scale), op, "scale", "must be at most 2^127 in size", scale)


def check_bool(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(op, argument, "must be a bool", value)


def check_text(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, str):
        fail(op, argument, "must be a string", value)


def check_choice(op: str, argument: str, value: Any, *choices: str) -> None:
    check_text(op, argument, value)
    if value not in choices:
        *others, last = map(repr, choices)
        rule = f"must be {', '.join(others)} or {last}" if others else f"must be {last}"
        fail(op, argument, rule, value)


def check_last_contiguous(op: str, argument: str, t: torch.Tensor) -> None:
    ok = t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 or t.numel() == 0
    check(ok, op, argument, "must have a contiguous last dimension; strides", t.stride())


def check_dtype(op: str, argument: str, t: torch.Tensor, *, float64: bool) -> None:
    ok = t.dtype in (torch.float16, torch.bfloat16, torch.float32)
    ok = ok or (float64 and t.dtype == torch.float64)
    check(ok, op, argument, "must be float16, bfloat16 or float32", t.dtype)


MAX_HEAD_DIM = 256


def check_head_dim(op: str, argument: str, t: torch.Tensor, maximum: int = MAX_HEAD_DIM) -> None:
    if not 1 <= t.shape[-1] <= maximum:
        fail(op, argument, f"must have a head dimension of 1 to {maximum}", t.shape[-1])


def check_qkv(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rank: int,
    float64: bool,
    paged: bool = False,
    maximum: int = MAX_HEAD_DIM,
    max_value: int = MAX_HEAD_DIM,
) -> None:
    """Checks queries, keys and values: tensors, rank (3: packed, 4: sequences, 5: maps), dtype,
    device, layout and shared shapes. paged: keys are in pages, any number of them. maximum,
    max_value: maximum head_dim of q and k, and of v."""
    layout = {3: "[T, H, D] (packed)", 4: "[B, S, H, D]", 5: "[B, Y, X, H, D]"}[rank]
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, t)
        if t.dim() != rank:
            fail(op, name, f"must have {rank} dimensions {layout}", t.dim())
    check_dtype(op, "q", q, float64=float64)
    for name, t in (("k", k), ("v", v)):
        check_dtype_of(op, name, t, "q", q)
        check_device_of_q(op, name, t, q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(op, name, t)
        check_head_dim(op, name, t, max_value if name == "v" else maximum)
    if k.shape[-1] != q.shape[-1]:
        fail(op, "k", f"must have the head dimension of q, {q.shape[-1]}", k.shape[-1])
    if rank > 3 and not paged and k.shape[0] != q.shape[0]:
        fail(op, "k", f"must have the batch size of q, {q.shape[0]}", k.shape[0])
    if v.shape[:-1] != k.shape[:-1]:
        rule = f"must have the shape of k up to the head dimension, {show(k.shape)}"
        fail(op, "v", rule, v.shape)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(op, "k", f"number of heads must divide that of q, {heads} (GQA)", kv_heads)


def check_device_of(
    op: str, argument: str, t: torch.Tensor, other: str, first: torch.Tensor
) -> None:
    if t.device != first.device:
        fail(op, argument, f"must be on the device of {other}, {show(first.device)}", t.device)


def check_dtype_of(
    op: str, argument: str, t: torch.Tensor, other: str, first: torch.Tensor
) -> None:
    if t.dtype != first.dtype:
        fail(op, argument, f"must have the dtype of {other}, {show(first.dtype)}", t.dtype)


def check_wide(op: str, argument: str, t: torch.Tensor, first: torch.Tensor) -> None:
    """float32, or float64 with a float64 tensor."""
    wide = torch.promote_types(first.dtype, torch.float32)
    if t.dtype != wide:
        fail(op, argument, f"must be {show(wide)}", t.dtype)


def check_device_of_q(op: str, argument: str, t: torch.Tensor, q: torch.Tensor) -> None:
    check_device_of(op, argument, t, "q", q)


def check_cu_seqlens(op: str, argument: str, t: torch.Tensor, q: torch.Tensor) -> None:
    check(t.dtype == torch.int32, op, argument, "must be int32", t.dtype)
    rule = "must have 1 dimension of at least 1 element"
    check(t.dim() == 1 and t.shape[0] >= 1, op, argument, rule, t.shape)
    check_last_contiguous(op, argument, t)
    check_device_of_q(op, argument, t, q)


def check_cu_seqlens_values(op: str, argument: str, t: torch.Tensor, total: int) -> list[int]:
    """Offsets of packed sequences: they start at 0, never decrease and end at total."""
    ends: list[int] = t.tolist()
    check(ends[0] == 0, op, argument, "must start at 0", ends[0])
    check(ends == sorted(ends), op, argument, "must not decrease", ends)
    if ends[-1] != total:
        fail(op, argument, f"must end at the number of tokens, {total}", ends[-1])
    return ends


def check_longest(op: str, argument: str, ends: list[int], bound: int | None) -> None:
    """A bound on the lengths of packed sequences."""
    longest = max((b - a for a, b in itertools.pairwise(ends)), default=0)
    if bound is not None and bound < longest:
        fail(op, argument, f"must be at least the longest sequence, {longest}", bound)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def synchronising_checks() -> bool:
    """TOKENMILL_CHECK=1: also check values inside GPU tensors, which synchronises."""
    return os.environ.get("TOKENMILL_CHECK") == "1"


def reads_values(t: torch.Tensor) -> bool:
    """Whether a function composed of operators may read the values of t."""
    here = t.device.type == "cpu" or synchronising_checks()
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return here and not traced and not isinstance(t, FakeTensor)


def needs(library: str, missing: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise where the library of an integration (also the name of the extra) is
    missing.
    """
    return ModuleNotFoundError(
        f"tokenmill.integrations.{library} needs {library}: pip install 'tokenmill[{library}]'; "
        f"got {missing}",
        name=missing.name,
    )


def check_version(name: str, library: str, version: str, *minimum: int) -> None:
    """Checks that a library is recent enough for a function; name: the function's name."""
    found = tuple(int(part) for part in version.split(".")[:2])
    wanted = ".".join(map(str, minimum))
    check(found >= minimum, name, library, f"must be {wanted} or later", version)
