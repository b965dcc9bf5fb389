"""Which calls of attention, and of requests with a cache, the sm_90a kernels take. The same rules
are in launch_sm90.h of csrc/dense/attention and csrc/dense/attention_decode, launch_backward_sm90.h
of the first and cuda.cu of the second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _knobs
from .._call.operator import record_of
from .._sm90 import MIN_TOKENS, Rules, float32, max_tiles

Arguments, DecodeArguments = record_of("attention"), record_of("attention_decode")
HEAD_DIMS = (64, 96, 128, 192, 256)
DECODE_HEAD_DIMS = (64, 128)
DECODE_ROWS = 64  # rows of a tile: queries times heads of a GQA group
MIN_PAGE = 64  # tokens; a tile has 64 to 128
MAX_BACKWARD_TILES = 2**31 - 1
SWITCH, MIN_TILES = "attention_decode.sm90", "attention_decode.sm90_tiles"  # knobs


def unsupported_sm90(*lowered: Any, out: Tensor | None = None) -> list[str]:
    """Rules of the sm_90a forward that a call breaks."""
    a = Arguments(*lowered)
    rules = _rules_of_both_passes(a)
    _check_forward(rules, a, out)
    return rules.broken


def unsupported_cached_sm90(*lowered: Any, out: Tensor | None = None) -> list[str]:
    """Rules that a call with a cache (attention_decode) breaks, of the sm_90a forward or of the
    decode kernel, whichever suits the number of rows; empty if either takes the call.
    """
    a = DecodeArguments(*lowered)
    broken = _unsupported_forward(a, out)
    if not broken or not _divides_keys(a):
        return broken
    if _has_few_rows(a):
        return _unsupported_decode(a, out)
    rules = Rules()
    few = f"must have at most {DECODE_ROWS} queries times heads of a KV head"
    rules.check(False, "q", f"{few}, or what the forward asks", _rows(a))
    return broken + rules.broken


def cached_sm90_kernel(*lowered: Any) -> str:
    a = DecodeArguments(*lowered)
    if _has_few_rows(a) and _unsupported_forward(a, None):
        return "csrc/dense/attention_decode/kernel_sm90"
    if a.cu_seqlens_q is None:
        return "csrc/dense/attention/kernel_sm90"
    few = f"csrc/dense/attention_decode for requests with fewer than {MIN_TOKENS} queries"
    return f"csrc/dense/attention/kernel_sm90 and {few}"


def cached_sm90_knobs(*lowered: Any, out: Tensor | None = None) -> list[str]:
    """Knobs that decide which sm_90a kernel takes a cached call, including the number of tiles from
    which the forward takes it.
    """
    a = DecodeArguments(*lowered)
    forward = not _unsupported_forward(a, out)
    few = not forward and _has_few_rows(a) and not _unsupported_decode(a, out)
    names = [SWITCH] if forward or few else []
    if not _knobs.value(SWITCH):
        return names
    if forward:
        names += ["attention.sm90_section", "attention.sm90_grid"]
    return [*names, MIN_TILES] if _divides_keys(a) else names


def _divides_keys(a: Any) -> bool:
    """Whether a split-KV decode kernel could take the call."""
    return a.cu_seqlens_q is None and bool(a.causal or a.window_right == 0)


def _rows(a: Any) -> int:
    """Rows of a KV head; Hk may be 0."""
    return int(a.q.shape[-2] // max(a.k_cache.shape[2], 1) * a.q.shape[-3])


def _has_few_rows(a: Any) -> bool:
    return _divides_keys(a) and _rows(a) <= DECODE_ROWS


def _unsupported_decode(a: Any, out: Tensor | None) -> list[str]:
    """The rules of the decode kernel, which applies to few rows."""
    rules = Rules()
    _check_cached_form(rules, a, DECODE_HEAD_DIMS)
    rules.check_scale(a)
    if out is not None:
        rules.check_layout("out", out)
    return rules.broken


def _unsupported_forward(a: Any, out: Tensor | None) -> list[str]:
    rules = Rules()
    check = rules.check
    _check_cached_form(rules, a, HEAD_DIMS)
    tokens = a.q.shape[-3]
    check(tokens >= MIN_TOKENS, "q", f"must have {MIN_TOKENS} tokens", tokens)
    maximum = MIN_TOKENS if a.max_seqlen_q is None else a.max_seqlen_q
    check(maximum >= MIN_TOKENS, "max_seqlen_q", f"must be {MIN_TOKENS} or more", maximum)
    if _divides_keys(a):
        check(a.num_splits == 0, "num_splits", "must be 0", a.num_splits)
        check(a.schedule != "split", "schedule", "must be 'auto' or 'stream_k'", a.schedule)
        tiles, many = max_tiles(a.q, None, 64), _knobs.value(MIN_TILES)
        check(tiles >= many, "q", f"must have {many} tiles of 64 rows", tiles)
    _check_forward(rules, a, out)
    return rules.broken


def unsupported_sm90_backward(*lowered: Any) -> list[str]:
    """Rules of the sm_90a backward that a call breaks. dout needs the layout of q."""
    a = Arguments(*lowered)
    rules = _rules_of_both_passes(a)
    if float32(a.softcap) > 0:
        rules.check_scale(a)
        summed = a.kind == "sigmoid" and a.score_bias is not None and a.score_bias.requires_grad
        rule = "must not require a gradient with a softcap"
        rules.check(not summed, "score_bias", rule, "a tensor that does")
    rows = 128 if a.q.shape[-1] <= 64 else 64
    tiles = max_tiles(a.q, a.cu_seqlens_q, rows)
    rule = f"must have fewer than 2^31 tiles of {rows} rows"
    rules.check(tiles <= MAX_BACKWARD_TILES, "q", rule, tiles)
    return rules.broken


def _rules_of_both_passes(a: Any) -> Rules:
    rules = Rules()
    _check_form(rules, a, "k", "v", HEAD_DIMS)
    rules.check_tokens(a.q, a.k, a.cu_seqlens_q)
    return rules


def _check_form(rules: Rules, a: Any, keys: str, values: str, head_dims: tuple[int, ...]) -> None:
    """Rules that hold with and without a cache."""
    check = rules.check
    rules.check_heads(a.q, getattr(a, values), head_dims, values)
    check(a.kind in ("softmax", "sigmoid"), "kind", "must be 'softmax' or 'sigmoid'", a.kind)
    check(a.normalize == "none", "normalize", "must be 'none'", a.normalize)
    for name in ("mask_ranges", "mask_q_spans", "bias", "alibi_slopes"):
        check(getattr(a, name, None) is None, name, "must be None", "a tensor")
    for name in ("q", keys, values):
        rules.check_layout(name, getattr(a, name))


def _check_cached_form(rules: Rules, a: Any, head_dims: tuple[int, ...]) -> None:
    check = rules.check
    _check_form(rules, a, "k_cache", "v_cache", head_dims)
    rule = f"must have the dtype of q, {a.q.dtype}"
    check(a.k_cache.dtype == a.q.dtype, "k_cache", rule, a.k_cache.dtype)
    pages, size = a.k_cache.shape[:2]
    if a.block_table is not None:
        rule = f"must have pages of {MIN_PAGE} tokens or more"
        check(size >= MIN_PAGE, "k_cache", rule, size)
        check(a.block_table.shape[1] > 0, "block_table", "must have pages", 0)
    check(pages > 0 and size > 0, "k_cache", "must have tokens", a.k_cache.shape)


def _check_forward(rules: Rules, a: Any, out: Tensor | None) -> None:
    rules.check_scale(a)
    rules.check_tiles(a.q, a.cu_seqlens_q)
    if out is not None:
        rules.check_layout("out", out)
