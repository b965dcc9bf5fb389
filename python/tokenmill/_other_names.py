"""Error messages for keywords of other libraries.

A function that refuses other names collects them in ``**other``, which costs one empty dict per
call (about 30 ns) and no frame. Its type ``Never`` lets type checkers reject them earlier; it does
not appear in the signature shown by :func:`inspect.signature`, help() and the site.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from ._check import InputError, show

F = TypeVar("F", bound=Callable[..., Any])


class UnknownKeyword(InputError, TypeError):
    """A keyword that the function does not have: a TypeError, as for any Python function."""


class _Required:
    def __str__(self) -> str:
        return "nothing"


REQUIRED: Any = _Required()  # stands for a required keyword that other libraries name differently

# Foreign name -> our names, and a remark. The first name that the function has is suggested.
RENAMED: dict[str, tuple[tuple[str, ...], str]] = {
    # PyTorch's scaled_dot_product_attention and flex_attention
    "attn_mask": (("bias", "mask"), "; a bool tensor shows what is True"),
    "is_causal": (("causal",), "; the last query sees the last key"),
    "scale_factor": (("scale",), ""),
    "block_mask": (("mask",), ", and made by tokenmill.masks"),
    # flash-attn
    "softmax_scale": (("scale",), ""),
    "window_size": (("window",), ""),
    "return_softmax_lse": (("return_lse",), ""),
    "cache_seqlens": (("seqlens_k",), ""),
    "seqused_k": (("seqlens_k",), ""),
    "seqused_q": (("seqlens_q",), ""),
    "page_table": (("block_table",), ""),
    "learnable_sink": (("sink",), ""),
    "s_aux": (("sink",), ""),
    "sinks": (("sink",), ""),
    "k_descale": (("k_scale",), ""),
    "v_descale": (("v_scale",), ""),
    "cu_seqlens": (("cu_seqlens_q",), ", and cu_seqlens_k where the keys differ"),
    "max_seqlen": (("max_seqlen_q",), ", and max_seqlen_k where the keys differ"),
    "rotary_interleaved": (("interleaved",), ""),
    # FlashInfer
    "sm_scale": (("scale",), ""),
    "logits_soft_cap": (("softcap",), ""),
    "window_left": (("window",), ", as (window_left, 0) with causal=True"),
    "custom_mask": (("bias", "mask"), "; a bool tensor shows what is True"),
    "qo_indptr": (("cu_seqlens_q",), ""),
    "kv_indptr": (("cu_seqlens_k",), ""),
    "block_tables": (("block_table",), ""),
    "seq_lens": (("seqlens_k", "lengths"), ""),
    "pos_encoding_mode": (("pos_mode",), ""),
    "top_k": (("topk", "k"), ""),
    # flash-linear-attention
    "g": (("log_decay",), ""),
    "u": (("bonus",), ""),
    "gk": (("log_decay",), ", with one number for each channel"),
    "g_gamma": (("log_decay",), ", with one number for each head"),
    "output_final_state": (("return_final_state",), ""),
    "use_qk_l2norm_in_kernel": (("qk_l2norm",), ""),
    # causal-conv1d
    "initial_states": (("initial_state",), ""),
    "return_final_states": (("return_final_state",), ""),
    "conv_state": (("state",), ""),
    "conv_state_indices": (("state_indices",), ""),
    "num_accepted_tokens": (("accepted",), ", of the tokens of this call"),
    "block_size": (("select_block", "block", "block_k"), ""),
    "block_counts": (("topk",), ""),
    # xformers and models of transformers
    "attn_bias": (("bias", "mask"), "; bands and lengths are causal, window and cu_seqlens_q"),
    "attention_mask": (("bias", "mask"), "; of padding, seqlens_k or cu_seqlens_q need no matrix"),
    "scaling": (("scale",), ""),
    "sliding_window": (("window",), ", as (sliding_window - 1, 0) with causal=True"),
    # MoBA and hip-attn
    "moba_chunk_size": (("block",), ""),
    "moba_topk": (("topk",), ""),
    "mask_k": (("budget",), ""),
    "block_size_q": (("block_q",), ""),
    "block_size_k": (("block_k",), ""),
    "block_stride_q": (("stride_q",), ""),
    "sliding_window_size": (("num_recent",), ""),
    "sink_token_size": (("num_sink",), ""),
    # ToMe and torch
    "mode": (("reduce",), ""),
    "dim_size": (("num_out",), ""),
    "index": (("assign",), ""),
    "class_token": (("protect_first",), ", as a number of tokens"),
    "sorted": (("order",), ', "score" or "index"'),
}

_DROPOUT = (
    "there is no dropout of attention weights here; leave it out, or train with PyTorch's SDPA"
)
_DETERMINISTIC = "has no meaning here: the same inputs give the same bits, forward and backward"
_WEIGHTS = "the weights are never in memory; return_lse=True gives their normaliser"
_GQA = "is not needed: fewer heads in k and v than in q are GQA"
_LAYOUT = "there is one layout, [B, S, H, D] (or packed [T, H, D]): transpose(1, 2), a view"

# Foreign name -> the reason why there is no counterpart.
ABSENT: dict[str, str] = {
    "dropout_p": _DROPOUT,
    "dropout": _DROPOUT,
    "p": _DROPOUT,
    "deterministic": _DETERMINISTIC,
    "return_attn_probs": _WEIGHTS,
    "output_attentions": _WEIGHTS,
    "need_weights": _WEIGHTS,
    "enable_gqa": _GQA,
    "pack_gqa": _GQA,
    "head_first": _LAYOUT,
    "kv_layout": _LAYOUT,
    "tensor_layout": _LAYOUT,
    "score_mod": "a score is changed by kind, bias, alibi_slopes, softcap and post_decay only",
    "pos_encoding_mode": "there is no RoPE inside: rotate q and k before (kv_cache_append(rope=))",
    "rotary_cos": "there is no RoPE inside: rotate q and k before (kv_cache_append(rope=))",
    "rotary_sin": "there is no RoPE inside: rotate q and k before (kv_cache_append(rope=))",
    "use_fp16_qk_reduction": "has no meaning here: sums are in float32",
    "allow_fp16_qk_reduction": "has no meaning here: sums are in float32",
    "cache_batch_idx": "a cache is found by block_table, whose rows belong to requests",
    "cache_leftpad": "caches begin at their first key; pad after the last key, and set seqlens_k",
    "leftpad_k": "caches begin at their first key; pad after the last key, and set seqlens_k",
    "gv": "a decay is per head, per token or per channel of k (log_decay), not of v",
    "largest": "the largest scores are taken: negate them for the smallest",
    "beta": "the delta rule is delta_attention",
    "op": "is called backend in tokenmill, and chosen by itself",
}


def refuses_other_names(function: F) -> F:
    """Hides ``**other``, which collects foreign names, from the signature of a function."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return function


