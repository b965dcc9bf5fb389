"""Sample calls of indexer_topk_select. Queries, keys and weights are integers: scores are exact in
every order of summation, so every backend selects the same keys.
"""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


def _sample(
    b: int = 2,
    sq: int = 9,
    n: int = 50,
    h: int = 4,
    d: int = 16,
    topk: int = 8,
    queries: tuple[int, ...] | None = None,
    keys: tuple[int, ...] | None = None,
    change: Any = None,
    float_weights: bool = False,
    float8: bool = False,
    k_scale: str | None = None,
    **options: Any,
) -> Any:
    """queries, keys: leading sizes instead of (b, sq) and (b, n), for packed sequences and pages.
    Scales are powers of two, among them a negative one and values that make a key NaN or 0.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        rows = queries or (b, sq)
        q = torch.randint(-4, 5, (*rows, h, d), generator=g).to(dtype)
        k = torch.randint(-4, 5, (*(keys or (b, n)), d), generator=g).to(dtype)
        weights = torch.randint(-2, 4, (*rows, h), generator=g).to(dtype)
        if float_weights and dtype != torch.float64:
            weights = weights.float()
        if change:
            change(q, k, weights)
        given = dict(options)
        if float8:
            k = k.to(torch.float8_e4m3fn)
        if k_scale is not None:
            shape = (1,) if k_scale == "one" else k.shape[:-1]
            scale = 2.0 ** torch.randint(-2, 3, shape, generator=g)
            if k_scale == "hostile":
                scale[:, 3:8] = torch.tensor([-2, 0, float("nan"), float("inf"), -float("inf")])
            given["k_scale"] = scale.to(torch.promote_types(dtype, torch.float32))
        return (q, k, weights, topk), given

    return make


def _poison(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    nan, inf = float("nan"), float("inf")
    q[0, 3, 1, 2] = nan
    k[0, 5, 0] = nan
    k[0, 9:12, 1] = inf
    k[0, 20] = -inf
    weights[0, 7, 0] = nan


def _poison_row(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    k[0, 12, -1] = k[1, 0, 0] = float("nan")
    q[1, 1, 0, 0] = float("inf")


def _zeros(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    k.zero_()


TABLE = torch.tensor([[4, 1, 2, -1], [0, 3, -1, -1]], dtype=torch.int32)

SAMPLES = (
    Sample("causal", _sample(seqlens_k=_ints(50, 31), return_values=True)),
    Sample("float32 weights", _sample(h=3, d=20, float_weights=True, return_values=True)),
    Sample("no activation", _sample(causal=False, activation="none", return_values=True)),
    Sample("many heads", _sample(b=1, sq=3, n=300, h=64, d=32, topk=40)),
    Sample("a step", _sample(sq=1, n=200, h=16, d=64, topk=33, seqlens_k=_ints(190, 7))),
    Sample("one head", _sample(b=1, sq=40, n=90, h=1, d=8, topk=5)),
    Sample("wide heads", _sample(b=1, sq=2, n=40, h=5, d=250, return_values=True)),
    Sample("blocks", _sample(b=1, sq=12, n=130, block_k=16, topk=3, return_values=True)),
    Sample("odd blocks", _sample(
        b=1, sq=30, n=203, h=7, block_k=5, topk=9, num_sink=7, num_recent=4
    )),
    Sample("one block", _sample(block_k=1000, topk=2, num_sink=3)),
    Sample("sink and recent", _sample(sq=4, num_sink=7, num_recent=5)),
    Sample("no key between", _sample(num_sink=30, num_recent=20)),
    Sample("fewer keys than topk", _sample(topk=64, return_values=True)),
    Sample("ties", _sample(change=_zeros, topk=12)),
    Sample("NaN and infinities", _sample(b=1, n=40, topk=20, change=_poison)),
    Sample("paged", _sample(
        sq=3, keys=(5, 16), seqlens_k=_ints(41, 20), block_table=TABLE, return_values=True
    )),
    Sample("paged blocks", _sample(
        sq=1, keys=(5, 16), seqlens_k=_ints(41, 20), block_table=TABLE, block_k=12, topk=3
    )),
    Sample("packed", _sample(
        queries=(22,), keys=(60,), cu_seqlens_q=_ints(0, 9, 9, 10, 22),
        cu_seqlens_k=_ints(0, 30, 34, 34, 60), return_values=True,
    )),
    Sample("packed queries, pages", _sample(
        queries=(7,), keys=(5, 16), cu_seqlens_q=_ints(0, 6, 7), seqlens_k=_ints(41, 20),
        block_table=TABLE,
    )),
    Sample("float8", _sample(b=1, sq=3, h=3, d=20, float8=True, return_values=True)),
    Sample("float8, scales of tokens", _sample(
        sq=3, n=70, h=3, d=33, topk=64, float8=True, k_scale="token", return_values=True
    )),
    Sample("float8, hostile scales", _sample(
        sq=2, n=20, d=16, topk=20, float8=True, k_scale="hostile", change=_poison_row,
        return_values=True,
    )),
    Sample("float8, paged blocks", _sample(
        sq=1, keys=(5, 16), d=150, seqlens_k=_ints(41, 20), block_table=TABLE, block_k=6, topk=4,
        float8=True, k_scale="token", return_values=True,
    )),
    Sample("float8, packed", _sample(
        queries=(9,), keys=(40,), cu_seqlens_q=_ints(0, 3, 9), cu_seqlens_k=_ints(0, 5, 40),
        float8=True, k_scale="token", activation="none",
    )),
    Sample("float8, one scale", _sample(b=1, sq=2, d=64, float8=True, k_scale="one")),
    Sample("hinted", _sample(
        sq=1, n=400, h=3, topk=20, float8=True, k_scale="token", return_values=True,
        previous=torch.stack([17 * torch.arange(23), 400 - 31 * torch.arange(23)])[:, None].int(),
    )),
    Sample("more queries than keys", _sample(sq=9, n=5)),
    Sample("no keys", _sample(n=0, return_values=True)),
    Sample("no queries", _sample(sq=0)),
    Sample("no sequences", _sample(queries=(0,), keys=(0,), cu_seqlens_q=_ints(0))),
)  # fmt: skip
