"""Hugging Face transformers: attention on :func:`tokenmill.attention` (register), generate() under
a policy (apply_policy), token reduction in vision transformers (patch).

Needs transformers 5.4 or later, whose masks are built from the lengths of queries and keys;
apply_policy and patch need 5.24.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from .._call.sharded import sharded_attention
from ..dense.attention import NO_WINDOW, attention
from ._needs import needs

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ModuleNotFoundError as missing:
    raise needs("transformers", missing) from missing

from ._padding import Padding, decoded, packed, padded, padding_of
from ._pages import Pages, attend_to_pages, give_pages
from ._policy_cache import AppliedPolicy, PolicyCache, apply_policy, pretrained, register_beside
from ._profile import watch_attention
from ._vision import patch, unpatch
from ._weights import attention_with_weights, weights_wanted

__all__ = [
    "AppliedPolicy",
    "PolicyCache",
    "apply_policy",
    "attention_forward",
    "build_mask",
    "continuous_batching",
    "patch",
    "register",
    "unpatch",
    "watch_attention",
]

TO_SDPA = "no kernel drops weights, and scaled_dot_product_attention runs in place of one"
TO_PYTORCH = "no kernel has the weights in memory, and plain PyTorch runs in place of one"
Kind = Literal["softmax", "sigmoid"]
UNSUPPORTED = {
    "head_mask": "a mask over heads needs the weights, which are never in memory",
    "layer_head_mask": "a mask over heads needs the weights, which are never in memory",
    "block_table": "paged caches are not supported",
}


def register(name: str = "tokenmill", *, backend: str | None = None, kind: Kind = "softmax") -> str:
    """Adds an attention implementation to transformers.

    Args:
        name: the value for attn_implementation.
        backend: as in :func:`tokenmill.attention`.
        kind: "softmax", which keeps the meaning of a pretrained model, or "sigmoid" (with a score
            bias of -log n, n being the number of keys that are not padding; with a complete mask,
            of all keys) to train one.

    Returns:
        name.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from tokenmill.integrations.transformers import register
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertModel(config).eval()
        >>> model.set_attn_implementation(register())
    """
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise RuntimeError(
            f"tokenmill needs transformers 5.4 or later; got {transformers.__version__}"
        )
    function = functools.partial(attention_forward, kind=kind, backend=backend)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, build_mask)
    return name


@contextlib.contextmanager
def continuous_batching(
    model: torch.nn.Module, *, backend: str | None = None, pages: bool = True
) -> Iterator[None]:
    """A context manager in which ``generate_batch`` and the like use tokenmill's attention.

    transformers keeps keys and values in pages. It passes block tables only to flash-attn, and
    gathers the keys of each request for all other implementations, which it calls with packed
    sequences. It accepts implementations by name, "sdpa" and names containing "flash", which
    set_attn_implementation does not.

    Args:
        model: a decoder of transformers.
        backend: as in :func:`register`.
        pages: layers with full attention read their pages in place (transformers 5.24 or later) if
            the page size is a power of two; with False, a window, other page sizes or older
            releases, keys are gathered.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tokenmill.integrations.transformers import continuous_batching
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=4)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with continuous_batching(model):
        ...     model.config._attn_implementation
        'tokenmill_flash'
    """
    name = "tokenmill_flash" if backend is None else f"tokenmill_{backend}_flash"
    register(name, backend=backend)
    before = {id(m.config): (m.config, m.config._attn_implementation) for m in pretrained(model)}
    for config, _ in before.values():
        config._attn_implementation_internal = name
    read_pages = model.register_forward_pre_hook(give_pages, with_kwargs=True) if pages else None
    try:
        yield
    finally:
        if read_pages is not None:
            read_pages.remove()
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation


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
        for name, given in (
            ("attention_mask", attention_mask), ("position_bias", position_bias),
            ("cu_seq_lens_q", cu_seq_lens_q), ("dropout", dropout or None),
            ("output_attentions", weights or None),
        ):  # fmt: skip
            if given is not None:
                raise RuntimeError(f"tokenmill attention: {name}: must be None in context_parallel")
        return run(q, k, v, **options), None
    if weights:
        for what, given in (
            ("continuous_batching", tokenmill_pages is not None),
            ("packed sigmoid attention", cu_seq_lens_q is not None and kind == "sigmoid"),
        ):
            if given:
                raise RuntimeError(
                    f"tokenmill attention: output_attentions: must be False in {what}; got True"
                )
        _say_once(f"tokenmill attention: output_attentions: {TO_PYTORCH}")
        mask = _complete(
            attention_mask, q.shape[1], k.shape[1], causal, sliding_window, cu_seq_lens_q,
            cu_seq_lens_k, q.device,
        )  # fmt: skip
        return attention_with_weights(
            q, k, v, mask, attention_mask, position_bias, dropout if module.training else 0.0,
            **options,
        )  # fmt: skip
    if dropout > 0:
        for name, given in (
            ("kind", kind != "softmax"), ("softcap", softcap), ("s_aux", s_aux is not None),
        ):  # fmt: skip
            if given:
                raise RuntimeError(
                    f"tokenmill attention: dropout: must be 0 with {name}, as {TO_SDPA}; got "
                    f"{dropout:g}: set attention_dropout (BERT: attention_probs_dropout_prob) of "
                    "the configuration to 0"
                )
        _say_once(f"tokenmill attention: dropout: {TO_SDPA}")
        mask = _complete(
            attention_mask, q.shape[1], k.shape[1], causal, sliding_window, cu_seq_lens_q,
            cu_seq_lens_k, q.device,
        )  # fmt: skip
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal,
            position_bias=position_bias,
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

    padding = None
    if attention_mask is not None:
        options["window"] = NO_WINDOW
        padding = padding_of(attention_mask, q, k)
    bias = None if position_bias is None else _additive(position_bias, q.dtype)
    if bias is None and _few_queries(q, k, v, s_aux, attention_mask, padding, kind, backend):
        return decoded(q, k, v, padding, **options), None
    if padding is not None:
        return padded(q, k, v, padding, bias, **options), None
    if attention_mask is not None:
        options["causal"] = False
        mask = _additive(attention_mask[..., : k.shape[1]], q.dtype)
        bias = mask if bias is None else bias + mask
    out = attention(q, k, v, bias=bias, **options)
    assert isinstance(out, Tensor)
    return out, None


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """The mask of all layers of one kind, in transformers' mask interface.

    Args:
        batch_size, q_length, kv_length: B, Sq and Sk.
        q_offset, kv_offset: positions of the first query (a tensor for a static cache) and key.
        mask_function: from indices (batch, head, query, key) to visible.
        attention_mask: ``[B, tokens so far]``, False on padding.
        local_size: the window or chunk size in mask_function.
        allow_is_causal_skip: mask_function is only causality and local_size.
        allow_is_bidirectional_skip: mask_function is only local_size.
        options: passed on to transformers' own mask function.

    Returns:
        None or a padding mask ``[B, Sk]`` if the only other masking is causality with the last
        query at the last key; else the complete boolean mask ``[B, 1, Sq, Sk]``. True is visible.
    """
    if sharded_attention.get() and attention_mask is None:
        return None  # causality and windows refer to positions in the whole sequence
    end = kv_offset + kv_length
    plain = allow_is_causal_skip or allow_is_bidirectional_skip
    if allow_is_causal_skip and not (isinstance(q_offset, int) and q_offset + q_length == end):
        plain = False  # the last query is not at the last key: a cache with spare capacity
    if plain and (local_size is None or kv_length < local_size):
        if attention_mask is None:
            return None
        if not torch.compiler.is_compiling():
            missing = max(end - attention_mask.shape[1], 0)
            padding = torch.nn.functional.pad(attention_mask, (0, missing))[:, kv_offset:end]
            return None if bool(padding.all()) else padding
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **options,
    )


@functools.lru_cache
def _say_once(notice: str) -> None:
    warnings.warn(notice, stacklevel=4)


def _complete(
    mask: Tensor | None, sq: int, sk: int, causal: bool, sliding_window: int | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device,
) -> Tensor | None:  # fmt: skip
    """A mask for attention_forward that includes all masking; None for plain causality."""
    if cu_seqlens_q is None and (mask.dim() == 4 if mask is not None else sliding_window is None):
        return None if mask is None else mask[..., :sk]
    query = torch.arange(sq, device=device)[:, None]
    key = torch.arange(sk, device=device)
    visible = torch.ones(1, 1, sq, sk, dtype=torch.bool, device=device)
    if cu_seqlens_q is not None:
        ends_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        of_q, of_k = (
            torch.searchsorted(ends, at.flatten(), right=True)
            for ends, at in ((cu_seqlens_q, query.int()), (ends_k, key.int()))
        )
        visible &= of_q[:, None] == of_k
        # The last query of a sequence is at its last key.
        query = query + (ends_k[of_q] - cu_seqlens_q[of_q])[:, None]
    else:
        query = query + sk - sq
        if mask is not None:
            visible = visible & mask[:, None, None]
    if causal:
        visible = visible & (key <= query)
    if sliding_window is not None and mask is None:
        visible = visible & ((key - query).abs() < sliding_window)
    return visible


def _refuse(others: dict[str, Any]) -> None:
    for name, reason in UNSUPPORTED.items():
        if (value := others.get(name)) is not None and value is not False:
            raise RuntimeError(f"tokenmill attention: {name}: {reason}")


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H, D], a view unless D is not contiguous."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _few_queries(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, mask: Tensor | None,
    padding: Padding | None, kind: Kind, backend: str | None,
) -> bool:  # fmt: skip
    """Whether the call is a decode step of generate() that attention_decode runs faster: it reads
    keys once per GQA group, and splits long rows of keys. On a CPU attention does so itself, except
    with padding.
    """
    sq, sk = q.shape[1], k.shape[1]
    if kind != "softmax" or not 0 < sq <= 8 or sk < 256 * sq:
        return False
    if mask is None and q.device.type == "cpu" and backend in (None, "cpu"):
        return False
    if torch.is_autocast_enabled(q.device.type):  # attention casts, attention_decode does not
        return False
    if mask is not None and (padding is None or sq > 1):
        return False
    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as an additive bias of dtype or float32, without materialising expanded dimensions."""
    for dim in range(mask.dim() - 1):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(torch.promote_types(mask.dtype, dtype)).contiguous()


register_beside(attention_forward, build_mask)
