"""Recycled Attention in its two versions, one request at a time.

The first version has full steps by stride or by similarity of queries; other steps attend to the
keys with most weight in the last full step and to all newer tokens. The published version,
RefreshKV, begins with the keys that the last query of the prompt weighs most, and replaces them one
by one with newer ones. Its repository (carriex/refreshkv at 3e41006) has no code yet: both follow
the papers' text.
"""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from policy_inputs import (
    DV,
    GROUP,
    HK,
    LENGTHS,
    SCALE,
    STEPS,
    D,
    assert_steps,
    attend,
    best,
    draw,
    new_cache,
    over,
)
from policy_inputs import H as HEADS
from tensors import every_backend

from tokenmill import policies


class Literal:
    """State of one request: full steps, and the keys of the other steps."""

    def __init__(self, budget, stride, threshold, heads=HK):
        self.budget, self.stride, self.threshold = budget, stride, threshold
        self.heads, self.since, self.full = heads, 0, []

    def step(self, q, k, v):
        """q [H, D]; k and v include the new token."""
        n = len(k)
        again = not self.full or self.since == self.stride
        if not again and self.threshold is not None:
            cosine = torch.cosine_similarity(q.flatten(), self.query.flatten(), 0)
            again = bool(cosine < self.threshold)
        self.full.append(again)
        if not again:
            self.since += 1
            rows = [[*kept, *range(self.last, n)] for kept in self.kept]
            return over(q, k, v, [rows[h // GROUP] for h in range(len(q))])
        self.kept = []
        for kv in range(self.heads):
            mass = torch.zeros(n, dtype=torch.float64)
            for h in range(kv * GROUP, (kv + 1) * GROUP):
                mass += torch.softmax(k[:, kv] @ q[h] * SCALE, 0)
            self.kept.append(best(mass, self.budget))
        self.query, self.last, self.since = q, n, 1
        return over(q, k, v, [list(range(n))] * len(q))


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
    if threshold == 0.7:  # full steps differ per request and from the stride
        assert schedules[0] != schedules[1] and sum(schedules[0]) < STEPS
    if threshold == 2.0:
        assert all(map(all, schedules))
    read = [
        n + STEPS if x.full[-1] else min(budget, x.last) + n + STEPS - x.last
        for n, x in zip(LENGTHS, literals, strict=True)
    ]
    assert policy.bytes_read == 4 * HK * (D + DV) * sum(read)


def test_default_budget_and_stride():
    """4096 keys, one full step in fifty."""
    tokens, steps = 4110, 52
    g = torch.Generator().manual_seed(0)
    shapes = ((HEADS, D), (HK, D), (HK, DV))
    q, k, v = (torch.randn(1, tokens + steps, *shape, generator=g) for shape in shapes)
    policy = policies.RecycledAttention(policies.KVCache.like(k, v, tokens + steps))
    lse = torch.empty(0)  # for a prompt that was read elsewhere
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


class Refresh:
    """One request of RefreshKV: its partial cache, ordered by ascending score."""

    def __init__(self, budget, stride, threshold, kernel):
        self.budget, self.stride, self.threshold, self.kernel = budget, stride, threshold, kernel
        self.steps, self.full = 0, []

    def choose(self, q, k):
        """Weighs keys k [n, HK, D] by q [H, D]."""
        side, self.query, self.partial = self.kernel // 2, q.mean(0), []
        group = len(q) // k.shape[1]
        for kv in range(k.shape[1]):
            heads = range(kv * group, (kv + 1) * group)
            p = torch.stack([torch.softmax(k[:, kv] @ q[h] * SCALE, 0) for h in heads]).amax(0)
            scores = torch.stack([p[max(j - side, 0) : j + side + 1].amax() for j in range(len(p))])
            order = sorted(range(len(p)), key=lambda j: (-scores[j].item(), j))
            self.partial.append(order[: self.budget][::-1])

    def step(self, q, k, v):
        """q [H, D]; k and v include the new token."""
        self.steps += 1
        full = self.steps % self.stride == 0
        if full and self.threshold is not None:
            full = float(torch.cosine_similarity(q.mean(0), self.query, 0)) < self.threshold
        self.full.append(full)
        newest, group = len(k) - 1, len(q) // k.shape[1]
        lists = [list(range(len(k)))] * k.shape[1]
        if not full:
            lists = [[*held, newest] for held in self.partial]
        rows = [(q[h], lists[h // group], h // group) for h in range(len(q))]
        out = torch.stack([attend(x, k[row, kv], v[row, kv]) for x, row, kv in rows])
        if full:
            self.choose(q, k)
        else:
            for held in self.partial:
                held.append(newest)
                del held[: max(len(held) - self.budget, 0)]
        return out


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize(
    ("budget", "stride", "threshold", "kernel"),
    [(6, 4, None, 7), (3, 8, None, 1), (6, 2, 0.6, 3), (0.3, 3, 0.9, 5), (100, 2, 0.6, 7)],
)
def test_refresh(page, budget, stride, threshold, kernel):
    policy = policies.RefreshKV(
        new_cache(page), budget=budget, stride=stride, threshold=threshold, kernel=kernel
    )
    tokens = draw(alike=0.7)
    policy.prefill(*tokens.prompt, lengths=torch.tensor(LENGTHS, dtype=torch.int32))
    literals = []
    for b, n in enumerate(LENGTHS):
        keys = budget if isinstance(budget, int) else int(budget * n)
        literals.append(Refresh(keys, stride, threshold, kernel))
        q, k, _ = tokens.of(b)
        literals[b].choose(q[n - 1], k[:n])
    assert_steps(policy, tokens, literals)
    schedules = [literal.full for literal in literals]
    assert any(map(any, schedules)) and not any(map(all, schedules))
    if threshold == 0.6:
        assert schedules[0] != schedules[1]
    if threshold is None:  # a step reads the budget and its own token, a full step the keys twice
        last = [n + STEPS for n in LENGTHS]
        partial = 4 * HK * (D + DV) * 2 * (min(budget, min(LENGTHS)) + 1)
        full = 4 * HK * (2 * D + DV) * sum(last)
        assert policy.bytes_read == (full if STEPS % stride == 0 else partial)


@every_backend
@pytest.mark.parametrize("published", [False, True])
def test_both_versions(backend, published):
    """Full steps by stride, and by similarity."""
    h, hk, d, prompt, steps = 2, 1, 16, 11, 5
    g = torch.Generator().manual_seed(1)
    near = [torch.randn(1, prompt + steps, heads, d, generator=g) for heads in (h, hk, hk)]
    exact = [t[0].double() for t in near]
    near = [t.to(device_of(backend)) for t in near]
    for threshold in (None, 0.2):
        cache = policies.KVCache.like(near[1], near[2], 16)
        options = {"budget": 4, "stride": 2, "threshold": threshold, "backend": backend}
        if published:
            policy = policies.RefreshKV(cache, kernel=3, **options)
            literal = Refresh(4, 2, threshold, 3)
            literal.choose(exact[0][prompt - 1], exact[1][:prompt])
        else:
            policy = policies.RecycledAttention(cache, **options)
            literal = Literal(4, 2, threshold, hk)
        policy.prefill(*(t[:, :prompt] for t in near))
        for n in range(prompt, prompt + steps):
            got = policy.step(*(t[:, n : n + 1] for t in near))
            want = literal.step(exact[0][n], exact[1][: n + 1], exact[2][: n + 1])
            torch.testing.assert_close(got[0, 0].cpu().double(), want, rtol=0, atol=2e-5)
        assert any(literal.full) and not all(literal.full)


def test_bytes_of_a_stride():
    """RefreshKV at a budget of 1/8 and one full step in ten: nine steps read 126 keys and values,
    the tenth reads all, and the keys once more: 3.8 times less than full attention. A window of 126
    keys, the paper's baseline, reads 8 times less."""
    n = 1000
    x = torch.ones(1, n, 1, 1)
    policy = policies.RefreshKV(policies.KVCache.like(x, x, n + 10), threshold=None)
    policy.begin(x, x, x, torch.empty(0))
    read = []
    for _ in range(10):
        policy.step(*(x[:, :1],) * 3)
        read.append(policy.bytes_read / 8)
    assert read == [126] * 9 + [1010 * 1.5]
    assert sum(range(n + 1, n + 11)) / sum(read) == pytest.approx(3.8, abs=0.03)
