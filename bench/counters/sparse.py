"""Cases of the sparse family. With block lists, every query block reads the keys and values that
its list names: the minimum is one read per list that names them. Landmark attention reads as much
as causal attention."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm

from .attention import Shape
from .case import Counted, CounterCase, on_device, products

F16, F32 = torch.float16, torch.float32


def _draw(dtype: torch.dtype, count: int, *shape: int, grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=g).to(dtype).requires_grad_(grad) for _ in range(count)
    ]  # fmt: skip


def _listed(
    title: str,
    dtype: torch.dtype,
    call: Callable[..., Any],
    shape: tuple[int, ...],
    queries: int,
    entries: int,
    keys: int,
    block_q: int,
    backward: bool,
) -> CounterCase:
    """`queries` rows of all heads see `keys` keys each; a list covers `block_q` rows and has
    `entries` per head."""
    dim = shape[-1]
    row = dim * dtype.itemsize

    def prepare() -> Callable[[], object]:
        q, k, v = _draw(dtype, 3, *shape, grad=backward)
        if not backward:
            return lambda: call(q, k, v)
        out = call(q, k, v)
        (cotangent,) = _draw(dtype, 1, *out.shape)
        return lambda: torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)

    scores = queries * keys
    # Forward: q, out and lse once. Backward: k and v for dq; for dk and dv, q and dout once per
    # list that names a block; and each gradient once.
    read = queries // block_q * keys * 2 * row
    minimum = read + queries * (2 * row + 4) if not backward else 2 * read + queries * (6 * row + 4)
    mma = products((5 if backward else 2) * scores * dim, dtype)
    name = f"{title}, {'backward, ' if backward else ''}{str(dtype)[6:]}"
    return CounterCase(name, scores / 1000, minimum, mma, prepare)


def _regions(dtype: torch.dtype, side: int, backward: bool = False) -> CounterCase:
    """A map of 4 x 4 regions of side x side pixels; each region attends to 4 regions."""
    heads, dim, parts, topk = 2, 32, 4, 4
    g = torch.Generator().manual_seed(1)
    graph = torch.rand(1, 1, parts**2, parts**2, generator=g).argsort(3)[..., :topk].int()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tm.bilevel_routing_attention(
            q, k, v, region_size=side, region_graph=graph, backend="emulated"
        )

    size = parts * side
    return _listed(
        f"{parts**2} regions of {side} x {side}, {topk} each", dtype, call,
        (1, size, size, heads, dim), size**2 * heads, topk, topk * side**2, side**2, backward,
    )  # fmt: skip


def regions_cases() -> Iterator[CounterCase]:
    for dtype in (F16, F32):
        yield _regions(dtype, 8)
    yield _regions(F16, 7)
    yield _regions(F16, 8, backward=True)


def _blocks(dtype: torch.dtype, block_k: int, backward: bool = False) -> CounterCase:
    """256 of 1024 keys for each block of 64 queries and each head."""
    return _quarter(f"256 of 1024 keys in blocks of {block_k}", dtype, block_k, backward)


def _blocks_on(
    device: str, title: str, heads: int = 2, dim: int = 64, block: int = 64, backward: bool = False
) -> CounterCase:
    """The case of _blocks on a device, with one list per KV head and two KV heads."""
    case = _quarter(
        f"{device} D={dim}, blocks of {block}, {title}", F16, block, backward, heads, dim, block
    )
    return dataclasses.replace(case, prepare=functools.partial(on_device, device, case.prepare))


def _quarter(
    title: str, dtype: torch.dtype, block_k: int, backward: bool, heads: int = 2, dim: int = 64,
    block_q: int = 64,
) -> CounterCase:  # fmt: skip
    tokens, kv_heads = 1024, 2
    entries = tokens // 4 // block_k
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(1, kv_heads, tokens // block_q, tokens // block_k, generator=g)
    indices = drawn.argsort(3)[..., :entries].sort(3).values.int()
    counts = torch.full(indices.shape[:3], entries, dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]
        return tm.block_sparse_attention(
            q, k, v, indices, counts, block_q=block_q, block_k=block_k, causal=False,
            backend="emulated",
        )  # fmt: skip

    return _listed(
        title, dtype, call, (1, tokens, heads, dim), tokens * heads, entries, tokens // 4,
        block_q * heads // kv_heads, backward,
    )  # fmt: skip


def _requests(dtype: torch.dtype, backward: bool = False) -> CounterCase:
    """Half of 512 keys for each block of 64 queries of two packed requests, with paged keys;
    backward with packed keys."""
    heads, dim, tokens, block, page = 2, 64, 1024, 64, 16
    g = torch.Generator().manual_seed(1)
    rows, entries = tokens // block + 2, 4
    drawn = torch.rand(heads, rows, 8, generator=g)
    indices = drawn.argsort(2)[..., :entries].sort(2).values.int()
    counts = torch.full(indices.shape[:2], entries, dtype=torch.int32)
    ends = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    table = torch.arange(tokens // page, dtype=torch.int32).view(2, -1)
    pages: dict[str, Any] = {"seqlens_k": ends.diff(), "block_table": table}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (-1, heads, dim) if backward else (-1, page, heads, dim)
        return tm.block_sparse_attention(
            q[0], k.view(shape), v.view(shape), indices, counts, block_q=block, block_k=block,
            cu_seqlens_q=ends, backend="emulated", **({} if backward else pages),
        )  # fmt: skip

    keys = f"in blocks of {block}" if backward else f"in pages of {page}"
    return _listed(
        f"packed, 256 of 512 keys {keys}", dtype, call, (1, tokens, heads, dim),
        tokens * heads, entries, 256, block, backward,
    )  # fmt: skip


def _mass() -> CounterCase:
    """A list of 256 keys for each of 8 queries, shared by 32 heads, with attention mass of its
    keys."""
    heads, dim, tokens, entries = 32, 64, 1024, 256
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(1, 1, 8, tokens, generator=g)
    indices = drawn.argsort(3)[..., :entries].sort(3).values.int()
    counts = torch.full(indices.shape[:3], entries, dtype=torch.int32)

    def prepare() -> Callable[[], object]:
        (q,), (k, v) = _draw(F16, 1, 1, 8, heads, dim), _draw(F16, 2, 1, tokens, 1, dim)
        return lambda: tm.block_sparse_attention(
            q, k, v, indices, counts, block_q=1, block_k=1, return_mass=True, backend="emulated"
        )

    scores, row = 8 * heads * entries, 2 * dim
    # Keys twice, values once; queries twice, out and lse; list and mass.
    minimum = 8 * entries * (3 * row + 8) + 8 * heads * (3 * row + 8)
    mma = products(3 * scores * dim, F16)
    return CounterCase(
        f"mass of 256 of {tokens} keys, float16", scores / 1000, minimum, mma, prepare
    )


def _latent(packed: bool = False) -> CounterCase:
    """A list of 512 latent keys for each of 4 queries, shared by 16 heads; packed: two requests of
    2 queries with packed keys."""
    heads, dim, value_dim, tokens, queries, entries = 16, 576, 512, 4096, 4, 512
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(1, 1, queries, tokens, generator=g)
    indices = drawn.argsort(3)[..., :entries].sort(3).values.int()
    counts = torch.full(indices.shape[:3], entries, dtype=torch.int32)
    ends: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor([0, queries // 2, queries], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32),
    }

    def prepare() -> Callable[[], object]:
        (q,), (k,) = _draw(F16, 1, 1, queries, heads, dim), _draw(F16, 1, 1, tokens, 1, dim)
        lists, lengths, options = indices, counts, {}
        if packed:
            q, k, options = q[0], torch.cat([k[0], k[0]]), ends
            rows = torch.tensor([0, 1, 3, 4])  # one more list row than queries per request
            lists = lists.new_zeros(1, queries + 2, entries).index_copy(1, rows, lists[0])
            lengths = lengths.new_zeros(1, queries + 2).index_copy(1, rows, lengths[0])
        return lambda: tm.block_sparse_attention(
            q, k, k[..., :value_dim], lists, lengths, block_q=1, block_k=1, backend="emulated",
            **options,
        )  # fmt: skip

    scores = queries * heads * entries
    # Keys and ids; queries, out and lse. A CTA copies keys and values, which are the same.
    minimum = queries * entries * (2 * dim + 4) + queries * heads * (2 * (dim + value_dim) + 4)
    mma = products(scores * (dim + value_dim), F16)
    name = f"{'packed, ' if packed else ''}{entries} of {tokens} latent keys, float16"
    return CounterCase(name, scores / 1000, minimum, mma, prepare)


def blocks_cases() -> Iterator[CounterCase]:
    for block_k in (64, 16, 2):
        yield _blocks(F16, block_k)
    yield _blocks(F32, 64)
    yield _blocks(F16, 64, backward=True)
    for device, dim in itertools.product(("sm_90a", "sm_80"), (64, 128)):
        case = functools.partial(_blocks_on, device, dim=dim)
        yield case("one head")
        yield case("three heads", 6)
        yield case("four heads", 8, block=128)
        yield case("one head", backward=True)
        yield case("four heads", 8, block=128, backward=True)
    yield _requests(F16)
    yield _requests(F16, backward=True)
    yield _mass()
    yield _latent()
    yield _latent(packed=True)


def _search(
    name: str, dtype: torch.dtype, queries: int, heads: int = 1, kv_heads: int = 1, dim: int = 64,
    exact: bool = False,
) -> CounterCase:  # fmt: skip
    """256 of 4096 keys in blocks of 2, not causal: every query block halves nodes of 16 blocks down
    to one. The last step knows the score of the second half of each node."""
    tokens, budget, block_q = 4096, 256, 64
    steps = int(math.log2(tokens / budget))
    keys = tokens if exact else (2 * steps - 1) * budget
    lists = kv_heads * max(queries // block_q, 1)
    speakers = max(min(queries, block_q) // 2, 1) * (heads // kv_heads)
    options: dict[str, Any] = {"bound": "minmax"} if exact else {}

    def prepare() -> Callable[[], object]:
        (q,) = _draw(dtype, 1, 1, queries, heads, dim)
        (k,) = _draw(dtype, 1, 1, tokens, kv_heads, dim)
        return lambda: tm.hip_block_select(
            q, k, budget=budget, block_q=block_q, num_sink=0, num_recent=0, causal=False,
            head_reduce="group_max", backend="emulated", **options,
        )  # fmt: skip

    scores = lists * keys * speakers
    minimum = lists * ((keys + speakers) * dim * dtype.itemsize + budget // 2 * 4)
    return CounterCase(
        f"{name}, {str(dtype)[6:]}", scores / 1000, minimum, products(scores * dim, dtype), prepare
    )


def search_cases() -> Iterator[CounterCase]:
    for dtype in (F16, F32):
        yield _search("512 queries", dtype, 512)
    yield _search("512 queries, D=128", F16, 512, dim=128)
    yield _search("512 queries, every product", F16, 512, exact=True)
    yield _search("decode, 8 heads of 2 key heads", F16, 1, 8, 2, 128)


def _landmarks(dtype: torch.dtype, block: int, backward: bool = False) -> CounterCase:
    """Scores, bytes and products of causal attention, including the landmarks' own weights."""
    dense = Shape(backward, head_dim=64, seqlen=1024, heads=1, kv_heads=1, causal=True)

    def prepare() -> Callable[[], object]:
        q, k, v = _draw(dtype, 3, 1, dense.seqlen, 1, dense.head_dim, grad=backward)
        out = functools.partial(tm.landmark_attention, q, k, v, block=block, backend="emulated")
        if not backward:
            return out
        made = out()
        (cotangent,) = _draw(dtype, 1, *made.shape)
        return lambda: torch.autograd.grad(made, (q, k, v), cotangent, retain_graph=True)

    rows = 8 if backward else 4  # rows in addition to lse
    minimum = dense.seqlen * (rows * dense.head_dim * dtype.itemsize + 4)
    mma = products(dense.min_mma * 2048, dtype)
    title = f"{dense.title}, blocks of {block}, {str(dtype)[6:]}"
    return CounterCase(title, dense.scores / 1000, minimum, mma, prepare)


