"""Cases of block_sparse_attention, on random lists per head: compiled flex_attention with the same
mask is the peer to beat, dense attention times the density the peer to reach. Peers get their
preferred memory layout: PyTorch [B, H, S, D], tokenmill [B, S, H, D]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm

from .attention import sdpa, with_backward
from .case import Absent, Case, Run, place

S, H, D, BLOCK_Q = 8192, 8, 64, 64


@functools.cache
def _flex() -> tuple[Callable[..., Tensor], Callable[..., Any], Any]:
    try:
        from torch.nn.attention.flex_attention import (
            BlockMask,
            create_block_mask,
            flex_attention,
        )
    except ImportError as error:
        raise Absent(f"flex_attention: {error}") from None
    compiled = torch.compile(flex_attention, dynamic=False)
    return compiled, torch.compile(create_block_mask), BlockMask


def _flex_mask(qkv: list[Tensor], listed: Tensor, block_k: int) -> Run:
    """Builds the mask from the lists on every call, as a mask over pairs."""
    q, k, v = qkv
    flex, create, _ = _flex()

    def pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return listed[h, i // BLOCK_Q, j // block_k]

    def run() -> Tensor:
        mask = create(pair, 1, H, S, S, device=q.device.type, BLOCK_SIZE=(BLOCK_Q, block_k))
        return flex(q, k, v, block_mask=mask)

    run()  # compiles
    return run


def _flex_lists(qkv: list[Tensor], indices: Tensor, counts: Tensor) -> Run:
    """Builds the mask from the lists on every call, in flex_attention's own block-list form."""
    q, k, v = qkv
    flex, _, block_mask = _flex()

    def run() -> Tensor:
        columns = S // BLOCK_Q - indices.shape[-1]
        full = torch.nn.functional.pad(indices.clamp(min=0), (0, columns))
        partial = torch.zeros_like(counts), torch.zeros_like(full)
        mask = block_mask.from_kv_blocks(*partial, counts, full, BLOCK_SIZE=BLOCK_Q)
        return flex(q, k, v, block_mask=mask)

    run()
    return run


