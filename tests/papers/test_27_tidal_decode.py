"""TidalDecode at the released defaults, its correction of the cache and prompts in chunks.

Released code: DerrickYLJ/TidalDecode at d67a1bd. In src/tidal_build/modify_llama.py a selecting
layer takes, for each query head, the token_budget largest logits of all keys, including the newest;
sparse layers mask the rest. In the kernels the newest token needs no list entry: it is always
visible. The first selecting layer is 2; the second is 9 in modify_llama.py, 13 in enable_tidal.py
and the scripts.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import device_of
from tensors import each_backend, every_backend

from tokenmill import policies

LAYERS, HEADS, KEY_HEADS, D = 12, 4, 2, 8
WIDTH = HEADS * D


class Model:
    """Layers x + attention(norm(x)) with random projections; each layer's attention is a
    parameter."""

    def __init__(self, layers: int, device: str = "cpu"):
        g = torch.Generator().manual_seed(0)
        sizes = (HEADS * D, KEY_HEADS * D, KEY_HEADS * D, WIDTH)
        self.layers = [
            [(torch.randn(WIDTH, size, generator=g) / WIDTH**0.5).to(device) for size in sizes]
            for _ in range(layers)
        ]

    def __call__(self, x, attends):
        for (*into, out), attend in zip(self.layers, attends, strict=True):
            y = x / x.square().mean(-1, keepdim=True).sqrt()
            q, k, v = ((y @ w).unflatten(-1, (-1, D)) for w in into)
            x = x + attend(q, k, v).flatten(2) @ out
        return x

    def stack(self, batch=1, capacity=64, **options):
        like = torch.zeros(batch, 1, KEY_HEADS, D, device=self.layers[0][0].device)
        caches = [policies.KVCache.like(like, like, capacity) for _ in self.layers]
        return policies.stack(policies.TidalDecode, caches, **options)


class Literal:
    """Attention of the layers of one step over all keys so far, one head at a time."""

    def __init__(self, budget, first, correction, keep_newest=True):
        self.budget, self.first, self.correction = budget, first, correction
        self.keep_newest = keep_newest
        self.keys, self.values = {}, {}

    def layer(self, number):
        def attend(q, k, v):
            prompt = number not in self.keys
            self.keys[number] = k if prompt else torch.cat([self.keys[number], k], 1)
            self.values[number] = v if prompt else torch.cat([self.values[number], v], 1)
            k = self.keys[number].repeat_interleave(HEADS // KEY_HEADS, 2)
            v = self.values[number].repeat_interleave(HEADS // KEY_HEADS, 2)
            z = torch.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
            rows, tokens = z.shape[2:]
            z = z.masked_fill(torch.ones(rows, tokens).tril(tokens - rows) == 0, -torch.inf)
            if not prompt and number >= self.first:
                if number in (self.first, self.correction):
                    those = z[..., :-1] if self.keep_newest else z
                    best = those.topk(min(self.budget, those.shape[-1]), -1).indices
                    self.seen = torch.zeros_like(z, dtype=torch.bool).scatter(-1, best, True)
                    self.seen[..., -1] |= self.keep_newest
                else:
                    z = z.masked_fill(~self.seen, -torch.inf)
            return torch.einsum("bhqk,bkhd->bqhd", z.softmax(-1), v)

        return attend


@each_backend
def test_selection_at_the_defaults(backend):
    """Twelve layers: full, full, select (256 tokens per query head), sparse up to layer 8, select
    again in layer 9, sparse."""
    tokens, steps, device = 300, 3, device_of(backend)
    x = torch.randn(1, tokens + steps, WIDTH, generator=torch.Generator().manual_seed(1))
    model, exact = Model(LAYERS, device), Model(LAYERS)
    exact.layers = [[w.double() for w in layer] for layer in exact.layers]
    stack = model.stack(capacity=tokens + steps, backend=backend)
    assert (stack[0].budget, stack[0].first, stack[0].correction) == (256, 2, 9)
    literal = Literal(256, 2, 9)
    parts = [(0, tokens), *itertools.pairwise(range(tokens, tokens + steps + 1))]
    for begin, end in parts:
        attends = [layer.step if begin else layer.prefill for layer in stack]
        got = model(x[:, begin:end].to(device), attends)
        want = exact(x[:, begin:end].double(), [literal.layer(i) for i in range(LAYERS)])
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-4)


@every_backend
@pytest.mark.parametrize("keep_newest", [True, False])
def test_the_newest_token(backend, keep_newest):
    """Four layers; the second and the fourth select 3 of 9 to 11 tokens."""
    tokens, steps, device = 8, 3, device_of(backend)
    x = torch.randn(1, tokens + steps, WIDTH, generator=torch.Generator().manual_seed(4))
    model, exact = Model(4, device), Model(4)
    exact.layers = [[w.double() for w in layer] for layer in exact.layers]
    stack = model.stack(
        capacity=16, backend=backend, budget=3, first=1, correction=3, keep_newest=keep_newest
    )
    literal, left_out = Literal(3, 1, 3, keep_newest), 0
    for begin, end in [(0, tokens), *itertools.pairwise(range(tokens, tokens + steps + 1))]:
        attends = [layer.step if begin else layer.prefill for layer in stack]
        got = model(x[:, begin:end].to(device), attends)
        want = exact(x[:, begin:end].double(), [literal.layer(i) for i in range(4)])
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=1e-4)
        left_out += int((~literal.seen[..., -1]).sum()) if begin else 0
    assert (left_out > 0) is not keep_newest


@pytest.mark.parametrize(("tokens", "less"), [(10_000, 5.595), (100_000, 6.309)])
def test_keys_read(tokens, less):
    """32 layers at the defaults with lists per KV head: two full, two that read the keys once more
    to select, 28 that read 257 keys. The paper's 2.1 refers to the time of a whole step."""
    x = torch.zeros(1, tokens, 1, 1)
    caches = [policies.KVCache.like(x, x, tokens + 1) for _ in range(32)]
    stack = policies.stack(policies.TidalDecode, caches, lists="key")
    for layer in stack:
        layer.begin(x, x, x, torch.empty(0))
        layer.step(*(x[:, :1],) * 3)
    read = [layer.bytes_read / (8 * (tokens + 1)) for layer in stack]  # in the layer's cache
    few = pytest.approx(257 / (tokens + 1))
    assert read == [1, 1, 1.5, *[few] * 6, 1.5, *[few] * 22]
    assert 32 / sum(read) == pytest.approx(less, abs=0.001)


