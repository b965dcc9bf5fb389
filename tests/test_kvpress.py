"""Presses of kvpress on our operators.

kvpress 0.5.5 needs transformers below 5.3, which the other tests do not use. With it, in a separate
environment (pip install "transformers<5.3" kvpress, and this package), the tests of this file
compare with kvpress itself; without it, a stand-in of its base class suffices for scores and
selection.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

import tokenmill as tm

HERE = find_spec("kvpress") is not None
needs_kvpress = pytest.mark.skipif(not HERE, reason="kvpress is not installed")
HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 8, 30


@pytest.fixture
def presses(monkeypatch):
    """The integration, on kvpress's base class and the two functions that it imports."""
    if HERE:
        yield importlib.import_module("tokenmill.integrations.kvpress")
        return

    @dataclass
    class ScorerPress:
        compression_ratio: float = 0.0

    def queries(module, hidden_states):
        return module.q_proj(hidden_states).unflatten(-1, (HEADS, DIM)).transpose(1, 2)

    package, utils = ModuleType("kvpress"), ModuleType("kvpress.utils")
    package.ScorerPress = ScorerPress
    utils.compute_n_kept = lambda length, ratio: max(1, int(length * (1 - ratio)))
    utils.get_prerope_query_states = queries
    monkeypatch.setitem(sys.modules, "kvpress", package)
    monkeypatch.setitem(sys.modules, "kvpress.utils", utils)
    name = "tokenmill.integrations.kvpress"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    del sys.modules[name]


