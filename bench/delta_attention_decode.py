"""Cases of delta_attention_decode, bound by state bandwidth: copying the state is the peer to
reach. Eager is the step of transformers' fallback."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

HEADS, HEAD_DIM = 32, 128


def eager_decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, state: Tensor
) -> Tensor:
    """A step for q, k, v [B, H, D], beta [B, H], decay [B, H, 1 | D], with state [B, H, D, Dv]."""
    state = state * decay[..., None]
    u = (v - (state * k.unsqueeze(-1)).sum(-2)) * beta.unsqueeze(-1)
    state = state + k.unsqueeze(-1) * u.unsqueeze(-2)
    return (state * q.unsqueeze(-1)).sum(-2)


def _case(batch: int, tokens: int = 1, channels: bool = False) -> Case:
    elements = batch * HEADS * HEAD_DIM * HEAD_DIM

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return place(torch.randn(shape, generator=generator))

        q, k, v = (draw(batch, tokens, HEADS, HEAD_DIM) for _ in range(3))
        k = torch.nn.functional.normalize(k, dim=-1)
        token = batch, tokens, HEADS
        beta = draw(*token).sigmoid()
        decay = -draw(*token, HEAD_DIM).exp() if channels else -draw(*token).exp()
        state, other = draw(batch, HEADS, HEAD_DIM, HEAD_DIM), place(torch.empty(elements))
        copy = functools.partial(other.copy_, state.view(-1))
        peers: dict[str, Callable[[], Run]] = {"copy of the state": lambda: copy}
        if tokens == 1:
            factor = decay.exp()[:, 0] if channels else decay.exp()[:, 0, :, None]
            theirs = (q * HEAD_DIM**-0.5)[:, 0], k[:, 0], v[:, 0], beta[:, 0], factor
            last = state.clone()
            peers["eager"] = lambda: lambda: eager_decode(*theirs, last)
        return lambda: tm.delta_attention_decode(q, k, v, beta, state, log_decay=decay), peers

    return Case(
        "delta_attention_decode",
        f"B={batch} H={HEADS} D={HEAD_DIM}"
        + (" per channel" if channels else "")
        + (f" {tokens} tokens" if tokens > 1 else ""),
        torch.float32,
        7.0 * tokens * elements,
        2.0 * elements * 4,
        prepare,
    )


def cases() -> Iterator[Case]:
    for batch in (1, 4, 16):
        yield _case(batch)
    yield _case(16, channels=True)
    yield _case(16, tokens=4)
