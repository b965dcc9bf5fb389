"""Linear attention, token by token, and once more as a matrix of weights.

`linear_attention` and `linear_attention_decode` take the lowered list of their operators and carry
a state from token to token. `linear_attention_quadratic` takes the same list and materialises the
weights of all pairs: the second, independent way to the same numbers, and in the dtype of the
inputs what plain PyTorch code would do. PyTorch's autograd differentiates both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dense import expand_heads

NORMALIZER_EPSILON = 1e-6


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    def one(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        features = _features(q, k, feature_map, scale)
        return recurrence(*features, _values(v, q, normalize), log_decay, state)

    return _by_sequence(
        one,
        q,
        k,
        v,
        log_decay,
        feature_map,
        normalize,
        initial_state,
        return_final_state,
        cu_seqlens,
    )


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k [B, S, H, F], v [B, S, H, E], log_decay [H] | [B, S, H], state [B, H, F, E]: the sums y
    [B, S, H, E] and the state after the last token."""
    batch, length, heads, features = k.shape
    if state is None:
        state = k.new_zeros(batch, heads, features, v.shape[-1])
    decay = None
    if log_decay is not None:
        decay = torch.exp(log_decay).expand(batch, length, heads)[..., None, None]
    sums = [v[:, :0]]
    for t in range(length):
        if decay is not None:
            state = state * decay[:, t]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        sums.append((q[:, t, :, None, :] @ state).transpose(1, 2))
    return torch.cat(sums, 1), state


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    state_indices: Tensor | None,
) -> tuple[Tensor]:
    """Updates state in place."""
    if state_indices is None:
        state_indices = torch.arange(q.shape[0], device=q.device)
    active = state_indices >= 0
    slots = state_indices[active].long()
    decay = log_decay[active] if log_decay is not None and log_decay.dim() > 1 else log_decay
    features = _features(q[active], k[active], feature_map, scale)
    y, after = recurrence(*features, _values(v[active], q, normalize), decay, state[slots])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    out[active] = _divide(y, normalize)[0].to(q.dtype)
    state[slots] = after
    return (out,)


def linear_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """upcast=False keeps 16-bit inputs in 16 bits throughout: what plain PyTorch code would do, the
    baseline of the error budget."""

    def one(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32) if upcast else q.dtype
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(dtype), expand_heads(k, q.shape[2]).to(dtype)
        v = _append_ones(expand_heads(v, q.shape[2]).to(dtype), normalize)
        if feature_map == "taylor2":
            u = torch.einsum("bihd,bjhd->bhij", q, k) * scale
            weights = 1 + u + u * u / 2
        else:
            mapped_q, mapped_k = FEATURE_MAPS[feature_map](q), FEATURE_MAPS[feature_map](k)
            weights = torch.einsum("bihd,bjhd->bhij", mapped_q, mapped_k) * scale
        decay = Decay(log_decay, q.shape[1], wide)
        weights = torch.where(decay.visible, weights * decay.pairs.to(dtype), 0)
        y = torch.einsum("bhij,bjhe->bihe", weights, v)
        if state is not None:
            mapped = query_features(q, feature_map, scale) * decay.from_start.to(dtype)
            y = y + torch.einsum("bihf,bhfe->bihe", mapped, state.to(dtype))
        mapped = key_features(k, feature_map) * decay.to_end.to(dtype)
        after = torch.einsum("bjhf,bjhe->bhfe", mapped, v).to(wide)
        if state is not None:
            after = after + decay.total * state
        return y, after

    return _by_sequence(
        one,
        q,
        k,
        v,
        log_decay,
        feature_map,
        normalize,
        initial_state,
        return_final_state,
        cu_seqlens,
    )


