"""Cases of gather_tokens: scattered rows of a large table, and the tokens that EViT and Focus-DETR
keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place

# name: sequences, tokens, tokens gathered, channels
SHAPES = {
    "50k of 200k rows": (1, 200_000, 50_000, 512),
    "EViT, 0.7 of 197": (64, 197, 138, 768),
    "Focus-DETR, 7.5k of 15k": (2, 15_000, 7_500, 256),
}


def _case(name: str, dtype: torch.dtype, pass_name: str) -> Case:
    batch, tokens, kept, channels = SHAPES[name]
    elements = batch * kept * channels

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        x = place(torch.randn(batch, tokens, channels, generator=generator).to(dtype))
        order = torch.rand(batch, tokens, generator=generator).argsort(1)
        indices = place(order[:, :kept].int())
        columns = indices.long()[..., None].expand(-1, -1, channels)
        flat = (indices.long() + torch.arange(batch, device=x.device)[:, None] * tokens).flatten()
        rows = x.flatten(0, 1)
        if pass_name == "backward":
            x.requires_grad_()
            ours, theirs = tm.gather_tokens(x, indices), x.gather(1, columns)
            dout = torch.randn_like(ours)

            def backward(out: torch.Tensor) -> Run:
                return lambda: torch.autograd.grad(out, x, dout, retain_graph=True)

            return backward(ours), {"torch.gather": lambda: backward(theirs)}
        if pass_name == "into out":
            ours = torch.empty(batch, kept, channels, dtype=dtype, device=x.device)
            theirs, copied = torch.empty_like(ours).flatten(0, 1), x[:, :kept]
            return lambda: tm.gather_tokens(x, indices, out=ours), {
                "torch.index_select": lambda: lambda: torch.index_select(rows, 0, flat, out=theirs),
                "copy_ of the result": lambda: lambda: theirs.view_as(copied).copy_(copied),
            }
        return lambda: tm.gather_tokens(x, indices), {
            "torch.index_select": lambda: lambda: rows.index_select(0, flat),
            "torch.gather": lambda: lambda: x.gather(1, columns),
            "copy of the result": lambda: torch.empty_like(x[:, :kept]).clone,
        }

    passed = elements + (batch * tokens * channels if pass_name == "backward" else elements)
    moved = passed * dtype.itemsize + 4 * batch * kept
    return Case("gather_tokens", name, dtype, 0.0, float(moved), prepare, pass_name)


def cases() -> Iterator[Case]:
    for name in SHAPES:
        yield _case(name, torch.float32, "forward")
    yield _case("50k of 200k rows", torch.float32, "into out")
    yield _case("EViT, 0.7 of 197", torch.float32, "into out")
    yield _case("EViT, 0.7 of 197", torch.bfloat16, "forward")
    yield _case("EViT, 0.7 of 197", torch.float32, "backward")
    yield _case("EViT, 0.7 of 197", torch.bfloat16, "backward")
