"""Prompts that are read with the attention of another policy than steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from policy_inputs import (
    DV,
    FLOAT32,
    GROUP,
    HK,
    LENGTHS,
    SCALE,
    TinyIndexer,
    draw,
    new_cache,
    rotation,
)
from torch import Tensor

import tokenmill as tm
from tokenmill import policies

SINK, RECENT = 3, 7
WINDOW = policies.StreamingLLM(num_sink=SINK, num_recent=RECENT)
HIP = {"budget": 8, "block_q": 4, "num_sink": 2, "num_recent": 8}
ALL = torch.tensor(LENGTHS, dtype=torch.int32)
# Tokens of each chunk of the two requests.
CHUNKINGS = [((37, 22),), ((16, 0), (20, 1), (1, 21)), ((1, 9), (1, 9), (35, 4))]
READ_FOR = [
    (policies.FullAttention, {}),
    (policies.Quest, {"budget": 16, "page": 4, "layer": 5}),
    (policies.Indexer, {"topk": 8, "indexer": TinyIndexer()}),
    (policies.StreamingLLM, {"num_recent": 20}),
    (policies.SnapKV, {"budget": 16, "window": 8}),
    (policies.RazorAttention, {"local": 8, "retrieval": (1,)}),
]


def new(method, options, page=None, reader=None):
    heads = len(options.get("retrieval", range(HK)))
    return method(new_cache(page, 96, heads), reader=reader, **options)


def read(policy, tokens, chunks, padding="right") -> list[Tensor]:
    """What each request's prompt gave, [n, H, Dv]."""
    found: list[list[Tensor]] = [[], []]
    first = torch.zeros(2, dtype=torch.int64)
    for number, chunk in enumerate(chunks, 1):
        width = max(chunk)
        own = []
        for t in tokens.prompt:
            rows = torch.full((2, width, *t.shape[2:]), 3.0)
            for b, n in enumerate(chunk):
                at = slice(0, n) if padding == "right" else slice(width - n, width)
                rows[b, at] = t[b, first[b] : first[b] + n]
            own.append(rows)
        lengths = torch.tensor(chunk, dtype=torch.int32)
        out = policy.prefill(*own, lengths=lengths, more=number < len(chunks), padding=padding)
        for b, n in enumerate(chunk):
            found[b].append(out[b, :n] if padding == "right" else out[b, width - n :])
        first += lengths
    return [torch.cat(rows) for rows in found]


def windowed(q: Tensor, k: Tensor, v: Tensor, softcap: float, sink: Tensor | None) -> Tensor:
    """Dense attention of a prompt [n, heads, D] in float64 to the first and the last keys."""
    n = len(q)
    k, v = (t.repeat_interleave(GROUP, 1) for t in (k, v))
    z = torch.einsum("ihd,jhd->hij", q, k) * SCALE
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    z = z.masked_fill(~((j <= i) & ((j < SINK) | (j > i - RECENT))), -torch.inf)
    if sink is not None:
        z = torch.cat([z, sink.double()[:, None, None].expand(-1, n, 1)], -1)
    return torch.einsum("hij,jhd->ihd", z.softmax(-1)[..., :n], v)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize(("method", "options"), READ_FOR)
