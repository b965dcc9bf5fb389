"""attention_decode: attention of the newest tokens of each request over its KV cache."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    MAX_HEAD_DIM,
    check_bool,
    check_cu_seqlens_values,
    check_longest,
    fail,
)
from .._flops import band, known
from .._kv_cache import capacity, check_lengths_values
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import REQUIRED, answered_by
from ..masks import MASKS, Lowered, Masks, Prefix, Segments, lower_mask
from ..reference.dense import attention_decode as reference
from ..registry import OpSpec, Sharding, register_op
from .attention_options import DecodeOptions, Schedule
from .terms import (
    NO_WINDOW,
    Kind,
    Normalize,
    ScoreBias,
    as_window,
    check_return_lse,
    lower_normalize,
    lower_score_bias,
    row_statistic_like,
)

OP = "attention_decode"


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, **given: Any
) -> Tensor | tuple[Tensor, ...]:
    out, backend = take_options(attention_decode, given)
    given.setdefault("seqlens_k", REQUIRED)
    used = 2 if given.get("return_lse") is True else 1
    results = call(SPEC, (q, k_cache, v_cache), given, backend, out, used=used)
    return results[:2] if used == 2 else results[0]


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...


@answered_by(_attend)
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block_table: Tensor | None = None,
    kind: Kind = "softmax",
    normalize: Normalize = None,
    scale: float | None = None,
    score_bias: ScoreBias = None,
    mask: Masks = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    window: tuple[int, int] = NO_WINDOW,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    num_splits: int = 0,
    schedule: Schedule = "auto",
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of the newest tokens of each request over its KV cache, dense or paged.

    Request b has n = seqlens_k[b] keys, including its Sq newest tokens, and its queries are the
    last Sq of n positions: query i sees keys j <= n - Sq + i. The result equals
    :func:`tokenmill.attention` with causal=True on these keys, request by request. Keys and values
    are read once for each KV head, whatever H / Hk and Sq. With cu_seqlens_q each request has its
    own number of queries: prefill, chunks of it, speculative and decode rows in one call.

    Args:
        q: ``[B, Sq, H, D]``, or packed ``[T, H, D]`` with cu_seqlens_q; float16, bfloat16 or
            float32 (float64 on the reference), D up to 576. Any strides; copied only where the last
            dimension is not contiguous. Caches are never copied.
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]`` in the dtype of q or in
            float8_e4m3fn, Hk a divisor of H (GQA, MQA), Dv up to 512; with block_table pages ``[P,
            page size, Hk, D]`` and ``[P, page size, Hk, Dv]``, the page size a power of two. Any
            strides with a contiguous last dimension, so ``[P, Hk, page size, D]`` is passed as its
            transpose, and v_cache may be a view of k_cache: ``k_cache[..., :512]`` are the values
            of a latent cache. The new keys must already be in the cache.
        seqlens_k: int32 ``[B]``, number of keys of each request, from 0 to S (pages: pages times
            page size). Later slots are never read.
        block_table: int32 ``[B, pages]``, the pages of each request in order; entries beyond its
            last key may hold anything.
        kind, normalize, scale, alibi_slopes, sink, softcap: as in :func:`tokenmill.attention`.
        score_bias: a float, a tensor ``[H]`` or ``[B, H]``, or "neg_log_n": -log seqlens_k[b].
        mask: segments or ranges of :mod:`tokenmill.masks`, or both; packed calls take ranges only
            (a tree of drafts). Segment ids of keys cover all positions that the cache has room for,
            in the order of the request's keys. A prefix is refused.
        causal: query i sees no key after its own position. False: all n keys, or the keys inside
            window.
        window: (left, right) numbers of keys on each side of a query's own position; -1 = no limit.
            With causal, right is -1 or 0.
        cu_seqlens_q: int32 ``[B + 1]``, offsets of the queries of each request; a request may have
            none. On a GPU, which does not check these values, tokens outside all requests are empty
            rows.
        max_seqlen_q: a bound on the queries of a request; None = all tokens.
        num_splits: 0 = automatic. n cuts the keys of each request into n ranges, at most one for
            each step of the kernel. With n > 0 a request's result has the same bits in any batch,
            whatever the other requests are; on the cpu backend, and for packed calls, 0 has this
            property too.
        schedule: how the keys are spread over a GPU. "split" cuts each request into equally many
            ranges, "stream_k" all requests together into equally long ranges, best for unequal
            lengths; "auto" takes stream_k on the cuda backend, unless num_splits is given, and
            split on triton. The cpu backend has one schedule and takes any of these, and so do
            packed calls.
        return_lse: also return lse (softmax), or the row sums s (normalize="sum").
        out: preallocated result: shape and dtype as returned, any non-overlapping strides with a
            contiguous last dimension; it shares no memory with the inputs.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).
        k_scale, v_scale: scales of caches in float8_e4m3fn: float32 ``[1]``, ``[Hk]`` or, for each
            token, ``[P, page size, Hk]`` (dense ``[B, S, Hk]``), any strides: keys and values are
            the stored numbers times their scale, in float32. None = 1. :func:`kv_cache_append` uses
            the same scales.
        invariant: on CPUs a token has the bits that :func:`tokenmill.attention` with invariant
            gives it in a prompt, whatever the number of queries of its request; D and Dv up to 256.
            One query takes up to 4 times as long. num_splits has no effect then. True is refused
            on GPUs; the reference, which promises no bits, ignores it.

    Returns:
        out ``[B, Sq, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q; with return_lse also lse
        ``[B, H, Sq]`` (packed ``[H, T]``) float32, natural log, or s of the same shape. A query
        with no visible key has out 0 and lse -inf (with a sink: lse = sink), s 0. NaN in one
        request does not reach others. The same inputs give the same bits. There is no gradient:
        inputs that require one are refused unless under no_grad.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs. On a GPU a length is
            clamped to what the cache holds, and a page that does not exist is read as page 0.

    Complexity: 2 H Sq (D + Dv) operations and (D + Dv) Hk elements read for each key of a request;
    only the partial results of ranges are allocated; they are combined in the order of the keys.

    Paper: Flash-Decoding (Dao et al. 2023); LeanAttention (Sanovar et al. 2024), section 4, for
    stream_k; PagedAttention (Kwon et al. 2023) for pages; SARATHI (Agrawal et al. 2023) for chunks
    of prefill batched with decode rows.

    Example:
        >>> import torch, tokenmill as tm
        >>> q = torch.randn(2, 1, 8, 64)
        >>> k = v = torch.randn(10, 16, 2, 64)  # 10 pages of 16 tokens
        >>> table = torch.tensor([[7, 2, 9], [0, 4, -1]], dtype=torch.int32)
        >>> lengths = torch.tensor([40, 17], dtype=torch.int32)
        >>> tm.attention_decode(q, k, v, seqlens_k=lengths, block_table=table).shape
        torch.Size([2, 1, 8, 64])
        >>> starts = torch.tensor([0, 32, 33], dtype=torch.int32)  # a chunk of 32, one decode row
        >>> q = torch.randn(33, 8, 64)
        >>> tm.attention_decode(
        ...     q, k, v, seqlens_k=lengths, block_table=table, cu_seqlens_q=starts
        ... ).shape
        torch.Size([33, 8, 64])
    """
    raise NotImplementedError