def layer_call(length=TOKENS):
    """A layer, its hidden states, keys, values and rotary tables, and the queries [B, H, S, D]."""
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    layer = torch.nn.Module()
    layer.q_proj = torch.nn.Linear(16, HEADS * DIM)
    layer.head_dim, layer.config = DIM, SimpleNamespace(**sizes)
    hidden = torch.randn(2, length, 16)
    keys, values = torch.randn(2, 2, KV_HEADS, length, DIM)
    angle = torch.arange(length)[:, None] * 10.0 ** -torch.arange(DIM // 2)
    cos, sin = (f(torch.cat([angle, angle], -1))[None] for f in (torch.cos, torch.sin))
    q = layer.q_proj(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    q = q * cos + torch.cat([-q[..., DIM // 2 :], q[..., : DIM // 2]], -1) * sin
    call = (layer, hidden, keys, values, None, {"position_embeddings": (cos, sin)})
    return call, q.detach()


def weights(q, keys):
    """Causal softmax [B, H, S, Sk]."""
    scores = q @ keys.repeat_interleave(HEADS // KV_HEADS, 1).mT / DIM**0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def groups(x):
    return x.unflatten(1, (KV_HEADS, -1))


def literal(name, q, keys):
    """The papers' computation, written out; the window has 5 queries."""
    if name == "SnapKVPress":
        mean = weights(q, keys)[:, :, -5:, :-5].mean(2)
        return groups(torch.nn.functional.avg_pool1d(mean, 3, 1, 1)).mean(2)
    if name == "ObservedAttentionPress":
        seen_by = torch.arange(TOKENS, 0, -1)
        return groups(weights(q, keys).sum(2) / seen_by).mean(2)
    pages = keys[:, :, :-5].split(4, dim=2)
    low, high = (torch.stack([f(p, 2) for p in pages], 2) for f in (torch.amin, torch.amax))
    low, high = (x[:, :, None, None] for x in (low, high))
    last = groups(q)[:, :, :, -5:, None]
    bound = torch.maximum(last * low, last * high).sum(-1) / DIM**0.5
    return bound.amax((2, 3)).repeat_interleave(4, -1)[..., : TOKENS - 5]


OPTIONS = {
    "SnapKVPress": {"window_size": 5, "kernel_size": 3},
    "ObservedAttentionPress": {},
    "QuestPress": {"window_size": 5, "page_size": 4},
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_those_of_the_paper(name, backend, presses):
    (layer, hidden, keys, *rest), q = layer_call()
    press = getattr(presses, name)(0.4, backend=backend, **OPTIONS[name])
    scores = press.score(layer, hidden, keys, *rest)
    expected = literal(name, q, keys)
    torch.testing.assert_close(scores[..., : expected.shape[-1]], expected)
    if window := OPTIONS[name].get("window_size"):
        assert (scores[..., -window:] > expected.amax()).all()
    k, v = press.compress(layer, hidden, keys, *rest)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :18].sort(-1).values
    best = best[..., None].expand(-1, -1, -1, DIM)
    assert torch.equal(k, keys.gather(2, best)) and torch.equal(v, rest[0].gather(2, best))


def test_streaming_ties_and_scores_that_are_no_numbers(presses):
    (layer, hidden, keys, *rest), _ = layer_call()
    k, _ = presses.StreamingLLMPress(0.5, n_sink=2).compress(layer, hidden, keys, *rest)
    assert torch.equal(k, torch.cat([keys[:, :, :2], keys[:, :, -13:]], 2))
    press = presses.ObservedAttentionPress(0.9)
    press.score = lambda *arguments: torch.full((2, KV_HEADS, TOKENS), torch.nan)
    k, _ = press.compress(layer, hidden, keys, *rest)
    assert torch.equal(k, keys[:, :, :2])
    assert presses.SnapKVPress(0.0).compress(layer, hidden, keys, *rest)[0] is keys
    keys = keys.clone()
    keys[0, 0, 3] = torch.nan  # the window stays, in this row and in the others
    k, _ = presses.SnapKVPress(0.5, 5, 3).compress(layer, hidden, keys, *rest)
    assert torch.equal(k[:, :, -5:], keys[:, :, -5:])
    for press, rule in (
        (presses.SnapKVPress(0.5), "SnapKVPress: window_size: .* 30; got 64"),
        (presses.SnapKVPress(0.5, 5, 4), "SnapKVPress: kernel_size: must be odd .*; got 4"),
        (presses.StreamingLLMPress(0.5, n_sink=-2), "n_sink: must not be negative; got -2"),
        (presses.QuestPress(0.5, window_size=0), "QuestPress: window_size: must be positive"),
        (presses.StreamingLLMPress(0.5, n_sink=30), "n_sink: must be less than .* 30; got 30"),
    ):
        with pytest.raises(tm.InputError, match=rule):
            press.compress(layer, hidden, keys, *rest)


def llama(implementation):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def compressed(press, implementation="sdpa", length=100):
    """The keys [B, Hk, kept, D] of both layers after a prompt."""
    from transformers import DynamicCache

    model, cache = llama(implementation), DynamicCache()
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
        step = model(ids[:, :1], past_key_values=cache).logits
    return [layer.keys[:, :, :-1] for layer in cache.layers], step


@needs_kvpress
@pytest.mark.parametrize("ratio", [0.3, 0.8])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SnapKVPress", {"window_size": 16}),
        ("ObservedAttentionPress", {}),
        ("StreamingLLMPress", {"n_sink": 3}),
    ],
)
def test_the_keys_are_those_of_kvpress(name, options, ratio, presses):
    import kvpress

    theirs = getattr(kvpress, name)(ratio, **options)
    expected, logits = compressed(theirs, "eager" if "Observed" in name else "sdpa")
    found, step = compressed(getattr(presses, name)(ratio, **options))
    for ours, others in zip(found, expected, strict=True):
        assert ours.shape == others.shape
        # kvpress keeps keys in the order of their scores.
        first, second = (x.sum(-1).sort(-1).values for x in (ours, others))
        torch.testing.assert_close(first, second)
    torch.testing.assert_close(step, logits, rtol=1e-4, atol=1e-4)


@needs_kvpress
def test_presses_go_into_those_that_wrap_one(presses):
    import kvpress

    for press in (
        kvpress.KeyRerotationPress(presses.StreamingLLMPress(0.5)),
        kvpress.AdaKVPress(presses.SnapKVPress(0.5, window_size=16)),
        kvpress.AdaKVPress(presses.StreamingLLMPress(0.5)),
        kvpress.ChunkKVPress(presses.QuestPress(0.5), chunk_length=10),
        kvpress.PerLayerCompressionPress(presses.ObservedAttentionPress(), [0.2, 0.5]),
    ):
        keys, step = compressed(press)
        assert step.isfinite().all() and len(keys) == 2
    with pytest.raises(tm.InputError, match="must have the 100 tokens of the call"):
        compressed(kvpress.ChunkPress(presses.ObservedAttentionPress(0.5), chunk_length=24))
