"""Sample calls of block_sparse_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense.attention_cases import Arguments
from ..registry import Sample


def draw_lists(
    batch: int, heads: int, rows: int, entries: int, blocks: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascending lists, some of them shorter, -1 after the last entry."""
    indices = torch.full((batch, heads, rows, entries), -1, dtype=torch.int32)
    counts = torch.zeros(batch, heads, rows, dtype=torch.int32)
    for at in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        maximum = min(entries, blocks)
        count = int(torch.randint(maximum // 2, maximum + 1, (), generator=g))
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
        "only first and last keys",
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
