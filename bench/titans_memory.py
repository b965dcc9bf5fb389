"""Cases of titans_memory, next to chunked eager PyTorch that computes everything independent of the
state for all chunks at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

HEADS = 8


def eager_chunked(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor, *, chunk: int
) -> Tensor:
    """Chunked form: q, k, v [B, H, S, D], gates [B, H, S] in (0, 1); S a multiple of chunk. Decays
    are differences of cumulative logarithms."""
    length = q.shape[2]
    q, k, v, alpha, eta, theta = (
        t.unflatten(2, (length // chunk, chunk)) for t in (q, k, v, alpha, eta, theta)
    )
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()

    def between(logs: Tensor) -> Tensor:
        return torch.exp((logs[..., :, None] - logs[..., None, :]).where(visible, -torch.inf))

    forget, keep = torch.log1p(-alpha).cumsum(-1), torch.log(eta).cumsum(-1)
    of_memory, of_momentum = between(forget), between(keep)
    carried = of_memory @ torch.exp(keep)[..., None]  # incoming momentum in the memory
    weights = of_memory @ (of_momentum * theta[..., None, :])
    scores = (q @ k.mT) * weights
    to_memory = k * weights[..., -1, :, None]
    to_momentum = k * (theta * torch.exp(keep[..., -1:] - keep))[..., None]
    kept, stays = torch.exp(forget), torch.exp(keep[..., -1])
    memory = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    momentum = memory
    memories, momenta, errors = [], [], []
    for i in range(length // chunk):
        memories.append(memory)
        momenta.append(momentum)
        error = k[:, :, i] @ memory - v[:, :, i]
        errors.append(error)
        memory = (
            kept[:, :, i, -1, None, None] * memory
            + carried[:, :, i, -1:] * momentum
            - to_memory[:, :, i].mT @ error
        )
        momentum = stays[:, :, i, None, None] * momentum - to_momentum[:, :, i].mT @ error
    out = kept[..., None] * (q @ torch.stack(memories, 2))
    out = out + carried * (q @ torch.stack(momenta, 2)) - scores @ torch.stack(errors, 2)
    return out.flatten(2, 3)


def useful_work(length: int, dim: int, chunk: int) -> float:
    """Operations of seven products per chunk, two of which are over pairs and count half."""
    return 2.0 * HEADS * length * dim * (5 * dim + chunk)


def _case(
    length: int, *, dim: int = 64, chunk: int = 64, dtype: torch.dtype = torch.float32,
    backward: bool = False,
) -> Case:  # fmt: skip
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, length, dim, generator=generator) for _ in range(3))
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
        drawn = (torch.rand(1, HEADS, length, generator=generator) for _ in range(3))
        bounds = ((0.0, 0.02), (0.3, 0.8), (0.0, 0.03))
        gates = [place(g * (b - a) + a) for g, (a, b) in zip(drawn, bounds, strict=True)]
        theirs = [*(place(t.to(dtype)) for t in (q, k, v)), *gates]
        ours = [t.transpose(1, 2).contiguous() for t in theirs]

        def own(
            q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor
        ) -> Tensor:
            return tm.titans_memory(q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=chunk)

        def call(function: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
            if not backward:
                return lambda: function(*tensors)
            leaves = [t.detach().requires_grad_() for t in tensors]
            cotangent = torch.randn_like(tensors[2])
            return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)

        peers: dict[str, Any] = {}
        if dtype == torch.float32:
            eager = functools.partial(eager_chunked, chunk=chunk)
            peers["eager chunks"] = functools.partial(call, eager, theirs)
        return call(own, ours), peers

    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        "titans_memory",
        f"S={length} D={dim} chunks of {chunk}",
        dtype,
        useful_work(length, dim, chunk) * (3.0 if backward else 1.0),
        float(HEADS * length * ((10 if backward else 4) * dim * size + 12)),
        prepare,
        "forward+backward" if backward else "forward",
        length=length,
    )


def cases() -> Iterator[Case]:
    yield _case(8192)
    yield _case(8192, backward=True)
    yield _case(2048)
    yield _case(8192, dim=128)
    yield _case(8192, chunk=16)
    yield _case(8192, chunk=256)
    yield _case(8192, dtype=torch.bfloat16)
