"""Cases of kv_block_scores: decode over long caches, bound by bandwidth of keys or pooled keys, and
query blocks of a prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

H, HK, D = 32, 8, 128


def eager(q: Tensor, k: Tensor, scoring: str, block: int) -> Tensor:
    """Scores of q [B, S, H, D] with k [B, N, Hk, D], or boxes [B, N, Hk, 2, D]."""
    x = q.unflatten(2, (HK, H // HK))
    if scoring == "minmax":
        low, high = k.unbind(3)
        both = (torch.einsum("brhgd,bnhd->bhgrn", y, z) for y, z in
                ((x.clamp(max=0), low), (x.clamp(min=0), high)))  # fmt: skip
        return sum(both)  # type: ignore[return-value]
    z = torch.einsum("brhgd,bnhd->bhgrn", x, k)
    return z if scoring == "dot" else z.unflatten(-1, (-1, block)).amax(-1)


def eager_vote(q: Tensor, k: Tensor) -> Tensor:
    return eager(q, k, "dot", 1).float().softmax(-1).sum((1, 2))


def eager_bound(q: Tensor, k: Tensor) -> Tensor:
    """Elementwise evaluation of the bound's definition."""
    x = q[:, 0].unflatten(1, (HK, H // HK))[:, None]
    low, high = (y[:, :, :, None] for y in k.unbind(3))
    return torch.maximum(x * low, x * high).sum(-1)


def _case(
    title: str, scoring: str, tokens: int, dtype: torch.dtype, block: int = 1, queries: int = 1,
    q_reduce: str = "none", block_q: int = 1, head_reduce: str = "none",
) -> Case:  # fmt: skip
    rows = tokens if scoring == "max_block" else tokens // block
    half = 2 if scoring == "minmax" else 1

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(1, queries, H, D, generator=generator).to(dtype))
        k = torch.randn(1, rows, HK, half, D, generator=generator).sort(3)[0].to(dtype)
        k = place(k if scoring == "minmax" else k[:, :, :, 0].contiguous())
        options = {
            "scoring": scoring, "block_k": block, "q_reduce": q_reduce, "block_q": block_q,
            "head_reduce": head_reduce,
        }  # fmt: skip
        peers: dict[str, Callable[[], Run]] = {"sum of the keys": lambda: k.sum}
        if head_reduce == "softmax_vote":
            peers["eager"] = lambda: lambda: eager_vote(q, k)
        elif q_reduce == "mean":
            peers["eager"] = lambda: (
                lambda: eager(q.unflatten(1, (-1, block_q)).mean(2), k, scoring, block)
            )
        elif q_reduce == "max":
            peers["eager"] = lambda: (
                lambda: eager(q, k, scoring, block).unflatten(3, (-1, block_q)).amax(4)
            )
        else:
            peers["eager"] = lambda: lambda: eager(q, k, scoring, block)
        if scoring == "minmax":
            peers["eager, elementwise"] = lambda: lambda: eager_bound(q, k)
        return lambda: tm.kv_block_scores(q, k, **options), peers  # type: ignore[arg-type]

    products = rows * half * (queries // block_q if q_reduce == "mean" else queries)
    read = rows * half * HK * D * dtype.itemsize + queries * H * D * dtype.itemsize
    heads = {"none": H, "softmax_vote": 1}.get(head_reduce, HK)
    written = heads * (queries // block_q) * (tokens // block) * 4
    return Case(
        "kv_block_scores", title, dtype, 2.0 * H * D * products, float(read + written), prepare
    )


def cases() -> Iterator[Case]:
    half = torch.bfloat16
    for tokens in (8192, 65536):
        yield _case(f"tokens {tokens}", "dot", tokens, half)
        yield _case(f"max of 16, {tokens}", "max_block", tokens, half, 16)
        yield _case(f"max of 64, {tokens}", "max_block", tokens, half, 64)
        yield _case(f"vote {tokens}", "dot", tokens, half, head_reduce="softmax_vote")
    yield _case("boxes of 16, 65536", "minmax", 65536, half, 16)
    yield _case("boxes of 16, 65536, group", "minmax", 65536, half, 16, head_reduce="group_max")
    yield _case("boxes of 16, 65536", "minmax", 65536, torch.float32, 16)
    yield _case("tokens 65536", "dot", 65536, torch.float32)
    yield _case("means of 64, 8192", "dot", 8192, half, 64, 8192, "mean", 64)
    yield _case("maximum of 64, 2048", "dot", 2048, half, 64, 2048, "max", 64, "group_max")
