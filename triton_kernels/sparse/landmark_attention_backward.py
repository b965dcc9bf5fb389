"""Gradients of landmark_attention, without atomics: one kernel owns the queries, one the keys.

With D the mean of dp over an earlier block under its own softmax, g = P_landmark the share of its
landmark, and delta = rowsum(dO O) - dlse:
    dz = P (dp - D),  dz_landmark = g (D - delta)     in an earlier block
    dz = P (dp - delta)                               in the query's own block
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.operator import as_record

from ..common import dot, head_of, launch, load_rows, program, scores, slice_of, store_rows
from ..dense.attention_backward import load_lse
from ..dense.attention_decode_merge import rows_of
from .landmark_attention import (
    SIZES,
    Blocks,
    Call,
    add_statistics,
    block_statistics,
    blocks_of,
    columns_of,
    gate_of,
    parts_seen,
    queries_of,
    seen_keys,
    spread,
    values_at,
)


@triton.jit
def gradients(b_z, b_dp, b_lse, b_delta, found, o_i, columns, block):
    """P and dz of a tile [BLOCK_M, BLOCK_N]."""
    N: tl.constexpr = b_z.shape[1]
    m_earlier, m_seen = seen_keys(o_i, columns, block)
    b_mean = found.b_mean / tl.where(found.b_sum == 0.0, 1.0, found.b_sum)
    b_gate = tl.exp2(found.b_landmark - b_lse[:, None])
    b_pull = b_gate * (b_mean - b_delta[:, None])
    b_p = tl.exp2(b_z + tl.where(m_earlier, spread(gate_of(found), N), 0.0) - b_lse[:, None])
    b_p = tl.where(m_seen, b_p, 0.0)
    b_dz = b_p * (b_dp - tl.where(m_earlier, spread(b_mean, N), b_delta[:, None]))
    b_dz = tl.where(m_seen, b_dz, 0.0)
    m_pulled = m_earlier & columns.m_landmark[None, :]
    return b_p, tl.where(m_pulled, spread(b_pull, N), b_dz)


@triton.jit(do_not_specialize=SIZES)
def landmark_queries_kernel(
    dout, dlse, out, lse, delta, q, k, v, dq, terms, tokens, block, heads, group, tiles, shape
):
    """dq and delta of a tile of queries."""
    i_tile, i_h, i_b = program(tiles, heads)
    first = (tiles - 1 - i_tile) * shape.BLOCK_M
    head = head_of(terms, i_b, i_h, tokens)
    blocks = blocks_of(k, v, terms, head, tokens, block, i_b, i_h // group)
    queries = queries_of(q, dout, i_b, i_h, first, tokens, shape)
    o_i = queries.o_i
    b_dout = queries.b_dout
    m_i = o_i < tokens
    b_out = load_rows(slice_of(out, i_b, i_h, 0, tokens), o_i, shape.VALUE_DIM, shape.BLOCK_V)
    o_row = (i_b * heads + i_h) * tokens + o_i
    # delta = rowsum(dO O) - dlse
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + o_row, mask=m_i, other=0.0)
    tl.store(delta + o_row, b_delta, mask=m_i)
    b_lse = load_lse(lse + o_row, m_i, head)

    b_dq = tl.zeros([shape.BLOCK_M, shape.BLOCK_D], tl.float32)
    for first_block in range(0, queries.last // block + 1, shape.NB):
        parts = parts_seen(first_block, queries.last, block, shape)
        found = block_statistics(queries, blocks, first_block, parts, shape)
        for part in range(parts):
            columns = columns_of(first_block, part, block, tokens, shape)
            b_k = load_rows(blocks.k, columns.o_j, shape.HEAD_DIM, shape.BLOCK_D)
            o_v = values_at(columns, tokens)
            b_v = load_rows(blocks.v, o_v, shape.VALUE_DIM, shape.BLOCK_V)
            # S = Q K^T, dP = dO V^T
            b_qk = dot(queries.b_q, tl.trans(b_k))
            b_z = scores(b_qk, o_i[:, None], columns.o_j[None, :], terms, head, None)
            b_dp = dot(b_dout, tl.trans(b_v))
            if not shape.LONG:
                found = add_statistics(found, b_z, b_dp, columns, shape.NB)
            _, b_dz = gradients(b_z, b_dp, b_lse, b_delta, found, o_i, columns, block)
            # dQ += dz K
            b_dq += dot(b_dz, b_k)

    store_rows(slice_of(dq, i_b, i_h, 0, tokens), o_i, b_dq * terms.scale, shape.HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def landmark_keys_kernel(
    dout, lse, delta, q, k, v, dk, dv, terms, tokens, block, heads, group, tiles, shape
):
    """dk and dv of a tile of keys, summed over the query heads that read it. For a tile that is
    part of a block, the statistics of the whole block are recomputed for each tile of queries."""
    i_tile, i_kv, i_b = program(tiles, heads // group)
    parts = 1
    if shape.LONG:
        parts = tl.cdiv(block, shape.BLOCK_N)
    first_block = i_tile // parts * shape.NB
    part = i_tile % parts
    columns = columns_of(first_block, part, block, tokens, shape)
    keys = slice_of(k, i_b, i_kv, 0, tokens)
    values = slice_of(v, i_b, i_kv, 0, tokens)
    b_k = load_rows(keys, columns.o_j, shape.HEAD_DIM, shape.BLOCK_D)
    b_v = load_rows(values, values_at(columns, tokens), shape.VALUE_DIM, shape.BLOCK_V)

    b_dk = tl.zeros([shape.BLOCK_N, shape.BLOCK_D], tl.float32)
    b_dv = tl.zeros([shape.BLOCK_N, shape.BLOCK_V], tl.float32)
    begin = (first_block * block + part * shape.BLOCK_N) // shape.BLOCK_M * shape.BLOCK_M
    count = tl.maximum(tl.cdiv(tokens - begin, shape.BLOCK_M), 0)
    for n in range(group * count):
        i_h = i_kv * group + n // count
        head = head_of(terms, i_b, i_h, tokens)
        first = begin + n % count * shape.BLOCK_M
        queries = queries_of(q, dout, i_b, i_h, first, tokens, shape)
        o_i = queries.o_i
        m_i = o_i < tokens
        o_row = (i_b * heads + i_h) * tokens + o_i
        # S = Q K^T, dP = dO V^T
        b_lse = load_lse(lse + o_row, m_i, head)
        b_delta = tl.load(delta + o_row, mask=m_i, other=0.0)
        b_qk = dot(queries.b_q, tl.trans(b_k))
        b_z = scores(b_qk, o_i[:, None], columns.o_j[None, :], terms, head, None)
        b_dp = dot(queries.b_dout, tl.trans(b_v))
        blocks = Blocks(keys, values, terms, head, tokens, block)
        found = block_statistics(queries, blocks, first_block, parts, shape)
        if not shape.LONG:
            found = add_statistics(found, b_z, b_dp, columns, shape.NB)
        b_p, b_dz = gradients(b_z, b_dp, b_lse, b_delta, found, o_i, columns, block)
        # dV += P^T dO, dK += dz^T Q
        b_dv += dot(tl.trans(b_p), queries.b_dout)
        b_dk += dot(tl.trans(b_dz), queries.b_q)

    store_rows(slice_of(dk, i_b, i_kv, 0, tokens), columns.o_j, b_dk * terms.scale, shape.HEAD_DIM)
    store_rows(slice_of(dv, i_b, i_kv, 0, tokens), columns.o_j, b_dv, shape.VALUE_DIM)


def landmark_attention_backward(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call._make(as_record("landmark_attention", a))
    batch, tokens, heads = call.q.shape[:3]
    dq, dk, dv = (t.new_empty(t.shape) for t in (call.q, call.k, call.v))
    if call.q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    plan = call.plan()
    qkv = tuple(map(rows_of, (call.q, call.k, call.v)))
    delta = torch.empty_like(a.lse)
    tiles = triton.cdiv(tokens, plan.queries.block_m)
    launch(
        landmark_queries_kernel, batch * heads * tiles, call.q, rows_of(a.dout), a.dlse,
        rows_of(a.out), a.lse, delta, *qkv, rows_of(dq), *call.arguments(tiles),
        **call.options(plan.queries),
    )  # fmt: skip
    width = call.blocks(plan.keys) * call.keys_of_block
    parts = max(triton.cdiv(call.keys_of_block, plan.keys.block_n), 1)
    tiles = triton.cdiv(tokens, width) * parts
    launch(
        landmark_keys_kernel, batch * call.k.shape[2] * tiles, call.q, rows_of(a.dout), a.lse,
        delta, *qkv, rows_of(dk), rows_of(dv), *call.arguments(tiles), **call.options(plan.keys),
    )  # fmt: skip
    return dq, dk, dv
