"""The attention layers of BiFormer."""

from __future__ import annotations

import functools
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_bool, fail
from ..dense.attention import attention
from ..sparse.bilevel_routing_attention import bilevel_routing_attention
from .rules import check_heads, check_input, convolved, renamed

NAME, LEPE = "nn.BiFormerAttention", "nn.AttentionLePE"
Padding = Literal["mask", "zeros", "input"]
Local = Literal["input", "values"]


class BiFormerAttention(nn.Module):
    r"""Bi-level routing attention with its projections and its local term:

    .. math::
       q, k, v = x W_{qkv} + b, \qquad
       y = (\operatorname{BRA}(q, k, v) + \operatorname{DWConv}(v)) W_o + b_o.

    Args:
        dim: channels C of the input.
        num_heads: number of heads, a divisor of the channels.
        regions: number of regions along each side of the map (the paper's S).
        topk: number of regions that each region attends to.
        scale: factor of q.k; None = 1/sqrt(C), as in the published models: all channels, not the
            channels of a head.
        side_dwconv: kernel size of the depthwise convolution of the values; 0 omits it.
        padding: used where regions do not divide the map: "mask", regions of ceil(side / regions)
            pixels, the last of them smaller; "zeros", as in the published channels-first code,
            regions of floor(side / regions) pixels, padded with keys whose logit and value are 0;
            "input", as in the published models for segmentation, the input itself is padded, so
            that the added pixels carry the bias of the projection.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]``, channels last, to ``[B, Y, X, C]``; float16, bfloat16, float32.

    Weights: qkv ``[3 C, C]``, lepe ``[C, 1, side, side]``, wo ``[C, C]``, each with a bias.
    State dicts of the published layouts load unchanged: ``qkv.qkv`` and ``wo`` (channels last),
    ``qkv_linear`` and ``output_linear`` (1x1 convolutions).

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: BiFormer (Zhu et al. 2023), section 3.2, equations 1 to 7; its models have regions=7,
    side_dwconv=5, 32 channels per head and topk 1, 4 and 16 in their first three stages. The fourth
    uses :class:`AttentionLePE`.

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
        topk: int = 4,
        *,
        scale: float | None = None,
        side_dwconv: int = 3,
        padding: Padding = "mask",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        regions, topk = as_int(NAME, "regions", regions), as_int(NAME, "topk", topk)
        check(1 <= regions < 2**15, NAME, "regions", "must be 1 to 2^15 - 1", regions)
        rule = f"must be 1 to regions^2, {regions**2}"
        check(1 <= topk <= regions**2, NAME, "topk", rule, topk)
        known = isinstance(padding, str) and padding in ("mask", "zeros", "input")
        check(known, NAME, "padding", "must be 'mask', 'zeros' or 'input'", padding)
        self.num_heads, self.regions, self.topk = num_heads, regions, topk
        self.scale = dim**-0.5 if scale is None else as_number(NAME, "scale", scale)
        self.padding, self.backend = padding, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = _local_term(NAME, dim, side_dwconv)
        self.wo = nn.Linear(dim, dim)
        names = {"qkv.qkv.": "qkv.", "qkv_linear.": "qkv.", "output_linear.": "wo."}
        self.register_load_state_dict_pre_hook(functools.partial(renamed, names))

    def forward(self, x: Tensor) -> Tensor:
        _check_map(NAME, x, self.wo.in_features, self.qkv.weight)
        height, width = x.shape[1:3]
        if self.padding == "input":
            x = F.pad(x, (0, 0, 0, -width % self.regions, 0, -height % self.regions))
        elif min(height, width) < self.regions:
            rule = f"must have at least {self.regions} pixels a side, one for each region"
            fail(NAME, "x", rule, [height, width])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        zeros = self.padding == "zeros"
        size = (x.shape[1] // self.regions, x.shape[2] // self.regions)
        y = bilevel_routing_attention(
            q, k, v, regions=None if zeros else self.regions, region_size=size if zeros else None,
            topk=self.topk, scale=self.scale, mask_padding=not zeros,
            backend=self.backend,
        ).flatten(3)  # fmt: skip
        if self.lepe is not None:
            y = y + convolved(self.lepe, v.flatten(3))
        return self.wo(y)[:, :height, :width]

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, regions={self.regions}, topk={self.topk}, "
            f"padding={self.padding!r}"
        )


class AttentionLePE(nn.Module):
    r"""Attention of each pixel to all pixels, with a local term: the last stage of BiFormer.

    .. math::
       q, k, v = x W_{qkv}, \qquad
       y = (\operatorname{softmax}(q k^\top / \sqrt{d})\, v + \operatorname{DWConv}(x)) W_o + b_o

    Args:
        dim: channels C of the input.
        num_heads: number of heads, a divisor of the channels.
        scale: factor of q.k; None = 1/sqrt(C / num_heads), unlike :class:`BiFormerAttention`.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        side_dwconv: kernel size of the depthwise convolution; 0 omits it.
        local: the input of the convolution: "input", x as above, or "values", v, as in the
            published channels-first code.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]``, channels last, to ``[B, Y, X, C]``; float16, bfloat16, float32.

    Weights: qkv ``[3 C, C]``, lepe ``[C, 1, side, side]`` with a bias, proj ``[C, C]`` with a bias,
    with the names of the published models. 1x1 convolutions (channels first) load unchanged.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 8 C^2 + 4 C Y X operations per pixel.

    Paper: BiFormer (Zhu et al. 2023), whose last stage of 7x7 pixels uses it; the local term
    follows CSWin (Dong et al. 2022).

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.AttentionLePE(512)
        >>> layer(torch.randn(2, 7, 7, 512)).shape
        torch.Size([2, 7, 7, 512])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        scale: float | None = None,
        qkv_bias: bool = False,
        side_dwconv: int = 5,
        local: Local = "input",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(LEPE, dim, num_heads)
        scale = None if scale is None else as_number(LEPE, "scale", scale)
        check_bool(LEPE, "qkv_bias", qkv_bias)
        known = isinstance(local, str) and local in ("input", "values")
        check(known, LEPE, "local", "must be 'input' or 'values'", local)
        self.num_heads, self.scale, self.local, self.backend = num_heads, scale, local, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = _local_term(LEPE, dim, side_dwconv)
        self.proj = nn.Linear(dim, dim)
        names = {"qkv.": "qkv.", "proj.": "proj."}
        self.register_load_state_dict_pre_hook(functools.partial(renamed, names))

    def forward(self, x: Tensor) -> Tensor:
        _check_map(LEPE, x, self.proj.in_features, self.qkv.weight)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(1, 2).unbind(2)
        out = attention(q, k, v, scale=self.scale, backend=self.backend)
        y: Tensor = out.flatten(2).unflatten(1, x.shape[1:3])
        if self.lepe is not None:
            values = v.flatten(2).unflatten(1, x.shape[1:3])
            y = y + convolved(self.lepe, x if self.local == "input" else values)
        return self.proj(y)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scale={self.scale}, local={self.local!r}"


def _check_map(name: str, x: Tensor, channels: int, weight: Tensor) -> None:
    check_input(name, "x", x, weight)
    shaped = x.dim() == 4 and x.shape[-1] == channels
    check(shaped, name, "x", f"must have shape [B, Y, X, {channels}]", x.shape)


def _local_term(name: str, dim: int, side: int) -> nn.Conv2d | None:
    side = as_int(name, "side_dwconv", side)
    odd = side >= 0 and (side == 0 or side % 2 == 1)
    check(odd, name, "side_dwconv", "must be odd, or 0", side)
    return nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) if side else None
