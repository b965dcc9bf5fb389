"""Calls of block_sparse_attention that every backend must answer, or must refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument, set_options
from ..dense.attention_cases import Arguments
from ..registry import Malformed, Sample


def draw_lists(
    batch: int, heads: int, rows: int, entries: int, blocks: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascending lists, some of them shorter, -1 after the last entry."""
    indices = torch.full((batch, heads, rows, entries), -1, dtype=torch.int32)
    counts = torch.zeros(batch, heads, rows, dtype=torch.int32)
    for at in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        most = min(entries, blocks)
        count = int(torch.randint(most // 2, most + 1, (), generator=g))
        ids = torch.randperm(blocks, generator=g)[:count].sort().values
        counts[tuple(at)] = count
        indices[tuple(at)][:count] = ids.int()
    return indices, counts


def hostile_lists(
    indices: Tensor, counts: Tensor, blocks: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Malformed values that no kernel may trust: any id, in any order, repeated, and any count."""
    wild = torch.randint(-2, blocks + 3, indices.shape, generator=g, dtype=torch.int32)
    wild[torch.rand(wild.shape, generator=g) < 0.05] = torch.iinfo(torch.int32).max
    wild[torch.rand(wild.shape, generator=g) < 0.05] = torch.iinfo(torch.int32).min
    count = torch.randint(-3, indices.shape[-1] + 4, counts.shape, generator=g, dtype=torch.int32)
    return torch.where(torch.rand(indices.shape, generator=g) < 0.5, indices, wild), count


def block_sparse_call(
    sq: int = 70,
    sk: int = 70,
    b: int = 2,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    lists: int = 2,
    entries: int = 3,
    block_q: int = 16,
    block_k: int = 16,
    hostile: bool = False,
    sink: bool = False,
    page: int = 0,
    latent: bool = False,
    ends_q: tuple[int, ...] = (),
    ends_k: tuple[int, ...] = (),
    **options: Any,
) -> Any:
    """lists: 1, hk or h. page: page size of a cache with shuffled pages. latent: values are the
    first channels of the keys. ends_q, ends_k: offsets of b packed requests; without ends_k each
    has sk keys of its own.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        q, k, v = (
            torch.randn(shape, generator=g).to(dtype)
            for shape in ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv))
        )
        rows, blocks = -(-sq // block_q), -(-sk // block_k)
        if ends_q:
            rows = b * sq // block_q + b
        indices, counts = draw_lists(1 if ends_q else b, lists, rows, entries, blocks, g)
        if hostile:
            indices, counts = hostile_lists(indices, counts, blocks, g)
        sizes = {"block_q": block_q, "block_k": block_k, "return_lse": True}
        drawn = {"sink": torch.randn(h, generator=g)} if sink else {}
        if page:
            order = torch.randperm(b * (sk // page), generator=g)
            k, v = (x.reshape(-1, page, *x.shape[2:])[order].contiguous() for x in (k, v))
            drawn["block_table"] = order.argsort().view(b, -1).int()
        if ends_q:
            q, indices, counts = q.flatten(0, 1)[: ends_q[-1]], indices[0], counts[0]
            rows = len(q) // block_q + b
            indices, counts = indices[:, :rows].contiguous(), counts[:, :rows].contiguous()
            drawn["cu_seqlens_q"] = torch.tensor([0, *ends_q], dtype=torch.int32)
        if ends_k:
            k, v = (x.flatten(0, 1)[: ends_k[-1]] for x in (k, v))
            drawn["cu_seqlens_k"] = torch.tensor([0, *ends_k], dtype=torch.int32)
        if latent:
            v = k[..., :dv]
        return (q, k, v, indices, counts), sizes | options | drawn

    return make


LATENT: dict[str, Any] = {
    "h": 3, "hk": 1, "d": 272, "dv": 264, "lists": 1, "block_q": 1, "latent": True,
}  # fmt: skip

SAMPLES = (
    Sample("list of each KV head", block_sparse_call()),
    Sample("list of each query head", block_sparse_call(lists=4, causal=True)),
    Sample("shared list", block_sparse_call(lists=1, h=3, hk=3, d=24, dv=40)),
    Sample(
        "first and last keys",
        block_sparse_call(
            sq=90, sk=130, block_k=8, entries=4, causal=True, num_sink=5, num_recent=20
        ),
    ),
    Sample(
        "small blocks of keys",
        block_sparse_call(block_q=32, block_k=2, entries=20, causal=True, num_recent=7),
    ),
    Sample("keys one by one", block_sparse_call(sq=40, block_k=1, entries=33, lists=4)),
    Sample("queries one by one", block_sparse_call(sq=33, sk=50, block_q=1, block_k=4, num_sink=3)),
    Sample(
        "wide blocks",
        block_sparse_call(
            sq=200, sk=300, b=1, block_q=64, block_k=128, entries=2, causal=True, num_sink=1
        ),
    ),
    Sample(
        "seqlens_k",
        block_sparse_call(
            b=3,
            sk=80,
            block_q=32,
            block_k=32,
            causal=True,
            num_sink=4,
            num_recent=6,
            seqlens_k=torch.tensor([80, 50, 0], dtype=torch.int32),
        ),
    ),
    Sample("seqlens_k, not causal", block_sparse_call(seqlens_k=torch.tensor([33, 1000]).int())),
    Sample("softcap", block_sparse_call(sq=20, h=6, hk=1, lists=1, softcap=2.0, scale=0.5)),
    Sample("wide heads", block_sparse_call(sq=35, sk=64, b=1, d=200, dv=136, causal=True)),
    Sample("not to be trusted", block_sparse_call(hostile=True, entries=6, lists=4)),
    Sample(
        "not to be trusted, causal",
        block_sparse_call(
            hostile=True, entries=30, block_k=4, causal=True, num_sink=2, num_recent=3
        ),
    ),
    Sample("nothing listed", block_sparse_call(entries=0)),
    Sample(
        "first and last keys alone",
        block_sparse_call(entries=0, causal=True, num_sink=4, num_recent=9),
    ),
    Sample("more queries than keys", block_sparse_call(sq=70, sk=20, causal=True, num_recent=5)),
    Sample(
        "sink", block_sparse_call(sq=40, lists=1, sink=True, causal=True, num_sink=1, entries=1)
    ),
    Sample("sink, softcap", block_sparse_call(b=1, sq=20, lists=4, sink=True, softcap=1.5)),
    Sample("sink, no keys", block_sparse_call(sq=9, sk=0, sink=True)),
    Sample(
        "mass",
        block_sparse_call(
            lists=1, entries=5, causal=True, num_sink=5, num_recent=9, return_mass=True, softcap=3.0
        ),
    ),
    Sample(
        "mass of each head, of wide blocks",
        block_sparse_call(
            sq=40,
            sk=300,
            b=1,
            d=72,
            lists=4,
            block_k=128,
            entries=2,
            sink=True,
            return_mass=True,
            seqlens_k=torch.tensor([290], dtype=torch.int32),
        ),
    ),
    Sample(
        "mass of keys one by one",
        block_sparse_call(
            sq=20, block_q=1, block_k=1, entries=17, hostile=True, causal=True, return_mass=True
        ),
    ),
    Sample(
        "packed",
        block_sparse_call(
            b=4,
            ends_q=(20, 20, 57, 100),
            ends_k=(50, 60, 61, 140),
            causal=True,
            num_sink=3,
            num_recent=6,
            sink=True,
            return_mass=True,
        ),
    ),
    Sample(
        "packed, not to be trusted",
        block_sparse_call(
            b=3,
            ends_q=(1, 34, 70),
            ends_k=(0, 40, 130),
            lists=4,
            block_q=32,
            block_k=2,
            entries=20,
            hostile=True,
            softcap=3.0,
        ),
    ),
    Sample(
        "packed queries of padded keys, one by one",
        block_sparse_call(
            b=3,
            sk=40,
            ends_q=(5, 12, 30),
            lists=1,
            block_q=1,
            block_k=1,
            entries=9,
            causal=True,
            num_recent=2,
            seqlens_k=torch.tensor([40, 3, 33], dtype=torch.int32),
        ),
    ),
    Sample(
        "pages",
        block_sparse_call(
            sk=64,
            sq=20,
            page=16,
            lists=1,
            causal=True,
            num_recent=3,
            seqlens_k=torch.tensor([64, 33], dtype=torch.int32),
        ),
        forward_only=True,
    ),
    Sample(
        "latent",
        block_sparse_call(
            **LATENT,
            sq=5,
            sk=40,
            block_k=1,
            entries=9,
            hostile=True,
            causal=True,
            num_recent=2,
            softcap=3.0,
        ),
        forward_only=True,
    ),
    Sample(
        "latent, packed, pages",
        block_sparse_call(
            **LATENT,
            b=2,
            sk=32,
            page=8,
            ends_q=(2, 3),
            block_k=2,
            entries=6,
            sink=True,
            return_mass=True,
            seqlens_k=torch.tensor([32, 9], dtype=torch.int32),
        ),
        forward_only=True,
    ),
    Sample("no keys", block_sparse_call(sk=0)),
    Sample("no queries", block_sparse_call(sq=0)),
    Sample("no requests", block_sparse_call(b=0)),
)


def packed(ends: Tensor) -> Any:
    """The first request of the first sample, as packed queries on the keys of both requests."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[0], args[3], args[4] = (args[i][0] for i in (0, 3, 4))
        kwargs["cu_seqlens_q"] = ends

    return edit


# Edits of the first sample: q [2, 70, 4, 32], k and v [2, 70, 2, 32], indices [2, 2, 5, 3].
MALFORMED = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "dtypes", "k: must have the dtype of q, float32; got float16", set_argument(1, Tensor.half)
    ),
    Malformed(
        "queries", "block_q: must be a power of two up to 128; got 24", set_options(block_q=24)
    ),
    Malformed("keys", "block_k: must be a power of two up to 128; got 0", set_options(block_k=0)),
    Malformed(
        "wide block", "block_k: must be a power of two up to 128; got 256", set_options(block_k=256)
    ),
    Malformed("first keys", "num_sink: must not be negative; got -1", set_options(num_sink=-1)),
    Malformed("last keys", "num_recent: must not be negative; got -2", set_options(num_recent=-2)),
    Malformed(
        "last keys without order",
        "num_recent: goes with causal alone; got 4",
        set_options(num_recent=4),
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got inf", set_options(scale=float("inf"))
    ),
    Malformed(
        "rank of lists",
        "indices: must have shape [2, heads, 5, K] with 1, 2 or 4 heads; got [2, 5, 3]",
        set_argument(3, lambda t: t[:, 0]),
    ),
    Malformed(
        "heads of lists",
        "indices: must have shape [2, heads, 5, K] with 1, 2 or 4 heads; got [2, 3, 5, 3]",
        set_argument(3, lambda t: t[:, :1].repeat(1, 3, 1, 1)),
    ),
    Malformed(
        "rows of lists",
        "indices: must have shape [2, heads, 3, K] with 1, 2 or 4 heads; got [2, 2, 5, 3]",
        set_options(block_q=32),
    ),
    Malformed(
        "shape of counts",
        "counts: must have shape [2, 2, 5]; got [2, 1, 5]",
        set_argument(4, lambda t: t[:, :1]),
    ),
    Malformed("dtype of lists", "indices: must be int32; got int64", set_argument(3, Tensor.long)),
    Malformed(
        "layout of lists",
        "indices: must have a contiguous last dimension",
        set_argument(3, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    ),
    Malformed(
        "shape of seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of seqlens_k",
        "seqlens_k: must be int32; got int64",
        set_options(seqlens_k=torch.zeros(2, dtype=torch.int64)),
    ),
    Malformed(
        "shape of sink", "sink: must have shape [4]; got [2]", set_options(sink=torch.zeros(2))
    ),
    Malformed(
        "packed keys alone",
        "cu_seqlens_q: must be given with cu_seqlens_k; got None",
        set_options(cu_seqlens_k=torch.tensor([0, 70], dtype=torch.int32)),
    ),
    Malformed(
        "rank of packed queries",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=torch.tensor([0, 70], dtype=torch.int32)),
    ),
    Malformed(
        "requests of packed queries",
        "k: must have the batch size of q, 3; got 2",
        packed(torch.tensor([0, 30, 50, 70], dtype=torch.int32)),
    ),
    Malformed(
        "dtype of cu_seqlens_q",
        "cu_seqlens_q: must be int32; got int64",
        packed(torch.tensor([0, 30, 70])),
    ),
    Malformed(
        "rows of packed lists",
        "indices: must have shape [heads, 6, K] with 1, 2 or 4 heads; got [2, 5, 3]",
        packed(torch.tensor([0, 30, 70], dtype=torch.int32)),
    ),
    Malformed(
        "out shape",
        "out: must have shape [2, 70, 4, 32]; got [2, 70, 2, 32]",
        set_options(out=torch.zeros(2, 70, 2, 32)),
    ),
    Malformed(
        "out over q",
        "out: must not share memory with q; strides; got [8960, 128, 32, 1]",
        lambda a, k: k.update(out=a[0]),
    ),
)
