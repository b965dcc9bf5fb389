"""Counter-based noise: g = -log(-log u), u uniform in (0, 1).

u = (floor(philox4x32_10(b, h, i, j; seed) / 2^9) + 1/2) 2^-23
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_words(
    seed: int,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    *,
    first_batch: int = 0,
    first_row: int = 0,
) -> Tensor:
    """The first word of Philox4x32-10 for counter (b, h, i, j) and key seed, int64 [batch, heads,
    rows, columns]. Rows count from first_row, as 32-bit words.
    """
    b, h, i, j = (
        (torch.arange(n) + start) & 0xFFFFFFFF
        for n, start in ((batch, first_batch), (heads, 0), (rows, first_row), (columns, 0))
    )
    c = list(torch.broadcast_tensors(b[:, None, None, None], h[:, None, None], i[:, None], j))
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        high0, low0 = _multiply(c[0], 0xD2511F53)
        high1, low1 = _multiply(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product x m, which overflows int64."""
    low = x * (m & 0xFFFF)
    high = x * (m >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def gumbel_noise(
    seed: int,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    *,
    first_batch: int = 0,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""The noise of :func:`tokenmill.attention_column_scores`: :math:`-\log(-\log u)` with u at the
    centre of one of 2^23 parts of (0, 1), selected by the high bits of Philox words.

    Args:
        seed: seed of the call.
        batch, heads, rows, columns: the shape.
        first_batch, first_row: indices of the first sequence and of the first row; row 0 of a call
            has index seqlens_k - seqlens_q, its position among the keys.
        dtype: float32 or float64.

    Returns:
        ``[batch, heads, rows, columns]`` on the CPU.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.select.gumbel_noise(1, 1, 1, 1, 3)
        tensor([[[[ 1.1283,  0.1254, -0.3163]]]])
    """
    words = gumbel_words(
        seed, batch, heads, rows, columns, first_batch=first_batch, first_row=first_row
    )
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u)).to(dtype)
