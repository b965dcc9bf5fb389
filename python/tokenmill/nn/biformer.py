"""The attention of BiFormer."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..check import check, fail
from ..sparse import bilevel_routing_attention

NAME = "nn.BiFormerAttention"
Padding = Literal["mask", "zeros", "input"]


class BiFormerAttention(nn.Module):
    r"""Bi-level routing attention with its projections and its local term:

    .. math::
       q, k, v = x W_{qkv} + b, \qquad
       y = (\operatorname{BRA}(q, k, v) + \operatorname{DWConv}(v)) W_o + b_o.

    Args:
        dim: channels C of the input.
        num_heads: heads, which divide the channels.
        regions: regions along each side of the map (the paper's S).
        topk: regions that each region attends to. None: all of them, as in the last stage.
        scale: factor of q.k; None = 1/sqrt(C), as in the published models: all channels, not those
            of a head.
        side_dwconv: side of the depthwise convolution of the values; 0 leaves it out.
        padding: where regions do not divide the map: "mask", regions of ceil(side / regions)
            pixels, the last of them smaller; "zeros", as in the published channels-first code,
            regions of floor(side / regions) pixels, filled up by keys whose logit and value are 0;
            "input", as in the published models for segmentation, the input itself is filled up, so
            that the added pixels carry the bias of the projection.
        backend: of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]``, channels last, to ``[B, Y, X, C]``; float16, bfloat16, float32.

    Weights: qkv ``[3 C, C]``, lepe ``[C, 1, side, side]``, wo ``[C, C]``, each with a bias.
    State dicts of the published layouts load as they are: ``qkv.qkv`` and ``wo`` (channels last),
    ``qkv_linear`` and ``output_linear`` (1x1 convolutions).

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: BiFormer (Zhu et al. 2023), section 3.2, equations 1 to 7; its models have regions=7,
    side_dwconv=5, 32 channels a head and topk 1, 4, 16 and None in their four stages.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.BiFormerAttention(128, num_heads=4, topk=4, side_dwconv=5)
        >>> layer(torch.randn(2, 28, 28, 128)).shape
        torch.Size([2, 28, 28, 128])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        regions: int = 7,
        topk: int | None = 4,
        *,
        scale: float | None = None,
        side_dwconv: int = 3,
        padding: Padding = "mask",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        divides = num_heads > 0 and dim % num_heads == 0
        check(divides, NAME, "num_heads", f"must divide dim, {dim}", num_heads)
        check(regions > 0, NAME, "regions", "must be at least 1", regions)
        fits = topk is None or 1 <= topk <= regions**2
        check(fits, NAME, "topk", f"must be 1 to regions^2, {regions**2}, or None", topk)
        odd = side_dwconv == 0 or side_dwconv % 2 == 1
        check(odd, NAME, "side_dwconv", "must be odd, or 0", side_dwconv)
        known = padding in ("mask", "zeros", "input")
        check(known, NAME, "padding", "must be 'mask', 'zeros' or 'input'", padding)
        self.num_heads, self.regions, self.topk = num_heads, regions, topk
        self.scale = dim**-0.5 if scale is None else scale
        self.padding, self.backend = padding, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)
            if side_dwconv
            else None
        )
        self.wo = nn.Linear(dim, dim)
        self.register_load_state_dict_pre_hook(_from_published)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.wo.in_features
        shaped = x.dim() == 4 and x.shape[-1] == channels
        check(shaped, NAME, "x", f"must have shape [B, Y, X, {channels}]", x.shape)
        height, width = x.shape[1:3]
        if min(height, width) < self.regions:
            rule = f"must have at least {self.regions} pixels a side, one for each region"
            fail(NAME, "x", rule, [height, width])
        if self.padding == "input":
            x = F.pad(x, (0, 0, 0, -width % self.regions, 0, -height % self.regions))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        zeros = self.padding == "zeros"
        size = (x.shape[1] // self.regions, x.shape[2] // self.regions)
        y = bilevel_routing_attention(
            q, k, v, regions=None if zeros else self.regions, region_size=size if zeros else None,
            topk=self.topk or self._all_regions(x), scale=self.scale, mask_padding=not zeros,
            backend=self.backend,
        ).flatten(3)  # fmt: skip
        if self.lepe is not None:
            y = y + self.lepe(v.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.wo(y)[:, :height, :width]

    def _all_regions(self, x: Tensor) -> int:
        """Of regions that need not divide the map there may be fewer or more a side."""
        floors = self.padding == "zeros"
        sides = (
            -(-side // (side // self.regions if floors else -(-side // self.regions)))
            for side in x.shape[1:3]
        )
        return math.prod(sides)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, regions={self.regions}, topk={self.topk}, "
            f"padding={self.padding!r}"
        )


def _from_published(
    module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *args: Any
) -> None:
    """Renames what the published layouts call otherwise; 1x1 convolutions become matrices."""
    names = {"qkv.qkv.": "qkv.", "qkv_linear.": "qkv.", "output_linear.": "wo."}
    for old, new in names.items():
        for kind in ("weight", "bias"):
            if (found := state.pop(prefix + old + kind, None)) is not None:
                state[prefix + new + kind] = found.flatten(1) if kind == "weight" else found
