"""Cases of moba_attention: dense attention is the peer to beat, and the same selection as a mask
over pairs is its composition in PyTorch. Peers get the layout [B, H, S, D]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

from .attention import sdpa, with_backward
from .case import Case, Run, place

HEADS, HEAD_DIM, BLOCK, TOPK = 8, 64, 512, 3
MASKED = 4096  # max tokens for a peer that materializes a mask of all pairs


def masked(q: Tensor, k: Tensor, v: Tensor, block: int = BLOCK, topk: int = TOPK) -> Tensor:
    """MoBA as a mask: own block and best earlier blocks; [B, H, S, D], S a multiple of the
    block."""
    length = q.shape[2]
    blocks = length // block
    means = k.detach().unflatten(2, (blocks, block)).float().mean(3)
    scores = q.detach().float() @ means.mT  # [B, H, S, blocks]
    own = (torch.arange(length, device=q.device) // block)[:, None]
    number = torch.arange(blocks, device=q.device)
    scores = scores.masked_fill(number > own, -torch.inf).masked_fill(number == own, torch.inf)
    best = scores.topk(min(topk, blocks)).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    mask = chosen.repeat_interleave(block, -1).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def pairs(length: int, block: int = BLOCK, topk: int = TOPK) -> float:
    """Attended pairs of query and key."""
    return float(sum(min(i // block, topk - 1) * block + i % block + 1 for i in range(length)))


def _case(length: int, dtype: torch.dtype, *, backward: bool = False) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        shape = (1, HEADS, length, HEAD_DIM)
        theirs = [place(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)]
        ours = [t.transpose(1, 2).contiguous() for t in theirs]
        own = functools.partial(tm.moba_attention, block=BLOCK, topk=TOPK)
        dense: Any = functools.partial(tm.attention, causal=True)

        def call(function: Callable[..., Any], tensors: list[Tensor]) -> Run:
            if backward:
                return with_backward(function, tensors)
            return lambda: function(*tensors)

        peers: dict[str, Callable[[], Run]] = {
            "attention, causal": lambda: call(dense, ours),
            "sdpa causal": lambda: call(functools.partial(sdpa, causal=True), theirs),
        }
        if length <= MASKED:
            peers["sdpa, mask of pairs"] = lambda: call(masked, theirs)
        return call(own, ours), peers

    choice = 2.0 * HEADS * HEAD_DIM * sum(i // BLOCK for i in range(length))
    work = 4.0 * HEADS * HEAD_DIM * pairs(length)
    return Case(
        "moba_attention",
        f"S={length} D={HEAD_DIM} {TOPK} blocks of {BLOCK}",
        dtype,
        choice + work * (3.5 if backward else 1.0),
        float((10 if backward else 4) * HEADS * length * HEAD_DIM * dtype.itemsize),
        prepare,
        "forward+backward" if backward else "forward",
        length=length,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for length in (4096, 8192, 16384):
            yield _case(length, dtype)
        yield _case(4096, dtype, backward=True)
