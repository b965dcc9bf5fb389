"""Layers of transformers' models on tokenmill's operators: patch and unpatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import transformers
from torch import nn

from .._check import check, check_version
from .._transformers.recurrences import (
    gated_norms,
    normalize_by_blocks,
    own_forward,
    replace_functions,
)
from ._reduction import KEEP, Reduction, check_own_forward, uninstall
from ._vision import NAME, reduce_tokens


@overload
def patch(
    model: nn.Module, merge: int | Sequence[int], *, layers: Sequence[int] | None = ...,
    fuse: bool = ..., backend: str | None = ...,
) -> Reduction: ...  # fmt: skip


@overload
def patch(
    model: nn.Module, merge: None = ..., *, keep_rate: float,
    layers: Sequence[int] | None = ..., fuse: bool = ..., backend: str | None = ...,
) -> Reduction: ...  # fmt: skip


@overload
def patch(model: nn.Module, *, backend: str | None = ...) -> tuple[str, ...]: ...


def patch(
    model: nn.Module, merge: int | Sequence[int] | None = None, *,
    keep_rate: float | None = None, layers: Sequence[int] | None = None, fuse: bool = True,
    backend: str | None = None,
) -> Reduction | tuple[str, ...]:  # fmt: skip
    """Runs the recurrences of a language model, or a vision transformer with fewer tokens.

    Without merge and keep_rate: the layers with a delta rule (Qwen3-Next, Qwen3.5, Kimi Linear,
    OLMo Hybrid) run :func:`tokenmill.delta_attention`, those with Mamba-2 (Mamba-2, Bamba, Granite
    4, Nemotron-H, Falcon-H1, Zamba2) :func:`tokenmill.linear_attention`, and both
    :func:`tokenmill.causal_conv1d`, with gradients; in decoding :func:`delta_attention_decode
    <tokenmill.delta_attention_decode>`, :func:`linear_attention_decode
    <tokenmill.linear_attention_decode>` and :func:`causal_conv1d_decode
    <tokenmill.causal_conv1d_decode>` update the states of the model's cache in place. Weights,
    caches and results are the model's own, but for rounding. Sequences packed in one batch entry
    (cu_seq_lens_q or seq_idx) are kept apart. Layers of attention are left as they are:
    :func:`register` is for them.

    With merge or keep_rate: tokens are merged or dropped in the layers of a vision transformer,
    between attention and MLP. Weights are unchanged, and attention is :func:`tokenmill.attention`;
    with dropout of attention weights, in training, PyTorch's attention runs. The last hidden states
    hold the remaining rows, class and distillation tokens first.

    Args:
        model: of transformers 5.24 or later. With a reduction a ViT, DeiT, DINOv2 (with registers
            or without) or the vision model of a CLIP or SigLIP, with any head that does not need a
            row for each patch (:meth:`Reduction.unmerge` makes these of merged tokens). SigLIP's
            pooling counts rows, however many tokens they hold.
        merge: ToMe: number of tokens that each layer merges, one number or one per layer. Merged
            keys count in attention as many times as there are tokens in them.
        keep_rate: EViT: fraction of the patches that the given layers keep, chosen by the attention
            of the class token, which SigLIP has not.
        layers: indices (from 0) of these layers; None: at a quarter, half and three quarters of the
            depth (3, 6 and 9 of 12).
        fuse: fuse the dropped patches into one token.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Returns:
        Of a language model the names of the patched layers. Of a reduction an object whose `source`
        and `size` describe it after each call of the model.

    Raises:
        RuntimeError: naming argument, rule and value.

    Papers: Gated Delta Networks (Yang et al. 2024); Kimi Linear (2025); Mamba-2 (Dao and Gu 2024);
    ToMe (Bolya et al. 2023), section 3; EViT (Liang et al. 2022), section 3.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> from tokenmill.integrations.transformers import patch, unpatch
        >>> model = ViTModel(ViTConfig(hidden_size=48, num_attention_heads=4)).eval()
        >>> reduction = patch(model, merge=13)
        >>> with torch.no_grad():
        ...     out = model(torch.randn(1, 3, 224, 224)).last_hidden_state
        >>> out.shape, reduction.unmerge(out).shape
        (torch.Size([1, 41, 48]), torch.Size([1, 197, 48]))
        >>> unpatch(model)
    """
    check_version(NAME, "transformers", transformers.__version__, 5, 24)
    if merge is None and keep_rate is None:
        found = {name: m for name, m in model.named_modules() if own_forward(m) is not None}
        if found:
            return _patch_recurrences(model, found, backend)
    return reduce_tokens(model, merge, keep_rate, layers, fuse, backend)


def _patch_recurrences(
    model: nn.Module, layers: dict[str, nn.Module], backend: str | None
) -> tuple[str, ...]:
    check(KEEP not in vars(model), NAME, "model", "must not be patched yet", type(model).__name__)
    check_own_forward(NAME, list(layers.values()))
    norms = [norm for layer in layers.values() for norm in gated_norms(layer)]
    for layer in layers.values():
        replace_functions(layer, backend)
    for norm in norms:
        normalize_by_blocks(norm)
    vars(model)[KEEP] = (None, [*layers.values(), *norms])
    return tuple(layers)


def unpatch(model: nn.Module) -> None:
    """Restores the layers' own forward."""
    uninstall("integrations.transformers.unpatch", model)
