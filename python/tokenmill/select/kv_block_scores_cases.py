"""Sample calls of kv_block_scores."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


def _sample(
    b: int = 2,
    sq: int = 1,
    n: int = 50,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    pages: tuple[int, int] | None = None,
    change: Any = None,
    float8: str | None = None,
    **options: Any,
) -> Any:
    """n rows of keys; pages: (number of pages, page size); float8: shape of the scale of keys in
    float8_e4m3fn.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        q = torch.randn(b, sq, h, d, generator=g)
        lead = pages or (b, n)
        if options.get("scoring") == "minmax":
            k = torch.randn(*lead, hk, 2, d, generator=g).sort(3)[0]
        else:
            k = torch.randn(*lead, hk, d, generator=g)
        if change:
            change(q, k)
        if float8 is None:
            return (q.to(dtype), k.to(dtype)), dict(options)
        shape = {"none": (), "one": (1,), "head": (hk,), "token": (*lead, hk)}[float8]
        scale = {"k_scale": 0.5 + torch.rand(shape, generator=g)} if shape else {}
        return (q.to(dtype), k.to(torch.float8_e4m3fn)), {**options, **scale}

    return make


def _empty_boxes(q: torch.Tensor, k: torch.Tensor) -> None:
    k[0, 7:9, :, 0], k[0, 7:9, :, 1] = float("inf"), -float("inf")


TABLE = torch.tensor([[4, 1, 2, -1], [0, 3, -1, -1]], dtype=torch.int32)

SAMPLES = (
    Sample("dot", _sample(sq=3)),
    Sample("tokens of a cache", _sample(n=300, h=8, d=64, seqlens_k=_ints(277, 9))),
    Sample(
        "minmax",
        _sample(n=40, d=64, scoring="minmax", block_k=16, seqlens_k=_ints(600, 17)),
    ),
    Sample("max_block", _sample(n=130, scoring="max_block", block_k=32, seqlens_k=_ints(130, 33))),
    Sample("small blocks", _sample(sq=2, n=61, scoring="max_block", block_k=4, causal=True)),
    Sample(
        "odd blocks",
        _sample(sq=5, n=90, h=3, hk=1, d=20, scoring="max_block", block_k=21, causal=True),
    ),
    Sample(
        "mean of queries",
        _sample(sq=37, n=9, block_k=8, q_reduce="mean", block_q=8, causal=True, scale=1.0),
    ),
    Sample(
        "max of queries",
        _sample(sq=37, n=70, block_k=1, q_reduce="max", block_q=16, causal=True),
    ),
    Sample(
        "long blocks of queries",
        _sample(
            b=1, sq=80, n=50, h=2, hk=1, scoring="max_block", block_k=16, q_reduce="max",
            block_q=80, head_reduce="group_mean", causal=True,
        ),
    ),
    Sample("group maximum", _sample(sq=2, h=6, n=33, head_reduce="group_max")),
    Sample(
        "group mean",
        _sample(
            sq=9, h=10, n=33, scoring="minmax", block_k=4, head_reduce="group_mean",
            q_reduce="max", block_q=4, causal=True, seqlens_k=_ints(132, 60),
        ),
    ),
    Sample(
        "vote",
        _sample(
            n=200, h=8, head_reduce="softmax_vote", num_sink=5, num_recent=33,
            seqlens_k=_ints(190, 30),
        ),
    ),
    Sample(
        "vote of rows",
        _sample(
            sq=11, n=90, scoring="max_block", block_k=8, head_reduce="softmax_vote",
            q_reduce="max", block_q=4, num_sink=4, num_recent=9, causal=True,
        ),
    ),
    Sample(
        "sink and recent",
        _sample(sq=4, n=30, causal=True, block_k=3, num_sink=7, num_recent=5),
    ),
    Sample("empty boxes", _sample(scoring="minmax", block_k=4, d=12, change=_empty_boxes)),
    Sample(
        "paged",
        _sample(sq=2, pages=(5, 16), causal=True, seqlens_k=_ints(41, 20), block_table=TABLE),
    ),
    Sample(
        "paged blocks",
        _sample(
            pages=(5, 16), scoring="max_block", block_k=12, seqlens_k=_ints(41, 20),
            block_table=TABLE,
        ),
    ),
    Sample("wide heads", _sample(n=20, h=2, hk=1, d=250, scoring="minmax", block_k=2)),
    Sample("more queries than keys", _sample(sq=9, n=5, causal=True)),
    Sample("no keys", _sample(n=0, head_reduce="group_max")),
    Sample("no keys to vote for", _sample(n=0, head_reduce="softmax_vote")),
    Sample("no queries", _sample(sq=0)),
    Sample("no requests", _sample(b=0)),
    Sample("float8", _sample(sq=2, float8="none", causal=True)),
    Sample(
        "float8 in pages, scales of tokens",
        _sample(
            sq=2, h=6, pages=(5, 16), scoring="max_block", block_k=12, causal=True,
            head_reduce="group_mean", seqlens_k=_ints(41, 20), block_table=TABLE, float8="token",
        ),
    ),
    Sample(
        "float8, vote, scales of heads",
        _sample(
            n=90, h=8, head_reduce="softmax_vote", num_sink=5, num_recent=9,
            seqlens_k=_ints(80, 30), float8="head",
        ),
    ),
)  # fmt: skip
