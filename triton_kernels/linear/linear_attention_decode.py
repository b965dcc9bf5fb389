"""Next tokens of each request: one program holds a tile of columns of a head's state, loads it once
and stores it once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...linear._state import feature_dim
from ..common import Rows, launch, slice_of
from .common import (
    MIN_OF_TOKEN,
    Inputs,
    Requests,
    States,
    form_of,
    load_features,
    load_request,
    load_tile,
    log_decay_of,
    scale_beside,
    store_tile,
)
from .linear_attention_forward import EPSILON

ELEMENTS = 4096  # elements of a state per program
LENGTHS = ["decay_batch", "tokens", "slots", "heads", "group", "tiles"]


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    inputs, out, normalizer, state, requests, decay_batch, tokens, slots, heads, group, tiles,
    KEYS_ALONE: tl.constexpr, PER_CHANNEL: tl.constexpr, form,
):  # fmt: skip
    """KEYS_ALONE: handles only the last column (the sum of keys) and the normalizer of every token.
    The programs of the other columns load that normalizer, since the column itself changes
    meanwhile."""
    i = tl.program_id(0)
    i_tile = i % tiles
    i_h = i // tiles % heads
    i_b = (i // (tiles * heads)).to(tl.int64)
    slot, used, kept = load_request(requests, i_b, tokens, slots)
    queries = slice_of(inputs.q, i_b, i_h, 0, tokens)
    keys = slice_of(inputs.k, i_b, i_h // group, 0, tokens)
    o_f = tl.arange(0, form.BLOCK_F)
    o_c = i_tile * form.BLOCK_V + tl.arange(0, form.BLOCK_V)
    o_state = slot * state.sequence + tl.cast(i_h, tl.int64) * state.head
    o_tile = o_f[:, None] * form.COLUMNS + o_c[None, :]
    if KEYS_ALONE:
        o_tile += form.VALUE_DIM
        m_state = (o_f < form.FEATURES)[:, None] & (o_c < 1)[None, :]
    else:
        m_state = (o_f < form.FEATURES)[:, None] & (o_c < form.VALUE_DIM)[None, :]
    p_state = state.data + o_state + o_tile
    m_state = m_state & (tl.zeros([form.BLOCK_F, form.BLOCK_V], tl.int64) < tl.where(used, 1, 0))
    b_state = tl.load(p_state, mask=m_state, other=0.0)
    o_z = (i_b * heads + i_h) * tokens
    for t in range(tokens):
        o_row = t + tl.arange(0, 1)
        if inputs.decay is not None:
            p_decay = inputs.decay.data + tl.cast(i_h, tl.int64) * inputs.decay.head
            if inputs.decay.seq is not None:
                p_decay += i_b * decay_batch + tl.cast(t, tl.int64) * inputs.decay.seq
            if PER_CHANNEL:
                x = tl.load(p_decay + o_f, mask=o_f < form.FEATURES, other=0.0)[:, None]
            else:
                x = tl.load(p_decay)
            # S *= exp(log decay)
            b_state *= tl.exp(tl.where(x < MIN_OF_TOKEN, MIN_OF_TOKEN, x))
        b_k = load_features(keys, o_row, o_f, inputs.scale, False, form)
        b_q = load_features(queries, o_row, o_f, inputs.scale, True, form)
        b_k = tl.trans(b_k.to(tl.float32))
        b_q = tl.trans(b_q.to(tl.float32)) * scale_beside(inputs.scale, form.MAP)
        if KEYS_ALONE:
            # z = phi(q) . S + eps
            b_state += b_k
            b_z = tl.sum(b_q * b_state, 0) + EPSILON
            tl.store(normalizer + o_z + t + o_c, b_z, mask=o_c < 1)
        else:
            values = slice_of(inputs.v, i_b, i_h // group, 0, tokens)
            # S += phi(k)^T v, y = phi(q) S
            b_state += b_k * load_tile(values, o_row, o_c, form.VALUE_DIM).to(tl.float32)
            b_y = tl.sum(b_q * b_state, 0)[None, :]
            if form.COLUMNS > form.VALUE_DIM:
                b_y = b_y / tl.load(normalizer + o_z + t)
            b_y = tl.where(tl.zeros([1, form.BLOCK_V], tl.int64) < tl.where(used, 1, 0), b_y, 0.0)
            store_tile(slice_of(out, i_b, i_h, 0, tokens), o_row, o_c, b_y, form.VALUE_DIM)
        if t + 1 == kept:
            tl.store(p_state, b_state, mask=m_state)


def linear_attention_decode(a: Any) -> Tensor:
    q, k, v, state = a.q, a.k, a.v, a.state
    batch, tokens, heads, head_dim = q.shape
    value_dim = v.shape[-1]
    features = feature_dim(a.feature_map, head_dim)
    out = q.new_empty((batch, tokens, heads, value_dim))
    normalizer = None
    if a.normalize:
        normalizer = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    decay, decay_batch = log_decay_of(a.log_decay)

    def rows(t: Tensor) -> Rows:
        return Rows(t, *t.stride()[:3])

    inputs = Inputs(rows(q), rows(k), rows(v), decay, a.scale, None)
    form = a.feature_map, head_dim, value_dim, features, value_dim + int(a.normalize)

    def run(keys_alone: bool, block_v: int) -> None:
        tiles = 1 if keys_alone else triton.cdiv(value_dim, block_v)
        launch(
            decode_kernel,
            batch * heads * tiles if tokens > 0 else 0,
            q,
            inputs,
            rows(out),
            normalizer,
            States(state, *state.stride()[:2]),
            Requests(a.state_indices, a.accepted),
            decay_batch,
            tokens,
            state.shape[0],
            heads,
            heads // max(k.shape[-2], 1),
            tiles,
            KEYS_ALONE=keys_alone,
            PER_CHANNEL=a.log_decay is not None and a.log_decay.dim() == 4,
            form=form_of(*form, block_f, block_v),
            num_warps=4,
        )

    block_f = triton.next_power_of_2(features)
    if a.normalize:
        run(True, 1)
    run(False, min(triton.next_power_of_2(value_dim), max(ELEMENTS // block_f, 8), 64))
    return out
