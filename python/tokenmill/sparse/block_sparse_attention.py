"""block_sparse_attention: exact attention of blocks of queries to listed blocks of keys."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Required, Unpack

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, kept, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    MAX_HEAD_DIM,
    check_bool,
    fail,
)
from .._flops import band, known
from .._kv_cache import capacity
from .._lowering import scale_or_default, take_options, widen_fields
from .._other_names import answered_by
from ..reference.sparse import block_sparse_attention as reference
from ..registry import OpSpec, Sharding, register_op
from ..select.rules import check_block_table_values, check_packed_values
from .gradients import cotangents

OP = "block_sparse_attention"


class BlockSparseOptions(TypedDict, total=False):
    """Keywords of :func:`block_sparse_attention` other than return_lse and return_mass."""

    block_q: Required[int]
    block_k: Required[int]
    causal: bool
    num_sink: int
    num_recent: int
    scale: float | None
    softcap: float
    seqlens_k: Tensor | None
    sink: Tensor | None
    block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    out: Tensor | None
    backend: str | None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_q: int,
    block_k: int,
    **given: Any,
) -> Tensor | tuple[Tensor, ...]:
    out, backend = take_options(block_sparse_attention, given)
    forward_only = "block_table" if given.get("block_table") is not None else ""
    if _is_wide(q) or _is_wide(v):
        forward_only = "latent heads"
    if forward_only and torch.is_grad_enabled():
        for name, t in (("q", q), ("k", k), ("v", v), ("sink", given.get("sink"))):
            if isinstance(t, Tensor) and t.requires_grad:
                rule = f"must not require a gradient, there is none with {forward_only}"
                fail(OP, name, rule, t.requires_grad)
    given["block_q"], given["block_k"] = block_q, block_k
    asked = (True, given.get("return_lse") is True, given.get("return_mass") is True)
    used = 3 if asked[2] else 2 if asked[1] else 1
    results = call(SPEC, (q, k, v, indices, counts), given, backend, out, used=used)
    wanted = tuple(r for r, keeps in zip(results, asked, strict=False) if keeps)
    return wanted if len(wanted) > 1 else wanted[0]


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_mass: Literal[False] = ...,
    **options: Unpack[BlockSparseOptions],
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    return_lse: Literal[True],
    return_mass: Literal[False] = ...,
    **options: Unpack[BlockSparseOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_mass: Literal[True],
    **options: Unpack[BlockSparseOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    return_lse: Literal[True],
    return_mass: Literal[True],
    **options: Unpack[BlockSparseOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...


@answered_by(_run)
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    num_sink: int = 0,
    num_recent: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    seqlens_k: Tensor | None = None,
    sink: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Softmax attention of blocks of queries to listed blocks of keys, with gradients.

    Queries block_q * r to block_q * (r + 1) - 1 share the list of row r. Request b has n =
    seqlens_k[b] keys, and query i of its m is at position p = n - m + i. It sees the keys j < n
    (and j <= p if causal) that are

    - in the blocks of its list: keys id * block_k to (id + 1) * block_k - 1,
    - among the first num_sink,
    - among its own last num_recent, j > p - num_recent,

    each once, even if these sets overlap. Lists and counts stay on the device: nothing is planned
    on the host, and the launch depends only on shapes.

    Requests may be packed (cu_seqlens_q), with keys packed too, padded or in pages. The result and
    gradients of a request do not depend on the other requests, bit for bit; gradients of the
    reference, and heads wider than 256 on a GPU, up to the order of sums.

    Args:
        q: ``[B, Sq, H, D]``, float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256; with block_q = 1 up to 576; packed
            ``[T, H, D]``.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``, Hk a divisor of H (GQA, MQA), Dv up to
            256; with block_q = 1 up to 512; packed ``[Tk, Hk, D]`` and ``[Tk, Hk, Dv]`` with
            cu_seqlens_k. v may be a view of k, as in a latent cache shared by all heads (Hk = 1).
            Heads wider than 256 are forward only.
        indices: int32 ``[B, 1, R, K]`` (lists for all heads), ``[B, Hk, R, K]`` (for each KV head)
            or ``[B, H, R, K]`` (for each query head), with R = ceil(Sq / block_q). For packed
            queries ``[1 | Hk | H, R, K]`` with R = T // block_q + B, as :func:`hip_block_select`
            returns: row r of request b is row cu_seqlens_q[b] // block_q + b + r, other rows are
            not read. Lists ascend, as :func:`topk_select` returns: an id counts if it is in range
            and greater than every id before it.
        counts: int32 ``[B, 1 | Hk | H, R]`` (packed ``[1 | Hk | H, R]``), number of entries of each
            list, clamped to 0 to K.
        block_q, block_k: queries of a row and keys of an entry, powers of two up to 128. Sq and Sk
            need not be multiples.
        causal: a query sees no later key.
        num_sink: number of sink (first) keys, always seen; lists need not hold them.
        num_recent: number of recent (last) keys, up to the query itself, likewise; only with
            causal.
        scale: factor of q.k; None = 1/sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        seqlens_k: int32 ``[B]``, keys of each request, clamped to 0 to Sk. None: all.
        sink: ``[H]``: a learnable logit of each head that adds to the row sum and has no value.
        block_table: int32 ``[B, P]``, the pages of each request in order: k and v are pages
            ``[pages, page_size, Hk, ...]``, page_size a power of two, and seqlens_k must be given.
            Entries after a request's last key may hold anything. Forward only.
        cu_seqlens_q: int32 ``[B + 1]``, offsets of packed queries. Their keys are packed too, or
            ``[B, Sk, Hk, ...]`` or pages.
        cu_seqlens_k: the same for packed keys. None with a packed k: cu_seqlens_q.
        return_lse: also return lse.
        return_mass: also return the probability mass of each list entry.
        out: preallocated result: shape and dtype as returned, any non-overlapping strides with a
            contiguous last dimension; it shares no memory with the inputs. Then no input may
            require a gradient, unless under no_grad.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` (packed ``[T, H, Dv]``) in the dtype of q; with return_lse also lse
        ``[B, H, Sq]`` (``[H, T]``) float32, natural log, also differentiable; with return_mass
        finally mass, float32 in the shape of indices: the probabilities of the keys that an entry
        added, summed over its keys, the queries of its row and the heads that read the list; 0
        where it added none (sink and recent keys are not counted for the list). With lists for each
        query head (an expanded tensor takes no memory) the mass is per head; with block_q = block_k
        = 1 and lists for all heads it is the target of :func:`indexer_kl_loss`. There is no
        gradient through mass. A query with no visible key has out 0 and lse -inf (with a sink: lse
        = sink), and gets no gradient. Gradients: q, k, v, sink; 0 for keys that no query lists.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 H (D + Dv) operations for each pair of a query and a key that it sees, 2 H D more
    for listed pairs with return_mass, backward 2.5 to 3.5 times that; memory linear in Sq, Sk and
    the entries.

    Paper: HiP (Lee et al. 2024), section 3.3; SeerAttention, MInference and native sparse attention
    read such lists too; online softmax as in FlashAttention-2 (Dao 2023).

    Example:
        >>> import torch, tokenmill as tm
        >>> q = k = torch.zeros(1, 128, 2, 16)
        >>> v = torch.arange(128.0).view(1, 128, 1, 1).repeat(1, 1, 2, 16)
        >>> indices = torch.tensor([[[[0, -1], [0, 1]]]], dtype=torch.int32)
        >>> counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
        >>> out = tm.block_sparse_attention(q, k, v, indices, counts, block_q=64, block_k=32)
        >>> out[0, ::64, 0, 0].round(decimals=4).tolist()  # means of keys 0 to 31, and of 0 to 63
        [15.5, 31.5]
    """
    raise NotImplementedError


