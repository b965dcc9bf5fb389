"""landmark_attention: a grouped softmax, with one landmark token for each block."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autocast import Autocast
from .._check import as_int, check, check_bool, check_qkv, check_tensor, reads_values
from .._lowering import scale_or_default
from ..dense.attention import attention
from ..dense.merge_attention_states import merge_attention_states
from ..select.rules import check_length_values, check_per_request
from ..select.topk_select import topk_select

OP, DECODE = "landmark_attention", "landmark_decode"


@Autocast(lower=("q", "k", "v")).applied
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal attention with a grouped softmax: the last token of a block, its landmark, weighs it.

    Query i, in block c, weighs its own block and the landmarks of the blocks before it in one
    softmax; what a landmark gets is shared by the tokens of its block. With logits
    :math:`z_j = \mathrm{scale}\; q_i \cdot k_j` and :math:`\ell_b` that of the landmark of block b:

    .. math::
       Z = \sum_{b < c} e^{\ell_b} + \sum_{j \in c,\, j \le i} e^{z_j}, \qquad
       w_j = \frac{e^{z_j}}{Z} \;(j \in c), \qquad
       w_j = \frac{e^{\ell_b}}{Z} \, \frac{e^{z_j}}{\sum_{m \in b} e^{z_m}} \;(j \in b < c)

    where sums over the tokens of a block leave its landmark out: a landmark has weight 0, and as a
    query sees what the token before it sees. The weights of a query sum to 1. The last block may be
    shorter than the others; it then has no landmark yet.

    Args:
        q: ``[B, S, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H.
        block: tokens of a block with its landmark, at least 2.
        scale: factor of q.k; None = 1/sqrt(D).
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, H, Dv]`` in the dtype of q; with return_lse also log Z, ``[B, H, S]`` float32,
        natural log. Gradients of q, k and v.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: the operations of causal attention; S/block calls of :func:`attention`, each for the
    queries of one block with every block before it, joined by :func:`merge_attention_states`. Extra
    memory B·S·H·Dv for a call, B·S²·H·Dv / (2 block) where gradients are wanted.

    Paper: Landmark Attention (Mohtashami and Jaggi 2023), section 3.1.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 200, 4, 32) for _ in range(3))
        >>> tm.landmark_attention(q, k, v, block=50).shape
        torch.Size([1, 200, 4, 32])
    """
    check_bool(OP, "return_lse", return_lse)
    block = _check_inputs(OP, q, k, v, block)
    check(k.shape[1] == q.shape[1], OP, "k", f"must have the length of q, {q.shape[1]}", k.shape[1])
    factor = scale_or_default(OP, scale, q)
    found = [
        _block_of_queries(q, k, v, first, block, factor, backend)
        for first in range(0, max(q.shape[1], 1), block)
    ]
    out, lse = torch.cat([o for o, _ in found], 1), torch.cat([x for _, x in found], 2)
    return (out, lse) if return_lse else out


def _check_inputs(op: str, q: Tensor, k: Tensor, v: Tensor, block: int) -> int:
    """block as an int."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, t)
    block = as_int(op, "block", block)
    check(2 <= block < 2**31, op, "block", "must be 2 to 2^31 - 1", block)
    check_qkv(op, q, k, v, 4, True)
    return block


def _block_of_queries(
    q: Tensor, k: Tensor, v: Tensor, first: int, block: int, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The queries of the block that begins with token `first`."""
    rows = q[:, first : first + block]
    out, lse = _own_block(rows, k, v, first, block, scale, backend)
    if first == 0:
        return out, lse
    batch, blocks = rows.shape[0], first // block
    # A block is a request of its own.
    keys, values = (
        t[:, :first].unflatten(1, (blocks, block))[:, :, :-1].flatten(0, 1) for t in (k, v)
    )
    queries = rows[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 1)
    outs = attention(queries, keys, values, scale=scale, backend=backend)
    outs = outs.unflatten(0, (batch, blocks)).transpose(0, 1)
    lses = _landmark_logits(rows, k[:, block - 1 : first : block], scale).to(lse.dtype)
    return merge_attention_states(
        torch.cat([out[None], outs]),
        torch.cat([lse[None], lses.permute(3, 0, 1, 2)]),
        backend=backend,
    )


