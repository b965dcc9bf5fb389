"""Padding masks of transformers: attention to visible keys, without a pairwise mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import masks
from ..dense.attention import attention

KEEP = "_tokenmill_padding"
Ends = tuple[Tensor, Tensor, bool]


class Shape(NamedTuple):
    """Host-side facts on the rows: whether the visible keys of each row are contiguous, and whether
    some row has masked keys before its first visible key, or after its last.
    """

    runs: bool
    leading: bool
    trailing: bool


class Padding:
    """A mask ``[B, Sk]``, True for visible keys, with derived values shared by all layers of a
    model.
    """

    def __init__(self, mask: Tensor):
        self.mask = mask.detach().bool()  # detached: not the tensor object that caches this
        self._segments: dict[int, masks.Segments] = {}
        self._packed: dict[tuple[int, bool], list[Ends]] = {}
        self._bounds: tuple[Tensor, Tensor] | None = None
        self._shape: Shape | None = None

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """``[B]`` each: the first visible key, and one past the last; 0 where there is none."""
        if self._bounds is None:
            shown = self.mask.int()
            past = self.mask.shape[1] - shown.flip(1).argmax(1)
            self._bounds = shown.argmax(1), past.where(shown.amax(1) > 0, 0)
        return self._bounds

    @property
    def shape(self) -> Shape:
        """Read from the device once."""
        if self._shape is None:
            begin, end = self.bounds
            runs = (end - begin == self.mask.sum(1)).all()
            leading, trailing = (begin > 0).any(), (end < self.mask.shape[1]).any()
            self._shape = Shape(*torch.stack([runs, leading, trailing]).tolist())
        return self._shape

    def segments(self, sq: int) -> masks.Segments:
        """Segment mask for sq queries: visible keys are in their segment."""
        if sq not in self._segments:
            q_ids = torch.zeros(1, sq, dtype=torch.int32, device=self.mask.device)
            self._segments[sq] = masks.segments(q_ids, (~self.mask).int())
        return self._segments[sq]

    def packed(self, sq: int, causal: bool) -> list[Ends]:
        """Packed calls whose sum is attention to the visible keys, which are contiguous:
        (cu_seqlens_q, cu_seqlens_k, causal) each.
        """
        if (sq, causal) not in self._packed:
            self._packed[sq, causal] = self._pack(sq, causal)
        return self._packed[sq, causal]

    def _pack(self, sq: int, causal: bool) -> list[Ends]:
        """Queries see the keys of their own sequence. Masked keys are in sequences without queries,
        and queries with no visible key in sequences without keys, whose result is 0.
        """
        (begin, end), sk = self.bounds, self.mask.shape[1]
        zero = torch.zeros_like(begin)
        all_q, all_k = (torch.full_like(begin, n) for n in (sq, sk))
        if not self.shape.trailing:
            return [(*_ends([zero, all_q], [begin, all_k]), causal)]
        if not causal:
            return [(*_ends([zero, all_q, all_q], [begin, end, all_k]), False)]
        # Query i is at key i + Sk - Sq: queries past the last visible key see all visible keys.
        past = (end - (sk - sq)).clamp(0, sq)
        return [
            (*_ends([zero, past, past, all_q], [begin, end, all_k, all_k]), True),
            (*_ends([past, past, all_q, all_q], [zero, begin, end, all_k]), False),
        ]


def _ends(q: list[Tensor], k: list[Tensor]) -> tuple[Tensor, Tensor]:
    """cu_seqlens from the ends of the sequences within each row, ``[B]`` each, the last being the
    row size.
    """
    ends = []
    for in_row in (torch.stack(q, 1), torch.stack(k, 1)):
        row = torch.arange(len(in_row), device=in_row.device)[:, None]
        flat = (row * in_row[:, -1:] + in_row).flatten()
        ends.append(torch.nn.functional.pad(flat, (1, 0)).int())
    return ends[0], ends[1]


def padding_of(mask: Tensor, q: Tensor, k: Tensor) -> Padding | None:
    """Padding of a mask ``[B, Sk]`` or of a complete mask of one query; None for other masks.
    Cached on the mask, so that layers share it.
    """
    (batch, sq), sk = q.shape[:2], k.shape[1]
    shown = mask
    if mask.dim() == 4:
        if sq > 1 or mask.dtype != torch.bool or mask.shape[:2] != (batch, 1):
            return None
        shown = mask[:, 0, 0]
    if torch.compiler.is_compiling():
        return Padding(shown[:, :sk])
    kept: Padding | None = vars(mask).get(KEEP)
    if kept is None or kept.mask.shape[1] != sk:
        kept = vars(mask)[KEEP] = Padding(shown[:, :sk])
    return kept


def decoded(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None, **options: Any) -> Tensor:
    """Attention of the newest tokens to a cache; with padding (one token only), to the visible
    keys.
    """
    visible = None
    if padding is None:
        seqlens = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    else:
        seqlens, visible = padding.bounds[1].int(), padding.segments(1)
    out = attention(q, k, v, seqlens_k=seqlens, mask=visible, **options)
    assert isinstance(out, Tensor)
    return out


def padded(
    q: Tensor, k: Tensor, v: Tensor, padding: Padding, bias: Tensor | None, **options: Any
) -> Tensor:
    """Attention to the visible keys: [B, Sq, H, D] -> [B, Sq, H, Dv]."""
    sq, sk = q.shape[1], k.shape[1]
    causal = options["causal"] and sq > 1
    if bias is None and _packs(q, k, v, padding, causal, options["backend"]):
        outs = [
            packed(q, k, v, ends_q, ends_k, sq, sk, **options | {"causal": aligned})
            for ends_q, ends_k, aligned in padding.packed(sq, causal)
        ]
        return sum(outs[1:], outs[0])
    if options["score_bias"] == "neg_log_n":
        n = padding.mask.sum(1, keepdim=True).clamp(min=1)
        options["score_bias"] = -n.float().log().repeat(1, q.shape[2])
    out = attention(q, k, v, bias=bias, mask=padding.segments(sq), **options)
    assert isinstance(out, Tensor)
    return out


def _packs(
    q: Tensor, k: Tensor, v: Tensor, padding: Padding, causal: bool, backend: str | None
) -> bool:
    """Whether rows are run as packed sequences. GPU kernels support more packed calls than segment
    masks. On a CPU packing saves time only if every row starts with its visible run, attention is
    not causal and no tensor must be copied; otherwise segments are used. Their bits do not depend
    on other rows, and equal the packed result and the result of a row without padding.
    """
    if torch.compiler.is_compiling() or q.shape[1] == 1:
        return False
    if q.device.type != "cpu" or backend not in (None, "cpu", "reference"):
        return padding.shape.runs
    if causal or any(x.stride(0) != x.shape[1] * x.stride(1) for x in (q, k, v)):
        return False
    return padding.shape.runs and not padding.shape.leading


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    **options: Any,
) -> Tensor:
    """[B, S, H, D] -> [B, S, H, Dv], with the B S tokens as sequences given by cu_seqlens."""
    out = attention(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        **options,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, q.shape[:2])
