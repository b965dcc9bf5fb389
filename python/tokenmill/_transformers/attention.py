"""The attention function of transformers' models."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .._call.sharded import sharded_attention
from ..dense.attention import NO_WINDOW, attention
from .masks import additive, complete_mask
from .padding import Padding, decoded, packed, padded, padding_of
from .pages import Pages, attend_to_pages
from .weights import attention_with_weights, weights_wanted

TO_SDPA = "no kernel drops weights, and scaled_dot_product_attention runs in place of one"
TO_PYTORCH = "no kernel has the weights in memory, and plain PyTorch runs in place of one"
Kind = Literal["softmax", "sigmoid"]
UNSUPPORTED = {
    "head_mask": "a mask over heads needs the weights, which are never in memory",
    "layer_head_mask": "a mask over heads needs the weights, which are never in memory",
    "block_table": "paged caches are not supported",
}


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    kind: Kind,
    backend: str | None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    tokenmill_pages: Pages | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of one layer, as transformers calls it.

    Args:
        module: the layer; its is_causal is used where the argument is None.
        query: ``[B, H, Sq, D]``. Any strides, without a copy, except that on a GPU a padding mask
            requires contiguous rows and copies others.
        key, value: ``[B, Hk, Sk, D]`` and ``[B, Hk, Sk, Dv]``, likewise.
        attention_mask: None; a padding mask ``[B, Sk]`` of :func:`build_mask`, to which causality
            with the last query at the last key is added; or a complete mask that broadcasts to
            ``[B, H, Sq, Sk]``, boolean (True is visible) or additive.
        scaling: None = 1/sqrt(D).
        dropout: dropout of the weights, in training. No kernel supports it: the call goes to
            scaled_dot_product_attention, with a warning once.
        kind, backend: as in :func:`register`.
        is_causal: None = module's.
        sliding_window: number of keys up to its own that a query sees (if not causal, as many from
            its own on), unless the mask already contains it.
        softcap: None = off.
        s_aux: ``[H]``, learnable sink.
        position_bias: broadcasts to ``[B, H, Sq, Sk]``, differentiable.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: offsets and maximum lengths of the
            sequences of a packed batch (B = 1); they replace a mask.
        tokenmill_pages: the pages of these sequences, replacing key and value; within
            :func:`continuous_batching`.
        others: ignored, except options that would change the result, and output_attentions: True
            runs the call in plain PyTorch, which materialises the weights.

    Returns:
        out ``[B, Sq, H, Dv]``, 0 for a query with no visible key, and None, or with
        output_attentions the weights ``[B, H, Sq, Sk]``, after dropout, as with "eager". A padding
        query sees the same keys as any query at its position, so no row depends on its batch.

    Raises:
        RuntimeError: for a head mask, for dropout of sigmoid attention or with a soft cap or a
            sink, for any mask or dropout within
            :func:`tokenmill.distributed.context_parallel`, and for weights there and in pages.
    """
    _refuse(others)
    q, k, v = _tokens_first(query), _tokens_first(key), _tokens_first(value)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    reach = sliding_window - 1 if sliding_window is not None else -1
    options: dict[str, Any] = {
        "kind": kind,
        "scale": scaling,
        "score_bias": "neg_log_n" if kind == "sigmoid" else None,
        "softcap": softcap or 0.0,
        "sink": s_aux,
        "causal": causal,
        "window": (reach, 0 if causal else reach),
        "backend": backend,
    }
    weights = weights_wanted(module, others)
    if run := sharded_attention.get():
        _refuse_in_context_parallel(
            attention_mask=attention_mask, position_bias=position_bias,
            cu_seq_lens_q=cu_seq_lens_q, dropout=dropout or None, output_attentions=weights or None,
        )  # fmt: skip
        return run(q, k, v, **options), None
    masking = (
        attention_mask, q.shape[1], k.shape[1], causal, sliding_window, cu_seq_lens_q,
        cu_seq_lens_k, q.device,
    )  # fmt: skip
    if weights:
        _refuse_weights(
            continuous_batching=tokenmill_pages is not None,
            packed_sigmoid=cu_seq_lens_q is not None and kind == "sigmoid",
        )
        _say_once(f"tokenmill attention: output_attentions: {TO_PYTORCH}")
        return attention_with_weights(
            q, k, v, complete_mask(*masking), attention_mask, position_bias,
            dropout if module.training else 0.0, **options,
        )  # fmt: skip
    if dropout > 0:
        _refuse_dropout(dropout, kind=kind != "softmax", softcap=softcap, s_aux=s_aux is not None)
        _say_once(f"tokenmill attention: dropout: {TO_SDPA}")
        return sdpa_attention_forward(
            module, query, key, value, complete_mask(*masking), dropout=dropout, scaling=scaling,
            is_causal=causal, position_bias=position_bias,
        )  # fmt: skip
    if cu_seq_lens_q is not None and position_bias is not None:
        raise RuntimeError("tokenmill attention: position_bias: must be None with packed sequences")
    if tokenmill_pages is not None:
        assert cu_seq_lens_q is not None and cu_seq_lens_k is not None
        return attend_to_pages(
            q, tokenmill_pages, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **options
        ), None
    if cu_seq_lens_q is not None:
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return packed(q, k, v, *lengths, **options), None
    return _attend(q, k, v, attention_mask, position_bias, options), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """One call of an operator, on sequences that are not packed."""
    padding = None
    if mask is not None:
        options["window"] = NO_WINDOW
        padding = padding_of(mask, q, k)
    bias = None if position_bias is None else additive(position_bias, q.dtype)
    if bias is None and _few_queries(q, k, v, mask, padding, options):
        return decoded(q, k, v, padding, **options)
    if padding is not None:
        return padded(q, k, v, padding, bias, **options)
    if mask is not None:
        options["causal"] = False
        mask = additive(mask[..., : k.shape[1]], q.dtype)
        bias = mask if bias is None else bias + mask
    out = attention(q, k, v, bias=bias, **options)
    assert isinstance(out, Tensor)
    return out


