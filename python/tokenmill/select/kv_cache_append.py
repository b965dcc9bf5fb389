"""kv_cache_append: writes new keys and values into a cache, with RoPE and quantisation fused."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    check,
    check_tensor,
)
from .._lowering import take_options, widen
from .._other_names import answered_by
from ..reference.select import kv_cache_append as reference
from ..registry import OpSpec, Sharding, register_op

OP = "kv_cache_append"


def _run(
    k_cache: Tensor,
    v_cache: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    **given: Any,
) -> Tensor | None:
    _, backend = take_options(kv_cache_append, given)
    (turned,) = call(SPEC, (k_cache, v_cache, k, v, slots), given, backend)
    return None if given.get("q") is None else turned


@answered_by(_run)
def kv_cache_append(
    k_cache: Tensor,
    v_cache: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    *,
    q: Tensor | None = None,
    rope: tuple[Tensor, Tensor, Tensor] | None = None,
    rope_offset: int = 0,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    r"""Writes the keys and values of new tokens into a KV cache in place and in one pass: keys are
    rotated by their positions, both are rounded to the dtype of the cache.

    A cache in float8_e4m3fn holds x / scale rounded to nearest even, saturated at -448 and 448,
    including infinities; NaN stays NaN. Rotation and division are done in float32 without fused
    multiply-adds, so codes and scales have the same bits on every backend.

    Args:
        k_cache, v_cache: ``[P, page size, Hk, D]`` and ``[P, page size, Hk, Dv]``, or dense ``[B,
            S, Hk, ...]``, in the dtype of k or in float8_e4m3fn; any non-overlapping strides with a
            contiguous last dimension, sharing no element with another argument (halves of one
            tensor are allowed). D up to 576, Dv up to 512. Overwritten at the slots. v_cache is
            None where one row holds key and value (latent caches, whose values are a view of
            k_cache).
        k, v: ``[T, Hk, D]`` and ``[T, Hk, Dv]``, float16, bfloat16 or float32 (float64 on the
            reference), any strides with a contiguous last dimension. v is None with v_cache.
        slots: int32 or int64 ``[T]``, slot of each token: page * page size + offset (dense: b * S +
            t), each slot once; -1 skips the token.
        q: ``[T, H, D]``, Hk a divisor of H: queries, rotated like the keys, including tokens
            without a slot. Requires rope.
        rope: (cos, sin, positions): float ``[positions, pairs]`` twice, pairs up to (D -
            rope_offset) / 2, and int32 or int64 ``[T]``, the row of each token. Columns before and
            after the pairs are unchanged. None: no rotation.
        rope_offset: the first column of the pairs, 0 to D - 2; 512 for a latent row ``[latent 512 |
            rotated 64]``. Requires rope.
        interleaved: pairs are columns (2 i, 2 i + 1) from rope_offset on, not (i, i + pairs).
        k_scale, v_scale: for caches in float8_e4m3fn, float32. ``[1]`` or ``[Hk]``: read, x is
            divided by it. ``[P, page size, Hk]`` (dense ``[B, S, Hk]``): written for each token and
            head, max|x| / 448 over the finite elements of its row, and 1 where this is subnormal or
            0 (a row of zeros). None: 1.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        q rotated, ``[T, H, D]`` in its dtype; None without q. There is no gradient: inputs that
        require one are refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU a token
            whose slot is out of range is skipped, positions are clamped to the tables, and the
            contents of a repeated slot are undefined.

    Complexity: reads k, v and q once and writes as many elements.

    Paper: rotary embedding (Su et al. 2021), section 3.2; pages: PagedAttention (Kwon et al. 2023),
    section 4; float8_e4m3fn: Micikevicius et al. 2022, section 3; latent rows: DeepSeek-V2
    (DeepSeek-AI 2024), section 2.1.

    Example:
        >>> import torch, tokenmill as tm
        >>> cache = torch.zeros(2, 3, 4, 1, 8).to(torch.float8_e4m3fn)  # keys, values; 3 pages of 4
        >>> k = torch.arange(16.0).view(2, 1, 8)
        >>> k_scale, v_scale = torch.ones(3, 4, 1), torch.ones(1)
        >>> slots = torch.tensor([7, 8])  # the last row of page 1, the first of page 2
        >>> tm.kv_cache_append(*cache, k, k, slots, k_scale=k_scale, v_scale=v_scale)
        >>> k_scale[1, 3].item() * 448
        7.0
        >>> cache[1, 2, 0, 0].float()
        tensor([ 8.,  9., 10., 11., 12., 13., 14., 15.])
    """
    raise NotImplementedError


def lower(
    k_cache: Tensor,
    v_cache: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    *,
    rope: tuple[Tensor, Tensor, Tensor] | None = None,
    **given: Any,
) -> tuple[Any, ...]:
    a = FORWARD.fields(k_cache=k_cache, v_cache=v_cache, k=k, v=v, slots=slots, **given)
    if rope is not None:
        triple = isinstance(rope, tuple | list) and len(rope) == 3
        check(triple, OP, "rope", "must be (cos, sin, positions)", type(rope).__name__)
        for t in rope:
            check_tensor(OP, "rope", t)
        a["cos"], a["sin"], a["positions"] = widen(rope[0], k), widen(rope[1], k), rope[2]
    for name in ("k_scale", "v_scale"):  # a scale of each token is written into the cache's scales
        if a[name] is not None and a[name].dim() == 3:
            a[f"{name}_out"], a[name] = a[name], None
    return tuple(a.values())


def _check_values(a: Any) -> None:
    capacity = a.k_cache.shape[0] * a.k_cache.shape[1]
    slots = a.slots.tolist()
    for slot in slots:
        rule = f"must be -1 or below the slots of the cache, {capacity}"
        check(-1 <= slot < capacity, OP, "slots", rule, slot)
    taken = sorted(slot for slot in slots if slot >= 0)
    for slot, other in itertools.pairwise(taken):
        check(slot != other, OP, "slots", "must not name a slot twice", slot)
    for at in a.positions.tolist() if a.positions is not None else ():
        rule = f"must have positions of 0 to below the rows of cos and sin, {a.cos.shape[0]}"
        check(0 <= at < a.cos.shape[0], OP, "rope", rule, at)
    for name, scales in (("k_scale", a.k_scale), ("v_scale", a.v_scale)):
        for scale in scales.tolist() if scales is not None else ():
            check(0 < scale < math.inf, OP, name, "must be above 0 and finite", scale)


def _fake(a: Any) -> Tensor:
    return a.k.new_empty((0,) if a.q is None else a.q.shape)


def _unsupported(backend: str, a: Any) -> list[str]:
    """float64 rows need the reference even where k_cache, the first tensor, is not float64."""
    wide = a.k.dtype == torch.float64 != a.k_cache.dtype
    return ["float64 runs only on the reference backend"] if wide else []


def _flops(a: Any) -> float:
    """Three operations per rotated element, one per written element."""
    turned = 0 if a.cos is None else a.k.shape[1] + (0 if a.q is None else a.q.shape[1])
    pairs = 0 if a.cos is None else a.cos.shape[1]
    written = a.k.numel() + (0 if a.v is None else a.v.numel())
    return float(written + 6 * a.k.shape[0] * turned * pairs)


FORWARD = register(
    TorchOp(
        OP,
        check_values=_check_values,
        fake=_fake,
        triton="select.kv_cache_append:kv_cache_append",
    )
)
SPEC = register_op(
    OpSpec(
        function=kv_cache_append,
        lower=lower,
        sugar=frozenset({"rope", "k_scale", "v_scale"}),
        reference=reference.kv_cache_append,
        plain=functools.partial(reference.kv_cache_append, upcast=False),
        forward=FORWARD,
        unsupported=_unsupported,
        sharding=Sharding(
            {
                "k_cache v_cache": "..h.",
                "k v q": ".h.",
                "k_scale v_scale": "h",
                "k_scale_out v_scale_out": "..h",
            },
            (".h.",),
        ),
        written=("k_cache", "v_cache", "k_scale", "v_scale"),
        paper="rotary embedding (Su et al. 2021), PagedAttention (Kwon et al. 2023)",
        flops=_flops,
    )
)
