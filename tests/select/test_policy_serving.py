"""Policies in serving: pages, ragged chunks, padding on either side, drafts."""

from __future__ import annotations

import pytest
import torch
from policy_inputs import (
    FLOAT32,
    HK,
    LENGTHS,
    SPARING,
    STEPS,
    TinyIndexer,
    draw,
    new_cache,
    rotation,
)
from torch import Tensor

import tokenmill as tm
from tokenmill import policies

# Tokens of each chunk. Methods that choose per chunk or query block cut there, too.
CHUNKS = {"right": ((16, 8), (21, 14)), "left": ((16, 0), (16, 16), (5, 6))}
BESIDE = {policies.TokenSelect: {"chunk": 8}}
ROTATED = [
    (policies.TokenSelect, {"k": 8, "num_sink": 2, "num_recent": 4, "rope": rotation(64)}),
    (policies.StreamingLLM, {"num_recent": 20, "rope": rotation(64)}),
]
KEEPING = [(m, o) for m, o in SPARING if hasattr(m, "extend")]
EVICTING = [(m, o) for m, o in SPARING if not hasattr(m, "extend")]


def new(method, options, page=None, capacity=64):
    heads = len(options.get("retrieval", range(HK)))
    return method(new_cache(page, capacity, heads), **options, **BESIDE.get(method, {}))


def rows(t: Tensor, first: tuple[int, ...], counts: tuple[int, ...], padding: str) -> Tensor:
    """Tokens first[b] to first[b] + counts[b] - 1 as [B, max(counts), ...], padded with ones."""
    out = torch.ones(len(counts), max(counts), *t.shape[2:])
    for b, (i, n) in enumerate(zip(first, counts, strict=True)):
        at = slice(0, n) if padding == "right" else slice(max(counts) - n, None)
        out[b, at] = t[b, i : i + n]
    return out


def test_every_policy_is_served():
    names = [getattr(policies, name) for name in policies.__all__]
    kinds = {c for c in names if isinstance(c, type) and issubclass(c, policies.Policy)}
    assert kinds - {policies.Policy} == {method for method, _ in SPARING}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("method", "options"), SPARING + ROTATED)
def test_a_request_in_company_is_as_alone(method, options, padding):
    """Batched: over pages, prompts in ragged chunks, a step of three tokens. Single: dense, the
    whole prompt, one token per step."""
    tokens = draw(alike=0.5)
    keeps = hasattr(method, "extend") or method is policies.RazorAttention
    policy = new(method, options, page=4, capacity=64 if keeps else 40)
    found: list[list[Tensor]] = [[], []]
    first = (0, 0)
    # The noise of Keyformer depends on the length of a row.
    chunks = CHUNKS["right" if method is policies.Keyformer else padding]
    for chunk in chunks:
        own = (rows(t, first, chunk, padding) for t in tokens.prompt)
        out = policy.prefill(
            *own, lengths=torch.tensor(chunk, dtype=torch.int32), more=chunk != chunks[-1],
            padding=padding,
        )  # fmt: skip
        for b, n in enumerate(chunk):
            found[b].append(out[b, :n] if padding == "right" else out[b, out.shape[1] - n :])
        first = (first[0] + chunk[0], first[1] + chunk[1])
    steps = [tuple(torch.cat(t, 1) for t in zip(*tokens.steps[:3], strict=True)), *tokens.steps[3:]]
    for step in steps:
        out = policy.step(*step)
        for b in range(2):
            found[b].append(out[b])
    for b in range(1 if method is policies.Keyformer else 2):  # noise depends on b
        n, own = LENGTHS[b], slice(b, b + 1)
        alone = new(method, options)
        alone.cache = policies.KVCache(alone.cache.k[own], alone.cache.v[own])
        want = [alone.prefill(*(t[own, :n] for t in tokens.prompt))[0]]
        want += [alone.step(*(t[own] for t in step))[0] for step in tokens.steps]
        torch.testing.assert_close(torch.cat(found[b]), torch.cat(want), **FLOAT32)