class Decay:
    """What remains of a token's weight later on, from differences of exponents alone.

    pairs [B | 1, H | 1, S, S] from key j to query i, from_start and to_end [B | 1, S, H | 1, 1],
    total [B | 1, H | 1, 1, 1]; visible [S, S].
    """

    def __init__(self, log_decay: Tensor | None, length: int, dtype: torch.dtype):
        device = None if log_decay is None else log_decay.device
        position = torch.arange(length + 1, device=device, dtype=dtype)
        i, j = position[:length, None], position[None, :length]
        self.visible = i >= j
        if log_decay is None:
            log_decay = position.new_zeros(1)
        # inf - inf must not be formed; e^-128 is 0 in float32 and e^-10000 in float64.
        per_token = log_decay.dim() == 3
        least = -128.0 if per_token and dtype == torch.float32 else -1e4
        log_decay = log_decay.clamp(min=least)
        if per_token:
            prefix = log_decay.cumsum(1)  # [B, S, H]
            by_head = prefix.transpose(1, 2)
            exponent = by_head[..., :, None] - by_head[..., None, :]
            end = (
                prefix[:, -1:] if length else prefix.new_zeros(prefix.shape[0], 1, prefix.shape[2])
            )
            from_start, to_end = prefix, end - prefix
        else:
            exponent = ((i - j) * log_decay[:, None, None])[None]
            from_start = (position[1:, None] * log_decay)[None]
            to_end = ((length - position[1:, None]) * log_decay)[None]
            end = (position[-1:, None] * log_decay)[None]
        self.pairs = torch.exp(torch.where(self.visible, exponent, 0))
        self.from_start, self.to_end = (torch.exp(x)[..., None] for x in (from_start, to_end))
        self.total = torch.exp(end).transpose(1, 2)[..., None]


def _by_sequence(
    one: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    normalize: bool,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the operator from one(q, k, v, log_decay, state) -> (y, state) over a batch of
    sequences of equal length."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens is None:
        y, state = one(q, k, v, log_decay, initial_state)
        if state is initial_state:
            state = state.clone()
        out, normalizer = _divide(y, normalize)
    else:
        parts, states = [q.new_zeros(1, 0, q.shape[1], v.shape[2] + int(normalize), dtype=wide)], []
        ends = cu_seqlens.tolist()
        for n in range(len(ends) - 1):
            rows = slice(ends[n], ends[n + 1])
            packed = [t[None, rows] for t in (q, k, v)]
            decay = log_decay
            if log_decay is not None and log_decay.dim() > 1:
                decay = log_decay[None, rows]
            before = None if initial_state is None else initial_state[n : n + 1]
            y, after = one(*packed, decay, before)
            parts.append(y)
            states.append(after)
        out, normalizer = _divide(torch.cat(parts, 1), normalize)
        out, normalizer = out[0], normalizer[0]
        if not states:
            features = key_features(k[:0, :1], feature_map).shape[-1]
            states = [q.new_zeros(0, q.shape[1], features, parts[0].shape[-1], dtype=wide)]
        state = torch.cat(states)
    empty = q.new_empty(0, dtype=wide)
    return (
        out.to(q.dtype),
        state.to(wide) if return_final_state else empty,
        normalizer.to(wide) if normalize else empty,
    )


def _divide(y: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv] and the normaliser [B, H, S]."""
    if not normalize:
        return y, y[..., 0].transpose(1, 2)
    z = y[..., -1:] + NORMALIZER_EPSILON
    return y[..., :-1] / z, z[..., 0].transpose(1, 2)


def _features(q: Tensor, k: Tensor, feature_map: str, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    k = expand_heads(k, q.shape[2])
    return query_features(q.to(wide), feature_map, scale), key_features(k.to(wide), feature_map)


def _values(v: Tensor, q: Tensor, normalize: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _append_ones(expand_heads(v, q.shape[2]).to(wide), normalize)


def _append_ones(v: Tensor, normalize: bool) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v


def _elu1(x: Tensor) -> Tensor:
    # e^x itself for x < 0: elu(x) + 1 cancels.
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu1": _elu1,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def key_features(k: Tensor, feature_map: str) -> Tensor:
    """What the state sums. taylor2: 1, k_i and k_i k_j for i <= j, in the order of the rows of the
    upper triangle."""
    if feature_map != "taylor2":
        return FEATURE_MAPS[feature_map](k)
    i, j = torch.triu_indices(k.shape[-1], k.shape[-1], device=k.device)
    return torch.cat([torch.ones_like(k[..., :1]), k, k[..., i] * k[..., j]], -1)


def query_features(q: Tensor, feature_map: str, scale: float) -> Tensor:
    """The factors of the sums, scale included: for taylor2 those of 1 + u + u^2/2 with
    u = scale q.k, in which each product of two different elements occurs twice."""
    if feature_map != "taylor2":
        return FEATURE_MAPS[feature_map](q) * scale
    q = q * scale
    i, j = torch.triu_indices(q.shape[-1], q.shape[-1], device=q.device)
    second = q[..., i] * q[..., j]
    return torch.cat([torch.ones_like(q[..., :1]), q, torch.where(i == j, second / 2, second)], -1)
