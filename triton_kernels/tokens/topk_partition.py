"""topk_partition: radix select of the k-th key of a row in four 8-bit digits, then each token goes
to its side."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, launch

TILE = 2048
BINS = tl.constexpr(256)
INVALID = tl.constexpr(1)  # key of an invalid token
# Arguments excluded from specialization.
SIZES = ["scores_batch", "valid_batch", "tokens", "k", "others", "protect_first", "protect_last"]


class Tokens(NamedTuple):
    scores: Tensor  # [B, N]
    valid: Tensor | None  # [B, N], bytes


@triton.jit
def keys_of(row, o_i, tokens, protect_first, protect_last, LARGEST: tl.constexpr):
    """Unsigned integer keys ordered as the tokens, 0 past the last token."""
    m_i = o_i < tokens
    b_x = tl.load(row.scores + o_i, mask=m_i, other=0.0).to(tl.float32)
    if not LARGEST:
        b_x = -b_x
    b_bits = (b_x + 0.0).to(tl.uint32, bitcast=True)  # -0 + 0 = 0
    b_key = tl.where((b_bits >> 31) != 0, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)
    b_key = tl.where(b_x > -INF, b_key, INVALID + 1)
    if row.valid is not None:
        m_valid = tl.load(row.valid + o_i, mask=m_i, other=0) != 0
        b_key = tl.where(m_valid, b_key, INVALID)
    m_protected = (o_i < protect_first) | (o_i >= tokens - protect_last)
    b_key = tl.where(m_protected, 0xFFFFFFFF, b_key)
    return tl.where(m_i, b_key, 0).to(tl.uint32)


@triton.jit(do_not_specialize=SIZES)
def partition_kernel(
    rows, counts, keep, rest, kept_keys, scores_batch, valid_batch, tokens, k, others,
    protect_first, protect_last,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    if rows.valid is not None:
        row = Tokens(rows.scores + i_b * scores_batch, rows.valid + i_b * valid_batch)
    else:
        row = Tokens(rows.scores + i_b * scores_batch, None)

    wanted = k
    if counts is not None:
        wanted = tl.minimum(tl.load(counts + i_b), k)
        wanted = tl.maximum(wanted, protect_first + protect_last)
    nothing = wanted == 0
    threshold = tl.zeros([], tl.uint32)
    o_bin = tl.arange(0, BINS)
    for DIGIT in tl.static_range(4):
        b_bins = tl.zeros([BINS], tl.int32)
        for i_tile in range(0, tokens, BLOCK):
            o_i = i_tile + tl.arange(0, BLOCK)
            b_key = keys_of(row, o_i, tokens, protect_first, protect_last, LARGEST)
            m_key = b_key != 0
            if DIGIT > 0:
                m_key = m_key & ((b_key >> (32 - 8 * DIGIT)) == threshold)
            b_digit = ((b_key >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
            b_bins += tl.histogram(b_digit, BINS, mask=m_key)
        b_above = tl.sum(b_bins, 0) - tl.cumsum(b_bins, 0)
        m_bin = (b_above < wanted) & (wanted <= b_above + b_bins)
        digit = tl.sum(tl.where(m_bin, o_bin, 0), 0)
        wanted -= tl.sum(tl.where(m_bin, b_above, 0), 0)
        threshold = (threshold << 8) | digit.to(tl.uint32)
    threshold = tl.where(nothing, 0xFFFFFFFF, threshold).to(tl.uint32)

    kept = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for i_tile in range(0, tokens, BLOCK):
        o_i = i_tile + tl.arange(0, BLOCK)
        b_key = keys_of(row, o_i, tokens, protect_first, protect_last, LARGEST)
        b_tied = (b_key == threshold).to(tl.int32)
        o_tie = ties + tl.cumsum(b_tied, 0) - b_tied  # rank among the ties
        b_taken = ((b_key > threshold) | ((b_tied != 0) & (o_tie < wanted))).to(tl.int32)
        o_taken = kept + tl.cumsum(b_taken, 0) - b_taken
        tl.store(keep + i_b * k + o_taken, o_i, mask=b_taken != 0)
        if kept_keys is not None:
            tl.store(kept_keys + i_b * k + o_taken, b_key.to(tl.int64), mask=b_taken != 0)
        m_rest = (b_taken == 0) & (o_i < tokens)
        tl.store(rest + i_b * others + o_i - o_taken, o_i, mask=m_rest)
        kept += tl.sum(b_taken, 0)
        ties += tl.sum(b_tied, 0)


def topk_partition(a: Any) -> tuple[Tensor, Tensor]:
    scores, valid, counts, k = a.scores, a.valid, a.counts, a.k
    batch, tokens = scores.shape
    by_score = a.order == "score"
    if counts is None and (k == 0 or (k == tokens and not by_score)):  # one side gets all
        every = torch.arange(tokens, dtype=torch.int32, device=scores.device).repeat(batch, 1)
        none = every.new_empty((batch, 0))
        return (every, none) if k else (none, every)
    others = tokens - k if counts is None else tokens
    keep = scores.new_empty((batch, k), dtype=torch.int32)
    rest = scores.new_empty((batch, others), dtype=torch.int32)
    keys = scores.new_empty((batch, k), dtype=torch.int64) if by_score else None
    if counts is not None:  # padding of each row
        for t, value in ((keep, -1), (rest, -1), (keys, 0)):
            if t is not None:
                t.fill_(value)
    rows = Tokens(scores, None if valid is None else valid.view(torch.uint8))
    block = min(TILE, max(32, triton.next_power_of_2(tokens)))
    launch(
        partition_kernel, batch, scores, rows, counts, keep, rest, keys, scores.stride(0),
        0 if valid is None else valid.stride(0), tokens, k, others, a.protect_first,
        a.protect_last, LARGEST=a.largest, BLOCK=block, num_warps=8,
    )  # fmt: skip
    if keys is not None:  # keys are in token order and the sort is stable
        keep = keep.gather(1, keys.argsort(dim=1, descending=True, stable=True))
    return keep, rest
