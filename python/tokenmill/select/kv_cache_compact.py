"""kv_cache_compact: evicts from a KV cache in place."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    as_number,
    check,
)
from .._lowering import take_options
from .._other_names import answered_by
from ..reference.select import kv_cache_compact as reference
from ..registry import OpSpec, Sharding, register_op

OP = "kv_cache_compact"


def _run(
    k_cache: Tensor, v_cache: Tensor, keep: Tensor, counts: Tensor, **given: Any
) -> Tensor | tuple[Tensor, ...]:
    _, backend = take_options(kv_cache_compact, given)
    results = call(SPEC, (k_cache, v_cache, keep, counts), given, backend)
    return results if given.get("compensation") else results[0]


@answered_by(_run)
def kv_cache_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    keep: Tensor,
    counts: Tensor,
    *,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    rerotate: float | Tensor | None = None,
    interleaved: bool = False,
    compensation: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Evicts from a KV cache in place: keeps the listed tokens and closes the gaps.

    Token keep[d] of a request moves to slot d, for d below its count. Lists ascend, so no slot is
    written before it is read, and no second cache is needed. Slots from the count on are free, with
    stale contents.

    Args:
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, or with block_table pages
            ``[P, page size, Hk, ...]`` that no two requests share; float16, bfloat16 or float32,
            any non-overlapping strides with a contiguous last dimension, sharing no element with
            another argument (halves of one tensor are allowed). Overwritten.
        keep: int32 ``[B, K]``, or ``[B, Hk, K]`` for a list per head (dense caches only): slots in
            ascending order, as returned by :func:`topk_select`.
        counts: int32 ``[B]`` or ``[B, Hk]``, number of valid entries of each list.
        seqlens_k: int32 ``[B]``, number of tokens in the cache of each request; None: all slots.
        block_table: int32 ``[B, pages]``, the pages of each request in order.
        rerotate: for keys to which a rotary embedding was applied at their slot: rotates them by
            slot d minus slot keep[d], in float32. A base >= 1 (inverse frequencies base^(-2 i /
            D)), or the inverse frequencies themselves, float ``[1 .. D/2]`` (columns after the
            pairs are unchanged). None: keys keep their positions.
        interleaved: pairs are columns (2 i, 2 i + 1), not (i, i + number of pairs).
        compensation: also return sums over the evicted tokens (below seqlens_k, in no list), before
            any rotation: the compensation token of RazorAttention is their mean. The sums may be
            added to the sums of earlier calls.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        the new seqlens_k, int32 of the shape of counts; with compensation (seqlens_k, k_sum,
        v_sum, dropped): float32 ``[B, Hk, D]`` and ``[B, Hk, Dv]``, and int32 ``[B, Hk]``, their
        number. There is no gradient: inputs that require one are refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything is written. On a GPU an entry
            that does not move down, or is on a page out of range, moves nothing; the contents of a
            repeated page are undefined.

    Complexity: reads and writes each moved row once; with compensation reads the whole cache.

    Paper: StreamingLLM (Xiao et al. 2024), section 3.2; RazorAttention (Tang et al. 2024), section
    3.3; eviction as in H2O (Zhang et al. 2023) and Keyformer (Adnan et al. 2024).

    Example:
        >>> import torch, tokenmill as tm
        >>> k = torch.arange(8.0).view(1, 8, 1, 1).repeat(1, 1, 1, 4)
        >>> v = k.clone()
        >>> keep = torch.tensor([[0, 1, 5, 6, 7]], dtype=torch.int32)  # two sinks, three recent
        >>> tm.kv_cache_compact(k, v, keep, torch.tensor([5], dtype=torch.int32))
        tensor([5], dtype=torch.int32)
        >>> v[0, :5, 0, 0]
        tensor([0., 1., 5., 6., 7.])
    """
    raise NotImplementedError


def lower(
    k_cache: Tensor,
    v_cache: Tensor,
    keep: Tensor,
    counts: Tensor,
    *,
    rerotate: float | Tensor | None = None,
    **given: Any,
) -> tuple[Any, ...]:
    a = FORWARD.fields(k_cache=k_cache, v_cache=v_cache, keep=keep, counts=counts, **given)
    if rerotate is not None:
        a["rerotate"] = _rotations(rerotate, k_cache)
    return tuple(a.values())


