"""Properties of every policy."""

from __future__ import annotations

import dataclasses
import doctest
import sys

import pytest
import torch
from policy_inputs import (
    DV,
    FLOAT32,
    HK,
    LENGTHS,
    SPARING,
    D,
    H,
    TinyIndexer,
    Tokens,
    draw,
    new_cache,
    rotation,
    run,
)

import tokenmill as tm
from tokenmill import policies

GENEROUS = [
    (policies.FullAttention, {}),
    (policies.TokenSelect, {"k": 64, "num_sink": 0, "num_recent": 1, "threshold": 2.0}),
    (policies.Quest, {"budget": 64, "layer": 5}),
    (policies.HiP, {"budget": 64, "num_recent": 8, "refresh_interval": 1, "layer": 5}),
    (policies.Indexer, {"topk": 64, "indexer": TinyIndexer()}),
    (policies.RecycledAttention, {"budget": 64, "stride": 3}),
    (policies.RefreshKV, {"budget": 64}),
    (policies.StreamingLLM, {"num_sink": 4, "num_recent": 60}),
    (policies.H2O, {"heavy": 64}),
    (policies.Keyformer, {"budget": 64}),
    (policies.SnapKV, {"budget": 64, "window": 8}),
    (policies.RazorAttention, {"local": 64, "retrieval": (1,)}),
]


@pytest.mark.parametrize(("method", "options"), GENEROUS)
def test_a_budget_for_all_keys_is_full_attention(method, options):
    heads = len(options.get("retrieval", range(HK)))
    out = run(method(new_cache(None, heads=heads), **options), draw())
    full = run(policies.FullAttention(new_cache(None)), draw())
    torch.testing.assert_close(out, full, **FLOAT32)


@pytest.mark.parametrize(("method", "options"), [case for case in SPARING if case[1]])
def test_numbers_fit_lengths(method, options):
    """A length divided by 2^62 used to be divided by 0 in int32."""
    for name, value in options.items():
        if isinstance(value, int):
            with pytest.raises(
                RuntimeError, match=rf"{name}: must be at most (2147483647|65536); got \d+"
            ):
                method(new_cache(None), **{**options, name: 2**62})


KEEPING = [(method, options) for method, options in SPARING if hasattr(method, "extend")]


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize(("method", "options"), KEEPING)
def test_chunks_are_attended_to_like_prompts(method, options, page):
    """With lists for all keys a chunk gets full attention, and later steps see its tokens."""
    wide = {"k": 64, "budget": 64, "threshold": 2.0, "refresh_interval": 1, "topk": 64}
    options = {**options, **{name: x for name, x in wide.items() if hasattr(method, name)}}
    tokens, n = draw(), min(LENGTHS)
    ours, full = method(new_cache(page), **options), policies.FullAttention(new_cache(page))
    for policy in (ours, full):
        policy.prefill(*(t[:, : n - 7] for t in tokens.prompt))
    for i in (n - 7, n - 3):
        chunk = [t[:, i : min(i + 4, n)] for t in tokens.prompt]
        torch.testing.assert_close(ours.extend(*chunk), full.extend(*chunk), **FLOAT32)
    for step in tokens.steps:
        torch.testing.assert_close(ours.step(*step), full.step(*step), **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("method", "options"), SPARING)
def test_16_bits(method, options, dtype):
    """Keys whose products are integers: every dtype selects the same ones."""
    tokens = draw()
    whole = Tokens(
        tuple(t.round() for t in tokens.prompt), [tuple(t.round() for t in s) for s in tokens.steps]
    )
    heads = len(options.get("retrieval", range(HK)))

    def result(dtype):
        cache = new_cache(None, heads=heads)
        cache = policies.KVCache(cache.k.to(dtype), cache.v.to(dtype))
        policy = method(cache, scale=0.25, **options)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        policy.prefill(*(t.to(dtype) for t in whole.prompt), lengths=lengths)
        return torch.cat([policy.step(*(t.to(dtype) for t in step)) for step in whole.steps])

    want = result(torch.float32)
    floor = 4 * torch.finfo(dtype).eps * want.abs().max().item()
    torch.testing.assert_close(result(dtype).float(), want, rtol=0, atol=floor)