def _case(dtype: torch.dtype, block_k: int, percent: int, backward: bool = False) -> Case:
    entries = max(1, round(S // block_k * percent / 100))

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        theirs = [place(torch.randn(1, H, S, D, generator=g).to(dtype)) for _ in range(3)]
        ours = [t.transpose(1, 2).contiguous() for t in theirs]
        blocks = S // block_k
        order = torch.rand(H, S // BLOCK_Q, blocks, generator=g).argsort(-1)
        indices = place(order[None, ..., :entries].sort(-1).values.int())
        counts = place(torch.full((1, H, S // BLOCK_Q), entries, dtype=torch.int32))

        def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tm.block_sparse_attention(
                q, k, v, indices, counts, block_q=BLOCK_Q, block_k=block_k
            )

        def call(function: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
            if backward:
                return with_backward(function, tensors)
            return lambda: function(*tensors)

        peers: dict[str, Callable[[], Run]] = {
            "dense": lambda: call(tm.attention, ours),
            "dense sdpa": lambda: call(functools.partial(sdpa, causal=False), theirs),
        }
        if block_k == BLOCK_Q and not backward:
            listed = torch.zeros(H, S // BLOCK_Q, blocks, dtype=torch.bool, device=indices.device)
            listed.scatter_(-1, indices[0].long(), True)
            peers |= {
                "flex, mask of pairs": lambda: _flex_mask(theirs, listed, block_k),
                "flex, lists": lambda: _flex_lists(theirs, indices, counts),
            }
        return call(sparse, ours), peers

    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        "block_sparse_attention",
        f"S={S} D={D} blocks {BLOCK_Q}x{block_k} {percent} %",
        dtype,
        4.0 * H * S * entries * block_k * D * (3.5 if backward else 1.0),
        float((10 if backward else 4) * H * S * D * size),
        prepare,
        "forward+backward" if backward else "forward",
    )


def _packed_case(dtype: torch.dtype) -> Case:
    """Causal requests of many lengths, with the lists of hip_block_select."""
    lengths = (4096, 2048, 1024, 512, 256, 128, *(1,) * 16)
    options: dict[str, Any] = {"block_q": BLOCK_Q, "block_k": 16, "num_sink": 16, "num_recent": 64}
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens, listed = int(ends[-1]), 256

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        q, k, v = (place(torch.randn(tokens, H, D, generator=g).to(dtype)) for _ in range(3))
        at = place(ends)
        indices, counts = tm.hip_block_select(q, k, budget=listed, cu_seqlens_q=at, **options)

        def each() -> list[Tensor]:
            outs: list[Tensor] = []
            first = 0
            for b, n in enumerate(lengths):
                row, own = first // BLOCK_Q + b, slice(first, first + n)
                rows = slice(row, row + -(-n // BLOCK_Q))
                out = tm.block_sparse_attention(
                    q[None, own], k[None, own], v[None, own], indices[None, :, rows],
                    counts[None, :, rows], causal=True, **options,
                )  # fmt: skip
                outs.append(out)
                first += n
            return outs

        packed: dict[str, Any] = {"cu_seqlens_q": at, "causal": True}
        peers: dict[str, Callable[[], Run]] = {
            "a call for each request": lambda: each,
            "dense": lambda: lambda: tm.attention(q, k, v, cu_seqlens_k=at, **packed),
        }
        sizes = options | packed
        return lambda: tm.block_sparse_attention(q, k, v, indices, counts, **sizes), peers

    size = torch.empty((), dtype=dtype).element_size()
    seen = sum(min(i + 1, listed + 80) for n in lengths for i in range(n))
    return Case(
        "block_sparse_attention",
        f"packed, 22 requests of 1 to 4096 tokens D={D} blocks {BLOCK_Q}x16",
        dtype,
        4.0 * H * D * seen,
        float(4 * H * tokens * D * size),
        prepare,
        "forward",
    )


def _latent(dtype: torch.dtype, queries: int, heads: int, tokens: int, entries: int) -> Case:
    """The last queries of a prompt, each with a list of latent keys shared by all heads: 576
    channels, whose first 512 are the value."""
    dim, value_dim = 576, 512

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        q = place(torch.randn(1, queries, heads, dim, generator=g).to(dtype))
        k = place(torch.randn(1, tokens, 1, dim, generator=g).to(dtype))
        v = k[..., :value_dim]
        drawn = torch.rand(1, 1, queries, tokens - queries, generator=g)
        indices = place(drawn.argsort(-1)[..., :entries].sort(-1).values.int())
        counts = place(torch.full((1, 1, queries), entries, dtype=torch.int32))
        lengths = place(torch.tensor([tokens], dtype=torch.int32))
        rows = indices[0, 0].long()

        def gathered() -> Tensor:
            keys = k[0, :, 0][rows]  # [queries, entries, D]
            scores = torch.bmm(q[0], keys.transpose(1, 2)).float() * dim**-0.5
            return torch.bmm(scores.softmax(-1).to(dtype), keys[..., :value_dim])

        def each_query() -> Tensor:
            outs = []
            for row, ids in zip(q[0], rows, strict=True):
                keys = k[0, :, 0][ids]
                scores = (row @ keys.T).float() * dim**-0.5
                outs.append(scores.softmax(-1).to(dtype) @ keys[:, :value_dim])
            return torch.stack(outs)

        return (
            lambda: tm.block_sparse_attention(
                q, k, v, indices, counts, block_q=1, block_k=1, causal=True
            ),
            {
                "gather, eager matmuls": lambda: gathered,
                "a gather and matmuls for each query": lambda: each_query,
                "dense": lambda: lambda: tm.attention_decode(q, k, v, seqlens_k=lengths),
            },
        )

    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        "block_sparse_attention",
        f"Sq={queries} Sk={tokens} H={heads}/1 D={dim}/{value_dim}, lists of {entries}",
        dtype,
        2.0 * queries * heads * entries * (dim + value_dim),
        float(size * (queries * heads * (dim + value_dim) + tokens * dim)),
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for percent in (5, 20, 50):
            yield _case(dtype, 64, percent)
        for block_k in (16, 2):
            yield _case(dtype, block_k, 5)
            yield _case(dtype, block_k, 20)
        yield _case(dtype, 64, 20, backward=True)
        yield _case(dtype, 2, 20, backward=True)
        yield _packed_case(dtype)
        yield _latent(dtype, 256, 16, 4096, 512)
        yield _latent(dtype, 64, 128, 8192, 2048)
