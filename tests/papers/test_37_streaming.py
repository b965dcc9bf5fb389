"""StreamingLLM as the released code runs it, and the bytes of its cache.

Released code: mit-han-lab/streaming-llm at 2e50426. Keys are cached without rotary embedding and
rotated by their place in the cache; a query is rotated by the place after the last key
(pos_shift/modify_llama.py). The cache is cut to the first start_size and the last recent_size keys
after each token in examples/eval_long_ppl.py, and before each turn, by the length of its prompt and
answer, in examples/run_streaming_llama.py (kv_cache.py). A prompt sees all of itself. The paper
says the same, without the order of the two.
"""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from policy_inputs import attend, rotation
from tensors import every_backend

import tokenmill as tm
from tokenmill import policies

H, HK, D = 2, 1, 16


def turned(x, at):
    """x [n, D] with rotary embedding at places [n]: pairs (i, i + D/2)."""
    pairs = torch.complex(x[:, : D // 2], x[:, D // 2 :])
    slow = 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    pairs = pairs * torch.polar(torch.ones(1, 1, dtype=torch.float64), at[:, None] * slow)
    return torch.cat([pairs.real, pairs.imag], 1)


class Released:
    """One request and one head: the cache is a list of tokens."""

    def __init__(self, start, recent, rope):
        self.start, self.recent, self.rope, self.held = start, recent, rope, []

    def read(self, tokens):
        """A call of the model with new tokens (q, k, v): their attention [n, D]."""
        outs = []
        for q, k, v in tokens:
            self.held.append((k, v))
            keys, values = (torch.stack(t) for t in zip(*self.held, strict=True))
            places = torch.arange(len(keys), dtype=torch.float64)
            if self.rope:
                keys, q = turned(keys, places), turned(q[None], places[-1:])[0]
            outs.append(attend(q, keys, values))
        return torch.stack(outs)

    def cut(self):
        if len(self.held) > self.start + self.recent:
            self.held = self.held[: self.start] + self.held[-self.recent :]

    def make_space(self, coming):
        if len(self.held) + coming > self.start + self.recent:
            first = len(self.held) - self.recent + coming
            self.held = self.held[: self.start] + self.held[first:]


def draw(length, backend):
    g = torch.Generator().manual_seed(0)
    near = [torch.randn(1, length, heads, D, generator=g) for heads in (H, HK, HK)]
    q, k, v = (t[0].double() for t in near)
    tokens = [[(q[i, h], k[i, 0], v[i, 0]) for i in range(length)] for h in range(H)]
    return [t.to(device_of(backend)) for t in near], tokens


def new(backend, capacity, rope, **options):
    like = torch.zeros(1, 1, HK, D, device=device_of(backend))
    cache = policies.KVCache.like(like, like, capacity)
    turns = tuple(t.to(like.device) for t in rotation(32)) if rope else None
    return policies.StreamingLLM(cache, rope=turns, backend=backend, **options)


def assert_same(got, heads, tokens):
    """Asserts that got [1, n, H, D] equals the literal reading of each head."""
    want = torch.stack([one.read(t) for one, t in zip(heads, tokens, strict=True)], 1)
    torch.testing.assert_close(got[0].cpu().double(), want, rtol=0, atol=2e-5)


@every_backend
@pytest.mark.parametrize("rope", [False, True])
def test_token_by_token(backend, rope):
    """eval_long_ppl.py: a token sees start_size + recent_size older tokens and itself."""
    start, recent, length = 2, 3, 14
    near, tokens = draw(length, backend)
    policy = new(backend, 8, rope, num_sink=start, num_recent=recent + 1)
    heads = [Released(start, recent, rope) for _ in range(H)]
    for i in range(length):
        call = policy.step if i else policy.prefill
        assert_same(call(*(t[:, i : i + 1] for t in near)), heads, [t[i : i + 1] for t in tokens])
        for one in heads:
            one.cut()
    assert len(heads[0].held) == start + recent == policy.kept.item() - 1


@every_backend
def test_turns_of_a_conversation(backend):
    """run_streaming_llama.py: room for a prompt and its answer, then the prompt at once."""
    start, recent, answer = 2, 9, 2
    near, tokens = draw(24, backend)
    policy = new(backend, 16, True, num_sink=start, num_recent=recent)
    heads = [Released(start, recent, True) for _ in range(H)]
    at = 0
    for prompt in (5, 4, 6, 1):
        policy.make_room(prompt + answer)
        for one in heads:
            one.make_space(prompt + answer)
        for n in (prompt, *[1] * answer):
            part = slice(at, at + n)
            call = policy.step if at else policy.prefill
            assert_same(call(*(t[:, part] for t in near)), heads, [t[part] for t in tokens])
            at += n
    assert len(heads[0].held) == policy.kept.item() == start + recent
    with pytest.raises(tm.InputError, match="StreamingLLM: tokens: must be at least 0; got -1"):
        policy.make_room(-1)


def test_the_cache_stays_as_small_as_it_is():
    """4 + 60 keys for any number of tokens, in slots for 65."""
    policy = policies.StreamingLLM(num_sink=4, num_recent=60)
    assert policy.slots(1) == policy.slots(64) == 65
    one = torch.ones(1, 1, 1, 8)
    cache = policies.KVCache.like(one, one, 65)
    policy = policies.StreamingLLM(cache, num_sink=4, num_recent=60)
    policy.prefill(one, one, one)
    held, read = set(), set()
    for n in range(2, 300):
        policy.step(one, one, one)
        if n > 65:
            held.add(policy.bytes_held), read.add(policy.bytes_read)
    assert cache.k.nbytes + cache.v.nbytes == 65 * 64 and max(held) <= 65 * 64
    assert read == {64 * 64}  # full attention reads 299 * 64
