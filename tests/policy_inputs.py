"""Prompts and steps for policy tests, and attention one head at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenmill import policies

H, HK, D, DV = 4, 2, 16, 8
GROUP, SCALE = H // HK, D**-0.5
LENGTHS, STEPS = (37, 22), 9
# Between two float32 results of one attention: each logit, below 16, is rounded to 2^-20, which
# changes a mean of values, below 5, by 5e-6.
FLOAT32 = {"rtol": 0, "atol": 1e-5}


@dataclass
class Tokens:
    """Prompts of LENGTHS tokens, padded with large numbers, then STEPS tokens per request."""

    prompt: tuple[Tensor, Tensor, Tensor]  # q, k, v [B, S, heads, D]
    steps: list[tuple[Tensor, Tensor, Tensor]]

    def of(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """All queries, keys and values of a request, in float64."""
        n = LENGTHS[b]
        parts = [
            torch.cat([self.prompt[i][b, :n], *(s[i][b] for s in self.steps)]) for i in (0, 1, 2)
        ]
        return parts[0].double(), parts[1].double(), parts[2].double()


def draw(seed: int = 0, alike: float = 1.0) -> Tokens:
    """A step's query differs from the previous one by `alike`, but completely now and then."""
    g = torch.Generator().manual_seed(seed)

    def token(n: int) -> list[Tensor]:
        shapes = ((H, D), (HK, D), (HK, DV))
        return [torch.randn(len(LENGTHS), n, *s, generator=g) * 1.5 for s in shapes]

    prompt = token(max(LENGTHS))
    for t in prompt[1:]:
        for b, n in enumerate(LENGTHS):
            t[b, n:] = 1e3
    steps = [token(1) for _ in range(STEPS)]
    for i in range(1, STEPS):
        for b in range(len(LENGTHS)):
            if (i + b) % 4:
                steps[i][0][b] = steps[i - 1][0][b] + alike * steps[i][0][b]
    return Tokens(tuple(prompt), [tuple(s) for s in steps])


def new_cache(page: int | None, capacity: int = 64, heads: int = HK) -> policies.KVCache:
    batch = len(LENGTHS)
    if page is None:
        shape, table = (batch, capacity), None
    else:
        pages = capacity // page
        shape = (batch * pages, page)
        table = torch.randperm(batch * pages).int().view(batch, pages)
    return policies.KVCache(
        torch.full((*shape, heads, D), math.nan), torch.full((*shape, heads, DV), math.nan), table
    )


class TinyIndexer(torch.nn.Module):
    """Indexer with 3 heads of 8 channels, from the input of the layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.q, self.weights = torch.nn.Linear(H * D, 24), torch.nn.Linear(H * D, 3)
            self.k = torch.nn.Linear(HK * D, 8)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = q.flatten(2).to(self.k.weight), k.flatten(2).to(self.k.weight)
        return self.q(q).unflatten(2, (3, 8)), self.k(k), self.weights(q)


# Each policy with budgets smaller than the number of keys.
SPARING: list[tuple[type[policies.Policy], dict[str, Any]]] = [
    (policies.FullAttention, {}),
    (policies.TokenSelect, {"k": 8, "num_sink": 2, "num_recent": 4}),
    (policies.TidalDecode, {"budget": 8, "layer": 2}),
    (policies.TidalDecode, {"budget": 8, "layer": 2, "lists": "key"}),
    (policies.Quest, {"budget": 16, "page": 4, "layer": 5}),
    (policies.HiP, {"budget": 8, "block_q": 4, "num_sink": 2, "num_recent": 8, "layer": 5}),
    (policies.Indexer, {"topk": 8, "indexer": TinyIndexer()}),
    (policies.RecycledAttention, {"budget": 8, "stride": 3}),
    (policies.RecycledAttention, {"budget": 8, "stride": 3, "threshold": 0.5}),
    (policies.RefreshKV, {"budget": 8, "stride": 2, "kernel": 3}),
    (policies.RefreshKV, {"budget": 8, "stride": 2, "threshold": None}),
    (policies.StreamingLLM, {"num_recent": 20}),
    (policies.H2O, {}),
    (policies.Keyformer, {}),
    (policies.SnapKV, {"budget": 16, "window": 8}),
    (policies.RazorAttention, {"local": 8, "slack": 4, "retrieval": (1,)}),
]


def run(policy: policies.Policy, tokens: Tokens) -> Tensor:
    """Results of the steps, [steps, B, H, Dv]."""
    out = policy.prefill(*tokens.prompt, lengths=torch.tensor(LENGTHS, dtype=torch.int32))
    for b, n in enumerate(LENGTHS):
        q, k, v = tokens.of(b)
        for i in (0, n - 1):
            for h in range(H):
                want = attend(q[i, h], k[: i + 1, h // GROUP], v[: i + 1, h // GROUP])
                torch.testing.assert_close(out[b, i, h].double(), want, rtol=0, atol=1e-5)
    return torch.cat([policy.step(*step)[None, :, 0] for step in tokens.steps])


def assert_steps(policy: policies.Policy, tokens: Tokens, literals: Sequence[Any]) -> None:
    """Asserts that each step equals the literal reading of each request, which gets its keys so
    far."""
    for t, step in enumerate(tokens.steps):
        out = policy.step(*step)
        for b, n in enumerate(LENGTHS):
            q, k, v = tokens.of(b)
            want = literals[b].step(q[n + t], k[: n + t + 1], v[: n + t + 1])
            torch.testing.assert_close(out[b, 0].double(), want, rtol=0, atol=2e-5)


def attend(q: Tensor, k: Tensor, v: Tensor, more: Tensor | None = None) -> Tensor:
    """One query over keys [n, D], with a term added to the logits."""
    z = k @ q * SCALE
    return torch.softmax(z if more is None else z + more, 0) @ v


def best(scores: Tensor, k: int) -> list[int]:
    """Positions of the k largest scores, ascending; ties go to the first."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j))
    return sorted(order[:k])


def over(q: Tensor, k: Tensor, v: Tensor, chosen: list[list[int]]) -> Tensor:
    """All heads of a query, each over the keys chosen for it or for its KV head."""
    heads = range(len(q))
    own = chosen if len(chosen) == len(q) else [chosen[h // GROUP] for h in heads]
    return torch.stack([attend(q[h], k[own[h], h // GROUP], v[own[h], h // GROUP]) for h in heads])


def rotation(positions: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(D // 2) / (D // 2))
    return angle.cos(), angle.sin()