@pytest.mark.parametrize("page", [None, 4])
def test_requests_of_hip_have_the_bits_that_they_have_alone(page):
    """A prompt and a chunk, in which each request has its own number of tokens, or none."""
    options = {"budget": 8, "block_q": 4, "num_sink": 2, "num_recent": 8, "layer": 5}
    tokens, chunks = draw(), ((16, 0), (21, 22))
    batch, table = [], new_cache(page).block_table
    alone = [[] for _ in LENGTHS]
    for own in (slice(0, 2), slice(0, 1), slice(1, 2)):
        cache = new_cache(page)
        keys = [cache.k, cache.v] if page else [cache.k[own], cache.v[own]]
        cache = policies.KVCache(*keys, table[own] if page else None)
        policy, first = policies.HiP(cache, **options), (0, 0)
        for chunk in chunks:
            lengths = torch.tensor(chunk, dtype=torch.int32)[own]
            q, k, v = (rows(t, first, chunk, "right")[own] for t in tokens.prompt)
            out = policy.prefill(q, k, v, lengths=lengths)
            first = chunk
            if own == slice(0, 2):
                batch.append(out)
            else:
                alone[own.start].append(out[0])
    for chunk, out, *others in zip(chunks, batch, *alone, strict=True):
        for b, n in enumerate(chunk):
            assert torch.equal(out[b, :n], others[b][:n])


@pytest.mark.parametrize(("method", "options"), EVICTING)
def test_eviction_knows_the_end_of_a_prompt(method, options):
    tokens, policy = draw(), new(method, options)
    chunk = [t[:, :9] for t in tokens.prompt]
    policy.prefill(*chunk, more=True)
    with pytest.raises(RuntimeError, match=r"more: must be False in the last chunk of a prompt, b"):
        policy.step(*tokens.steps[0])
    policy.prefill(*chunk)
    with pytest.raises(RuntimeError, match=r"more: must be True in all chunks of a prompt but the"):
        policy.prefill(*chunk)
    with pytest.raises(RuntimeError, match=r"tokens: cannot be taken back from a policy that evic"):
        policy.rewind(1)
    policy.reset()
    policy.prefill(*chunk, more=True)
    policy.prefill(*chunk, more=True)
    with pytest.raises(RuntimeError, match=r"k: must fit into 64; got 92"):
        for _ in range(2):
            policy.prefill(*tokens.prompt, more=True)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize(("method", "options"), KEEPING)
def test_drafts_are_taken_back(method, options, page):
    """With lists for all keys, refused drafts leave no trace."""
    wide = {"k": 64, "budget": 64, "threshold": 2.0, "refresh_interval": 1, "topk": 64}
    if method is not policies.Indexer:
        options = {**options, **{name: x for name, x in wide.items() if hasattr(method, name)}}
    tokens = draw()
    ours, clean = new(method, options, page), new(method, options, page)
    full = policies.FullAttention(new_cache(None))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    for policy in (ours, clean, full):
        policy.prefill(*tokens.prompt, lengths=lengths)
    draft = [torch.cat(t, 1) for t in zip(*tokens.steps[4:8], strict=True)]
    for back in (4, [3, 3], torch.tensor([2, 1], dtype=torch.int32)):
        ours.step(*draft)
        ours.rewind(back)
        if isinstance(back, torch.Tensor):
            ours.rewind(torch.tensor([2, 3], dtype=torch.int32))
        elif back != 4:
            ours.rewind(1)
        assert ours.cache.lengths.tolist() == full.cache.lengths.tolist()
        assert ours.cache.longest == full.cache.longest
        step = tokens.steps[full.cache.longest - max(LENGTHS)]
        got, same, whole = (policy.step(*step) for policy in (ours, clean, full))
        want = same if method is policies.Indexer else whole
        torch.testing.assert_close(got, want, **FLOAT32)


