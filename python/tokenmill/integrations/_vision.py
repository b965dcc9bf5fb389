"""Token reduction in the vision transformers of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor, nn

from .._check import check, check_version
from ._reduction import Reduction, install, make_reduction, uninstall

NAME = "integrations.transformers.patch"


def patch(
    model: nn.Module, merge: int | Sequence[int] | None = None, *,
    keep_rate: float | None = None, layers: Sequence[int] | None = None, fuse: bool = True,
    backend: str | None = None,
) -> Reduction:  # fmt: skip
    """Merges or drops tokens in the layers of a ViT or a DeiT, between attention and MLP.

    Weights are unchanged, and attention is :func:`tokenmill.attention`; with dropout of attention
    weights, in training, PyTorch's attention runs. The last hidden states hold the remaining rows,
    class and distillation tokens first.

    Args:
        model: a ViT or DeiT of transformers 5.24 or later, with any head that reads its class
            tokens.
        merge: ToMe: number of tokens that each layer merges, one number or one per layer. Merged
            keys count in attention as many times as there are tokens in them.
        keep_rate: EViT: fraction of the patches that the given layers keep, chosen by the attention
            of the class token.
        layers: indices (from 0) of these layers; None: at a quarter, half and three quarters of the
            depth (3, 6 and 9 of 12).
        fuse: fuse the dropped patches into one token.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Returns:
        After each call of the model its `source` and `size` describe the reduction of the tokens.

    Raises:
        RuntimeError: naming argument, rule and value.

    Papers: ToMe (Bolya et al. 2023), section 3; EViT (Liang et al. 2022), section 3.

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
    from transformers.models.deit.modeling_deit import DeiTLayer
    from transformers.models.vit.modeling_vit import ViTLayer

    def layers_in(module: nn.Module) -> list[nn.Module]:
        return [m for m in module.children() if type(m) in (ViTLayer, DeiTLayer)]

    stacks = [stack for stack in map(layers_in, model.modules()) if stack]
    rule = "must have layers of ViT or DeiT"
    check(len(stacks) > 0, NAME, "model", rule, type(model).__name__)
    rule = "must have one stack of such layers: patch one encoder at a time"
    check(len(stacks) == 1, NAME, "model", rule, len(stacks))
    found = stacks[0]
    prefix = 2 if type(found[0]) is DeiTLayer else 1
    reduction = make_reduction(
        NAME, len(found), prefix, True, merge, keep_rate, layers, fuse, backend
    )
    install(NAME, model, found, reduction, _forward)
    return reduction


def unpatch(model: nn.Module) -> None:
    """Restores the layers' own forward."""
    uninstall("integrations.transformers.unpatch", model)


def _forward(
    layer: Any, number: int, reduction: Reduction, hidden_states: Tensor,
    attention_mask: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    check(attention_mask is None, NAME, "attention_mask", "must be None", "a mask")
    attn, x = layer.attention, hidden_states
    wanted = options.get("output_attentions") or attn.config.output_attentions
    rule = "must be False, as the weights are never in memory"
    check(not wanted, NAME, "output_attentions", rule, wanted)
    h = layer.layernorm_before(x)
    q, k, v = (
        linear(h).unflatten(2, (attn.num_attention_heads, attn.head_dim))
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    dropout = attn.attention_dropout if attn.training else 0.0
    out = reduction.attend(number, q, k, v, attn.scaling, dropout).flatten(2)
    x = layer.dropout(attn.o_proj(out)) + x
    x = reduction.reduce(number, x, q, k, attn.scaling)
    return layer.dropout(layer.mlp(layer.layernorm_after(x))) + x
