"""Attention that returns its weights for transformers, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weights_wanted(module: torch.nn.Module, others: dict[str, Any]) -> bool:
    """Whether a call asks for the weights, by its argument or else by the configuration."""
    asked = others.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked)


def attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, given: Tensor | None,
    position_bias: Tensor | None, dropout: float, *, kind: str, scale: float | None,
    score_bias: str | None, softcap: float, sink: Tensor | None, causal: bool, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, Sq, H, D] -> out [B, Sq, H, Dv] and weights [B, H, Sq, Sk], 0 for masked keys.

    mask holds all masking, boolean or additive, or is None if there is only causality; given is the
    mask of the call, whose padding does not count in "neg_log_n".
    """
    sq, sk = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    # S = cap(scale Q K^T) + bias, [B, H, Sq, Sk]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float()
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and causal:
        mask = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(sk - sq)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if kind == "sigmoid":
        n = torch.tensor([sk], device=q.device)
        if given is not None and given.dim() == 2:
            n = given.sum(1)
        weights = torch.sigmoid(scores - n.clamp(min=1).float().log().view(-1, 1, 1, 1))
    else:
        if sink is not None:
            column = sink.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        hidden = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)[..., :sk]
    weights = torch.nn.functional.dropout(weights.to(v.dtype), dropout)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), weights
