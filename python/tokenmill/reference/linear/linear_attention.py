"""linear_attention, token by token, and again as a weight matrix.

    y_t = sum_(s <= t) w_ts v_s,  w_ts = scale phi(q_t) . phi(k_s) e^(sum_(s < r <= t) log_decay_r)

`linear_attention` carries a state from token to token. `linear_attention_quadratic` takes the same
record and materialises the weights of all pairs: a second, independent computation of the same
numbers, and in the dtype of the inputs what plain PyTorch code would do. PyTorch's autograd
differentiates both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense._common import expand_heads
from ._common import (
    FEATURE_MAPS,
    append_ones,
    by_sequence,
    features_of,
    key_features,
    query_features,
    recurrence,
    values_of,
)


def linear_attention(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, H, D], k [B, S, Hk, D], v [B, S, Hk, Dv] (packed [T, ...]), log_decay [H], [B, S, H]
    or [B, S, H, D], initial_state [B, H, F, Dv (+ 1)]: out, the state after the last token, the
    normaliser.
    """

    def one(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        features = features_of(q, k, a.feature_map, a.scale)
        return recurrence(*features, values_of(v, q, a.normalize), log_decay, state)

    return by_sequence(one, a)


def linear_attention_quadratic(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """upcast=False keeps 16-bit inputs in 16 bits throughout, as plain PyTorch code would: the
    baseline of the error budget.
    """

    def one(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32) if upcast else q.dtype
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(dtype), expand_heads(k, q.shape[2]).to(dtype)
        v = append_ones(expand_heads(v, q.shape[2]).to(dtype), a.normalize)
        if log_decay is not None and log_decay.dim() == 4:
            return by_channel(q * a.scale, k, v, log_decay, state)
        if a.feature_map == "taylor2":
            u = torch.einsum("bihd,bjhd->bhij", q, k) * a.scale
            weights = 1 + u + u * u / 2
        else:
            mapped_q, mapped_k = FEATURE_MAPS[a.feature_map](q), FEATURE_MAPS[a.feature_map](k)
            weights = torch.einsum("bihd,bjhd->bhij", mapped_q, mapped_k) * a.scale
        decay = Decay(log_decay, q.shape[1], wide)
        weights = torch.where(decay.visible, weights * decay.pairs.to(dtype), 0)
        y = torch.einsum("bhij,bjhe->bihe", weights, v)
        if state is not None:
            mapped = query_features(q, a.feature_map, a.scale) * decay.from_start.to(dtype)
            y = y + torch.einsum("bihf,bhfe->bihe", mapped, state.to(dtype))
        mapped = key_features(k, a.feature_map) * decay.to_end.to(dtype)
        after = torch.einsum("bjhf,bjhe->bhfe", mapped, v).to(wide)
        if state is not None:
            after = after + decay.total * state
        return y, after

    return by_sequence(one, a)


def by_channel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums y and the state after the last token with a decay [B, S, H, D] per channel, which
    the products of all pairs hold.
    """
    dtype, wide = q.dtype, log_decay.dtype
    log_decay = log_decay.clamp(min=-128.0 if wide == torch.float32 else -1e4)
    prefix = log_decay.transpose(1, 2).cumsum(2)  # [B, H, S, D]
    length = q.shape[1]
    end = prefix[:, :, -1:] if length else log_decay.new_zeros(*prefix.shape[:2], 1, q.shape[-1])
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    exponent = prefix[:, :, :, None] - prefix[:, :, None]
    pairs = torch.exp(exponent.masked_fill(~visible[..., None], -torch.inf)).to(dtype)
    weights = torch.einsum("bihd,bjhd,bhijd->bhij", q, k, pairs)
    y = torch.einsum("bhij,bjhe->bihe", weights, v)
    stays = k * torch.exp(end - prefix).transpose(1, 2).to(dtype)
    after = torch.einsum("bjhd,bjhe->bhde", stays, v).to(wide)
    if state is not None:
        enters = q * torch.exp(prefix).transpose(1, 2).to(dtype)
        y = y + torch.einsum("bihd,bhde->bihe", enters, state.to(dtype))
        after = after + torch.exp(end).transpose(2, 3) * state
    return y, after


class Decay:
    """Decay factors between tokens, computed only from differences of exponents.

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
        minimum = -128.0 if per_token and dtype == torch.float32 else -1e4
        log_decay = log_decay.clamp(min=minimum)
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
