"""float8_e4m3fn: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0


def float8_codes(x: Tensor) -> Tensor:
    """x as float8_e4m3fn, rounded to nearest even, saturated; NaN is 0x7f. (PyTorch's CPU cast
    turns values out of range into NaN.)
    """
    codes = x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), 0x7F, codes)


def cache_rows(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows [..., D] of a cache in dtype. Codes of float8_e4m3fn are multiplied by their scales, in
    at least float32."""
    if rows.dtype != torch.float8_e4m3fn:
        return rows.to(dtype)
    wide = rows.to(torch.promote_types(dtype, torch.float32))
    if scale is not None:
        wide = wide * scale.to(wide.dtype)[..., None]
    return wide.to(dtype)
