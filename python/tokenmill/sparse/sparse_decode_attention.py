"""sparse_decode_attention: decode over selected, sink and recent keys of a cache."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._autocast import Autocast
from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_device_of_q,
    check_dtype_of,
    check_last_contiguous,
    check_tensor,
    check_text,
    fail,
    is_power_of_two,
    show,
)
from .._dispatch import call
from .._flops import known
from .._kv_cache import capacity, check_cache, check_int32, check_lengths, check_lengths_values
from .._library import TorchOp, register
from .._lowering import scale_or_default, widen
from ..dense.attention_decode_rules import MAX_SPLITS
from ..dense.terms import check_scale, check_small, check_terms
from ..reference.sparse import sparse_decode_attention as reference
from ..registry import OpSpec, Sharding, register_op

OP = "sparse_decode_attention"

Positions = Literal["absolute", "cache"]
MAX_BLOCK = 128


@overload
def sparse_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_k: int = ...,
    seqlens_k: Tensor,
    block_table: Tensor | None = ...,
    num_sink: int = ...,
    num_recent: int = ...,
    pos_mode: Positions = ...,
    rope: tuple[Tensor, Tensor] | None = ...,
    interleaved: bool = ...,
    extra_k: Tensor | None = ...,
    extra_v: Tensor | None = ...,
    extra_log_count: Tensor | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    sink: Tensor | None = ...,
    num_splits: int = ...,
    return_mass: Literal[False] = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def sparse_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_k: int = ...,
    seqlens_k: Tensor,
    block_table: Tensor | None = ...,
    num_sink: int = ...,
    num_recent: int = ...,
    pos_mode: Positions = ...,
    rope: tuple[Tensor, Tensor] | None = ...,
    interleaved: bool = ...,
    extra_k: Tensor | None = ...,
    extra_v: Tensor | None = ...,
    extra_log_count: Tensor | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    sink: Tensor | None = ...,
    num_splits: int = ...,
    return_mass: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    r"""Decode over selected, sink and recent keys of a KV cache, with fused RoPE.

    Request b has n = seqlens_k[b] keys, those of its Sq newest tokens included; query i is at
    position p = n - Sq + i and sees of the keys j <= p those

    - among the first num_sink of the request,
    - among its own last num_recent, j > p - num_recent,
    - in the blocks of its list: keys id * block_k to (id + 1) * block_k - 1,

    each once, whatever overlaps. With block_table None or not, in pages or not, ids count keys of
    the request. Beside them it sees the extra keys, if given. Keys and values are read once for all
    query heads that share a list and a KV head, and all query tokens.

    Args:
        q: ``[B, Sq, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256. Sq is 1, or a few for speculative tokens.
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H (GQA, MQA), Dv
            up to 256; with block_table pages ``[P, page size, Hk, D]`` and ``[P, page size, Hk,
            Dv]``, the page size a power of two. The new keys must be there.
        indices: int32 ``[B, 1, K]`` (a list for all heads), ``[B, Hk, K]`` (for each KV head) or
            ``[B, H, K]`` (for each query head: keys of a group are read once for each list).
            Lists ascend, as :func:`topk_select` makes them. An id that is not greater than every id
            before it, or out of range, is left out.
        counts: int32 ``[B, 1]``, ``[B, Hk]`` or ``[B, H]``: the entries of each list that count,
            clamped to 0 to K.
        block_k: keys of an entry, a power of two up to 128.
        seqlens_k: int32 ``[B]``, keys of each request, from 0 to S (pages: pages times page size).
        block_table: int32 ``[B, pages]``, the pages of each request in order. A key on a page that
            does not exist (evicted: -1) is left out.
        num_sink, num_recent: sink (first) and recent (last) keys, always seen; lists may omit
            them.
        pos_mode: positions of rope. "absolute": positions in the request. "cache" (one query
            token): places in the row of keys that are attended to, in order; the query has that of
            the last one.
        rope: (cos, sin), float ``[positions, pairs]`` each, pairs up to D / 2: q and the cache
            come without their rotary embedding, and are rotated by the row of their position.
            Columns after the pairs stay as they are. None: they are used as they are. Places
            count keys of a block that are left out, and stop at the last row of the tables.
        interleaved: pairs are columns (2 i, 2 i + 1), not (i, i + pairs).
        extra_k, extra_v: ``[B, E, Hk, D]`` and ``[B, E, Hk, Dv]``: keys and values from outside the
            cache that every query sees, never rotated.
        extra_log_count: float ``[B, Hk, E]``: added to their logits, the log of how many keys each
            stands for; -inf: none. None: 0.
        scale: factor of the products, None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap), before counts are added; 0 = off.
        sink: float ``[H]``, a logit of each head that takes weight and has no value.
        num_splits: 0 = automatic. n cuts each row of keys into n ranges, at most one for each step
            of the kernel. With n > 0 the result of a request has the same bits in any batch.
        return_mass: also return the probability that the entries of lists received.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (out, lse), with return_mass (out, lse, mass): out ``[B, Sq, H, Dv]`` in the dtype of q; lse
        ``[B, H, Sq]`` float32, natural log, for :func:`merge_attention_states`; mass float32 ``[B,
        Hk, K]``, or ``[B, H, K]`` with a list for each query head: the probabilities of the keys
        that an entry added, summed over its keys, the query tokens and the heads of a group; 0
        where it added none. A query that sees nothing has out 0 and lse -inf (with a sink: lse =
        sink). The same inputs give the same bits. There is no gradient: inputs that require one are
        refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs. On a GPU a length is
            clamped to what the cache holds.

    Complexity: 2 H Sq (D + Dv) operations and (D + Dv) Hk elements read for each key of a row. A
    list of K entries that does not ascend costs up to K^2 / 2 comparisons more.

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
    out, lse, mass = call(
        SPEC,
        lower(
            q,
            k_cache,
            v_cache,
            indices,
            counts,
            block_k=block_k,
            seqlens_k=seqlens_k,
            block_table=block_table,
            num_sink=num_sink,
            num_recent=num_recent,
            pos_mode=pos_mode,
            rope=rope,
            interleaved=interleaved,
            extra_k=extra_k,
            extra_v=extra_v,
            extra_log_count=extra_log_count,
            scale=scale,
            softcap=softcap,
            sink=sink,
            num_splits=num_splits,
            return_mass=return_mass,
        ),
        backend,
    )
    return (out, lse, mass) if return_mass else (out, lse)


