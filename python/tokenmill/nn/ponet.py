"""PoNet: pooling instead of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._check import as_int, check, check_bool, check_device_of, check_tensor, fail, show
from ..dense.attention import attention
from ..tokens.local_pool import local_pool
from ..tokens.merge_tokens import merge_tokens, unmerge_tokens
from .rules import check_tokens

NAME, SEGMENTS = "nn.PoNetMixing", "nn.segments_of"


def segments_of(boundaries: Tensor, mask: Tensor | None = None) -> Tensor:
    """Segment numbers for :class:`PoNetMixing`: a boundary token is its own segment, and the next
    token begins another.

    Args:
        boundaries: ``[B, N]`` bool, e.g. ends of sentences.
        mask: ``[B, N]`` bool, True for valid tokens. None: all.

    Returns:
        ``[B, N]`` int32, ascending in each row; -1 for invalid tokens.

    Example:
        >>> import torch
        >>> from tokenmill.nn import segments_of
        >>> segments_of(torch.tensor([[True, False, False, True, False]])).tolist()
        [[0, 1, 1, 2, 3]]
    """
    for name, t in (("boundaries", boundaries), ("mask", mask)):
        check_tensor(SEGMENTS, name, t, optional=name == "mask")
        if t is not None:
            check(t.dtype == torch.bool, SEGMENTS, name, "must be bool", t.dtype)
            check_device_of(SEGMENTS, name, t, "boundaries", boundaries)
    rule = "must have 2 dimensions [B, N]"
    check(boundaries.dim() == 2, SEGMENTS, "boundaries", rule, boundaries.dim())
    if mask is not None and mask.shape != boundaries.shape:
        fail(SEGMENTS, "mask", f"must have shape {show(boundaries.shape)}", mask.shape)
    begins = boundaries.clone()
    begins[:, 1:] |= boundaries[:, :-1]
    begins[:, :1] = True
    segments = begins.to(torch.int32).cumsum(1, dtype=torch.int32) - 1
    return segments if mask is None else torch.where(mask, segments, -1)


class PoNetMixing(nn.Module):
    r"""Mixes tokens by pooling over the sequence, over segments and over neighbours.

    With projections Q, K, O, S and L of the tokens,

    .. math::
       g = \sum_j \operatorname{softmax}_j(\bar q \cdot k_j / \sqrt{d})\, k_j, \qquad
       out_i = (g + \max_{j \in seg(i)} s_j) \odot o_i + \max_{|j - i| \le 1} l_j,

    where :math:`\bar q` is the mean of Q over the valid tokens, and g is computed per head. out is
    0 for invalid tokens.

    Args:
        dim: channels C.
        num_heads: number of heads of the global part, a divisor of the channels.
        exclude_first: whether the first token (the class token) is excluded from the two maxima.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]``, segments ``[B, N]`` int32 (numbers below N; -1 for invalid tokens;
        :func:`segments_of`) to ``[B, N, C]``.

    Weights: query, key, output, segment and local, each a linear layer C to C.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 10 B N C² operations for the projections, and a few reads of their results. A
    segment or window that only holds an excluded first token has maximum 0.

    Paper: PoNet (Tan et al. 2022), section 3.

    Example:
        >>> import torch
        >>> from tokenmill import nn
        >>> x, ends = torch.randn(2, 20, 32), torch.zeros(2, 20, dtype=torch.bool)
        >>> ends[:, ::7] = True
        >>> nn.PoNetMixing(32, num_heads=4)(x, nn.segments_of(ends)).shape
        torch.Size([2, 20, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        *,
        exclude_first: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = as_int(NAME, "dim", dim), as_int(NAME, "num_heads", num_heads)
        check(1 <= dim < 2**31, NAME, "dim", "must be 1 to 2^31 - 1", dim)
        check_bool(NAME, "exclude_first", exclude_first)
        check(num_heads >= 1 and dim % num_heads == 0, NAME, "num_heads", f"must divide dim, {dim}",
              num_heads)  # fmt: skip
        self.num_heads, self.exclude_first, self.backend = num_heads, exclude_first, backend
        self.query, self.key, self.output, self.segment, self.local = (
            nn.Linear(dim, dim) for _ in range(5)
        )

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        check_tokens(NAME, x, self.query.weight)
        check_tensor(NAME, "segments", segments)
        whole = segments.dtype in (torch.int32, torch.int64)
        check(whole, NAME, "segments", "must be int32 or int64", segments.dtype)
        check_device_of(NAME, "segments", segments, "x", x)
        if segments.shape != x.shape[:2]:
            fail(NAME, "segments", f"must have shape {show(x.shape[:2])}", segments.shape)
        there = segments >= 0
        pooled = there.clone()
        if self.exclude_first:
            pooled[:, :1] = False
        assign = torch.where(pooled, segments, -1)
        highest, _ = merge_tokens(
            self.segment(x), assign, x.shape[1], reduce="amax", backend=self.backend
        )
        near = local_pool(self.local(x), 3, mode="max", mask=pooled, backend=self.backend)
        mixed = self._global(x, there) + unmerge_tokens(highest, segments, backend=self.backend)
        return (mixed * self.output(x) + near).masked_fill(~there[..., None], 0)

    def _global(self, x: Tensor, there: Tensor) -> Tensor:
        """[B, 1, C]"""
        count = there.sum(1, keepdim=True).clamp(min=1)
        mean = (self.query(x) * there[..., None]).sum(1, dtype=torch.float32) / count
        keys = self.key(x).unflatten(2, (self.num_heads, -1))
        query = mean.to(keys.dtype).unflatten(1, (self.num_heads, -1))[:, None]
        hidden = torch.zeros_like(there, dtype=keys.dtype).masked_fill(~there, -torch.inf)
        out = attention(query, keys, keys, bias=hidden[:, None, None], backend=self.backend)
        return out.flatten(2)