def test_wrong_options_are_refused():
    prompt = draw().prompt
    with pytest.raises(RuntimeError, match=r"policies.SnapKV: kernel: must be odd; got 4"):
        policies.SnapKV(new_cache(None), kernel=4).prefill(*prompt)
    policy = policies.StreamingLLM(new_cache(None), rope=rotation(8))
    with pytest.raises(RuntimeError, match=r"policies.StreamingLLM: rope: must have a position"):
        policy.prefill(*prompt)
    few = policies.TokenSelect(new_cache(None), k=8, num_sink=2, num_recent=4, rope=rotation(8))
    rule = r"policies.TokenSelect: rope: must have a position for each place of a list, 522; got"
    with pytest.raises(RuntimeError, match=rule):
        few.prefill(*prompt)
    with pytest.raises(RuntimeError, match=r"policies.TokenSelect: kernel_size: must be odd; got"):
        policies.TokenSelect(new_cache(None), kernel_size=2).prefill(*prompt)
    rule = r"policies.TidalDecode: lists: must be 'query' or 'key'; got 'head'"
    with pytest.raises(RuntimeError, match=rule):
        policies.TidalDecode(new_cache(None), lists="head")
    rule = r"policies.HiP: refresh_interval: must be at most num_recent, 4; got 8"
    with pytest.raises(RuntimeError, match=rule):
        policies.HiP(new_cache(None), num_recent=4)
    with pytest.raises(RuntimeError, match=r"policies.HiP: budget: must be a multiple of block_k"):
        policies.HiP(new_cache(None), block_k=3)
    policy = policies.TidalDecode(new_cache(None), layer=5)
    policy.prefill(*prompt)
    with pytest.raises(RuntimeError, match=r"policies.TidalDecode: previous: must be .*NoneType"):
        policy.step(*draw().steps[0])


@pytest.mark.parametrize(("method", "options"), SPARING)
def test_a_prompt_has_a_query_for_each_key(method, options):
    q, k, v = draw().prompt
    policy = method(new_cache(None, heads=len(options.get("retrieval", range(HK)))), **options)
    rule = rf"policies\.{method.__name__}: k: must have the tokens of q, 36; got \[2, 37, "
    with pytest.raises(RuntimeError, match=rule):
        policy.prefill(q[:, 1:], k, v)
    assert policy.cache.longest == 0