def lower(
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
    pos_mode: str = "absolute",
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
    op: str = OP,
) -> tuple[Any, ...]:
    for name, t in (
        ("q", q),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("indices", indices),
        ("counts", counts),
        ("seqlens_k", seqlens_k),
    ):
        check_tensor(op, name, t)
    for name, option in (
        ("block_table", block_table),
        ("extra_k", extra_k),
        ("extra_v", extra_v),
        ("extra_log_count", extra_log_count),
        ("sink", sink),
    ):
        check_tensor(op, name, option, optional=True)
    block_k, num_splits = as_int(op, "block_k", block_k), as_int(op, "num_splits", num_splits)
    num_sink, num_recent = as_int(op, "num_sink", num_sink), as_int(op, "num_recent", num_recent)
    for name, flag in (("interleaved", interleaved), ("return_mass", return_mass)):
        check_bool(op, name, flag)
    softcap = as_number(op, "softcap", softcap)
    check_text(op, "pos_mode", pos_mode)
    cos, sin = None, None
    if rope is not None:
        pair = isinstance(rope, tuple | list) and len(rope) == 2
        check(pair, op, "rope", "must be (cos, sin)", type(rope).__name__)
        for t in rope:
            check_tensor(op, "rope", t)
        cos, sin = (widen(t, q) for t in rope)
    return (
        q,
        k_cache,
        v_cache,
        indices,
        counts,
        seqlens_k,
        block_table,
        block_k,
        num_sink,
        num_recent,
        pos_mode,
        cos,
        sin,
        interleaved,
        extra_k,
        extra_v,
        None if extra_log_count is None else widen(extra_log_count, q),
        scale_or_default(op, scale, q),
        softcap,
        None if sink is None else widen(sink, q),
        num_splits,
        return_mass,
    )


# csrc/sparse/sparse_decode_attention/host.cpp has the same rules in the same order and words.
def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    block_k: int,
    num_sink: int,
    num_recent: int,
    pos_mode: str,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    extra_log_count: Tensor | None,
    scale: float,
    softcap: float,
    sink: Tensor | None,
    num_splits: int,
    return_mass: bool,
    *,
    float64: bool = False,
    op: str = OP,
) -> None:
    check_cache(op, q, k_cache, v_cache, block_table is not None, float64)
    check_scale(op, scale, softcap)
    blocks = f"must be a power of two up to {MAX_BLOCK}"
    check(is_power_of_two(block_k) and block_k <= MAX_BLOCK, op, "block_k", blocks, block_k)
    for name, number in (("num_sink", num_sink), ("num_recent", num_recent)):
        check(number >= 0, op, name, "must not be negative", number)
    splits = f"must be 0 (automatic) to {MAX_SPLITS}"
    check(0 <= num_splits <= MAX_SPLITS, op, "num_splits", splits, num_splits)
    modes = "must be 'absolute' or 'cache'"
    check(pos_mode in ("absolute", "cache"), op, "pos_mode", modes, pos_mode)
    rule = "'cache' goes with one query token; q has"
    check(pos_mode == "absolute" or q.shape[1] <= 1, op, "pos_mode", rule, q.shape[1])
    check_lengths(op, q, q.shape[0], seqlens_k, block_table)
    _check_lists(op, q, k_cache, indices, counts)
    longest = capacity(k_cache, block_table)
    if pos_mode == "cache":
        longest = min(longest, num_sink + indices.shape[2] * block_k + num_recent)
    _check_rope(op, q, cos, sin, max(longest, 1))
    _check_extra(op, q, k_cache, v_cache, extra_k, extra_v, extra_log_count)
    check_terms(op, q, q.shape[0], "softmax", None, None, sink)


