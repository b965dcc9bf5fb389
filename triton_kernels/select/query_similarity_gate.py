"""query_similarity_gate: one program per request."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Rows, launch

TILE = 1024


@triton.jit
def sum_tokens(rows, i_b, o_h, o_d, m_i, tokens):
    """Sum over tokens; the cosine is invariant to vector length."""
    b_sum = tl.zeros(o_h.shape, tl.float32)
    o_i = i_b * rows.batch + o_h * rows.head + o_d
    for t in range(tokens):
        p_x = rows.data + o_i + tl.cast(t, tl.int64) * rows.seq
        b_sum += tl.load(p_x, mask=m_i, other=0.0).to(tl.float32)
    return b_sum


@triton.jit(do_not_specialize=["tokens", "tokens_ref", "elements"])
def gate_kernel(q, q_ref, out, threshold, tokens, tokens_ref, elements, DIM: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    b_dot = tl.zeros([BLOCK], tl.float32)
    b_norm = tl.zeros([BLOCK], tl.float32)
    b_norm_ref = tl.zeros([BLOCK], tl.float32)
    for i in range(0, elements, BLOCK):
        o_i = (i + tl.arange(0, BLOCK)).to(tl.int64)
        m_i = o_i < elements
        b_x = sum_tokens(q, i_b, o_i // DIM, o_i % DIM, m_i, tokens)
        b_y = sum_tokens(q_ref, i_b, o_i // DIM, o_i % DIM, m_i, tokens_ref)
        b_dot += b_x * b_y
        b_norm += b_x * b_x
        b_norm_ref += b_y * b_y
    # cosine = q.q_ref / (|q| |q_ref|)
    length = tl.sqrt(tl.sum(b_norm, 0)) * tl.sqrt(tl.sum(b_norm_ref, 0))
    tl.store(out + i_b, tl.sum(b_dot, 0) / length >= threshold)


def query_similarity_gate(a: Any) -> Tensor:
    batch, tokens, heads, dim = a.q.shape
    out: Tensor = a.q.new_empty((batch,), dtype=torch.bool)
    rows = (Rows(t, *t.stride()[:3]) for t in (a.q, a.q_ref))
    launch(
        gate_kernel, batch, a.q, *rows, out, a.threshold, tokens, a.q_ref.shape[1], heads * dim,
        DIM=max(dim, 1), BLOCK=TILE, num_warps=4,
    )  # fmt: skip
    return out