@pytest.mark.parametrize(("method", "options"), SPARING)
def test_a_step_has_a_key_for_each_query(method, options):
    q, k, v = draw().prompt
    heads = len(options.get("retrieval", range(HK)))
    policy = method(new_cache(None, heads=heads), **options)
    policy.prefill(q, k, v)
    longest = policy.cache.longest
    for tokens, rule in ((2, "k: must have the tokens of q, 2"), (0, "q: must have at least 1")):
        with pytest.raises(RuntimeError, match=rf"policies\.\w+: {rule}"):
            policy.step(q[:, :tokens], k[:, : tokens // 2], v[:, : tokens // 2])
    assert policy.cache.longest == longest


def test_a_rotated_prompt_has_keys_of_the_dimension_of_queries():
    q, k, v = draw().prompt
    policy = policies.StreamingLLM(new_cache(None), rope=rotation(36))
    rule = r"policies\.StreamingLLM: k: must have the head dimension of q, \d+; got 0"
    with pytest.raises(RuntimeError, match=rule):
        policy.prefill(q, k[..., :0], v)


WITH_READERS = [
    (method, {"reader": policies.StreamingLLM(num_recent=8)})
    for method in (policies.FullAttention, policies.SnapKV)
]


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize(("method", "options"), SPARING + WITH_READERS)
def test_nothing_waits_for_the_device(method, options, page, monkeypatch):
    """Tensors have no data: reading a value raises. Operators run as their fakes, also those
    without a kernel in this build. Checks of available tensors are skipped."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(tm._call.operator.TorchOp, "has_native", lambda self, key: True)
    for name, module in [*sys.modules.items()]:
        if name.startswith("tokenmill.") and hasattr(module, "reads_values"):
            monkeypatch.setattr(module, "reads_values", lambda t: False)
    heads = len(options.get("retrieval", range(HK)))
    evicts = method.__name__ in ("H2O", "Keyformer")

    def tokens(n):
        return (torch.empty(2, n, h, d) for h, d in ((H, D), (HK, D), (HK, DV)))

    with FakeTensorMode():
        if method is policies.StreamingLLM:
            options = {**options, "rope": rotation(64)}
        if method is policies.Indexer:  # without parameters, which have data
            options = {**options, "indexer": lambda q, k: (q[..., :8], k[:, :, 0, :8], q.sum(3))}
        if method is policies.TokenSelect:
            options = {**options, "rope": rotation(64), "chunk": 10, "kernel_size": 3}
        policy = method(new_cache(page, 48 if evicts else 72, heads=heads), **options)
        lengths = torch.empty(2, dtype=torch.int32)
        for n, more in ((17, True), (20, False)):
            policy.prefill(*tokens(n), lengths=lengths, more=more)
        for _ in range(1 if "reader" in options else 27):  # which reads prompts only
            out = policy.step(*tokens(1))
        if hasattr(method, "extend"):
            policy.rewind(lengths)
            policy.step(*tokens(4))
    assert out.shape == (2, 1, H, DV)


def test_a_prompt_on_two_devices_is_refused():
    policy = policies.StreamingLLM(new_cache(None, 48), rope=rotation(64))
    q, k, v = (torch.zeros(2, 5, h, d) for h, d in ((H, D), (HK, D), (HK, DV)))
    rule = r"^tokenmill.policies.StreamingLLM: k: must be on the device of q, cpu; got meta"
    with pytest.raises(RuntimeError, match=rule):
        policy.prefill(q, k.to("meta"), v)


def test_a_full_cache_is_refused():
    cache = new_cache(None, 4)
    k, v = torch.zeros(2, 5, HK, D), torch.zeros(2, 5, HK, DV)
    with pytest.raises(RuntimeError, match=r"policies.KVCache: k: must fit into 4; got 5"):
        cache.fill(k, v)
    cache.fill(k[:, :4], v[:, :4])
    with pytest.raises(RuntimeError, match=r"policies.KVCache: k: must fit into 4; got 5"):
        cache.append(k[:, :1], v[:, :1])
    with pytest.raises(RuntimeError, match=r"policies.KVCache: k: must have 1 token; got 5"):
        cache.append(k, v)


def test_a_page_that_is_not_there_is_refused():
    cache = new_cache(4, 16)
    cache.block_table[1, 1] = -1
    k, v = torch.zeros(2, 5, HK, D), torch.zeros(2, 5, HK, DV)
    rule = r"policies.KVCache: block_table: must name pages below 8 where tokens go; got -1"
    with pytest.raises(RuntimeError, match=rule):
        cache.fill(k, v)
    cache.fill(k, v, torch.tensor([5, 4], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=rule):
        cache.append(k[:, :1], v[:, :1])


@pytest.mark.parametrize("module", [policies, policies.cache, policies.policy, policies.indexer])
def test_examples_of_the_documentation(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("policy", [p for p in vars(policies).values() if hasattr(p, "PAPER")])
def test_the_paper_has_its_own_values(policy):
    """A preset names fields, and none whose default is already the paper's."""
    defaults = {field.name: field.default for field in dataclasses.fields(policy)}
    for name, value in policy.PAPER.items():
        assert defaults[name] != value
        assert getattr(policy.paper(), name) == value
        assert getattr(policy.paper(**{name: defaults[name]}), name) == defaults[name]
