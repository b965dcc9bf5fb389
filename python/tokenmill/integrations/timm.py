"""Token reduction in the vision transformers of timm.

Example:
    >>> import timm, torch
    >>> from tokenmill.integrations.timm import patch, unpatch
    >>> model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    >>> reduction = patch(model, merge=13)
    >>> with torch.no_grad():
    ...     out = model(torch.randn(1, 3, 224, 224))
    >>> out.shape, reduction.size.shape, reduction.source.shape
    (torch.Size([1, 1000]), torch.Size([1, 41]), torch.Size([1, 197]))
    >>> unpatch(model)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._check import check, needs

try:
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, VisionTransformer
except ModuleNotFoundError as missing:
    raise needs("timm", missing) from missing

from ._reduction import Reduction, install, make_reduction, uninstall

__all__ = ["Reduction", "patch", "unpatch"]

NAME = "integrations.timm.patch"


def patch(
    model: nn.Module, merge: int | Sequence[int] | None = None, *,
    keep_rate: float | None = None, layers: Sequence[int] | None = None, fuse: bool = True,
    backend: str | None = None,
) -> Reduction:  # fmt: skip
    """Merges or drops tokens in the blocks of a vision transformer, between attention and MLP.

    Weights are unchanged, and attention is :func:`tokenmill.attention`; with dropout of attention
    weights, in training, PyTorch's attention runs. A mean over patches ("avg") weights each row by
    the number of its tokens.

    Args:
        model: a VisionTransformer (ViT, DeiT, with or without registers, ...) whose blocks are
            timm's Block with timm's Attention.
        merge: ToMe: number of tokens that each block merges, one number or one per block. Merged
            keys count in attention as many times as there are tokens in them.
        keep_rate: EViT: fraction of the patches that the blocks in layers keep, chosen by the
            attention of the class token.
        layers: indices (from 0) of these blocks; None: at a quarter, half and three quarters of the
            depth (3, 6 and 9 of 12).
        fuse: fuse the dropped patches into one token.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Returns:
        After each call of the model its `source` and `size` describe the reduction of the tokens.

    Raises:
        RuntimeError: naming argument, rule and value.

    Papers: ToMe (Bolya et al. 2023), section 3; EViT (Liang et al. 2022), section 3.
    """
    kind = type(model).__name__
    check(isinstance(model, VisionTransformer), NAME, "model", "must be a VisionTransformer", kind)
    assert isinstance(model, VisionTransformer)
    blocks = list(model.blocks)
    for block in blocks:
        known = type(block) is Block and type(block.attn) is Attention
        found = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
        check(known, NAME, "model", "must have blocks Block with Attention", found)
    pooled = model.attn_pool is None and model.global_pool in ("", "token", "avg")
    rule = "must pool by its class token, by a mean or not at all"
    check(pooled, NAME, "model", rule, model.global_pool)
    prefix = model.num_prefix_tokens
    reduction = make_reduction(
        NAME, len(blocks), prefix, bool(model.has_class_token), merge, keep_rate, layers, fuse,
        backend,
    )  # fmt: skip
    own = "pool" not in vars(model)
    check(own, NAME, "model", "must have the pool of its class", f"{kind} with another")
    install(NAME, model, blocks, reduction, _forward)
    if merge is not None and model.global_pool == "avg":
        vars(model)["pool"] = functools.partial(_pool, model, reduction)
    return reduction


def unpatch(model: nn.Module) -> None:
    """Restores the blocks' own forward."""
    uninstall("integrations.timm.unpatch", model)
    vars(model).pop("pool", None)


def _pool(model: Any, reduction: Reduction, x: Tensor, pool_type: str | None = None) -> Tensor:
    """Mean over patches, each row weighted by its number of tokens."""
    size = reduction.size
    if (pool_type or "avg") != "avg" or size is None:
        return type(model).pool(model, x, pool_type)
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    weight = size[:, first:, None].to(x.dtype)
    return (x[:, first:] * weight).sum(1) / weight.sum(1)


def _forward(
    block: Any, number: int, reduction: Reduction, x: Tensor, attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    check(attn_mask is None, NAME, "attn_mask", "must be None", "a mask")
    check(not is_causal, NAME, "is_causal", "must be False", is_causal)
    attn, h = block.attn, block.norm1(x)
    heads = (3, attn.num_heads, attn.head_dim)
    q, k, v = attn.qkv(h).unflatten(2, heads).unbind(2)  # [B, N, H, D]
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = attn.norm(reduction.attend(number, q, k, v, attn.scale, dropout).flatten(2))
    gate = getattr(attn, "gate", None)  # timm 1.0.20 has none
    if gate is not None:
        out = out * torch.sigmoid(gate(h))
    out = attn.proj_drop(attn.proj(out))
    x = x + block.drop_path1(block.ls1(out))
    x = reduction.reduce(number, x, q, k, attn.scale)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
