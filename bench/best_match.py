"""Cases of best_match: the matching step of ToMe, compute-bound. Eager code writes all products to
memory before the row maximum. "ToMe" merges half of the tokens and unmerges them, as around a layer
of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place


def eager_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    unit = metric / metric.norm(dim=-1, keepdim=True)
    score, index = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    return index, score


def eager_tome(x: Tensor, metric: Tensor) -> Tensor:
    r = x.shape[1] // 2
    partner, best = eager_match(metric)
    order = best.argsort(dim=-1, descending=True)[..., None]
    gone, left = order[:, :r], order[:, r:]
    to = partner[..., None].gather(1, gone)
    channels = x.shape[2]

    def rows(index: Tensor) -> Tensor:
        return index.expand(-1, -1, channels)

    source, target = x[:, ::2], x[:, 1::2]
    target = target.scatter_reduce(1, rows(to), source.gather(1, rows(gone)), reduce="mean")
    merged = torch.cat([source.gather(1, rows(left)), target], 1)
    stay, target = merged[:, : left.shape[1]], merged[:, left.shape[1] :]
    out = torch.empty_like(x)
    out[:, 1::2] = target
    out.scatter_(1, rows(2 * left), stay)
    return out.scatter_(1, rows(2 * gone), target.gather(1, rows(to)))


def tome(x: Tensor, metric: Tensor) -> Tensor:
    assign, count, _ = tm.bipartite_match(metric, x.shape[1] // 2)
    return tm.unmerge_tokens(tm.merge_tokens(x, assign, count)[0], assign)


def _tome_case(width: int, dtype: torch.dtype) -> Case:
    batch, tokens, channels = 8, 4096, 320

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        x = place(torch.randn(batch, tokens, channels, generator=generator).to(dtype))
        metric = place(torch.randn(batch, tokens, width, generator=generator).to(dtype))
        return lambda: tome(x, metric), {"eager": lambda: lambda: eager_tome(x, metric)}

    return Case(
        "best_match",
        f"ToMe, {batch} x {tokens} tokens, C={channels}, metric of {width}",
        dtype,
        2.0 * batch * (tokens / 2) ** 2 * width,
        float(batch * tokens * dtype.itemsize * (width + 3 * channels)),
        prepare,
    )


def _case(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Case:
    rows, partners = (tokens + 1) // 2, tokens // 2

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        metric = place(torch.randn(batch, tokens, channels, generator=generator).to(dtype))
        a, b = metric[:, ::2], metric[:, 1::2]
        own = a.contiguous(), b.mT.contiguous()
        return lambda: tm.best_match(a, b, normalize=True), {
            "eager": lambda: lambda: eager_match(metric),
            "product of matrices": lambda: lambda: own[0] @ own[1],
        }

    return Case(
        "best_match",
        f"{batch} x {tokens} tokens, C={channels}",
        dtype,
        2.0 * batch * rows * partners * channels,
        float(batch * (tokens * channels * dtype.itemsize + 8 * rows)),
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(64, 197, 64, dtype)  # ViT at 224 pixels
        yield _case(8, 577, 64, dtype)  # ViT at 384 pixels
        yield _case(8, 4096, 64, dtype)
        yield _case(8, 4096, 320, dtype)  # Stable Diffusion at 512, hidden state
    yield _case(8, 4096, 320, torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        yield _tome_case(64, dtype)
        yield _tome_case(320, dtype)
