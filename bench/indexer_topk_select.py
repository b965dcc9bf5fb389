"""Cases of indexer_topk_select at the sizes of DeepSeek-V3.2-Exp (64 heads of 128, 2048 keys): part
of a prefill, and a decode step. Peers of float8 keys have them in the dtype of q."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, causal_pairs, place

CHUNK = 32  # queries per step of the eager peer, whose scores of all heads are in memory


def eager(q: Tensor, k: Tensor, weights: Tensor, topk: int, chunk: int) -> list[Tensor]:
    """Products in the dtype of q, sum over heads in float32."""
    queries, keys = q.shape[1], k.shape[1]
    found = []
    for i in range(0, queries, chunk):
        rows = q[0, i : i + chunk]
        z = (rows.flatten(0, 1) @ k[0].T).relu_().unflatten(0, (len(rows), -1))
        scores = torch.bmm(weights[0, i : i + chunk, None], z.float())[:, 0]
        last = torch.arange(i, i + len(rows), device=q.device)[:, None] + keys - queries
        hidden = torch.arange(keys, device=q.device) > last
        found.append(scores.masked_fill_(hidden, -torch.inf).topk(topk)[1].sort()[0])
    return found


def _case(
    name: str, queries: int, keys: int, dtype: torch.dtype, heads: int = 64, dim: int = 128,
    topk: int = 2048, float8: bool = False,
) -> Case:  # fmt: skip
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(1, queries, heads, dim, generator=generator).to(dtype))
        k = place(torch.randn(1, keys, dim, generator=generator).to(dtype))
        weights = place(torch.randn(1, queries, heads, generator=generator))
        peers: dict[str, Callable[[], Run]] = {
            "query by query": lambda: lambda: eager(q, k, weights, topk, 1)
        }
        if queries > 1:
            peers[f"eager, {CHUNK} queries"] = lambda: lambda: eager(q, k, weights, topk, CHUNK)
        else:
            peers["sum of the keys"] = lambda: k.sum
        if not float8:
            return lambda: tm.indexer_topk_select(q, k, weights, topk), peers
        k_scale = k.abs().amax(-1).float() / 448
        codes = (k.float() / k_scale[..., None]).to(torch.float8_e4m3fn)
        peers["keys as they were"] = lambda: lambda: tm.indexer_topk_select(q, k, weights, topk)
        return lambda: tm.indexer_topk_select(q, codes, weights, topk, k_scale=k_scale), peers

    pairs = causal_pairs(queries, keys)
    key = dim + 4 if float8 else dim * dtype.itemsize
    read = queries * heads * (dim * dtype.itemsize + 4) + keys * key
    return Case(
        "indexer_topk_select", name, dtype, 2.0 * heads * dim * pairs,
        float(read + queries * (topk + 1) * 4), prepare,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    half = torch.bfloat16
    yield _case("1024 queries of 16384", 1024, 16384, half)
    yield _case("256 queries of 16384", 256, 16384, half)
    yield _case("256 queries of 16384", 256, 16384, torch.float32)
    yield _case("256 queries of 65536, 16 heads", 256, 65536, half, 16)
    yield _case("a step over 131072", 1, 131072, half)
    yield _case("a step over 131072", 1, 131072, torch.float32)
    yield _case("256 queries of 16384, float8 keys", 256, 16384, half, float8=True)
    yield _case("a step over 131072, float8 keys", 1, 131072, half, float8=True)
    yield _case("a step over 131072, 8 heads of 64", 1, 131072, half, 8, 64)
