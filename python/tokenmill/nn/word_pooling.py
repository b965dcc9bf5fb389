"""Word representations from characters, by an encoder within each word."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, check
from ..dense.attention import attention
from ..tokens.gather_tokens import gather_tokens
from .pooling import SegmentPooling, check_words
from .rules import check_heads, check_input

NAME = "nn.WordPooling"


class WordPooling(nn.Module):
    r"""Pools the characters of each word into a few rows, the input of a word-level language model.

    `prefix` trained rows precede the characters of each word, positions count from the first of
    these rows, and an encoder attends within each word; its output for the prefix rows represents
    the word. Words are packed: word w is rows ``offsets[w]`` to ``offsets[w + 1] - 1`` of x, and no
    padding is computed.

    Args:
        dim: channels C.
        num_heads: number of heads of the encoder, a divisor of the channels.
        num_layers: number of layers of the encoder.
        prefix: number of rows p per word.
        max_length: maximum number of characters read per word; later ones are dropped.
        dim_feedforward: width of the feed-forward networks of the encoder.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[T, C]``, embedded characters, and offsets int32 ``[W + 1]`` to ``[W, prefix, C]``. For
        an empty word the encoder runs on its prefix rows only; float16, bfloat16, float32.

    Weights: prefix_rows ``[p, C]``, positions ``[p + max_length, C]``, and layers, named as in
    torch.nn.TransformerEncoder (norms after the residuals, ReLU), whose state dict they load.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: num_layers (8 C^2 + 4 C F) operations per character and prefix row, with F =
    dim_feedforward, and 4 C n^2 per word of n rows.

    Paper: Learn Your Tokens (Thawani et al. 2023), section 2; 4 prefix rows, 12 characters, 2
    layers of 4 heads over 768 channels. There is no dropout. The published code pads words to 12
    characters and lets characters see the padding; here there is none.

    Example:
        >>> import torch, tokenmill as tm
        >>> pool = tm.nn.WordPooling(32, num_heads=2, prefix=2, dim_feedforward=64)
        >>> x, offsets = torch.randn(11, 32), torch.tensor([0, 4, 9, 11], dtype=torch.int32)
        >>> words = pool(x, offsets)
        >>> words.shape
        torch.Size([3, 2, 32])
        >>> rows, ends = pool.decoder_input(x, offsets, words)
        >>> rows.shape, ends.tolist()
        (torch.Size([17, 32]), [0, 6, 13, 17])
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 4,
        num_layers: int = 2,
        prefix: int = 4,
        *,
        max_length: int = 12,
        dim_feedforward: int = 2048,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        counts = {"num_layers": num_layers, "prefix": prefix, "max_length": max_length,
                  "dim_feedforward": dim_feedforward}  # fmt: skip
        for name, count in counts.items():
            minimum = int(name != "num_layers")
            counts[name] = as_int(NAME, name, count, minimum=minimum, maximum=2**20 - 1)
        self.num_heads, self.prefix, self.max_length = num_heads, prefix, max_length
        self.backend = backend
        self.prefix_rows = nn.Parameter(torch.randn(prefix, dim) * 0.02)
        self.positions = nn.Parameter(torch.zeros(prefix + max_length, dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, num_heads, dim_feedforward, dropout=0.0,
                                       batch_first=True) for _ in range(counts["num_layers"])
        )  # fmt: skip
        self.pool = SegmentPooling(prefix=prefix, backend=backend)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        rows, _, ends = self._rows(x, offsets)
        # No sequence is longer than a word, including the one formed by rows after the last word.
        maximum, total = self.prefix + self.max_length, rows.shape[0]
        behind = torch.arange(1, -(-total // maximum) + 1, device=x.device) * maximum
        behind = (ends[-1] + behind).clamp(max=total)
        sequences = torch.cat([ends, behind.to(torch.int32)])
        for layer in self.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            rows = self._encoded(layer, rows, sequences, maximum)
        return self.pool(rows, ends)

    def decoder_input(self, x: Tensor, offsets: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """The rows from which characters are decoded, by causal attention within words, and the
        offsets of words: ``[T + W prefix, C]`` and int32 ``[W + 1]``. The prefix rows of word w + 1
        are the language model's output for word w, ``words[w]`` ``[prefix, C]``; positions are
        added again, as published. The first word keeps its prefix rows. Rows after the last word
        are undefined.
        """
        rows, places, ends = self._rows(x, offsets)
        rows = self.pool.insert(rows, ends, words)
        return rows + gather_tokens(self.positions, places, backend=self.backend), ends

    def _rows(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix rows and characters with positions ``[T + W p, C]``, their positions in words (-1
        after the last word), and the offsets of words.
        """
        check_words(NAME, x, offsets)
        check_input(NAME, "x", x, self.positions)
        channels = self.positions.shape[1]
        check(x.shape[1] == channels, NAME, "x", f"must have shape [T, {channels}]", x.shape)
        lengths = offsets.diff().clamp(0, self.max_length) + self.prefix
        ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        total = x.shape[0] + lengths.shape[0] * self.prefix
        row = torch.arange(total, dtype=torch.int32, device=x.device)
        word = torch.searchsorted(ends[1:], row, right=True)
        there = word < lengths.shape[0]
        word = word.clamp(max=max(lengths.shape[0] - 1, 0))
        starts = torch.stack([ends, offsets])[:, word]
        places = row - starts[0]
        # In the gathered rows, as in words, characters follow the prefix rows.
        sources = torch.where(places < self.prefix, places, places + starts[1])
        places, sources = (torch.where(there, t, -1) for t in (places, sources))
        rows = gather_tokens(torch.cat([self.prefix_rows.to(x.dtype), x]), sources,
                             backend=self.backend)  # fmt: skip
        rows = rows + gather_tokens(self.positions, places, backend=self.backend)
        return rows, places, ends

    def _encoded(
        self, layer: nn.TransformerEncoderLayer, rows: Tensor, sequences: Tensor, maximum: int
    ) -> Tensor:
        attend = layer.self_attn
        q, k, v = (
            F.linear(rows, attend.in_proj_weight, attend.in_proj_bias)
            .unflatten(1, (3, self.num_heads, -1))
            .unbind(1)
        )
        out = attention(
            q, k, v, cu_seqlens_q=sequences, max_seqlen_q=maximum, max_seqlen_k=maximum,
            backend=self.backend,
        )  # fmt: skip
        rows = layer.norm1(rows + attend.out_proj(out.flatten(1)))
        y: Tensor = layer.norm2(rows + layer.linear2(F.relu(layer.linear1(rows))))
        return y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, prefix={self.prefix}, max_length={self.max_length}"
