"""sparse_decode_attention: decode over selected, sink and recent keys of a cache."""

from __future__ import annotations

import functools
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Required, Unpack

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    MAX_HEAD_DIM,
    check,
    check_tensor,
)
from .._flops import known
from .._kv_cache import check_lengths_values
from .._lowering import scale_or_default, take_options, widen, widen_fields
from .._other_names import REQUIRED, answered_by
from ..reference.sparse import sparse_decode_attention as reference
from ..registry import OpSpec, Sharding, register_op

OP = "sparse_decode_attention"

Positions = Literal["absolute", "cache"]


class SparseDecodeOptions(TypedDict, total=False):
    """Keywords of :func:`sparse_decode_attention` other than return_mass."""

    block_k: int
    seqlens_k: Required[Tensor]
    block_table: Tensor | None
    num_sink: int
    num_recent: int
    pos_mode: Positions
    rope: tuple[Tensor, Tensor] | None
    interleaved: bool
    extra_k: Tensor | None
    extra_v: Tensor | None
    extra_log_count: Tensor | None
    scale: float | None
    softcap: float
    sink: Tensor | None
    num_splits: int
    out: Tensor | None
    backend: str | None
    k_scale: Tensor | None
    v_scale: Tensor | None


def _run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, counts: Tensor, **given: Any
) -> tuple[Tensor, ...]:
    out, backend = take_options(sparse_decode_attention, given)
    given.setdefault("seqlens_k", REQUIRED)
    results = call(SPEC, (q, k_cache, v_cache, indices, counts), given, backend, out)
    return results if given.get("return_mass") else results[:2]


