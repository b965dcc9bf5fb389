"""bilevel_routing_attention: out_i = sum_j softmax(scale q_i . k)_j v_j over the pixels j of the
regions listed for the region of pixel i; without mask_padding also over the zeros that pad regions
at the edge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense._common import expand_heads, scores, softmax, weighted_sum
from .transpose_block_list import listed_blocks


def bilevel_routing_attention(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor]:
    """out [B, Y, X, H, Dv] and lse [B, H, Y, X] of q [B, Y, X, H, D] over k and v [B, Yk, Xk, Hk,
    ...], with lists [B, 1 | Hk | H, R, K] of regions.
    """
    own = region_of_pixels(a.q, a.region_y, a.region_x)
    others = region_of_pixels(a.k, a.key_region_y, a.key_region_x)
    heads, regions = a.q.shape[3], a.indices.shape[2]
    routed = listed_blocks(a.indices, a.counts, regions)
    routed = routed.repeat_interleave(heads // max(routed.shape[1], 1), 1)  # [B, H, R, R]
    visible = routed[:, :, own][..., others]
    z = scores(
        a.q.flatten(1, 2), a.k.flatten(1, 2), a.scale, 0.0, None, None, None, 0.0, upcast
    )  # [B, H, Sq, Sk]
    vx = expand_heads(a.v.flatten(1, 2), heads).to(z.dtype)
    if not a.mask_padding:
        # A column for the keys that pad regions: value 0, logit 0, as often as there are any.
        pads = a.key_region_y * a.key_region_x - torch.bincount(others, minlength=regions)
        missing = (routed * pads).sum(-1)[:, :, own, None]
        z = torch.cat([z, missing.to(z.dtype).log()], -1)
        visible = torch.cat([visible, missing > 0], -1)
        vx = torch.cat([vx, vx.new_zeros(vx.shape[0], 1, *vx.shape[2:])], 1)
    p, lse = softmax(z, visible, None)
    out = weighted_sum(p, vx).to(a.q.dtype)
    sides = a.q.shape[1:3]
    lse = lse.to(torch.promote_types(a.q.dtype, torch.float32))
    return out.unflatten(1, sides), lse.unflatten(2, sides)


def region_of_pixels(x: Tensor, region_y: int, region_x: int) -> Tensor:
    """[Y * X]: the region of each pixel of a map [B, Y, X, ...]."""
    height, width = x.shape[1:3]
    columns = -(-width // region_x)
    row = torch.arange(height, device=x.device) // region_y
    return (row[:, None] * columns + torch.arange(width, device=x.device) // region_x).flatten()
