"""Token mixing and pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._check import as_int, check, check_bool, check_device_of, check_tensor, fail
from ..tokens.gather_tokens import gather_tokens
from ..tokens.local_pool import local_pool
from ..tokens.scatter_tokens import scatter_tokens
from ..tokens.segment_reduce import segment_reduce

MIXING, SEGMENTS = "nn.PoolFormerMixing", "nn.SegmentPooling"


class PoolFormerMixing(nn.Module):
    """The token mixer of PoolFormer: the mean over a window around each pixel, minus the pixel. At
    the edge of the map the mean is over the pixels inside it.

    Args:
        pool_size: side of the window, odd.
        channels_first: the map is ``[B, C, Y, X]``; torch.channels_last memory is then read without
            a copy.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]`` to ``[B, Y, X, C]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads x once and writes the result.

    Paper: PoolFormer (Yu et al. 2022), section 3.2, equation 4.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.nn.PoolFormerMixing()(torch.randn(1, 14, 14, 64)).shape
        torch.Size([1, 14, 14, 64])
    """

    def __init__(
        self, pool_size: int = 3, *, channels_first: bool = False, backend: str | None = None
    ) -> None:
        super().__init__()
        pool_size = as_int(MIXING, "pool_size", pool_size)
        check_bool(MIXING, "channels_first", channels_first)
        odd = pool_size >= 1 and pool_size % 2 == 1
        check(odd, MIXING, "pool_size", "must be odd and positive", pool_size)
        self.pool_size, self.channels_first, self.backend = pool_size, channels_first, backend

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(MIXING, "x", x)
        layout = "[B, C, Y, X]" if self.channels_first else "[B, Y, X, C]"
        check(x.dim() == 4, MIXING, "x", f"must have 4 dimensions {layout}", x.dim())
        if self.channels_first:
            x = x.permute(0, 2, 3, 1).contiguous()
        y = local_pool(x, self.pool_size, subtract_input=True, backend=self.backend)
        return y.permute(0, 3, 1, 2) if self.channels_first else y

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}, channels_first={self.channels_first}"


class SegmentPooling(nn.Module):
    """Pools characters into words, and back. Words are consecutive: word w is rows
    ``offsets[w]`` to ``offsets[w + 1] - 1``.

    Args:
        reduce: "first" takes the first `prefix` rows of each word, which an encoder within words
            has filled (as in the paper); "sum", "mean", "amax", "amin" and "last" reduce all rows
            to one.
        prefix: number of rows of a word before its characters.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[T, C]`` and offsets int32 ``[W + 1]`` to ``[W, prefix, C]`` (``[W, 1, C]`` unless
        "first"). Rows that a word does not have are 0.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads the pooled rows once.

    Paper: Learn Your Tokens (Thawani et al. 2023), section 2: 4 prefix rows per word.

    Example:
        >>> import torch, tokenmill as tm
        >>> pool = tm.nn.SegmentPooling(prefix=2)
        >>> x, offsets = torch.randn(11, 8), torch.tensor([0, 4, 9, 11], dtype=torch.int32)
        >>> words = pool(x, offsets)
        >>> words.shape, torch.equal(words[1], x[4:6])
        (torch.Size([3, 2, 8]), True)
        >>> torch.equal(pool.insert(x, offsets, words)[4:6], x[0:2])
        True
    """

    def __init__(
        self, reduce: str = "first", *, prefix: int = 1, backend: str | None = None
    ) -> None:
        super().__init__()
        known = isinstance(reduce, str) and reduce in (
            "first",
            "last",
            "sum",
            "mean",
            "amax",
            "amin",
        )
        rule = "must be 'first', 'last', 'sum', 'mean', 'amax' or 'amin'"
        check(known, SEGMENTS, "reduce", rule, reduce)
        prefix = as_int(SEGMENTS, "prefix", prefix)
        fits = 1 <= prefix < 2**31 and (prefix == 1 or reduce == "first")
        check(
            fits, SEGMENTS, "prefix", "must be at least 1, and 1 unless reduce is 'first'", prefix
        )
        self.reduce, self.prefix, self.backend = reduce, prefix, backend

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        check_words(SEGMENTS, x, offsets)
        if self.reduce == "first":
            rows = gather_tokens(x, self._rows(offsets).flatten(), backend=self.backend)
            return rows.unflatten(0, (-1, self.prefix))
        pooled = segment_reduce(x, offsets, reduce=self.reduce, backend=self.backend)
        assert isinstance(pooled, Tensor)
        return pooled[:, None]

    def insert(self, x: Tensor, offsets: Tensor, words: Tensor) -> Tensor:
        """x with the language model's output rows for word w, ``[W, prefix, C]``, replacing the
        first rows of word w + 1: the input from which its characters are decoded. The first word
        keeps its rows, and rows beyond the length of a word are dropped.
        """
        check_words(SEGMENTS, x, offsets)
        check_tensor(SEGMENTS, "words", words)
        wanted = [offsets.shape[0] - 1, self.prefix, x.shape[1]]
        if list(words.shape) != wanted:
            fail(SEGMENTS, "words", f"must have shape {wanted}", words.shape)
        rows = self._rows(offsets)[1:].flatten()
        return scatter_tokens(words[:-1].flatten(0, 1), rows, x, backend=self.backend)

    def _rows(self, offsets: Tensor) -> Tensor:
        """Row indices [W, prefix], -1 beyond the end of a word."""
        place = torch.arange(self.prefix, dtype=torch.int32, device=offsets.device)
        rows = offsets[:-1, None] + place
        return torch.where(rows < offsets[1:, None], rows, -1)

    def extra_repr(self) -> str:
        return f"reduce={self.reduce!r}, prefix={self.prefix}"


def check_words(name: str, x: Tensor, offsets: Tensor) -> None:
    check_tensor(name, "x", x)
    check_tensor(name, "offsets", offsets)
    check(x.dim() == 2, name, "x", "must have 2 dimensions [T, C]", x.dim())
    shaped = offsets.dim() == 1 and offsets.shape[0] >= 1
    check(shaped, name, "offsets", "must have shape [W + 1]", offsets.shape)
    check(offsets.dtype == torch.int32, name, "offsets", "must be int32", offsets.dtype)
    check_device_of(name, "offsets", offsets, "x", x)
