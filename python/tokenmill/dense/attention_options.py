"""Keyword arguments of attention, of attention_decode and of the functions that forward them."""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor
from typing_extensions import Required

from ..masks import Decay2d, Grid, Masks
from .terms import Kind, Normalize, ScoreBias

Precision = Literal["accurate", "fast"]
Schedule = Literal["auto", "split", "stream_k"]


class SharedOptions(TypedDict, total=False):
    """Keywords of attention over a sequence and over a cache."""

    normalize: Normalize
    scale: float | None
    mask: Masks
    alibi_slopes: Tensor | None
    softcap: float
    causal: bool
    window: tuple[int, int]
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    block_table: Tensor | None
    out: Tensor | None
    backend: str | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    invariant: bool


class KindOptions(TypedDict, total=False):
    """Keywords that :func:`sigmoid_attention` fixes, has as an argument, or lacks."""

    kind: Kind
    score_bias: ScoreBias
    sink: Tensor | None


class SigmoidOptions(SharedOptions, total=False):
    """Keywords of :func:`sigmoid_attention` other than score_bias."""

    bias: Tensor | None
    alibi_grid: Grid | None
    cu_seqlens_k: Tensor | None
    max_seqlen_k: int | None
    seqlens_k: Tensor | None
    precision: Precision


class AttentionOptions(SigmoidOptions, KindOptions, total=False):
    """Keywords of :func:`attention` other than return_lse, which decides the type of the result."""

    post_decay: Decay2d | None


class DecodeOptions(SharedOptions, KindOptions, total=False):
    """Keywords of :func:`attention_decode` other than return_lse, which decides the type of the
    result.
    """

    seqlens_k: Required[Tensor]
    num_splits: int
    schedule: Schedule