def landmarks_cases() -> Iterator[CounterCase]:
    for block in (64, 16, 128):
        yield _landmarks(F16, block)
    yield _landmarks(F32, 64)
    yield _landmarks(F16, 64, backward=True)


def lists_cases() -> Iterator[CounterCase]:
    heads, rows, blocks, entries = 2, 64, 256, 32

    def prepare() -> Callable[[], object]:
        drawn = torch.rand(1, heads, rows, blocks, generator=torch.Generator().manual_seed(1))
        indices = drawn.argsort(3)[..., :entries].sort(3).values.int()
        counts = torch.full(indices.shape[:3], entries, dtype=torch.int32)
        return lambda: tm.transpose_block_list(indices, counts, blocks, backend="emulated")

    listed = heads * rows * entries
    minimum = 4 * (2 * listed + heads * (rows + blocks + 1))
    yield CounterCase(f"{rows} lists of {entries} of {blocks}", listed, minimum, 0, prepare)


PER = "1000 scores"
COUNTED = {
    "bilevel_routing_attention": Counted(f"{PER}; H=2, D=32", regions_cases),
    "block_sparse_attention": Counted(f"{PER}; H=2, D=64", blocks_cases),
    "hip_block_select": Counted(f"{PER}; 256 of 4096 keys, D=64", search_cases),
    "landmark_attention": Counted(f"{PER}; one head", landmarks_cases),
    "transpose_block_list": Counted("entry of a list; two heads", lists_cases),
}
