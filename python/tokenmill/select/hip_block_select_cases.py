"""Sample calls of hip_block_select. Queries and keys are integers: products are exact in every
order of summation, so every backend selects the same blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


def _sample(
    b: int = 1,
    sq: int = 20,
    n: int = 160,
    h: int = 2,
    hk: int = 1,
    d: int = 16,
    pages: tuple[int, int] | None = None,
    change: Any = None,
    **options: Any,
) -> Any:
    """n keys; pages: (number of pages, page size). Packed if the options hold cu_seqlens. Small
    windows unless options say otherwise.
    """
    options = {
        "budget": 32, "block_q": 32, "num_sink": 4, "num_recent": 10, **options,
    }  # fmt: skip

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        rows_q = (sq,) if "cu_seqlens_q" in options else (b, sq)
        rows_k = (n,) if "cu_seqlens_k" in options else pages or (b, n)
        q = torch.randint(-4, 5, (*rows_q, h, d), generator=g).to(dtype)
        k = torch.randint(-4, 5, (*rows_k, hk, d), generator=g).to(dtype)
        if change:
            change(q, k)
        return (q, k), dict(options)

    return make


def _poison(q: torch.Tensor, k: torch.Tensor) -> None:
    q[0, 7, 0, 3] = float("nan")
    k[0, 40:60, :, 1] = float("nan")


def _zeros(q: torch.Tensor, k: torch.Tensor) -> None:
    k.zero_()


def _list(rows: int, *blocks: int, width: int = 16, heads: int = 2) -> tuple[Any, Any]:
    indices = torch.full((1, heads, rows, width), -1, dtype=torch.int32)
    indices[..., : len(blocks)] = _ints(*blocks)
    return indices, torch.full((1, heads, rows), len(blocks), dtype=torch.int32)


TABLE = torch.tensor([[4, 1, 2, -1], [0, 3, -1, -1]], dtype=torch.int32)

SAMPLES = (
    Sample("search", _sample(b=2)),
    Sample("defaults", _sample(
        sq=66, n=900, h=1, d=64, budget=512, block_q=64, num_sink=16, num_recent=256
    )),
    Sample("first", _sample(representative="first", block_q=16)),
    Sample("last", _sample(representative="last", stride_q=1)),
    Sample("group maximum", _sample(sq=33, h=6, hk=2, block_q=64, head_reduce="group_max")),
    Sample("exact", _sample(bound="minmax")),
    Sample("few blocks", _sample(budget=600)),
    Sample("one block", _sample(n=60, budget=2)),
    Sample("single keys", _sample(h=1, block_k=1, budget=16, block_q=10, stride_q=3)),
    Sample("odd blocks", _sample(n=333, d=20, block_k=7, budget=35, stride_q=4)),
    Sample("large blocks", _sample(h=1, n=700, block_k=128, budget=256, block_q=128, sq=130)),
    Sample("not causal", _sample(causal=False, num_recent=0, num_sink=0)),
    Sample("decode", _sample(b=2, sq=1, n=400, seqlens_k=_ints(371, 90))),
    Sample("decode, group", _sample(sq=2, n=400, h=12, hk=2, d=128, head_reduce="group_max")),
    Sample("paged", _sample(
        b=2, sq=3, pages=(5, 64), num_recent=3, seqlens_k=_ints(170, 128), block_table=TABLE
    )),
    Sample("restart", _sample(
        start=_list(1, 2, 9, 10, 20, 21, 33, 50, 51, 53, 65), restart_span=4
    )),
    Sample("restart from anything", _sample(start=_list(1, 300, 9, 9, -1, 57, 58, 8))),
    Sample("restart from nothing", _sample(start=_list(1))),
    Sample("right-padded", _sample(
        b=3, sq=40, block_q=16, budget=16, seqlens_q=_ints(40, 17, 0), seqlens_k=_ints(150, 90, 60)
    )),
    Sample("packed", _sample(
        sq=53, n=290, block_q=16, cu_seqlens_q=_ints(0, 20, 20, 53),
        cu_seqlens_k=_ints(0, 150, 160, 290),
    )),
    Sample("packed, over pages", _sample(
        sq=24, pages=(5, 64), num_recent=3, block_q=8, h=4, head_reduce="group_max",
        cu_seqlens_q=_ints(0, 1, 24), seqlens_k=_ints(170, 128), block_table=TABLE,
    )),
    Sample("packed, restart", _sample(
        sq=12, n=300, block_q=8, cu_seqlens_q=_ints(0, 3, 12), cu_seqlens_k=_ints(0, 140, 300),
        start=tuple(t[0] for t in _list(3, 2, 9, 20, 21, 50)), restart_span=4,
    )),
    Sample("no sequences", _sample(sq=0, n=0, cu_seqlens_q=_ints(0), cu_seqlens_k=_ints(0))),
    Sample("more queries than keys", _sample(sq=60, n=45)),
    Sample("everything kept anyway", _sample(num_recent=1000)),
    Sample("nan", _sample(change=_poison)),
    Sample("nan, exact", _sample(change=_poison, bound="minmax")),
    Sample("ties", _sample(change=_zeros)),
    Sample("wide heads", _sample(h=1, d=250)),
    Sample("no keys", _sample(n=0)),
    Sample("no queries", _sample(sq=0)),
    Sample("no requests", _sample(b=0)),
)  # fmt: skip