def _is_wide(t: Any) -> bool:
    """Whether q or v has the wide head_dim of latent caches, which is forward only."""
    return isinstance(t, Tensor) and t.dim() > 0 and t.shape[-1] > MAX_HEAD_DIM


def lower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    *,
    return_lse: bool = False,
    op: str = OP,
    **given: Any,
) -> tuple[Any, ...]:
    a = FORWARD.fields(op, q=q, k=k, v=v, indices=indices, counts=counts, **given)
    check_bool(op, "return_lse", return_lse)
    if a["cu_seqlens_q"] is not None and a["cu_seqlens_k"] is None and k.dim() == 3:
        a["cu_seqlens_k"] = a["cu_seqlens_q"]
    a["scale"] = scale_or_default(op, a["scale"], q)
    widen_fields(a, q, "sink")
    return tuple(a.values())


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    mass = a.indices.shape if a.return_mass else (0,)
    shape = a.q[..., 0].transpose(-1, -2).shape
    return (
        a.q.new_empty((*a.q.shape[:-1], a.v.shape[-1])),
        a.q.new_empty(shape, dtype=torch.float32),
        a.q.new_empty(mass, dtype=torch.float32),
    )


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    requests = a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.shape[0] - 1
    heads = (requests, a.q.shape[-2]) if a.needs_dsink and a.sink is not None else (0,)
    return (
        *(t.new_empty(t.shape) for t in (a.q, a.k, a.v)),
        a.q.new_empty(heads, dtype=torch.float32),
    )


def _check_values(a: Any) -> None:
    check_packed_values(OP, a)
    check_block_table_values(OP, a.block_table, a.k, a.seqlens_k)


