"""kv_cache_append: row slots[t] of a cache becomes new row t.

    k'_t = R(positions_t) k_t,    (a, b) -> (a cos - b sin, b cos + a sin) for each pair of columns
                                  from rope_offset on
    cache_slot = k'_t,            or round(k'_t / scale) in float8_e4m3fn

With scales per token, scale = max |k'_t| / 448 over finite elements, and 1 where this is not a
normal number (a row of zeros, or without a finite element).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..float8 import LARGEST, float8_codes

MIN_SCALE = 2.0**-126


def kv_cache_append(a: Any, *, upcast: bool = True) -> tuple[Tensor]:
    """The rotated q [T, H, D]; empty without q. upcast=False rotates 16-bit rows in 16 bits: the
    baseline of the error budget.
    """
    keys, turned = _widened(a.k, upcast), a.q
    if a.cos is not None and a.sin is not None and a.positions is not None:
        rows = a.cos[a.positions.long()], a.sin[a.positions.long()]
        keys = _rotated(keys, *rows, a.rope_offset, a.interleaved)
        if a.q is not None:
            turned = _rotated(_widened(a.q, upcast), *rows, a.rope_offset, a.interleaved)
            turned = turned.to(a.q.dtype)
    there = a.slots >= 0
    used, size = a.slots[there].long(), max(a.k_cache.shape[1], 1)
    page, row = used // size, used % size
    for cache, new, scale, scale_out in (
        (a.k_cache, keys, a.k_scale, a.k_scale_out),
        (a.v_cache, a.v, a.v_scale, a.v_scale_out),
    ):
        if cache is None or new is None:
            continue
        x = _widened(new[there], upcast)
        if cache.dtype != torch.float8_e4m3fn:
            cache[page, row] = x.to(cache.dtype)
            continue
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if scale_out is not None:
            finite = torch.where(wide.isfinite(), wide.abs(), 0.0)
            scale = finite.amax(-1) / LARGEST
            scale = torch.where(scale < MIN_SCALE, 1.0, scale)
            scale_out[page, row] = scale
        if scale is not None:
            wide = wide / scale[..., None]
        cache.view(torch.uint8)[page, row] = float8_codes(wide)
    return (a.k.new_empty(0) if turned is None else turned,)


def _widened(x: Tensor, upcast: bool) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if upcast else x


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, offset: int, interleaved: bool) -> Tensor:
    """Rotates column pairs of x [T, H, D] by the angles of their token [T, pairs]."""
    cos, sin = (t[:, None].to(x.dtype) for t in (cos, sin))
    pairs = cos.shape[-1]
    middle, end = offset + pairs, offset + 2 * pairs
    first = slice(offset, end, 2) if interleaved else slice(offset, middle)
    second = slice(offset + 1, end, 2) if interleaved else slice(middle, end)
    a, b = x[..., first], x[..., second]
    turned = x.clone()
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    return turned