@pytest.mark.parametrize("lists", ["query", "key"])
def test_correction_makes_the_cache_that_of_full_attention(lists):
    tokens, steps = 30, 8
    x = torch.randn(2, tokens + steps, WIDTH, generator=torch.Generator().manual_seed(2))
    model = Model(5)
    options = {"batch": 2, "budget": 4, "first": 1, "correction": 3, "lists": lists}
    stack, whole = model.stack(**options), model.stack(**options)
    model(x[:, :tokens], [layer.prefill for layer in stack])
    for t in range(tokens, tokens + steps):
        model(x[:, t : t + 1], [layer.step for layer in stack])
    want = model(x, [layer.prefill for layer in whole])
    off = (stack[-1].cache.k - whole[-1].cache.k)[:, tokens : tokens + steps].abs().max()
    assert off > 0.01
    got = model(x[:, tokens:], [layer.correct for layer in stack])
    torch.testing.assert_close(got, want[:, tokens:], rtol=0, atol=1e-4)
    for one, other in zip(stack, whole, strict=True):
        assert one.cache.longest == other.cache.longest == tokens + steps
        for a, b in ((one.cache.k, other.cache.k), (one.cache.v, other.cache.v)):
            torch.testing.assert_close(
                a[:, : tokens + steps], b[:, : tokens + steps], rtol=0, atol=1e-4
            )
    rule = r"policies.KVCache: k: must have no more tokens than each request, 38; got 39"
    with pytest.raises(RuntimeError, match=rule):
        stack[0].correct(*(torch.zeros(2, 39, h, D) for h in (HEADS, KEY_HEADS, KEY_HEADS)))


def test_a_prompt_in_chunks():
    x = torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(3))
    model = Model(4)
    options = {"batch": 2, "budget": 6, "first": 1, "correction": 3}
    stack, whole = model.stack(**options), model.stack(**options)
    want = model(x[:, :38], [layer.prefill for layer in whole])
    got = [model(x[:, :16], [layer.prefill for layer in stack])]
    for begin, end in ((16, 32), (32, 38)):
        got.append(model(x[:, begin:end], [layer.extend for layer in stack]))
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=1e-4)
    for t in (38, 39):
        outs = [model(x[:, t : t + 1], [layer.step for layer in s]) for s in (stack, whole)]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-4)
