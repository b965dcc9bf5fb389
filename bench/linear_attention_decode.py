"""Cases of linear_attention_decode, bound by state bandwidth: copying the state is the peer to
reach."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

HEADS, HEAD_DIM = 64, 128


def eager_decode(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor) -> Tensor:
    """Decode step for q, k, v [B, H, D], with state [B, H, D, Dv] updated in place."""
    state.mul_(decay[:, None, None]).add_(k.unsqueeze(-1) * v.unsqueeze(-2))
    return (q.unsqueeze(-2) @ state).squeeze(-2)


def _case(batch: int, tokens: int = 1) -> Case:
    elements = batch * HEADS * HEAD_DIM * HEAD_DIM

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return place(torch.randn(shape, generator=generator))

        q, k, v = (draw(batch, tokens, HEADS, HEAD_DIM) for _ in range(3))
        state, other = draw(batch, HEADS, HEAD_DIM, HEAD_DIM), place(torch.empty(elements))
        decay = -place(tm.lightning_slopes(HEADS))
        copy = functools.partial(other.copy_, state.view(-1))
        peers: dict[str, Callable[[], Run]] = {"copy of the state": lambda: copy}
        if tokens == 1:
            theirs = (q * HEAD_DIM**-0.5)[:, 0], k[:, 0], v[:, 0]
            last, factors = state.clone(), torch.exp(decay)
            peers["eager"] = lambda: lambda: eager_decode(*theirs, last, factors)
        return lambda: tm.linear_attention_decode(q, k, v, state, log_decay=decay), peers

    return Case(
        "linear_attention_decode",
        f"B={batch} H={HEADS} D={HEAD_DIM}" + (f" {tokens} tokens" if tokens > 1 else ""),
        torch.float32,
        5.0 * tokens * elements,
        2.0 * elements * 4,
        prepare,
    )


def cases() -> Iterator[Case]:
    for batch in (1, 4, 16, 64):
        yield _case(batch)
    yield _case(16, tokens=4)
