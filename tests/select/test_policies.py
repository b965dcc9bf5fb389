"""Every policy against a slow reading of its paper: one request, one step, one head at a time."""

from __future__ import annotations

import copy
import math

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
    H,
    TinyIndexer,
    attend,
    best,
    draw,
    new_cache,
    over,
    rotation,
    run,
)
from torch import Tensor

import tokenmill as tm
from tokenmill import policies


def check(policy, tokens, literal):
    """literal(q, k, v, n): results [H, Dv] of the steps of a request with a prompt of n tokens."""
    out = run(policy, tokens)
    for b, n in enumerate(LENGTHS):
        want = torch.stack(list(literal(*tokens.of(b), n)))
        torch.testing.assert_close(out[:, b].double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("vote_scale", [None, 1.0])
def test_token_select(page, vote_scale):
    k_best, sink, recent, threshold = 5, 2, 4, 0.9
    served = []

    def literal(q, k, v, n):
        reference, chosen = None, []
        for t in range(STEPS):
            now, x = n + t + 1, q[n + t]
            like = reference is not None and torch.cosine_similarity(
                x.flatten(), reference.flatten(), 0
            )
            served.append(reference is not None and bool(like >= threshold))
            if not served[-1]:
                votes = torch.zeros(now - recent - sink, dtype=torch.float64)
                for h in range(H):
                    z = k[sink : now - recent, h // GROUP] @ x[h] * (vote_scale or SCALE)
                    votes += torch.softmax(z, 0)
                chosen, reference = [sink + j for j in best(votes, k_best)], x
            every = sorted({*range(sink), *chosen, *range(now - recent, now)})
            yield over(x, k, v, [every] * HK)

    policy = policies.TokenSelect(
        new_cache(page),
        k=k_best,
        num_sink=sink,
        num_recent=recent,
        threshold=threshold,
        vote_scale=vote_scale,
    )
    check(policy, draw(alike=0.35), literal)
    assert any(served) and not all(served)
    selected = [n + STEPS for n, i in zip(LENGTHS, (STEPS - 1, -1), strict=True) if not served[i]]
    listed = len(LENGTHS) * (k_best + sink + recent) * (D + DV)
    assert policy.bytes_read == 4 * HK * (sum(selected) * D + listed)


@pytest.mark.parametrize("page", [None, 8])
def test_quest(page):
    size, budget = 4, 16

    def literal(q, k, v, n):
        for t in range(STEPS):
            now, x = n + t + 1, q[n + t]
            pages = [range(i, min(i + size, now)) for i in range(0, now, size)]
            chosen = []
            for kv in range(HK):
                bounds = torch.full((len(pages),), -math.inf)
                for i, page_ in enumerate(pages):
                    low, high = (f(k[list(page_), kv], 0) for f in (torch.amin, torch.amax))
                    for h in range(kv * GROUP, (kv + 1) * GROUP):
                        bound = torch.maximum(x[h] * low, x[h] * high).sum()
                        bounds[i] = max(bounds[i], bound)
                bounds[-1] = math.inf
                picked = best(bounds, max(3, budget // size))
                chosen.append([j for i in picked for j in pages[i]])
            yield over(x, k, v, chosen)

    check(policies.Quest(new_cache(page), layer=2, budget=budget, page=size), draw(), literal)
    dense = policies.Quest(new_cache(page), layer=1, budget=budget, page=size)
    full = policies.FullAttention(new_cache(page))
    assert torch.equal(run(dense, draw()), run(full, draw()))


@pytest.mark.parametrize("page", [None, 2])
@pytest.mark.parametrize("lists", ["query", "key"])
def test_tidal_decode(page, lists):
    budget, layers = 6, 6
    tokens = [draw(seed) for seed in range(layers)]
    model = policies.stack(
        policies.TidalDecode, [new_cache(page) for _ in range(layers)], budget=budget, first=1,
        correction=4, lists=lists,
    )  # fmt: skip
    for layer, its in zip(model, tokens, strict=True):
        layer.prefill(*its.prompt, lengths=torch.tensor(LENGTHS, dtype=torch.int32))
    for t in range(STEPS):
        out = [layer.step(*its.steps[t]) for layer, its in zip(model, tokens, strict=True)]
        for b, n in enumerate(LENGTHS):
            now, chosen = n + t + 1, [list(range(n + t + 1))] * HK
            for layer in range(layers):
                q, k, v = tokens[layer].of(b)
                x, full = q[n + t], layer in (0, 1, 4)
                everything = [list(range(now))] * HK
                want = over(x, k, v, everything if full else chosen)
                torch.testing.assert_close(out[layer][b, 0].double(), want, rtol=0, atol=2e-5)
                if layer in (1, 4):
                    logits = [k[: now - 1, h // GROUP] @ x[h] for h in range(H)]
                    if lists == "key":
                        logits = torch.stack(logits).unflatten(0, (HK, GROUP)).amax(1)
                    chosen = [[*best(each, budget), now - 1] for each in logits]


@pytest.mark.parametrize("page", [None, 16])
def test_recycled_attention(page):
    budget, stride = 6, 4

    def literal(q, k, v, n):
        for t in range(STEPS):
            now, x = n + t + 1, q[n + t]
            if t % stride == 0:
                yield over(x, k, v, [list(range(now))] * HK)
                kept = []
                for kv in range(HK):
                    mass = torch.zeros(now, dtype=torch.float64)
                    for h in range(kv * GROUP, (kv + 1) * GROUP):
                        mass += torch.softmax(k[:now, kv] @ x[h] * SCALE, 0)
                    kept.append(best(mass, budget))
                last = now
            else:
                yield over(x, k, v, [[*each, *range(last, now)] for each in kept])

    check(
        policies.RecycledAttention(new_cache(page), budget=budget, stride=stride), draw(), literal
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("page", [None, 4])
def test_indexer(page, given):
    """Prompts too: each query attends to the keys that the indexer scores highest for it."""
    topk, indexer, tokens = 6, TinyIndexer(), draw()
    exact = copy.deepcopy(indexer).double()
    policy = policies.Indexer(
        new_cache(page), topk=topk, indexer=None if given else indexer,
        index_cache=torch.full((*new_cache(page).k.shape[:2], 8), math.nan) if given else None,
    )  # fmt: skip

    def beside(q, k):
        return {"index": indexer(q, k)} if given else {}

    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    outs = [policy.prefill(*tokens.prompt, lengths=lengths, **beside(*tokens.prompt[:2]))]
    outs += [policy.step(*step, **beside(*step[:2])) for step in tokens.steps]
    for b, n in enumerate(LENGTHS):
        q, k, v = tokens.of(b)
        index_q, index_k, weights = (t[0] for t in exact(q[None], k[None]))
        scores = (weights[..., None] * (index_q @ index_k.T[None]).relu()).sum(1)
        got = torch.cat([outs[0][b, :n], *(out[b] for out in outs[1:])]).double()
        for i in range(n + STEPS):
            chosen = best(scores[i, : i + 1], topk)
            want = over(q[i], k, v, [chosen] * HK)
            torch.testing.assert_close(got[i], want, rtol=0, atol=2e-5)
    listed = len(LENGTHS) * topk * HK * (D + DV)
    assert policy.bytes_read == 4 * (listed + (sum(LENGTHS) + 2 * STEPS) * 8)


def turned(x: Tensor, position: int) -> Tensor:
    """x [D] with its rotary embedding: pairs (i, i + D/2) as complex numbers."""
    pair = torch.complex(x[: D // 2], x[D // 2 :])
    angle = position * 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    pair = pair * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pair.real, pair.imag])


@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("capacity", [40, 64])
@pytest.mark.parametrize("rope", [False, True])
def test_streaming_llm(page, capacity, rope):
    sink, recent = 3, 7
    tokens = draw()
    policy = policies.StreamingLLM(
        new_cache(page, capacity), num_sink=sink, num_recent=recent,
        rope=rotation(64) if rope else None,
    )  # fmt: skip
    out = policy.prefill(*tokens.prompt, lengths=torch.tensor(LENGTHS, dtype=torch.int32))
    turn = turned if rope else (lambda x, position: x)
    for b, n in enumerate(LENGTHS):
        q, k, v = tokens.of(b)
        for h in range(H):
            keys = torch.stack([turn(k[j, h // GROUP], j) for j in range(n)])
            want = attend(turn(q[n - 1, h], n - 1), keys, v[:n, h // GROUP])
            torch.testing.assert_close(out[b, n - 1, h].double(), want, rtol=0, atol=2e-5)
    for t, step in enumerate(tokens.steps):
        out = policy.step(*step)
        for b, n in enumerate(LENGTHS):
            q, k, v = tokens.of(b)
            row = [*range(sink), *range(n + t + 1 - recent, n + t + 1)]
            for h in range(H):
                keys = torch.stack([turn(k[j, h // GROUP], place) for place, j in enumerate(row)])
                want = attend(turn(q[n + t, h], len(row) - 1), keys, v[row, h // GROUP])
                torch.testing.assert_close(out[b, 0, h].double(), want, rtol=0, atol=2e-5)
    assert policy.kept.tolist() == [sink + recent] * 2
    assert policy.bytes_read == 2 * (sink + recent) * HK * (D + DV) * 4


def evict(scores: Tensor, slots: list[int], budget: int, recent: int) -> list[int]:
    """Remaining slots: the last ones, and the best of the others."""
    old, last = slots[: len(slots) - recent], slots[len(slots) - recent :]
    keep = best(scores[old], budget - len(last))
    return [old[j] for j in keep] + last


@pytest.mark.parametrize("capacity", [38, 64])
@pytest.mark.parametrize(("heavy", "recent"), [(0.2, 0.3), (5, 3), (12, 0.1)])
def test_h2o(heavy, recent, capacity):
    def literal(q, k, v, n):
        last = max(recent if isinstance(recent, int) else int(recent * n), 1)
        budget = last + (heavy if isinstance(heavy, int) else int(heavy * n))
        scores = torch.zeros(HK, n + STEPS, dtype=torch.float64)
        for h in range(H):
            for i in range(n):
                p = torch.softmax(k[: i + 1, h // GROUP] @ q[i, h] * SCALE, 0)
                scores[h // GROUP, : i + 1] += p / GROUP
        left = [evict(scores[kv], list(range(n)), budget, last) for kv in range(HK)]
        for t in range(STEPS):
            left = [[*slots, n + t] for slots in left]
            yield over(q[n + t], k, v, left)
            for h in range(H):
                kv = h // GROUP
                p = torch.softmax(k[left[kv], kv] @ q[n + t, h] * SCALE, 0)
                scores[kv, left[kv]] += p / GROUP
            left = [evict(scores[kv], left[kv], budget, last) for kv in range(HK)]

    policy = policies.H2O(new_cache(None, capacity), heavy=heavy, recent=recent)
    check(policy, draw(), literal)
    budgets = [
        max(recent if isinstance(recent, int) else int(recent * n), 1)
        + (heavy if isinstance(heavy, int) else int(heavy * n))
        for n in LENGTHS
    ]
    assert policy.kept.tolist() == [[budget] * HK for budget in budgets]


@pytest.mark.parametrize(("budget", "recent"), [(0.6, 0.3), (8, 4)])
def test_keyformer(budget, recent):
    seed, tau, rise = 7, 1.0, 0.5

    def noisy(q, k, h, b, i, t, columns):
        """Softmax with the noise of slot j and query position i."""
        g = tm.select.gumbel_noise(
            seed + t, len(LENGTHS), H, 1, columns, first_row=i, dtype=torch.float64
        )[b, h, 0]
        return torch.softmax((k @ q * SCALE + g[: len(k)]) / (tau + rise * t), 0)

    def literal_of(b):
        def literal(q, k, v, n):
            total = budget if isinstance(budget, int) else int(budget * n)
            last = recent if isinstance(recent, int) else int(recent * total)
            scores = torch.zeros(HK, n + STEPS, dtype=torch.float64)
            for h in range(H):
                for i in range(n):
                    p = noisy(q[i, h], k[: i + 1, h // GROUP], h, b, i, 0, n)
                    scores[h // GROUP, : i + 1] += p / GROUP
            left = [evict(scores[kv], list(range(n)), total, last) for kv in range(HK)]
            for t in range(STEPS):
                left = [[*slots, n + t] for slots in left]
                yield over(q[n + t], k, v, left)
                for h in range(H):
                    kv = h // GROUP
                    keys, place = k[left[kv], kv], len(left[kv]) - 1
                    p = noisy(q[n + t, h], keys, h, b, place, t + 1, len(keys))
                    scores[kv, left[kv]] += p / GROUP
                left = [evict(scores[kv], left[kv], total, last) for kv in range(HK)]

        return literal

    tokens = draw()
    policy = policies.Keyformer(
        new_cache(None), budget=budget, recent=recent, tau=tau, tau_step=rise, seed=seed
    )
    out = run(policy, tokens)
    for b, n in enumerate(LENGTHS):
        want = torch.stack(list(literal_of(b)(*tokens.of(b), n)))
        torch.testing.assert_close(out[:, b].double(), want, rtol=0, atol=2e-5)


def test_snapkv():
    budget, window, kernel = 12, 4, 5

    def literal(q, k, v, n):
        left = []
        for kv in range(HK):
            votes = torch.zeros(n - window, dtype=torch.float64)
            for h in range(kv * GROUP, (kv + 1) * GROUP):
                for i in range(n - window, n):
                    p = torch.softmax(k[: i + 1, kv] @ q[i, h] * SCALE, 0)
                    votes += p[: n - window] / (window * GROUP)
            half = kernel // 2
            pooled = torch.stack([
                votes[max(j - half, 0) : j + half + 1].sum() / kernel for j in range(n - window)
            ])  # fmt: skip
            left.append([*best(pooled, budget - window), *range(n - window, n)])
        for t in range(STEPS):
            left = [[*slots, n + t] for slots in left]
            yield over(q[n + t], k, v, left)

    policy = policies.SnapKV(new_cache(None), budget=budget, window=window, kernel=kernel)
    check(policy, draw(), literal)
    assert policy.kept.tolist() == [budget + STEPS] * 2


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("retrieval", [(), (1,), (0, 1)])
@pytest.mark.parametrize("slack", [1, 64])
@pytest.mark.parametrize("local", [5, 25])
def test_razor_attention(page, retrieval, slack, local):
    sink, share = 2, 5

    def literal(q, k, v, n):
        last = max(local, n // share)
        for t in range(STEPS):
            now, rows = n + t + 1, []
            for h in range(H):
                x, keys, values = q[n + t, h], k[:now, h // GROUP], v[:now, h // GROUP]
                if h // GROUP in retrieval or now <= sink + last:
                    rows.append(attend(x, keys, values))
                    continue
                gone = slice(sink, now - last)
                stay = [*range(sink), *range(now - last, now)]
                mean = keys[gone].mean(0, keepdim=True), values[gone].mean(0, keepdim=True)
                count = torch.zeros(len(stay) + 1, dtype=torch.float64)
                count[-1] = math.log(now - last - sink)
                keys, values = torch.cat([keys[stay], mean[0]]), torch.cat([values[stay], mean[1]])
                rows.append(attend(x, keys, values, count))
            yield torch.stack(rows)

    policy = policies.RazorAttention(
        new_cache(page, heads=len(retrieval)), retrieval=retrieval, num_sink=sink, local=local,
        share=share, slack=slack,
    )  # fmt: skip
    check(policy, draw(), literal)
    for b, n in enumerate(LENGTHS):
        short = min(sink + max(local, n // share), n + STEPS)
        want = [n + STEPS if h in retrieval else short for h in range(HK)]
        assert policy.kept[b].tolist() == want
