"""Cases of attention_decode, bound by KV cache bandwidth: reading keys and values is the peer to
reach. PyTorch gets its preferred layout [B, H, S, D] and equal lengths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

from . import case
from .case import Absent, Case, Run, place
from .packages import builders

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
RAGGED = (300, 1200, 2500, 5000, 9000, 14000, 20000, 32768)


def in_pages(cache: Tensor, order: Tensor) -> Tensor:
    """Splits a cache [B, S, Hk, D] into pages in the given order."""
    pages = cache.reshape(-1, PAGE_SIZE, *cache.shape[2:])
    return torch.empty_like(pages).index_copy_(0, order, pages)


def build_case(
    name: str, dtype: torch.dtype, lengths: Sequence[int], paged: bool = False, tokens: int = 1
) -> Case:
    longest, batch, keys = max(lengths), len(lengths), sum(lengths)
    pairs = tokens * keys - batch * tokens * (tokens - 1) / 2
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
            # 4-byte words: sums of 16-bit numbers are bound by their conversion.
            parts = [t[b, :n].view(torch.int32) for t in (k, v) for b, n in enumerate(lengths)]
            return lambda: [part.amax() for part in parts]

        def decode() -> Tensor:
            return tm.attention_decode(q, *ours, seqlens_k=seqlens_k, block_table=table)

        def call(forward: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
            return lambda: forward(*tensors)

        installed = {}
        if not paged:
            installed = builders("attention_decode", [q, k, v], decode, call, seqlens_k=seqlens_k)
        return decode, {"SDPA": sdpa, "read of k and v": read, **installed}

    return Case(
        "attention_decode",
        f"B={batch} H={HEADS}/{KV_HEADS} D={HEAD_DIM} {name}",
        dtype,
        4.0 * HEADS * HEAD_DIM * pairs,
        2.0 * keys * KV_HEADS * HEAD_DIM * size,
        prepare,
    )


def _float8(name: str, length: int) -> Case:
    """A float8_e4m3fn cache with a scale per token and head, next to a bfloat16 cache."""
    dtype = torch.bfloat16

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(1, 1, HEADS, HEAD_DIM, generator=generator).to(dtype))
        shape = (1, length, KV_HEADS, HEAD_DIM)
        k, v = (place(torch.randn(shape, generator=generator).to(dtype)) for _ in range(2))
        seqlens_k = place(torch.tensor([length], dtype=torch.int32))
        k8, v8 = (torch.zeros_like(t, dtype=torch.float8_e4m3fn) for t in (k, v))
        k_scale, v_scale = (place(torch.ones(shape[:3])) for _ in range(2))
        slots = place(torch.arange(length))
        tm.kv_cache_append(k8, v8, k[0], v[0], slots, k_scale=k_scale, v_scale=v_scale)

        def wide() -> Run:
            return lambda: tm.attention_decode(q, k, v, seqlens_k=seqlens_k)

        return (
            lambda: tm.attention_decode(
                q, k8, v8, seqlens_k=seqlens_k, k_scale=k_scale, v_scale=v_scale
            ),
            {"attention_decode, bfloat16 cache": wide},
        )

    return Case(
        "attention_decode",
        f"B=1 H={HEADS}/{KV_HEADS} D={HEAD_DIM} {name}",
        dtype,
        4.0 * HEADS * HEAD_DIM * length,
        2.0 * length * KV_HEADS * (HEAD_DIM + 4),
        prepare,
    )


def _latent(name: str, batch: int, length: int, heads: int = 16) -> Case:
    """One key of 576 channels for all heads; its first 512 channels are the value."""
    dtype, dim, value_dim = torch.bfloat16, 576, 512

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(batch, 1, heads, dim, generator=generator).to(dtype))
        cache = place(torch.randn(batch, length, 1, dim, generator=generator).to(dtype))
        values = cache[..., :value_dim]
        seqlens_k = place(torch.full((batch,), length, dtype=torch.int32))

        def eager() -> Run:
            keys, rows = cache[:, :, 0], q[:, 0]

            def run() -> Tensor:
                scores = torch.bmm(rows, keys.transpose(1, 2)).float() * dim**-0.5
                return torch.bmm(scores.softmax(-1).to(dtype), keys[..., :value_dim])

            return run

        return (
            lambda: tm.attention_decode(q, cache, values, seqlens_k=seqlens_k),
            {"eager matmuls": eager},
        )

    return Case(
        "attention_decode",
        f"B={batch} H={heads}/1 D={dim}/{value_dim} {name}",
        dtype,
        2.0 * batch * heads * (dim + value_dim) * length,
        2.0 * batch * length * dim,
        prepare,
    )


def _served(
    name: str,
    dtype: torch.dtype,
    requests: Sequence[tuple[int, int]],
    page_size: int = PAGE_SIZE,
) -> Case:
    """requests: (queries, keys) per request, paged. PyTorch runs one request after the other."""
    queries, lengths = zip(*requests, strict=True)
    pages = [-(-n // page_size) for n in lengths]

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return place(torch.randn(shape, generator=generator).to(dtype))

        q = draw(sum(queries), HEADS, HEAD_DIM)
        k, v = (draw(sum(pages), page_size, KV_HEADS, HEAD_DIM) for _ in range(2))
        order = torch.randperm(sum(pages), generator=generator)
        table = torch.zeros(len(requests), max(pages), dtype=torch.int32)
        for row, own in zip(table, order.split(pages), strict=True):
            row[: len(own)] = own
        starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
        seqlens_k = torch.tensor(lengths, dtype=torch.int32)
        seqlens_k, table, starts = (place(t) for t in (seqlens_k, table, starts))
        masks = [
            place(torch.arange(sk) <= torch.arange(sk - sq, sk)[:, None]) for sq, sk in requests
        ]

        def loop(repeat: bool) -> Callable[[], Run]:
            def one(x: Tensor, b: int) -> Tensor:
                own = x[table[b, : pages[b]].long()].flatten(0, 1)[: lengths[b]]
                if repeat:
                    own = own.repeat_interleave(HEADS // KV_HEADS, 1)
                return own.transpose(0, 1)[None]

            def run() -> list[Tensor]:
                return [
                    F.scaled_dot_product_attention(
                        own.transpose(0, 1)[None],
                        one(k, b),
                        one(v, b),
                        attn_mask=masks[b],
                        enable_gqa=not repeat,
                    )
                    for b, own in enumerate(q.split(queries))
                ]

            return lambda: run

        return (
            lambda: tm.attention(
                q, k, v, causal=True, cu_seqlens_q=starts, seqlens_k=seqlens_k, block_table=table
            ),
            {"gather, SDPA": loop(False), "gather, repeat, SDPA": loop(True)},
        )

    pairs = sum(sq * sk - sq * (sq - 1) / 2 for sq, sk in requests)
    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        "attention_decode",
        f"H={HEADS}/{KV_HEADS} D={HEAD_DIM} {name}",
        dtype,
        4.0 * HEADS * HEAD_DIM * pairs,
        2.0 * sum(lengths) * KV_HEADS * HEAD_DIM * size,
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for length in (8192, 65536):
            yield build_case(f"S={length}", dtype, (length,))
    yield build_case("S=8192 pages of 16", torch.bfloat16, (8192,), paged=True)
    yield build_case("S=8192 4 tokens", torch.bfloat16, (8192,), tokens=4)
    yield build_case("S=300..32768", torch.bfloat16, RAGGED)
    yield build_case("S=300..32768 pages of 16", torch.bfloat16, RAGGED, paged=True)
    yield _float8("S=8192 float8", 8192)
    yield _latent("S=8192 latent", 1, 8192)
    served = ((256, 4096),) * 4 + ((1, 16384),) * 4
    yield _served("4 chunks of 256 on 4096, 4 rows on 16384", torch.bfloat16, served)
    if case.device.type == "cuda":  # dtypes and shapes that the sm_90a kernels take
        yield _served("4 chunks of 256 on 4096 pages of 64", torch.bfloat16, served[:4], 64)
        for tokens in (128, 256, 512):
            yield build_case(f"S=8192 {tokens} tokens", torch.bfloat16, (8192,), tokens=tokens)