def _rotations(rerotate: Any, k_cache: Tensor) -> Tensor:
    """Revolutions of each pair per slot, [2, pairs]: the sum of two float32."""
    if isinstance(rerotate, Tensor):
        ok = rerotate.dim() == 1 and rerotate.is_floating_point()
        check(ok, OP, "rerotate", "must be a number or floats [pairs]", rerotate)
        frequency = rerotate.detach().double()
    else:
        rule = "must be a base of at least 1, or a tensor of inverse frequencies"
        base = as_number(OP, "rerotate", rerotate, rule)
        check(1 <= base < math.inf, OP, "rerotate", rule, base)
        dim = k_cache.shape[-1] if k_cache.dim() else 0
        exponent = torch.arange(dim // 2, device=k_cache.device, dtype=torch.float64)
        frequency = torch.exp(exponent * (-2 * math.log(base) / max(dim, 1)))
    turns = frequency / (2 * math.pi)
    if k_cache.dtype == torch.float64:
        return torch.stack([turns, torch.zeros_like(turns)])
    high = turns.float()
    return torch.stack([high, (turns - high.double()).float()])


def _check_values(a: Any) -> None:
    batch, size, entries = a.keep.shape[0], a.k_cache.shape[1], a.keep.shape[-1]
    capacity = size if a.block_table is None else a.block_table.shape[1] * size
    length = [capacity] * batch if a.seqlens_k is None else a.seqlens_k.tolist()
    for n in length:
        rule = f"must be 0 to what the cache holds of a request, {capacity}"
        check(0 <= n <= capacity, OP, "seqlens_k", rule, n)
    for b in range(batch):
        lists = a.keep[b].tolist() if a.keep.dim() == 3 else [a.keep[b].tolist()]
        for kept, count in zip(lists, a.counts[b].reshape(-1).tolist(), strict=True):
            rule = f"must be 0 to the entries of keep, {entries}"
            check(0 <= count <= entries, OP, "counts", rule, count)
            for d, slot in enumerate(kept[:count]):
                rule = f"must name slots below the length of the request, {length[b]}"
                check(0 <= slot < length[b], OP, "keep", rule, slot)
                check(d == 0 or slot > kept[d - 1], OP, "keep", "must ascend", slot)
    if a.block_table is not None:
        pages, taken = a.k_cache.shape[0], set()
        for row, n in zip(a.block_table.tolist(), length, strict=True):
            for page in row[: -(-n // size)]:
                rule = f"must name pages below {pages} where keys lie"
                check(0 <= page < pages, OP, "block_table", rule, page)
                rule = "must not name a page twice where keys lie"
                check(page not in taken, OP, "block_table", rule, page)
                taken.add(page)


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads = a.keep.shape[0], a.k_cache.shape[2]

    def sums(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return a.k_cache.new_empty(shape if a.compensation else (0,), dtype=dtype)

    return (
        a.counts.new_empty(a.counts.shape),
        sums(batch, heads, a.k_cache.shape[3]),
        sums(batch, heads, a.v_cache.shape[3]),
        sums(batch, heads, dtype=torch.int32),
    )


FORWARD = register(
    TorchOp(
        OP,
        check_values=_check_values,
        fake=_fake,
        triton="select.kv_cache_compact:kv_cache_compact",
    )
)
SPEC = register_op(
    OpSpec(
        function=kv_cache_compact,
        lower=lower,
        sugar=frozenset({"rerotate"}),
        reference=reference.kv_cache_compact,
        plain=functools.partial(reference.kv_cache_compact, upcast=False),
        forward=FORWARD,
        sharding=Sharding(
            {
                "k_cache v_cache": "b.h.",
                "k_cache@block_table v_cache@block_table": "..h.",
                "keep": "bh. b.",
                "counts": "bh b",
                "seqlens_k": "b",
                "block_table": "b.",
            },
            ("bh b~h", "bh.", "bh.", "bh"),
        ),
        paper="StreamingLLM (Xiao et al. 2024), RazorAttention (Tang et al. 2024)",
        flops=lambda a: float(a.keep.numel() * (a.k_cache.shape[3] + a.v_cache.shape[3])),
    )
)