def test_a_step_of_several_layers_passes_a_list_for_each_token():
    tokens = draw()
    at_once, alone = (
        policies.stack(policies.TidalDecode, [new_cache(None) for _ in range(2)], budget=6, first=0)
        for _ in range(2)
    )
    several = [torch.cat(t, 1) for t in zip(*tokens.steps, strict=True)]
    for layer in (*at_once, *alone):
        layer.prefill(*tokens.prompt)
    outs = [layer.step(*several) for layer in at_once]
    for t in range(STEPS):
        for out, layer in zip(outs, alone, strict=True):
            want = layer.step(*tokens.steps[t])
            torch.testing.assert_close(out[:, t : t + 1], want, **FLOAT32)


def test_what_the_caller_indexes_is_padded_like_its_tokens():
    tokens, indexer = draw(), TinyIndexer()
    outs = []
    for padding in ("right", "left"):
        policy, first, found = policies.Indexer(new_cache(4), topk=8), (0, 0), []
        for chunk in CHUNKS["right"]:
            q, k, v = (rows(t, first, chunk, padding) for t in tokens.prompt)
            lengths = torch.tensor(chunk, dtype=torch.int32)
            out = policy.prefill(
                q, k, v, lengths=lengths, padding=padding, index=indexer(q, k)
            )  # fmt: skip
            first = chunk
            for b, n in enumerate(chunk):
                found.append(out[b, :n] if padding == "right" else out[b, out.shape[1] - n :])
        outs.append(torch.cat(found))
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("options", "index", "rule"),
    [
        ({"topk": 0}, None, "topk: must be at least 1; got 0"),
        ({"activation": "gelu"}, None, "activation: must be 'relu' or 'none'; got 'gelu'"),
        ({"indexer": 3}, None, "indexer: must be callable or None; got 3"),
        ({"index_cache": torch.zeros(2, 9, 4)}, None,
         "index_cache: must have shape [2, 64, Di]; got [2, 9, 4]"),
        ({}, None, "index: must be given, as there is no indexer; got None"),
        ({"indexer": lambda q, k: q}, None, "indexer: must give three tensors: q [B, n, Hi, D], "),
        ({}, (torch.zeros(2, 37, 1, 4), torch.zeros(2, 37, 5), torch.zeros(2, 37, 1)),
         "index: must give three tensors: q [B, n, Hi, D], k [B, n, D] and weights [B, n, Hi] of "
         "[2, 37] tokens; got [[2, 37, 1, 4], [2, 37, 5], [2, 37, 1]]"),
    ],
)  # fmt: skip
def test_malformed_indexers(options, index, rule):
    with pytest.raises(tm.InputError) as error:
        policies.Indexer(new_cache(None), **options).prefill(*draw().prompt, index=index)
    assert str(error.value).startswith(f"tokenmill.policies.Indexer: {rule}")


def test_malformed_calls():
    tokens, cache = draw(), new_cache(None)
    k, v = tokens.prompt[1:]
    policy = policies.FullAttention(cache)
    lengths = torch.tensor(LENGTHS)
    name = "tokenmill.policies"
    for call, rule in (
        (lambda: policy.prefill(*tokens.prompt, padding="both"),
         "FullAttention: padding: must be 'right' or 'left'; got 'both'"),
        (lambda: policy.prefill(*tokens.prompt, lengths=lengths),
         "KVCache: lengths: must be int32; got int64"),
        (lambda: policy.prefill(*tokens.prompt, more=1),
         "FullAttention: more: must be a bool; got 1"),
        (lambda: policy.prefill(*tokens.prompt[:2], v[:, 1:]),
         "FullAttention: v: must have the tokens of q, 37; got [2, 36, 2, 8]"),
        (lambda: cache.rewind(1), "KVCache: tokens: must be 0 to 0; got 1"),
        (lambda: cache.rewind([0]),
         "KVCache: tokens: must be a number or one for each request, 2; got 1"),
        (lambda: cache.extend(k, v, lengths[:1].int()),
         "KVCache: lengths: must have shape [2]; got [1]"),
    ):  # fmt: skip
        with pytest.raises(tm.InputError) as error:
            call()
        assert str(error.value) == f"{name}.{rule}"
    assert cache.longest == 0