def lower(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    normalize: str | None = None,
    scale: float | None = None,
    score_bias: ScoreBias = None,
    mask: Masks = None,
    window: tuple[int, int] = NO_WINDOW,
    return_lse: bool = False,
    **given: Any,
) -> tuple[Any, ...]:
    """given: the arguments that the schema has under the same name and of the same kind."""
    a = FORWARD.fields(q=q, k_cache=k_cache, v_cache=v_cache, **given)
    check_bool(OP, "return_lse", return_lse)
    a["normalize"] = lower_normalize(OP, normalize)
    if return_lse:
        check_return_lse(OP, a["kind"], a["normalize"])
    a["scale"] = scale_or_default(OP, scale, q)
    left, right = as_window(OP, window)
    if a["causal"] and right not in (-1, 0):
        rule = "right must be -1 or 0 where queries are causal: none sees a later key"
        fail(OP, "window", rule, right)
    a["window_left"], a["window_right"] = left, right
    if mask is not None:
        a["mask_ranges"], a["mask_q_spans"], a["mask_k_spans"] = _lower_mask(
            mask, q, a["causal"], a["cu_seqlens_q"]
        )
    if score_bias is not None:
        a["score_bias"], a["score_bias_value"], a["score_bias_neg_log_n"] = lower_score_bias(
            OP, score_bias, q
        )
    if a["invariant"] and q.is_cuda:
        fail(OP, "invariant", "must be False on a GPU", True)
    widen_fields(a, q, "alibi_slopes", "sink")
    return tuple(a.values())


