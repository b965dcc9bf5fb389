"""Recycled Attention: full steps by stride or by the likeness of queries, one request at a time."""

from __future__ import annotations

import pytest
import torch
from policy_inputs import (
    DV,
    GROUP,
    HK,
    LENGTHS,
    SCALE,
    STEPS,
    D,
    assert_steps,
    best,
    draw,
    new_cache,
    over,
)
from policy_inputs import H as HEADS

from tokenmill import policies


class Literal:
    """Of one request: which steps are full, and what the others attend to."""

    def __init__(self, budget, stride, threshold):
        self.budget, self.stride, self.threshold = budget, stride, threshold
        self.since, self.full = 0, []

    def step(self, q, k, v):
        """q [H, D]; k and v with the new token."""
        n = len(k)
        again = not self.full or self.since == self.stride
        if not again and self.threshold is not None:
            cosine = torch.cosine_similarity(q.flatten(), self.query.flatten(), 0)
            again = bool(cosine < self.threshold)
        self.full.append(again)
        if not again:
            self.since += 1
            return over(q, k, v, [[*kept, *range(self.last, n)] for kept in self.kept])
        self.kept = []
        for kv in range(HK):
            mass = torch.zeros(n, dtype=torch.float64)
            for h in range(kv * GROUP, (kv + 1) * GROUP):
                mass += torch.softmax(k[:, kv] @ q[h] * SCALE, 0)
            self.kept.append(best(mass, self.budget))
        self.query, self.last, self.since = q, n, 1
        return over(q, k, v, [list(range(n))] * HK)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize(("stride", "threshold"), [(4, None), (3, 0.7), (50, 0.7), (50, 2.0)])
@pytest.mark.parametrize("budget", [6, 100])
def test_schedules(page, stride, threshold, budget):
    policy = policies.RecycledAttention(
        new_cache(page), budget=budget, stride=stride, threshold=threshold
    )
    tokens = draw(alike=0.5)
    policy.prefill(*tokens.prompt, lengths=torch.tensor(LENGTHS, dtype=torch.int32))
    literals = [Literal(budget, stride, threshold) for _ in LENGTHS]
    assert_steps(policy, tokens, literals)
    schedules = [literal.full for literal in literals]
    if threshold == 0.7:  # each request has its own, which is not that of the stride
        assert schedules[0] != schedules[1] and sum(schedules[0]) < STEPS
    if threshold == 2.0:
        assert all(map(all, schedules))
    read = [
        n + STEPS if x.full[-1] else min(budget, x.last) + n + STEPS - x.last
        for n, x in zip(LENGTHS, literals, strict=True)
    ]
    assert policy.bytes_read == 4 * HK * (D + DV) * sum(read)


def test_default_budget_and_stride():
    """4096 keys, a full step in fifty."""
    tokens, steps = 4110, 52
    g = torch.Generator().manual_seed(0)
    shapes = ((HEADS, D), (HK, D), (HK, DV))
    q, k, v = (torch.randn(1, tokens + steps, *shape, generator=g) for shape in shapes)
    policy = policies.RecycledAttention(policies.KVCache.like(k, v, tokens + steps))
    lse = torch.empty(0)  # of a prompt that was read elsewhere
    policy.begin(q[:, :tokens], k[:, :tokens], v[:, :tokens], lse)
    literal = Literal(4096, 50, None)
    exact = [t[0].double() for t in (q, k, v)]
    for n in range(tokens, tokens + steps):
        got = policy.step(*(t[:, n : n + 1] for t in (q, k, v)))
        if n in (tokens, tokens + 50) or n > tokens + 48:
            want = literal.step(exact[0][n], exact[1][: n + 1], exact[2][: n + 1])
            torch.testing.assert_close(got[0, 0].double(), want, rtol=0, atol=2e-5)
        else:
            literal.since += 1
            literal.full.append(False)
    assert [i for i, full in enumerate(literal.full) if full] == [0, 50]


def test_tokens_of_a_chunk_are_new_ones():
    tokens = draw()
    n = min(LENGTHS)
    for threshold in (None, 0.0):
        ours, full = (
            policies.RecycledAttention(new_cache(None), budget=64, threshold=threshold),
            policies.FullAttention(new_cache(None)),
        )
        for policy in (ours, full):
            policy.prefill(*(t[:, :n] for t in tokens.prompt))
            policy.step(*tokens.steps[0])
            policy.extend(*(torch.cat(t, 1) for t in zip(*tokens.steps[1:5], strict=True)))
        got, want = (policy.step(*tokens.steps[5]) for policy in (ours, full))
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