def _backward(
    ops: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None
) -> Gradients:
    a, (out, lse) = kept(ctx)
    dout, dlse = cotangents(dout, dlse, out)
    needs_dsink = needed_gradients(ctx)["sink"]
    dq, dk, dv, dsink = ops.block_sparse_attention_backward(dout, dlse, out, lse, needs_dsink, *a)
    return {"q": dq, "k": dk, "v": dv, "sink": dsink.sum(0) if needs_dsink else None}


def flops(a: Any) -> float:
    """Operations of the two products over the visible keys of listed blocks, and over sink and
    recent keys.
    """
    heads, dim = a.q.shape[-2:]
    sizes = (a.block_q, a.block_k, a.causal)
    pairs = more = maximum = 0.0
    for sq, sk, indices, counts in _requests(a):
        if known(a.counts):
            pairs += _listed_pairs(sq, sk, indices, counts, *sizes)
        else:
            pairs += float(indices.numel() * a.block_q * a.block_k)
        requests = indices.shape[0]
        more += requests * heads * sq * (a.num_sink + a.num_recent)
        maximum += requests * heads * band(sq, sk, -1, 0 if a.causal else -1)
    pairs *= heads / max(a.indices.shape[-3], 1)
    return float(2.0 * min(pairs + more, maximum) * (dim + a.v.shape[-1]))


def _requests(a: Any) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Queries, keys and lists of requests, grouped by equal sizes; packed requests of unknown
    lengths count as one.
    """
    sq = a.q.shape[-3]
    sk = a.k.shape[0] if a.cu_seqlens_k is not None else capacity(a.k, a.block_table)
    if a.cu_seqlens_q is None:
        yield sq, sk, a.indices, a.counts
    elif not known(a.cu_seqlens_q):
        yield sq, sk, a.indices[None], a.counts[None]
    else:
        ends = a.cu_seqlens_q.tolist()
        ends_k = None if a.cu_seqlens_k is None else a.cu_seqlens_k.tolist()
        for b, (first, end) in enumerate(itertools.pairwise(ends)):
            row = first // a.block_q + b
            rows = slice(row, row + -(-(end - first) // a.block_q))
            keys = sk if ends_k is None else ends_k[b + 1] - ends_k[b]
            yield end - first, keys, a.indices[None, :, rows], a.counts[None, :, rows]


def _listed_pairs(
    sq: int, sk: int, indices: Tensor, counts: Tensor, block_q: int, block_k: int, causal: bool
) -> float:
    """Number of pairs of a query and a visible listed key."""
    entries = torch.arange(indices.shape[3], device=indices.device)
    first_row = torch.arange(indices.shape[2], device=indices.device)[:, None] * block_q
    rows = (sq - first_row).clamp(0, block_q)
    first_key = indices.long() * block_k
    keys = (sk - first_key).clamp(0, block_k)

    def before(x: Tensor) -> Tensor:
        """Sum of clamp(m, 0, keys) over m < x."""
        inside = x.clamp(min=0).minimum(keys + 1)
        return inside * (inside - 1) // 2 + (x - keys - 1).clamp(min=0) * keys

    # number of the block's keys that its first query sees
    start = first_row + sk - sq + 1 - first_key
    pairs = before(start + rows) - before(start) if causal else rows * keys
    return float(pairs.where(entries < counts[..., None], 0).sum())


def backward_flops(a: Any) -> float:
    """Operations of the five products of the backward."""
    return 2.5 * flops(a)


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v")),
        check_values=_check_values,
        fake=_fake,
        triton=f"sparse.{OP}:{OP}",
        backward=_backward,
        saves=("out", "lse"),
        constant=("mass",),
    )
)
OUT = register(TorchOp(OP + "_out"))
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton=f"sparse.{OP}_backward:{OP}_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=block_sparse_attention,
        lower=lower,
        sugar=frozenset({"return_lse", "cu_seqlens_q", "sink"}),
        reference=reference.block_sparse_attention,
        plain=functools.partial(reference.block_sparse_attention, upcast=False),
        forward=FORWARD,
        differentiable=("q", "k", "v", "sink"),
        logarithms=(1,),
        sharding=Sharding(
            {
                "q k v": "b.h.",
                "k@block_table v@block_table": "..h.",
                "block_table": "b.",
                "indices": "bh..",
                "counts": "bh.",
                "seqlens_k": "b",
                "sink": "bh",
            },
            ("b.h.", "bh.", "b..."),  # heads on several shards may read the same list
            without=("cu_seqlens_q", "cu_seqlens_k"),
        ),
        paper="HiP (Lee et al. 2024); FlashAttention-2 (Dao 2023)",
        flops=flops,
        backward_flops=backward_flops,
    )
)
