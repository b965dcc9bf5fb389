"""Exchange of key blocks between ranks: a rank receives the blocks that it needs, and sends their
gradients back.

A unit is a block of tokens of one request and one KV head. The compact keys of a rank [B, slots *
block, Hk, D] are the units that it needs, in the order of the sequence; heads that need fewer units
are padded with zeros, which no list names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._group import Group
from .sequence import Layout, Piece

Units = tuple[Tensor, Tensor, Tensor]  # request, block and KV head of each unit


class BlockExchange(NamedTuple):
    """The blocks that a rank sends to all ranks, including itself, and the slots of the blocks it
    receives.
    """

    group: Group
    block: int  # tokens per block
    lent: list[Units]  # per destination rank, units of this rank's shard
    borrowed: list[int]  # number of units from each rank
    places: Units  # slots of the received units in the compact keys
    slots: int  # number of blocks of the compact keys
    lacking: int  # tokens missing in the last block

    def borrow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exchanges shards [B, n, Hk, *] for compact keys and values; differentiable."""
        found: tuple[Tensor, Tensor] = _Borrow.apply(k, v, self)
        return found

    def send(self, units: Tensor, back: bool) -> Tensor:
        """Sends [units, block, E] to the ranks that need them, or their gradients back to the
        owners.
        """
        each = units.shape[1:].numel()
        lent = [len(of[0]) * each for of in self.lent]
        borrowed = [n * each for n in self.borrowed]
        there, here = (borrowed, lent) if back else (lent, borrowed)
        found = self.group.wait(self.group.send(units.flatten(), there, here))
        return found.view(sum(here) // each, *units.shape[1:])


def arrange(
    group: Group, where: Layout, block: int, needed: Tensor, last: Piece
) -> tuple[BlockExchange, Tensor]:
    """The exchange for the blocks in this rank's mask needed [B, Hk, blocks], and the slot of each
    block [B, Hk, blocks].

    The blocks `last` always have the last slots, one each, even if not needed; no later block is
    needed. One exchange of masks informs the owners.
    """
    blocks = [Piece(-(-p.first // block), -(-p.end // block)) for (p,) in where.pieces]
    batch, heads = needed.shape[:2]
    own = blocks[group.rank].size
    asked = [needed[..., of.first : of.end] for of in blocks]
    sent = torch.cat([mask.flatten() for mask in asked]).byte()
    size = batch * heads * own
    counts = [mask.numel() for mask in asked]
    masks = group.wait(group.send(sent, counts, [size] * group.size))
    lent = [_units(mask) for mask in masks.view(group.size, batch, heads, own).bool()]

    slot = needed.cumsum(-1) - 1
    front = int(slot[..., : last.first].max()) + 1 if last.first > 0 and slot.numel() else 0
    slot[..., last.first : last.end] = torch.arange(last.size, device=slot.device) + front
    found = [_units(mask) for mask in asked]
    b, c, h = (torch.cat(parts) for parts in zip(*_shifted(found, blocks), strict=True))
    lacking = -where.length % block if last.end * block > where.length else 0
    borrowed = [len(units[0]) for units in found]
    places = b, slot[b, h, c], h
    return BlockExchange(group, block, lent, borrowed, places, front + last.size, lacking), slot


def _units(mask: Tensor) -> Units:
    """Units of a mask [B, Hk, blocks], in its order."""
    b, h, c = mask.nonzero(as_tuple=True)
    return b, c, h


def _shifted(found: Sequence[Units], blocks: Sequence[Piece]) -> list[Units]:
    """Block numbers within ranks as block numbers of the sequence."""
    return [(b, c + of.first, h) for (b, c, h), of in zip(found, blocks, strict=True)]


class _Borrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, loan: BlockExchange) -> tuple[Tensor, ...]:
        ctx.loan, ctx.shape = loan, k.shape[:3]
        ctx.dims = k.shape[3], v.shape[3]
        b, c, h = (torch.cat(parts) for parts in zip(*loan.lent, strict=True))
        units = torch.cat([_read(x, loan.block, (b, c, h)) for x in (k, v)], -1)
        units = loan.send(units, back=False)
        return tuple(_placed(part, k.shape, loan) for part in units.split(ctx.dims, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        loan, (batch, tokens, heads) = ctx.loan, ctx.shape
        units = torch.cat([_read(g, loan.block, loan.places) for g in grads], -1)
        units = loan.send(units, back=True)
        wide = torch.promote_types(units.dtype, torch.float32)
        whole = (batch, -(-tokens // loan.block), loan.block, heads, sum(ctx.dims))
        total = units.new_zeros(whole, dtype=wide)
        parts = units.split([len(of[0]) for of in loan.lent])
        for (b, c, h), part in zip(loan.lent, parts, strict=True):  # in the order of the ranks
            total[b, c, :, h] += part
        dk, dv = total.flatten(1, 2)[:, :tokens].to(units.dtype).split(ctx.dims, -1)
        return dk, dv, None


def _read(x: Tensor, block: int, units: Units) -> Tensor:
    """Units of x [B, n, Hk, D]: [units, block, D], zero-padded after the last token."""
    if lacking := -x.shape[1] % block:
        x = F.pad(x, (0, 0, 0, 0, 0, lacking))
    b, c, h = units
    return x.unflatten(1, (x.shape[1] // block, block))[b, c, :, h]


def _placed(units: Tensor, shape: Sequence[int], loan: BlockExchange) -> Tensor:
    """Scatters units [units, block, D] into compact keys."""
    b, slot, h = loan.places
    found = units.new_zeros(shape[0], loan.slots, loan.block, shape[2], units.shape[-1])
    found[b, slot, :, h] = units
    return found.flatten(1, 2)[:, : loan.slots * loan.block - loan.lacking]
