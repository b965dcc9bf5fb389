"""token_select: the k tokens of a cache with the most votes over all heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from .._check import as_int, check, check_choice, check_tensor
from .kv_block_scores import kv_block_scores
from .topk_select import topk_select

OP = "token_select"
MAX_KERNEL = 1023


def token_select(
    q: Tensor,
    k_cache: Tensor,
    *,
    k: int,
    num_sink: int = 128,
    num_recent: int = 512,
    vote: str = "softmax",
    kernel_size: int = 1,
    scale: float | None = None,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
    k_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The k tokens of a cache with the most votes over all heads, excluding sink and recent
    tokens.

    Candidates are the tokens num_sink to seqlens_k - num_recent - 1. The mean of the queries of q
    (rounded to their dtype) gives each head a softmax over the candidates, and a token's vote is
    its sum over heads: :math:`w_t = \sum_h \exp(scale\, \bar q_h \cdot k_t - lse_h)`. The list only
    holds candidates: the first num_sink and the last num_recent tokens are always attended to, and
    where there are at most k candidates, all of them are listed.

    This is :func:`kv_block_scores` with "softmax_vote", then :func:`topk_select`. The keys are read
    once. Between the two kernels pass 4 S bytes of votes, and within the first 4 H S bytes of
    scores, each written once and read at most three times, compared with 2 Hk D S bytes of 16-bit
    keys: with H = 32, Hk = 8 and D = 128, each pass costs 6 % of the keys. Reading the keys twice
    would cost 100 %.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32: one token, or the tokens of a chunk.
            Their position is taken to be the end of the cache, so num_recent should cover a chunk
            that is already in it.
        k_cache: ``[B, S, Hk, D]`` in the dtype of q or in float8_e4m3fn, Hk a divisor of H; with
            block_table ``[pages, page_size, Hk, D]``.
        k: number of tokens to select, 1 to 65536.
        num_sink: number of sink (first) tokens, which are not in the list.
        num_recent: number of recent (last) tokens, which are not in the list.
        vote: "softmax".
        kernel_size: max-pooling of votes: each candidate gets the maximum over a window of
            kernel_size candidates centred on it; odd, up to 1023. 1: no pooling.
        scale: factor of the products. None = 1/sqrt(D); the authors' code has 1.
        seqlens_k: int32 ``[B]``, number of tokens of each request; None: all.
        block_table: ``[B, P]`` int32, the pages of each request.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).
        k_scale: scales of a cache in float8_e4m3fn: float32 ``[1]``, ``[Hk]`` or, for each token,
            ``[B, S, Hk]`` (``[pages, page_size, Hk]``); None = 1.

    Returns:
        (indices ``[B, 1, 1, k]`` int32, counts ``[B, 1, 1]`` int32): one list for all heads, of
        positions in the request, ascending, -1 after the last; ties go to the lower position. Not
        differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 H S D operations; reads each key once.

    Paper: TokenSelect (Wu et al. 2024), section 4.2.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, cache = torch.ones(1, 1, 2, 4), torch.zeros(1, 100, 1, 4)
        >>> cache[0, 30:33] = 1
        >>> indices, counts = tm.token_select(q, cache, k=3, num_sink=4, num_recent=16)
        >>> indices.flatten().tolist(), counts.flatten().tolist()
        ([30, 31, 32], [3])
    """
    check_tensor(OP, "q", q)
    check(q.dim() == 4, OP, "q", "must have 4 dimensions [B, S, H, D]", q.dim())
    k = as_int(OP, "k", k)
    check_choice(OP, "vote", vote, "softmax")
    kernel_size = as_int(OP, "kernel_size", kernel_size)
    odd = 1 <= kernel_size <= MAX_KERNEL and kernel_size % 2 == 1
    check(odd, OP, "kernel_size", f"must be odd and 1 to {MAX_KERNEL}", kernel_size)
    votes = kv_block_scores(
        q, k_cache, q_reduce="mean", block_q=max(q.shape[1], 1), head_reduce="softmax_vote",
        scale=scale, num_sink=num_sink, num_recent=num_recent, seqlens_k=seqlens_k,
        block_table=block_table, backend=backend, k_scale=k_scale,
    )  # fmt: skip
    batch, _, rows, tokens = votes.shape
    votes = votes.view(batch * rows, tokens)
    if kernel_size > 1 and votes.numel() > 0:
        out = ~(votes > -torch.inf)  # not a candidate, or NaN, which is never selected
        votes = votes.masked_fill(out, -torch.inf)
        votes = max_pool1d(votes, kernel_size, 1, kernel_size // 2).masked_fill(out, -torch.inf)
    # one row of votes for each request
    indices, counts = topk_select(
        votes, k, lengths=seqlens_k if rows == 1 else None, backend=backend
    )
    return indices.view(batch, 1, rows, k), counts.view(batch, 1, rows)