@functools.lru_cache
def _say_once(notice: str) -> None:
    warnings.warn(notice, stacklevel=4)


def _refuse_in_context_parallel(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise RuntimeError(f"tokenmill attention: {name}: must be None in context_parallel")


def _refuse_weights(*, continuous_batching: bool, packed_sigmoid: bool) -> None:
    for what, given in (
        ("continuous_batching", continuous_batching),
        ("packed sigmoid attention", packed_sigmoid),
    ):
        if given:
            raise RuntimeError(
                f"tokenmill attention: output_attentions: must be False in {what}; got True"
            )


def _refuse_dropout(dropout: float, **others: Any) -> None:
    for name, given in others.items():
        if given:
            raise RuntimeError(
                f"tokenmill attention: dropout: must be 0 with {name}, as {TO_SDPA}; got "
                f"{dropout:g}: set attention_dropout (BERT: attention_probs_dropout_prob) of "
                "the configuration to 0"
            )


def _refuse(others: dict[str, Any]) -> None:
    for name, reason in UNSUPPORTED.items():
        if (value := others.get(name)) is not None and value is not False:
            raise RuntimeError(f"tokenmill attention: {name}: {reason}")


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H, D], a view unless D is not contiguous."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _few_queries(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, padding: Padding | None,
    options: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether the call is a decode step of generate() that attention_decode runs faster: it reads
    keys once per GQA group, and splits long rows of keys. On a CPU attention does so itself, except
    with padding.
    """
    sq, sk = q.shape[1], k.shape[1]
    if options["kind"] != "softmax" or not 0 < sq <= 8 or sk < 256 * sq:
        return False
    if mask is None and q.device.type == "cpu" and options["backend"] in (None, "cpu"):
        return False
    if torch.is_autocast_enabled(q.device.type):  # attention casts, attention_decode does not
        return False
    if mask is not None and (padding is None or sq > 1):
        return False
    sink = options["sink"]
    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