def _check_lists(op: str, q: Tensor, k_cache: Tensor, indices: Tensor, counts: Tensor) -> None:
    batch, heads = q.shape[0], (1, k_cache.shape[2], q.shape[2])
    rule = f"must have shape [{batch}, 1, {heads[1]} or {heads[2]}, K]"
    shape = indices.dim() == 3 and indices.shape[0] == batch and indices.shape[1] in heads
    check(shape, op, "indices", rule, indices.shape)
    if counts.shape != indices.shape[:2]:
        fail(op, "counts", f"must have shape {show(indices.shape[:2])}", counts.shape)
    for name, t in (("indices", indices), ("counts", counts)):
        check_int32(op, name, t)
        check_last_contiguous(op, name, t)
        check_device_of_q(op, name, t, q)


def _check_rope(op: str, q: Tensor, cos: Tensor | None, sin: Tensor | None, longest: int) -> None:
    if cos is None or sin is None:
        return
    pairs = q.shape[3] // 2
    shape = cos.dim() == 2 and cos.shape[0] >= longest and 1 <= cos.shape[1] <= pairs
    rule = f"must have shape [positions, pairs], {longest} positions or more, 1 to {pairs} pairs"
    check(shape, op, "rope", rule, cos.shape)
    check(sin.shape == cos.shape, op, "rope", "must have cos and sin of one shape", sin.shape)
    for t in (cos, sin):
        check_small(op, "rope", t, q)


def _check_extra(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    extra_log_count: Tensor | None,
) -> None:
    both = (extra_k is None) == (extra_v is None)
    check(both, op, "extra_v", "must be given with extra_k, and only then", extra_v is not None)
    if extra_k is None or extra_v is None:
        if extra_log_count is not None:
            fail(op, "extra_log_count", "needs extra_k and extra_v", extra_log_count.shape)
        return
    extras = (("extra_k", extra_k, k_cache), ("extra_v", extra_v, v_cache))
    entries = extra_k.shape[1] if extra_k.dim() == 4 else -1
    for name, t, cache in extras:
        wanted = [q.shape[0], max(entries, 0), *cache.shape[2:]]
        if list(t.shape) != wanted:
            fail(op, name, f"must have shape {show(wanted)}", t.shape)
        check_dtype_of(op, name, t, "q", q)
        check_last_contiguous(op, name, t)
        check_device_of_q(op, name, t, q)
    if extra_log_count is not None:
        wanted = [q.shape[0], k_cache.shape[2], entries]
        if list(extra_log_count.shape) != wanted:
            fail(op, "extra_log_count", f"must have shape {show(wanted)}", extra_log_count.shape)
        check_small(op, "extra_log_count", extra_log_count, q)


def _check_values(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    counts: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    *rest: Any,
) -> None:
    check_lengths_values(OP, k_cache, seqlens_k, block_table, pages_may_lack=True)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads = q.shape[:3]
    row_heads = heads if indices.shape[1] > k.shape[2] else k.shape[2]
    mass = (batch, row_heads, indices.shape[2]) if rest[-1] else (0,)
    return (
        q.new_empty((batch, queries, heads, v.shape[-1])),
        q.new_empty((batch, heads, queries), dtype=torch.float32),
        q.new_empty(mass, dtype=torch.float32),
    )


def flops(*lowered: Any) -> float:
    """Operations of the two products over all listed, sink and recent keys."""
    a = FORWARD.record(*lowered)
    blocks = float(a.counts.sum()) if known(a.counts) else float(a.indices.numel())
    listed = blocks * a.block_k / max(a.counts.shape[1], 1)
    keys = listed + a.counts.shape[0] * (a.num_sink + a.num_recent)
    return 2.0 * a.q.shape[1] * a.q.shape[2] * keys * (a.q.shape[-1] + a.v_cache.shape[-1])


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "extra_k", "extra_v"), cache="k_cache"),
        check=_check,
        check_values=_check_values,
        fake=_fake,
        triton="sparse.sparse_decode_attention:sparse_decode_attention",
        refuses_gradients=True,
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="sparse",
        function=sparse_decode_attention,
        lower=lower,
        reference=reference.sparse_decode_attention,
        plain=functools.partial(reference.sparse_decode_attention, upcast=False),
        forward=FORWARD,
        backward=None,
        differentiable=(),
        logarithms=(1,),
        sharding=Sharding(
            {
                "q k_cache v_cache extra_k extra_v": "b.h.",
                "k_cache@block_table v_cache@block_table": "..h.",
                "indices extra_log_count": "bh.",
                "counts": "bh",
                "seqlens_k": "b",
                "block_table": "b.",
                "sink": "h",
            },
            ("b.h.", "bh.", "bh."),
        ),
        paper="TokenSelect (Wu et al. 2024), Quest (Tang et al. 2024)",
        flops=flops,
    )
)