def _own_block(
    rows: Tensor, k: Tensor, v: Tensor, first: int, block: int, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """What queries see of their own block, which has a landmark if it is complete."""
    ordinary = min(rows.shape[1], block - 1)
    keys, values = (t[:, first : first + ordinary] for t in (k, v))
    out, lse = attention(
        rows[:, :ordinary], keys, values, causal=True, scale=scale, return_lse=True, backend=backend
    )
    if ordinary == rows.shape[1]:
        return out, lse
    last, last_lse = attention(
        rows[:, ordinary:], keys, values, scale=scale, return_lse=True, backend=backend
    )
    return torch.cat([out, last], 1), torch.cat([lse, last_lse], 2)


def _landmark_logits(q: Tensor, landmarks: Tensor, scale: float) -> Tensor:
    """[B, H, Sq, n] of q [B, Sq, H, D] and landmarks [B, n, Hk, D], at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(2, (landmarks.shape[2], -1)).to(wide)
    return scale * torch.einsum("bihgd,bnhd->bhgin", grouped, landmarks.to(wide)).flatten(1, 2)


@Autocast(lower=("q",), cache="k_cache").applied
def landmark_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seqlens_k: Tensor,
    block: int = 64,
    topk: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of decoding with :func:`landmark_attention`, over the blocks whose landmarks score
    highest.

    The newest token of each request, whose key is in the cache, sees its own block, and of the
    complete blocks before it the topk with the greatest landmark logits, for each head its own.
    The weights are those of the grouped softmax over these blocks alone.

    Args:
        q: ``[B, 1, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256.
        k_cache, v_cache: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H.
        seqlens_k: ``[B]`` int32, keys of each request, 0 to S.
        block: tokens of a block with its landmark, at least 2.
        topk: blocks to retrieve, at least 1. None: all, which is the last row of
            :func:`landmark_attention`.
        scale: factor of q.k; None = 1/sqrt(D).
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, 1, H, Dv]`` in the dtype of q; with return_lse also log Z, ``[B, H, 1]`` float32.
        A request without keys, or whose only key is that of a landmark, has out 0 and lse -inf.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads S / block landmarks and (topk + 1) block keys for a head.

    Paper: Landmark Attention (Mohtashami and Jaggi 2023), section 3.2. Positions are those with
    which keys were written to the cache.

    Example:
        >>> import torch, tokenmill as tm
        >>> k, v = (torch.randn(2, 512, 2, 32) for _ in range(2))
        >>> lengths = torch.tensor([512, 301], dtype=torch.int32)
        >>> tm.landmark_decode(torch.randn(2, 1, 4, 32), k, v, seqlens_k=lengths, topk=2).shape
        torch.Size([2, 1, 4, 32])
    """
    check_bool(DECODE, "return_lse", return_lse)
    check_tensor(DECODE, "seqlens_k", seqlens_k)
    block = _check_inputs(DECODE, q, k_cache, v_cache, block)
    check(q.shape[1] == 1, DECODE, "q", "must have 1 token", q.shape[1])
    check_per_request(DECODE, "seqlens_k", seqlens_k, q.shape[0], "q", q)
    if topk is not None:
        topk = as_int(DECODE, "topk", topk)
        check(topk >= 1, DECODE, "topk", "must be at least 1", topk)
    if reads_values(seqlens_k):
        check_length_values(DECODE, "seqlens_k", seqlens_k, k_cache.shape[1])
    factor = scale_or_default(DECODE, scale, q)
    newest = seqlens_k.long()[:, None] - 1
    first = newest.clamp(min=0) // block * block  # of the own block
    chosen, logits = _retrieve(q, k_cache, first, block, topk, factor, backend)
    own = first[:, :, None].expand(-1, q.shape[2], -1)
    starts = torch.cat([own, chosen.clamp(min=0) * block], 2)
    ends = torch.minimum(starts + block - 1, newest[..., None] + 1)
    outs, lses = _blocks_of_keys(q, k_cache, v_cache, starts, ends, block, factor, backend)
    lses = torch.cat([lses[:, :, :1], torch.where(chosen < 0, -torch.inf, logits)], 2)
    out, lse = merge_attention_states(
        outs.permute(2, 0, 1, 3)[:, :, None], lses.permute(2, 0, 1)[..., None], backend=backend
    )
    return (out, lse) if return_lse else out


def _retrieve(
    q: Tensor, k: Tensor, first: Tensor, block: int, topk: int | None, scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Blocks [B, H, n] for each head, -1 after the last, and the logits of their landmarks."""
    logits = _landmark_logits(q, k[:, block - 1 :: block], scale)[:, :, 0]
    count = logits.shape[2]
    if count == 0:
        return first.new_zeros((*q.shape[:1], q.shape[2], 0)), logits
    complete = (first // block).to(torch.int32).expand(-1, q.shape[2])
    wanted = count if topk is None else min(topk, count)
    chosen, _ = topk_select(
        logits.flatten(0, 1), wanted, lengths=complete.flatten().contiguous(), backend=backend
    )
    chosen = chosen.long().unflatten(0, (q.shape[0], q.shape[2]))
    return chosen, logits.gather(2, chosen.clamp(min=0))


def _blocks_of_keys(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, block: int, scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each head to tokens starts .. ends - 1 [B, H, n] of its blocks: [B, H, n, Dv]
    and lse [B, H, n]."""
    batch, heads, parts = starts.shape
    positions = starts[..., None] + torch.arange(min(block - 1, k.shape[1]), device=q.device)
    request = torch.arange(batch, device=q.device)[:, None, None, None]
    head = torch.arange(heads, device=q.device) // max(heads // max(k.shape[2], 1), 1)
    inside = positions.clamp(max=max(k.shape[1] - 1, 0))
    absent = positions >= ends[..., None]
    keys, values = (
        t[request, inside, head[None, :, None, None]].masked_fill(absent[..., None], 0)
        .flatten(0, 2)[:, :, None] for t in (k, v)
    )  # fmt: skip
    queries = q[:, 0, :, None].expand(-1, -1, parts, -1).flatten(0, 2)[:, None, None]
    hidden = torch.zeros_like(absent, dtype=q.dtype).masked_fill(absent, -torch.inf)
    out, lse = attention(
        queries, keys, values, bias=hidden.flatten(0, 2)[:, None, None], scale=scale,
        return_lse=True, backend=backend,
    )  # fmt: skip
    return (out[:, 0, 0].unflatten(0, (batch, heads, parts)),
            lse[:, 0, 0].unflatten(0, (batch, heads, parts)))  # fmt: skip