def test_windows_with_sinks(method, options, page):
    tokens = draw()
    for softcap, sink in ((0.0, None), (2.0, torch.tensor([0.5, -1.0, 2.0, 0.0]))):
        for chunks in CHUNKINGS:
            for padding in ("right", "left"):
                beside = {"softcap": softcap, "sink": sink, **options}
                found = read(new(method, beside, page, WINDOW), tokens, chunks, padding)
                for b, n in enumerate(LENGTHS):
                    q, k, v = (t[:n] for t in tokens.of(b))
                    want = windowed(q, k, v, softcap, sink)
                    torch.testing.assert_close(found[b].double(), want, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_windows_in_16_bits(dtype):
    tokens = draw()
    q, k, v = (t[1:, :22].to(dtype) for t in tokens.prompt)
    cache = policies.KVCache(k.new_zeros(1, 30, HK, k.shape[3]), v.new_zeros(1, 30, HK, DV))
    out = policies.FullAttention(cache, reader=WINDOW).prefill(q, k, v)
    want = windowed(q[0].double(), k[0].double(), v[0].double(), 0.0, None)
    floor = 4 * torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(out[0].double(), want, rtol=0, atol=floor)


def test_a_window_costs_what_it_sees():
    """Four times the tokens take four times the operations, not sixteen times."""
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for tokens in (512, 2048):
        q, k, v = torch.zeros(3, 1, tokens, 2, 16)
        policy = policies.FullAttention(policies.KVCache(k.clone(), v.clone()), reader=WINDOW)
        with FlopCounterMode(display=False) as counter:
            policy.prefill(q, k, v)
        found.append(counter.get_total_flops())
    assert 0 < found[1] <= 4.01 * found[0]


def test_hip_reads_and_quest_decodes():
    """The reader knows the layer: its first three are dense."""
    tokens, reader = draw(), policies.HiP(**HIP)
    caches = [new_cache(None) for _ in range(5)]
    layers = policies.stack(policies.Quest, caches, budget=16, page=4, reader=reader)
    q, k, v = tokens.prompt
    full, lse = tm.attention(q, k, v, causal=True, return_lse=True)
    sparse = tm.hip_attention(q, k, v, seqlens_q=ALL, seqlens_k=ALL, **HIP)
    for number, layer in enumerate(layers):
        out = layer.prefill(q, k, v, lengths=ALL)
        alone = policies.Quest(new_cache(None), layer=number, budget=16, page=4)
        alone.begin(q, k, v, lse, lengths=ALL)
        for b, n in enumerate(LENGTHS):
            assert torch.equal(out[b, :n], (full if number < 3 else sparse)[b, :n])
        for step in tokens.steps:
            assert torch.equal(layer.step(*step), alone.step(*step))


@pytest.mark.parametrize("reader", [policies.HiP(**HIP, dense_layers=0), policies.TokenSelect(
    k=8, num_sink=2, num_recent=4, chunk=8), policies.FullAttention()],
    ids=lambda p: type(p).__name__)  # fmt: skip
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize(("method", "options"), READ_FOR)
def test_a_prompt_is_read_as_by_the_reader_itself(method, options, page, reader):
    """In ragged chunks of its blocks, by a policy over any cache, and with a sink."""
    tokens, sink = draw(), torch.tensor([0.5, -1.0, 2.0, 0.0])
    chunks = ((16, 8), (21, 14))
    known = ("k", "num_sink", "num_recent", "chunk", "budget", "block_q", "dense_layers")
    own = {name: getattr(reader, name) for name in known if hasattr(reader, name)}
    alone = new(type(reader), own | {"sink": sink})
    want = read(alone, tokens, [LENGTHS])
    found = read(new(method, options | {"sink": sink}, page, reader), tokens, chunks)
    for b in range(2):
        torch.testing.assert_close(found[b], want[b], **FLOAT32)


@pytest.mark.parametrize("chunks", CHUNKINGS[:2])
@pytest.mark.parametrize(
    ("method", "options"),
    [(policies.H2O, {"heavy": 6, "recent": 4}), (policies.SnapKV, {"budget": 12, "window": 4}),
     (policies.Keyformer, {"budget": 9}), (policies.RazorAttention, {"local": 8, "retrieval": ()})],
)  # fmt: skip
def test_eviction_scores_are_of_full_attention(method, options, chunks):
    """What stays does not depend on the reader, so steps are the same."""
    tokens = draw()
    ours, plain = new(method, options, reader=WINDOW), new(method, options)
    for policy in (ours, plain):
        read(policy, tokens, chunks)
    for step in tokens.steps:
        torch.testing.assert_close(ours.step(*step), plain.step(*step), **FLOAT32)


def test_a_reader_has_keys_as_streaming_llm_rotates_them():
    rope = rotation(64)
    tokens, ours = draw(), policies.StreamingLLM(new_cache(None), rope=rope, reader=WINDOW)
    q, k, v = tokens.prompt
    at = torch.arange(q.shape[1])
    turned = [policies.rotation.rotated(x, rope, at, False) for x in (q, k)]
    given = policies.FullAttention(new_cache(None), reader=WINDOW).prefill(*turned, v, lengths=ALL)
    torch.testing.assert_close(ours.prefill(*tokens.prompt, lengths=ALL), given)
    chunked = policies.StreamingLLM(new_cache(None), rope=rope, reader=WINDOW)
    found = read(chunked, tokens, CHUNKINGS[1])
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(found[b], given[b, :n], **FLOAT32)


def test_a_reader_shows():
    policy = policies.Quest(reader=policies.HiP(budget=64))
    assert "reader=HiP(" in str(policy) and "budget=64" in str(policy)
    assert str(policy) != str(policies.Quest()) != str(policies.Quest(reader=policies.HiP()))


def test_readers_are_those_that_the_error_names():
    named = [getattr(policies, name) for name in policies.__all__]
    found = {c.__name__ for c in named if getattr(c, "_READS", False)}
    assert found == {"FullAttention", "HiP", "StreamingLLM", "TokenSelect"}
    assert all(name in RULE for name in found)


RULE = "must be FullAttention, HiP, StreamingLLM or TokenSelect, as only these read prompts; got"


@pytest.mark.parametrize(
    ("reader", "rule"),
    [
        (policies.Quest(), f"{RULE} 'Quest'"),
        (policies.Indexer(), f"{RULE} 'Indexer'"),
        (policies.HiP, f"{RULE} <class"),
        ("HiP", f"{RULE} 'HiP'"),
        (policies.HiP(new_cache(None)),
         "must leave cache to the policy that it reads for; got 'KVCache'"),
        (policies.HiP(layer=5), "must leave layer to the policy that it reads for; got 5"),
        (policies.HiP(scale=0.5), "must leave scale to the policy that it reads for; got 0.5"),
        (policies.HiP(sink=torch.zeros(4)),
         "must leave sink to the policy that it reads for; got 'Tensor'"),
        (policies.HiP(reader=WINDOW),
         "must leave reader to the policy that it reads for; got 'StreamingLLM'"),
        (policies.StreamingLLM(rope=rotation(64)),
         "must have no rope, as it is given keys as they are attended to; got 'tuple'"),
    ],
)  # fmt: skip
def test_what_cannot_read_is_refused(reader, rule):
    with pytest.raises(tm.InputError) as error:
        policies.SnapKV(new_cache(None), reader=reader)
    assert str(error.value).startswith(f"tokenmill.policies.SnapKV: reader: {rule}")


def test_unrotated_keys_have_no_reader():
    rule = r"^tokenmill.policies.TokenSelect: reader: must be None with rope, .*; got 'HiP'"
    with pytest.raises(tm.InputError, match=rule):
        policies.TokenSelect(new_cache(None), rope=rotation(64), reader=policies.HiP())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("chunks", CHUNKINGS[:2])
@pytest.mark.parametrize("reader", [policies.FullAttention(), policies.TokenSelect(k=64)])
def test_memory_without_tokens_may_hold_anything(reader, chunks, dtype):
    """A new cache is uninitialised memory. In float8 a later chunk sees the rounded keys, as under
    the reader itself."""
    tokens = draw()
    empty = new_cache(None)
    caches = [
        policies.KVCache(*(torch.full_like(t, torch.nan).to(dtype) for t in (empty.k, empty.v)))
        for _ in range(2)
    ]
    policy = policies.Quest(caches[0], budget=16, page=4, reader=reader)
    alone = dataclasses.replace(reader, cache=caches[1])
    for mine, theirs in zip(read(policy, tokens, chunks), read(alone, tokens, chunks), strict=True):
        assert not mine.isnan().any()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reader", [WINDOW, policies.HiP()])
def test_a_reader_that_reads_no_float8_is_refused(reader):
    cache = policies.KVCache(*torch.zeros(2, 1, 8, 1, 16, dtype=torch.float8_e4m3fn))
    rule = rf"^tokenmill.policies.Quest: cache: .* here {type(reader).__name__}; got float8"
    with pytest.raises(tm.InputError, match=rule):
        policies.Quest(cache, reader=reader)