@overload
def sparse_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    return_mass: Literal[False] = ...,
    **options: Unpack[SparseDecodeOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def sparse_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    return_mass: Literal[True],
    **options: Unpack[SparseDecodeOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...


@answered_by(_run)
def sparse_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_k: int = 1,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    num_sink: int = 0,
    num_recent: int = 0,
    pos_mode: Positions = "absolute",
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_log_count: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    num_splits: int = 0,
    return_mass: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    r"""Decode attention over selected, sink and recent keys of a KV cache, with fused RoPE.

    Request b has n = seqlens_k[b] keys, including its Sq newest tokens; query i is at position p =
    n - Sq + i and sees the keys j <= p that are

    - among the first num_sink of the request,
    - among its own last num_recent, j > p - num_recent,
    - in the blocks of its list: keys id * block_k to (id + 1) * block_k - 1,

    each once, even if these sets overlap. Ids count keys of the request, with or without pages. In
    addition it sees the extra keys, if given. Keys and values are read once for all query heads
    that share a list and a KV head, and all query tokens.

    Args:
        q: ``[B, Sq, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 576. Sq is 1, or a few for speculative tokens.
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]`` in the dtype of q or in
            float8_e4m3fn, Hk a divisor of H (GQA, MQA), Dv up to 512; with block_table pages ``[P,
            page size, Hk, D]`` and ``[P, page size, Hk, Dv]``, the page size a power of two.
            v_cache may be a view of k_cache, as in :func:`attention_decode`. The new keys must
            already be in the cache.
        indices: int32 ``[B, 1, K]`` (a list for all heads), ``[B, Hk, K]`` (for each KV head) or
            ``[B, H, K]`` (for each query head: a GQA group reads keys once per list). Lists ascend,
            as :func:`topk_select` returns. An id that is not greater than every id before it, or
            out of range, is skipped.
        counts: int32 ``[B, 1]``, ``[B, Hk]`` or ``[B, H]``: number of valid entries of each list,
            clamped to 0 to K.
        block_k: keys of an entry, a power of two up to 128.
        seqlens_k: int32 ``[B]``, number of keys of each request, from 0 to S (pages: pages times
            page size).
        block_table: int32 ``[B, pages]``, the pages of each request in order. A key on a page that
            does not exist (evicted: -1) is skipped.
        num_sink, num_recent: numbers of sink (first) and recent (last) keys, always seen; lists may
            omit them.
        pos_mode: positions for rope. "absolute": positions in the request. "cache" (one query
            token): ranks among the keys attended to, in order; the query has the rank of the last
            one.
        rope: (cos, sin), float ``[positions, pairs]`` each, pairs up to D / 2: q and the cache are
            stored without rotary embedding, and are rotated by the row of their position. Columns
            after the pairs are unchanged. None: no rotation. Ranks count skipped keys of a block,
            and are clamped to the last row of the tables.
        interleaved: pairs are columns (2 i, 2 i + 1), not (i, i + pairs).
        extra_k, extra_v: ``[B, E, Hk, D]`` and ``[B, E, Hk, Dv]`` in the dtype of q: keys and
            values outside the cache that every query sees, never rotated.
        extra_log_count: float ``[B, Hk, E]``: added to their logits: the log of the number of keys
            that each represents; -inf: none. None: 0.
        scale: factor of the products, None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap), before counts are added; 0 = off.
        sink: float ``[H]``, a logit of each head that adds to the row sum and has no value.
        num_splits: 0 = automatic. n cuts each row of keys into n ranges, at most one for each step
            of the kernel. With n > 0 the result of a request has the same bits in any batch.
        return_mass: also return the probability mass of each list entry.
        out: preallocated result, as in :func:`attention_decode`.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).
        k_scale, v_scale: scales of caches in float8_e4m3fn: float32 ``[1]``, ``[Hk]`` or, for each
            token, ``[P, page size, Hk]`` (dense ``[B, S, Hk]``), any strides: keys and values are
            the stored numbers times their scale, in float32. None = 1.

    Returns:
        (out, lse), with return_mass (out, lse, mass): out ``[B, Sq, H, Dv]`` in the dtype of q; lse
        ``[B, H, Sq]`` float32, natural log, for :func:`merge_attention_states`; mass float32 ``[B,
        Hk, K]``, or ``[B, H, K]`` with a list for each query head: the probabilities of the keys
        that an entry added, summed over its keys, the query tokens and the heads of a group; 0
        where it added none. A query with no visible key has out 0 and lse -inf (with a sink: lse =
        sink). The same inputs give the same bits. There is no gradient: inputs that require one are
        refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs. On a GPU a length is
            clamped to what the cache holds.

    Complexity: 2 H Sq (D + Dv) operations and (D + Dv) Hk elements read for each key of a row. A
    list of K entries that does not ascend costs up to K^2 / 2 additional comparisons.

    Paper: TokenSelect (Wu et al. 2024), TidalDecode (Yang et al. 2024), Quest (Tang et al. 2024),
    Recycled Attention (Xu et al. 2024); pos_mode "cache": StreamingLLM (Xiao et al. 2024), section
    3.2; extra keys: RazorAttention (Tang et al. 2024), section 3.3, the compensation token.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.ones(1, 1, 2, 4), torch.zeros(1, 100, 1, 4)
        >>> v = torch.arange(100.0).view(1, 100, 1, 1).repeat(1, 1, 1, 4)
        >>> indices = torch.tensor([[[30, 50, -1]]], dtype=torch.int32)
        >>> counts = torch.tensor([[2]], dtype=torch.int32)
        >>> n = torch.tensor([80], dtype=torch.int32)
        >>> out, lse = tm.sparse_decode_attention(
        ...     q, k, v, indices, counts, seqlens_k=n, num_sink=1, num_recent=1)
        >>> out[0, 0, 0, 0].item()  # the mean of 0, 30, 50 and 79
        39.75
    """
    raise NotImplementedError


def lower(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    op: str = OP,
    **given: Any,
) -> tuple[Any, ...]:
    a = FORWARD.fields(
        op, q=q, k_cache=k_cache, v_cache=v_cache, indices=indices, counts=counts, **given
    )
    if rope is not None:
        pair = isinstance(rope, tuple | list) and len(rope) == 2
        check(pair, op, "rope", "must be (cos, sin)", type(rope).__name__)
        for t in rope:
            check_tensor(op, "rope", t)
        a["cos"], a["sin"] = (widen(t, q) for t in rope)
    a["scale"] = scale_or_default(op, a["scale"], q)
    widen_fields(a, q, "extra_log_count", "sink")
    return tuple(a.values())


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads = a.q.shape[:3]
    row_heads = heads if a.indices.shape[1] > a.k_cache.shape[2] else a.k_cache.shape[2]
    mass = (batch, row_heads, a.indices.shape[2]) if a.return_mass else (0,)
    return (
        a.q.new_empty((*a.q.shape[:-1], a.v_cache.shape[-1])),
        a.q.new_empty((batch, heads, queries), dtype=torch.float32),
        a.q.new_empty(mass, dtype=torch.float32),
    )


def _check_values(a: Any) -> None:
    check_lengths_values(OP, a.k_cache, a.seqlens_k, a.block_table, pages_may_lack=True)


def unsupported(backend: str, a: Any) -> list[str]:
    # A call without these dimensions breaks a rule, which names them.
    dim, pairs = (0 if t is None or not t.dim() else t.shape[-1] for t in (a.q, a.cos))
    turned = 2 * pairs
    if backend == "triton" and dim > MAX_HEAD_DIM and turned > MAX_HEAD_DIM:
        return [f"of wider keys it turns at most {MAX_HEAD_DIM} columns; got {turned}"]
    return []


def flops(a: Any) -> float:
    """Operations of the two products over all listed, sink and recent keys."""
    blocks = float(a.counts.sum()) if known(a.counts) else float(a.indices.numel())
    listed = blocks * a.block_k / max(a.counts.shape[1], 1)
    keys = listed + a.counts.shape[0] * (a.num_sink + a.num_recent)
    return 2.0 * a.q.shape[1] * a.q.shape[2] * keys * (a.q.shape[-1] + a.v_cache.shape[-1])


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "extra_k", "extra_v"), cache="k_cache"),
        check_values=_check_values,
        fake=_fake,
        triton="sparse.sparse_decode_attention:sparse_decode_attention",
        refuses_gradients=True,
    )
)
OUT = register(TorchOp(OP + "_out"))
SPEC = register_op(
    OpSpec(
        function=sparse_decode_attention,
        lower=lower,
        sugar=frozenset({"rope", "extra_log_count", "sink"}),
        reference=reference.sparse_decode_attention,
        plain=functools.partial(reference.sparse_decode_attention, upcast=False),
        forward=FORWARD,
        logarithms=(1,),
        unsupported=unsupported,
        sharding=Sharding(
            {
                "q k_cache v_cache extra_k extra_v": "b.h.",
                "k_cache@block_table v_cache@block_table": "..h.",
                "indices extra_log_count": "bh.",
                "counts": "bh",
                "seqlens_k": "b",
                "block_table": "b.",
                "sink": "h",
                "k_scale v_scale": "h b.h",
                "k_scale@block_table v_scale@block_table": "h ..h",
            },
            ("b.h.", "bh.", "bh."),
        ),
        paper="TokenSelect (Wu et al. 2024), Quest (Tang et al. 2024)",
        flops=flops,
    )
)
