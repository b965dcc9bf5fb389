"""Keyword arguments of attention, of attention_decode and of the functions that forward them."""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

from ..masks import Decay2d, Grid, Masks
from .terms import Kind, Normalize, ScoreBias

Precision = Literal["accurate", "fast"]
Schedule = Literal["auto", "split", "stream_k"]


class SigmoidOptions(TypedDict, total=False):
    """Keywords of :func:`sigmoid_attention` other than score_bias."""

    normalize: Normalize
    scale: float | None
    bias: Tensor | None
    mask: Masks
    alibi_slopes: Tensor | None
    alibi_grid: Grid | None
    softcap: float
    causal: bool
    window: tuple[int, int]
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    seqlens_k: Tensor | None
    block_table: Tensor | None
    precision: Precision
    out: Tensor | None
    backend: str | None
    k_scale: Tensor | None
    v_scale: Tensor | None


class AttentionOptions(SigmoidOptions, total=False):
    """Keywords of :func:`attention` other than return_lse, which decides the type of the result."""

    kind: Kind
    score_bias: ScoreBias
    sink: Tensor | None
    post_decay: Decay2d | None


class DecodeOptions(TypedDict, total=False):
    """Keywords of :func:`attention_decode` other than seqlens_k and return_lse, which decides the
    type of the result.
    """

    block_table: Tensor | None
    kind: Kind
    normalize: Normalize
    scale: float | None
    score_bias: ScoreBias
    mask: Masks
    alibi_slopes: Tensor | None
    sink: Tensor | None
    softcap: float
    causal: bool
    window: tuple[int, int]
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    num_splits: int
    schedule: Schedule
    out: Tensor | None
    backend: str | None
    k_scale: Tensor | None
    v_scale: Tensor | None