def _lower_mask(mask: Masks, q: Tensor, causal: bool, cu_seqlens_q: Tensor | None) -> Lowered:
    """Key positions are relative to the request; a prefix mask is refused because it needs its
    length.
    """
    several: Any = mask if isinstance(mask, tuple | list) else (mask,)
    for m in (mask,) if isinstance(mask, MASKS) else several:
        if isinstance(m, Prefix):
            fail(OP, "mask", "must not be a prefix with a cache", "prefix")
        if cu_seqlens_q is not None and isinstance(m, Segments):
            fail(OP, "mask", "must be only ranges with cu_seqlens_q", "segments")
    return lower_mask(
        OP, mask, q, 0, causal=causal, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_q
    )


def _check_values(a: Any) -> None:
    """Lengths and offsets of requests, and pages of their keys."""
    if a.cu_seqlens_q is not None:
        ends = check_cu_seqlens_values(OP, "cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
        check_longest(OP, "max_seqlen_q", ends, a.max_seqlen_q)
    check_lengths_values(OP, a.k_cache, a.seqlens_k, a.block_table)


def _unsupported(backend: str, a: Any) -> list[str]:
    if a.invariant and backend in ("cuda", "triton"):
        return ["invariant must be False"]
    # A call without these dimensions breaks a rule, which names them.
    dim, value_dim = [t.shape[-1] if t.dim() else 0 for t in (a.q, a.v_cache)]
    widest = max(dim, value_dim)
    ragged = a.cu_seqlens_q is not None or not a.causal
    if backend == "cuda" and ragged and widest > MAX_HEAD_DIM:
        rule = f"beyond {MAX_HEAD_DIM} its queries are causal and not packed; got {widest}"
        return [f"with head dimensions {rule}"]
    return []


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    out = a.q.new_empty((*a.q.shape[:-1], a.v_cache.shape[-1]))
    return out, row_statistic_like(a.q, a.kind, a.normalize)


def flops(a: Any) -> float:
    """Operations of the two products over the keys of each request, ignoring window and mask;
    causal rows of a packed call count the keys up to their own position.
    """
    room = capacity(a.k_cache, a.block_table)
    batch = a.seqlens_k.shape[0]
    lengths = a.seqlens_k.clamp(0).tolist() if known(a.seqlens_k) else [room] * batch
    if a.cu_seqlens_q is None:
        pairs = a.q.shape[1] * float(sum(lengths))
    elif known(a.cu_seqlens_q):
        sizes = a.cu_seqlens_q.diff().tolist()
        right = 0 if a.causal else a.window_right
        pairs = sum(
            float(band(sq, sk, a.window_left, right)) for sq, sk in zip(sizes, lengths, strict=True)
        )
    else:
        pairs = a.q.shape[0] * float(max(lengths, default=0))
    return 2.0 * a.q.shape[-2] * pairs * (a.q.shape[-1] + a.v_cache.shape[-1])


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q",), cache="k_cache"),
        check_values=_check_values,
        fake=_fake,
        triton="dense.attention_decode:attention_decode",
        refuses_gradients=True,
    )
)
OUT = register(TorchOp(OP + "_out"))
SPEC = register_op(
    OpSpec(
        function=attention_decode,
        lower=lower,
        sugar=frozenset(
            {
                "normalize",
                "score_bias",
                "mask",
                "window",
                "return_lse",
                "alibi_slopes",
                "sink",
                "invariant",
            }
        ),
        reference=reference.attention_decode,
        plain=functools.partial(reference.attention_decode, upcast=False),
        forward=FORWARD,
        copied=("q",),
        logarithms=(1,),
        unsupported=_unsupported,
        sharding=Sharding(
            {
                "q k_cache v_cache": "b.h.",
                "k_cache@block_table v_cache@block_table": "..h.",
                "seqlens_k": "b",
                "block_table": "b.",
                "score_bias alibi_slopes sink": "bh",
                "mask_q_spans mask_k_spans": "b..",
                "mask_ranges": "bh...",
                "k_scale v_scale": "h b.h",
                "k_scale@block_table v_scale@block_table": "h ..h",
            },
            ("b.h.", "bh."),
        ),
        paper="Flash-Decoding (Dao et al. 2023); LeanAttention (Sanovar et al. 2024)",
        flops=flops,
    )
)
