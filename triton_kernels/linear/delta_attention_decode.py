"""Next tokens of the delta rule: one program holds a tile of columns of a head's state, loads it
once and stores it once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common import Rows, launch, slice_of
from .common import Requests, States, load_request, load_tile, store_tile
from .delta_chunks import L2NORM_EPSILON, load_decay

ELEMENTS = 4096  # elements of a state per program
LENGTHS = ["tokens", "slots", "heads", "group", "tiles"]


@triton.jit
def load_key(rows, o_row, o_d, L2NORM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[D, 1], a row of q or k in float32."""
    b_x = load_tile(rows, o_row, o_d, HEAD_DIM).to(tl.float32)
    if L2NORM:
        b_x = b_x / tl.sqrt(tl.sum(b_x * b_x, 1) + L2NORM_EPSILON)[:, None]
    return tl.trans(b_x)


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    q, k, v, beta, decay, out, state, requests, tokens, slots, heads, group, tiles, scale,
    L2NORM: tl.constexpr, DECAY: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_tile = i % tiles
    i_h = i // tiles % heads
    i_b = (i // (tiles * heads)).to(tl.int64)
    slot, used, kept = load_request(requests, i_b, tokens, slots)
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    o_state = slot * state.sequence + tl.cast(i_h, tl.int64) * state.head
    p_state = state.data + o_state + o_d[:, None] * VALUE_DIM + o_c[None, :]
    m_state = (o_d < HEAD_DIM)[:, None] & (o_c < VALUE_DIM)[None, :]
    m_state = m_state & (tl.zeros([BLOCK_D, BLOCK_V], tl.int64) < tl.where(used, 1, 0))
    b_state = tl.load(p_state, mask=m_state, other=0.0)
    o_gate = i_b * tokens * heads + i_h
    for t in range(tokens):
        o_row = t + tl.arange(0, 1)
        b_x = load_decay(decay, o_gate, heads, o_row, tokens, o_d, DECAY, HEAD_DIM)
        # S *= exp(log decay)
        b_state *= tl.trans(tl.exp2(b_x))
        b_k = load_key(slice_of(k, i_b, i_h // group, 0, tokens), o_row, o_d, L2NORM, HEAD_DIM)
        b_q = load_key(slice_of(q, i_b, i_h // group, 0, tokens), o_row, o_d, L2NORM, HEAD_DIM)
        b_v = load_tile(slice_of(v, i_b, i_h, 0, tokens), o_row, o_c, VALUE_DIM).to(tl.float32)
        b_beta = tl.load(beta + o_gate + tl.cast(t, tl.int64) * heads)
        # u = beta (v - k S), S += k^T u, y = q S
        b_u = b_beta * (b_v - tl.sum(b_k * b_state, 0)[None, :])
        b_state += b_k * b_u
        b_y = tl.sum(b_q * scale * b_state, 0)[None, :]
        b_y = tl.where(tl.zeros([1, BLOCK_V], tl.int64) < tl.where(used, 1, 0), b_y, 0.0)
        store_tile(slice_of(out, i_b, i_h, 0, tokens), o_row, o_c, b_y, VALUE_DIM)
        if t + 1 == kept:
            tl.store(p_state, b_state, mask=m_state)


def delta_attention_decode(a: Any) -> Tensor:
    q, k, v, state, decay = a.q, a.k, a.v, a.state, a.log_decay
    batch, tokens, heads, value_dim = v.shape
    head_dim = q.shape[-1]
    kind = "none" if decay is None else "channel" if decay.dim() > a.beta.dim() else "head"
    out = v.new_empty(v.shape)

    def rows(t: Tensor) -> Rows:
        return Rows(t, *t.stride()[:3])

    block_d = triton.next_power_of_2(head_dim)
    block_v = min(triton.next_power_of_2(value_dim), max(ELEMENTS // block_d, 8), 64)
    tiles = triton.cdiv(value_dim, block_v)
    launch(
        decode_kernel,
        batch * heads * tiles if tokens > 0 else 0,
        q,
        *(rows(t) for t in (q, k, v)),
        a.beta.contiguous(),
        None if decay is None else decay.contiguous(),
        rows(out),
        States(state, *state.stride()[:2]),
        Requests(a.state_indices, a.accepted),
        tokens,
        state.shape[0],
        heads,
        heads // max(q.shape[-2], 1),
        tiles,
        a.scale,
        L2NORM=a.qk_l2norm,
        DECAY=kind,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        num_warps=4,
    )
    return out