def answered_by(run: Callable[..., Any]) -> Callable[[F], F]:
    """Gives run, which takes the keywords that a call names, the signature and the docstring of the
    decorated function, which has no body. run refuses other keywords: those not in its `keywords`.
    """

    def declare(function: F) -> F:
        own = inspect.signature(function).parameters.values()
        keywords = frozenset(p.name for p in own if p.kind is p.KEYWORD_ONLY)
        run.keywords = keywords  # type: ignore[attr-defined]
        return functools.update_wrapper(run, function)  # type: ignore[return-value]

    return declare


def refuse(function: Callable[..., Any], other: Mapping[str, Any]) -> NoReturn:
    """The error for the first keyword that a function does not have."""
    name, value = next(iter(other.items()))
    rule = rule_of(name, tuple(inspect.signature(function).parameters))
    raise UnknownKeyword(f"tokenmill.{function.__name__}: {name}: {rule}; got {show(value)}")


def rule_of(name: str, own: tuple[str, ...]) -> str:
    """Suggestion for a keyword, given the parameters of the function."""
    ours, remark = RENAMED.get(name, ((), ""))
    for candidate in ours:
        if candidate in own:
            return f"is called {candidate} here{remark}"
    if name in ABSENT:
        return ABSENT[name]
    near = difflib.get_close_matches(name, own, 1)
    return "is not an argument" + (f" (did you mean '{near[0]}'?)" if near else "")
