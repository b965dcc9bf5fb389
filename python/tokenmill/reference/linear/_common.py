"""The recurrence of linear attention.

    S_t = e^log_decay_t S_(t-1) + phi(k_t) (v_t, 1),    y_t = scale phi(q_t) S_t

With normalize, out is y without its last column, divided by this column + 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dense._common import elu1, expand_heads

NORMALIZER_EPSILON = 1e-6


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k [B, S, H, F], v [B, S, H, E], log_decay [H] | [B, S, H] | [B, S, H, F], state [B, H, F,
    E]: the sums y [B, S, H, E] and the state after the last token.
    """
    batch, length, heads, features = k.shape
    if state is None:
        state = k.new_zeros(batch, heads, features, v.shape[-1])
    decay = None
    if log_decay is not None:
        decay = torch.exp(log_decay)
        if decay.dim() < 4:
            decay = decay.expand(batch, length, heads)[..., None]
        decay = decay[..., None]
    sums = [v[:, :0]]
    for t in range(length):
        if decay is not None:
            state = state * decay[:, t]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        sums.append((q[:, t, :, None, :] @ state).transpose(1, 2))
    return torch.cat(sums, 1), state


def requests_of(a: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which requests of a decode step have a slot [B], and the slot of each [B]; x: an input."""
    slots = a.state_indices
    if slots is None:
        slots = torch.arange(len(x), device=x.device)
    return slots >= 0, slots.long()


def keep_states(a: Any, active: Tensor, slots: Tensor, step: Callable[..., Any]) -> Tensor:
    """The outputs of step(requests, tokens) -> (outputs, states) with all tokens. a.state gets the
    states after the tokens that each request keeps.
    """
    y, after = step(active, None)
    if a.accepted is None:
        a.state[slots[active]] = after
        return y
    for count in a.accepted[active].unique().tolist():
        kept = active & (a.accepted == count)
        a.state[slots[kept]] = step(kept, count)[1]
    return y


def by_sequence(one: Callable[..., tuple[Tensor, Tensor]], a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the operator from one(q, k, v, log_decay, state) -> (y, state) over a batch of
    sequences of equal length."""
    q, k, v, log_decay = a.q, a.k, a.v, a.log_decay
    wide = torch.promote_types(q.dtype, torch.float32)
    if a.cu_seqlens is None:
        y, state = one(q, k, v, log_decay, a.initial_state)
        if state is a.initial_state:
            state = state.clone()
        out, normalizer = divide(y, a.normalize)
    else:
        columns = v.shape[2] + int(a.normalize)
        parts, states = [q.new_zeros(1, 0, q.shape[1], columns, dtype=wide)], []
        ends = a.cu_seqlens.tolist()
        for n in range(len(ends) - 1):
            rows = slice(ends[n], ends[n + 1])
            packed = [t[None, rows] for t in (q, k, v)]
            decay = log_decay
            if log_decay is not None and log_decay.dim() > 1:
                decay = log_decay[None, rows]
            before = None if a.initial_state is None else a.initial_state[n : n + 1]
            y, after = one(*packed, decay, before)
            parts.append(y)
            states.append(after)
        out, normalizer = divide(torch.cat(parts, 1), a.normalize)
        out, normalizer = out[0], normalizer[0]
        if not states:
            features = key_features(k[:0, :1], a.feature_map).shape[-1]
            states = [q.new_zeros(0, q.shape[1], features, columns, dtype=wide)]
        state = torch.cat(states)
    empty = q.new_empty(0, dtype=wide)
    return (
        out.to(q.dtype),
        state.to(wide) if a.return_final_state else empty,
        normalizer.to(wide) if a.normalize else empty,
    )


def divide(y: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv] and the normaliser [B, H, S]."""
    if not normalize:
        return y, y[..., 0].transpose(1, 2)
    z = y[..., -1:] + NORMALIZER_EPSILON
    return y[..., :-1] / z, z[..., 0].transpose(1, 2)


def features_of(q: Tensor, k: Tensor, feature_map: str, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    k = expand_heads(k, q.shape[2])
    return query_features(q.to(wide), feature_map, scale), key_features(k.to(wide), feature_map)


def values_of(v: Tensor, q: Tensor, normalize: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return append_ones(expand_heads(v, q.shape[2]).to(wide), normalize)


def append_ones(v: Tensor, normalize: bool) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu1": elu1,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def key_features(k: Tensor, feature_map: str) -> Tensor:
    """Features of k that the state sums. taylor2: 1, k_i and k_i k_j for i <= j, in the order of
    the rows of the upper triangle.
    """
    if feature_map != "taylor2":
        return FEATURE_MAPS[feature_map](k)
    i, j = torch.triu_indices(k.shape[-1], k.shape[-1], device=k.device)
    return torch.cat([torch.ones_like(k[..., :1]), k, k[..., i] * k[..., j]], -1)


def query_features(q: Tensor, feature_map: str, scale: float) -> Tensor:
    """Coefficients of the sums, including the scale: for taylor2 the terms of 1 + u + u^2/2 with u
    = scale q.k, in which each product of two different elements occurs twice.
    """
    if feature_map != "taylor2":
        return FEATURE_MAPS[feature_map](q) * scale
    q = q * scale
    i, j = torch.triu_indices(q.shape[-1], q.shape[-1], device=q.device)
    second = q[..., i] * q[..., j]
    return torch.cat([torch.ones_like(q[..., :1]), q, torch.where(i == j, second / 2, second)], -1)
