"""Token reduction in the vision transformers of transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .._check import check, fail
from ._reduction import Reduction, install, make_reduction

NAME = "integrations.transformers.patch"


@dataclass(frozen=True)
class Layout:
    """Names of the parts of a layer, and its tokens before the patches."""

    norms: tuple[str, str]  # before attention and before the MLP
    attention: str
    heads: str
    out: str
    scale: str
    dropout: str  # attention-weight dropout
    after: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # attention and the MLP, in order
    prefix: int = 1
    class_token: bool = True


VIT = Layout(
    norms=("layernorm_before", "layernorm_after"),
    attention="attention",
    heads="num_attention_heads",
    out="o_proj",
    scale="scaling",
    dropout="attention_dropout",
    after=(("dropout",), ("dropout",)),
)
DINOV2 = replace(
    VIT,
    norms=("norm1", "norm2"),
    after=(("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
)
CLIP = Layout(
    norms=("layer_norm1", "layer_norm2"),
    attention="self_attn",
    heads="num_heads",
    out="out_proj",
    scale="scale",
    dropout="dropout",
)


# Layers with a bias for each pair of patches.
RELATIVE = ("BeitLayer", "Data2VecVisionLayer")


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout of a layer of transformers, None: not known."""
    name = type(layer).__name__
    if not type(layer).__module__.startswith("transformers.models."):
        return None
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    if name == "ViTLayer":
        return VIT
    if name == "DeiTLayer":
        return replace(VIT, prefix=2)
    if name == "Dinov2Layer":
        return DINOV2
    if name == "Dinov2WithRegistersLayer":
        registers: int = layer.attention.config.num_register_tokens  # type: ignore
        return replace(DINOV2, prefix=1 + registers)
    if name == "CLIPEncoderLayer" and type(config).__name__ == "CLIPVisionConfig":
        return CLIP
    if name == "SiglipEncoderLayer" and type(config).__name__ == "SiglipVisionConfig":
        return replace(CLIP, prefix=0, class_token=False)
    return None


def reduce_tokens(
    model: nn.Module, merge: int | Sequence[int] | None, keep_rate: float | None,
    layers: Sequence[int] | None, fuse: bool, backend: str | None,
) -> Reduction:  # fmt: skip
    """Installs a reduction in the layers of a vision transformer; arguments as of patch."""

    def layers_in(module: nn.Module) -> list[tuple[nn.Module, Layout]]:
        found = ((layer, layout_of(layer)) for layer in module.children())
        return [(layer, layout) for layer, layout in found if layout is not None]

    for kind in {type(module).__name__ for module in model.modules()} & {*RELATIVE}:
        rule = "must have no bias by relative position, as a merged token has no one position"
        fail(NAME, "model", rule, f"{type(model).__name__} with {kind}")
    stacks = [stack for stack in map(layers_in, model.modules()) if stack]
    rule = "must have layers of ViT, DeiT, DINOv2, CLIP's or SigLIP's vision"
    check(len(stacks) > 0, NAME, "model", rule, type(model).__name__)
    rule = "must have one stack of such layers: patch one encoder at a time"
    check(len(stacks) == 1, NAME, "model", rule, len(stacks))
    found = [layer for layer, _ in stacks[0]]
    layout = stacks[0][0][1]
    reduction = make_reduction(
        NAME, len(found), layout.prefix, layout.class_token, merge, keep_rate, layers, fuse, backend
    )
    install(NAME, model, found, reduction, functools.partial(_forward, layout))
    return reduction


def _forward(
    layout: Layout, layer: Any, number: int, reduction: Reduction, hidden_states: Tensor,
    attention_mask: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    check(attention_mask is None, NAME, "attention_mask", "must be None", "a mask")
    attn, x = getattr(layer, layout.attention), hidden_states
    wanted = options.get("output_attentions") or attn.config.output_attentions
    rule = "must be False, as the weights are never in memory"
    check(not wanted, NAME, "output_attentions", rule, wanted)
    norm, norm_mlp = (getattr(layer, name) for name in layout.norms)
    h = norm(x)
    q, k, v = (
        linear(h).unflatten(2, (getattr(attn, layout.heads), attn.head_dim))
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    scale = getattr(attn, layout.scale)
    dropout = getattr(attn, layout.dropout) if attn.training else 0.0
    out = getattr(attn, layout.out)(reduction.attend(number, q, k, v, scale, dropout).flatten(2))
    x = _through(layer, layout.after[0], out) + x
    x = reduction.reduce(number, x, q, k, scale)
    return _through(layer, layout.after[1], layer.mlp(norm_mlp(x))) + x


def _through(layer: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    for name in names:
        x = getattr(layer, name)(x)
    return x
