"""Cases of attention_decode, bound by the memory of keys and values: reading them is the peer to
reach. PyTorch gets the layout that it likes best, [B, H, S, D], and equal lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

from .case import Absent, Case, Run, place

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
RAGGED = (300, 1200, 2500, 5000, 9000, 14000, 20000, 32768)


def in_pages(cache: Tensor, order: Tensor) -> Tensor:
    """[B, S, Hk, D] in pages that lie in any order."""
    pages = cache.reshape(-1, PAGE_SIZE, *cache.shape[2:])
    return torch.empty_like(pages).index_copy_(0, order, pages)


def _case(
    name: str, dtype: torch.dtype, lengths: Sequence[int], paged: bool = False, tokens: int = 1
) -> Case:
    longest, batch, keys = max(lengths), len(lengths), sum(lengths)
    size = torch.empty((), dtype=dtype).element_size()

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)

        def draw(length: int, heads: int) -> Tensor:
            shape = (batch, length, heads, HEAD_DIM)
            return place(torch.randn(shape, generator=generator).to(dtype))

        q = draw(tokens, HEADS)
        k, v = (draw(longest, KV_HEADS) for _ in range(2))
        seqlens_k, table, ours = place(torch.tensor(lengths, dtype=torch.int32)), None, (k, v)
        if paged:
            order = place(torch.randperm(batch * longest // PAGE_SIZE, generator=generator))
            table = order.int().view(batch, -1)
            ours = (in_pages(k, order), in_pages(v, order))

        def sdpa() -> Run:
            if min(lengths) < longest or tokens > 1:
                raise Absent("SDPA: a mask for each request")
            q_t, k_t, v_t = (t.transpose(1, 2).contiguous() for t in (q, k, v))
            return lambda: F.scaled_dot_product_attention(q_t, k_t, v_t, enable_gqa=True)

        def read() -> Run:
            # Words of 4 bytes: sums of 16-bit numbers are bound by their conversion.
            parts = [t[b, :n].view(torch.int32) for t in (k, v) for b, n in enumerate(lengths)]
            return lambda: [part.amax() for part in parts]

        return (
            lambda: tm.attention_decode(q, *ours, seqlens_k=seqlens_k, block_table=table),
            {"SDPA": sdpa, "read of k and v": read},
        )

    return Case(
        "attention_decode",
        f"B={batch} H={HEADS}/{KV_HEADS} D={HEAD_DIM} {name}",
        dtype,
        4.0 * tokens * HEADS * HEAD_DIM * keys,
        2.0 * keys * KV_HEADS * HEAD_DIM * size,
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for length in (8192, 65536):
            yield _case(f"S={length}", dtype, (length,))
    yield _case("S=8192 pages of 16", torch.bfloat16, (8192,), paged=True)
    yield _case("S=8192 4 tokens", torch.bfloat16, (8192,), tokens=4)
    yield _case("S=300..32768", torch.bfloat16, RAGGED)
    yield _case("S=300..32768 pages of 16", torch.bfloat16, RAGGED, paged=True)
