"""Cases of native_sparse_attention at the sizes of the paper: dense attention is the peer to beat,
and the three branches as masks over pairs are its composition in PyTorch. Peers get the layout [B,
H, S, D]."""

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

HEADS, KV_HEADS, HEAD_DIM = 16, 1, 64
SIZES: dict[str, Any] = {
    "block": 32, "stride": 16, "select_block": 64, "topk": 16, "num_first": 1, "num_local": 2,
    "window": 512,
}  # fmt: skip
MASKED = 2048  # max tokens for a peer that materializes masks of all pairs


def masked(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, block: int, stride: int, select_block: int,
    topk: int, num_first: int, num_local: int, window: int,
) -> Tensor:  # fmt: skip
    """The three branches as masks: q [B, H, S, D]; k, v [B, Hk, S, D]; gates [B, H, S, 3]; S a
    multiple of select_block."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    at = torch.arange(length, device=q.device)[:, None]
    full_k, full_v = (t.repeat_interleave(group, 1) for t in (k, v))
    coarse_k, coarse_v = (t.unfold(2, block, stride).mean(-1) for t in (full_k, full_v))
    ends = torch.arange(coarse_k.shape[2], device=q.device) * stride + block - 1
    scores = (q @ coarse_k.mT).float() * q.shape[-1] ** -0.5
    weights = scores.masked_fill(ends > at, -torch.inf).softmax(-1).nan_to_num(0)
    coarse = weights.to(q.dtype) @ coarse_v

    each, blocks = select_block // stride, length // select_block
    summed = weights.detach().unflatten(1, (-1, group)).sum(2)  # [B, Hk, S, N]
    of_strides = summed.new_zeros(*summed.shape[:3], each * blocks)
    for n in range(block // stride):
        of_strides[..., n : n + summed.shape[-1]] += summed
    importance = of_strides.unflatten(-1, (blocks, each)).sum(-1)
    number, own = torch.arange(blocks, device=q.device), at // select_block
    forced = (number < num_first) | (number > own - num_local)
    importance = importance.masked_fill(forced, torch.inf).masked_fill(number > own, -torch.inf)
    best = importance.topk(min(topk, blocks)).indices
    chosen = torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, best, True)
    mask = chosen.repeat_interleave(select_block, -1).tril().repeat_interleave(group, 1)
    fine = F.scaled_dot_product_attention(q, full_k, full_v, attn_mask=mask)
    key = torch.arange(length, device=q.device)
    near = F.scaled_dot_product_attention(
        q, full_k, full_v, attn_mask=(key <= at) & (key > at - window)
    )
    mixed = torch.stack([coarse, fine, near], -1).float() * gates[..., None, :].float()
    return mixed.sum(-1).to(q.dtype)


def pairs(
    length: int, *, block: int, stride: int, select_block: int, topk: int, window: int, **_: int
) -> float:
    """Attended pairs of query and key: compressed, selected and local."""
    total = 0
    for i in range(length):
        own = i // select_block
        selected = min(own, topk - 1) * select_block + i % select_block + 1
        total += max((i + 1 - block) // stride + 1, 0) + selected + min(i + 1, window)
    return float(total)


def _case(length: int, dtype: torch.dtype, *, backward: bool = False) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        heads = (HEADS, KV_HEADS, KV_HEADS)
        q, k, v = (
            place(torch.randn(1, h, length, HEAD_DIM, generator=generator).to(dtype)) for h in heads
        )
        gates = place(torch.rand(1, HEADS, length, 3, generator=generator).to(dtype))
        theirs = [q, k, v, gates]
        ours = [t.transpose(1, 2).contiguous() for t in theirs]
        own = functools.partial(tm.native_sparse_attention, **SIZES)

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return tm.attention(q, k, v, causal=True)

        def call(function: Callable[..., Any], tensors: list[Tensor]) -> Run:
            if backward:
                return with_backward(function, tensors)
            return lambda: function(*tensors)

        def repeated() -> Run:
            full = [t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v)]
            return call(functools.partial(sdpa, causal=True), [q, *full])

        peers: dict[str, Callable[[], Run]] = {
            "attention, causal": lambda: call(dense, ours[:3]),
            "sdpa causal": repeated,
        }
        if length <= MASKED:
            peers["sdpa, masks of pairs"] = lambda: call(functools.partial(masked, **SIZES), theirs)
        return call(own, ours), peers

    size = dtype.itemsize
    moved = length * (HEADS * (2 * HEAD_DIM + 3) + 2 * KV_HEADS * HEAD_DIM) * size
    return Case(
        "native_sparse_attention",
        f"S={length} H={HEADS}/{KV_HEADS} D={HEAD_DIM}",
        dtype,
        4.0 * HEADS * HEAD_DIM * pairs(length, **SIZES) * (3.5 if backward else 1.0),
        float(moved * (2.5 if backward else 1.0)),
        prepare,
        "forward+backward" if backward else "forward",
        length=length,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for length in (2048, 8192):
            yield _case(length, dtype)
        yield _case(2048, dtype, backward=True)
