"""Cases of gather_fuse: token reorganization of EViT, whose eager form is a chain of six calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

# name: sequences, tokens including the class token, channels; 0.7 of the patches are kept
SHAPES = {"ViT-B": (64, 197, 768), "DeiT-S": (128, 197, 384), "ViT-L, 336 pixels": (8, 577, 1024)}


def _eager(x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor) -> Tensor:
    patches, channels = x[:, 1:], x.shape[2]
    kept = patches.gather(1, keep[..., None].expand(-1, -1, channels))
    others = patches.gather(1, rest[..., None].expand(-1, -1, channels))
    fused = (others * weight.gather(1, rest)[..., None]).sum(1, keepdim=True)
    return torch.cat((x[:, :1], kept, fused), 1)


def _case(name: str, dtype: torch.dtype, pass_name: str) -> Case:
    batch, tokens, channels = SHAPES[name]
    patches = tokens - 1
    kept = -(-7 * patches // 10)
    rows = tokens + kept + 2

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        x = place(torch.randn(batch, tokens, channels, generator=generator).to(dtype))
        weight = place(torch.rand(batch, patches, generator=generator))
        order = weight.argsort(1, descending=True)
        keep, rest = order[:, :kept].contiguous(), order[:, kept:].contiguous()
        ids = keep.int(), rest.int()
        narrow = weight.to(dtype)
        if pass_name == "forward":
            copied = torch.ones(batch * rows * channels // 2, dtype=dtype, device=x.device)
            into = torch.empty_like(copied)
            return lambda: tm.gather_fuse(x, *ids, weight), {
                "eager": lambda: lambda: _eager(x, keep, rest, narrow),
                "copy_ of as many bytes": lambda: lambda: into.copy_(copied),
            }
        leaves = [t.requires_grad_() for t in (x, weight, narrow.detach().clone())]
        ours = tm.gather_fuse(x, *ids, leaves[1])
        theirs = _eager(x, keep, rest, leaves[2])
        dout = torch.randn_like(ours)

        def backward(out: Tensor, of: Tensor) -> Run:
            return lambda: torch.autograd.grad(out, (x, of), dout, retain_graph=True)

        return backward(ours, leaves[1]), {"eager": lambda: backward(theirs, leaves[2])}

    # The backward reads dout and the patches of rest, and writes dx.
    passed = rows if pass_name == "forward" else (kept + 2) + (patches - kept) + tokens
    moved = batch * passed * channels * dtype.itemsize
    work = 2.0 * batch * (patches - kept) * channels * (1 if pass_name == "forward" else 2)
    return Case("gather_fuse", name, dtype, work, float(moved), prepare, pass_name)


def _select_case(dtype: torch.dtype, pass_name: str) -> Case:
    """Selection and reorganization together, as a layer of EViT has them. Copies of as many bytes
    write to memory allocated like our result: new, or given."""
    batch, tokens, channels = SHAPES["ViT-B"]
    kept = -(-7 * (tokens - 1) // 10)
    rows = tokens + kept + 2

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        x = place(torch.randn(batch, tokens, channels, generator=generator).to(dtype))
        scores = place(torch.rand(batch, tokens - 1, generator=generator))
        narrow = scores.to(dtype)
        every = place(torch.arange(tokens - 1)).expand(batch, -1)
        out = torch.empty(batch, kept + 2, channels, dtype=dtype, device=x.device)
        given = None if pass_name == "forward" else out

        def ours() -> Tensor:
            return tm.gather_fuse(x, *tm.topk_partition(scores, kept), scores, out=given)

        def eager() -> Tensor:
            keep = scores.topk(kept)[1]
            dropped = torch.ones_like(every, dtype=torch.bool).scatter_(1, keep, False)
            return _eager(x, keep, every[dropped].view(batch, -1), narrow)

        copied = torch.ones(batch * rows * channels // 2, dtype=dtype, device=x.device)
        into = torch.empty_like(copied)
        copy = copied.clone if pass_name == "forward" else lambda: into.copy_(copied)
        return ours, {"eager": lambda: eager, "copy of as many bytes": lambda: copy}

    moved = float(batch * rows * channels * dtype.itemsize)
    work = 2.0 * batch * (tokens - 1 - kept) * channels
    return Case("gather_fuse", "EViT select + fuse", dtype, work, moved, prepare, pass_name)


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for pass_name in ("forward", "into out"):
            yield _select_case(dtype, pass_name)
    for name in SHAPES:
        yield _case(name, torch.float32, "forward")
    for dtype, pass_name in (
        (torch.bfloat16, "forward"),
        (torch.float32, "backward"),
        (torch.bfloat16, "backward"),
    ):
        yield _case("ViT-B", dtype, pass_name)
