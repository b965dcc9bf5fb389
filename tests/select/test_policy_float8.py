"""Policies over caches in float8_e4m3fn give the results of the decoded numbers in float32."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, device_of
from policy_inputs import DV, HK, LENGTHS, SPARING, D, draw, rotation
from torch import Tensor

from tokenmill import policies
from tokenmill.policies import razor

FLOAT8 = torch.float8_e4m3fn
READING = [(m, o) for m, o in SPARING if m is not policies.HiP]
READING += [
    (
        policies.TokenSelect,
        {"k": 8, "num_sink": 2, "num_recent": 4, "chunk": 8, "rope": rotation(64)},
    ),
    (policies.StreamingLLM, {"num_recent": 20, "rope": rotation(64)}),
]
# Pages and scales.
KINDS = [(None, None), (4, "head"), (None, "token"), (4, "token")]
CALLS = [
    pytest.param(backend, *case, *KINDS[(i + kind) % 4])
    for kind, backend in ((0, "cpu"), (1, "cpu"), (2, "reference"))
    for i, case in enumerate(READING)
    if backend == "cpu" or i % 4 == 0
]


def rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """Numbers [..., Hk, D] as a cache returns them; a scale of 3 dimensions: one of each row."""
    if scale is None:
        scale = torch.ones(1)
    elif scale.dim() == 3:
        scale = x.abs().amax(-1) / 448
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    codes = (x.float() / scale[..., None]).clamp(-448, 448).to(FLOAT8)
    return codes.float() * scale[..., None]


def two_caches(page: int | None, scale: str | None, heads: int = HK, capacity: int = 64):
    """A float8 cache, and a float32 cache that rounds what is written into it."""
    shape, table = (len(LENGTHS), capacity), None
    if page is not None:
        pages = len(LENGTHS) * capacity // page
        shape, table = (pages, page), torch.randperm(pages).int().view(len(LENGTHS), -1)
    k, v = torch.full((*shape, heads, D), math.nan), torch.full((*shape, heads, DV), math.nan)
    scales: dict[str | None, tuple[Tensor | None, Tensor | None]] = {
        None: (None, None),
        "one": (torch.tensor([0.3]), torch.tensor([0.7])),
        "head": (torch.tensor([0.3, 0.07]), torch.tensor([1.7, 0.004])),
        "token": (torch.full((*shape, heads), math.nan), torch.full((*shape, heads), math.nan)),
    }
    of_k, of_v = scales[scale]

    class Rounding(policies.KVCache):
        def fill(self, k, v, lengths=None):
            super().fill(rounded(k, of_k), rounded(v, of_v), lengths)

        def extend(self, k, v, lengths=None):
            super().extend(rounded(k, of_k), rounded(v, of_v), lengths)

        def replace(self, k, v):
            super().replace(rounded(k, of_k), rounded(v, of_v))

    ours = policies.KVCache(k.to(FLOAT8), v.to(FLOAT8), table, k_scale=of_k, v_scale=of_v)
    return ours, Rounding(k, v, table)


def served(policy: policies.Policy) -> Tensor:
    """Results for a prompt in two chunks, single tokens, several at once, and after a rewind."""
    tokens, first = draw(alike=0.5), min(LENGTHS) - 5
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)

    def several(a, b):
        return (torch.cat(t, 1) for t in zip(*tokens.steps[a:b], strict=True))

    found = [policy.prefill(*(t[:, :first] for t in tokens.prompt), more=True)]
    out = policy.prefill(*(t[:, first:] for t in tokens.prompt), lengths=lengths - first)
    found += [out[b, : n - first] for b, n in enumerate(LENGTHS)]
    found += [policy.step(*step) for step in tokens.steps[:5]]
    found.append(policy.step(*several(5, 8)))
    if hasattr(policy, "extend"):
        policy.rewind([2, 3])
    if isinstance(policy, policies.TidalDecode):
        found.append(policy.correct(*several(0, 2)))
    found.append(policy.step(*tokens.steps[8]))
    return torch.cat([x.flatten() for x in found])


@pytest.mark.parametrize(("backend", "method", "options", "page", "scale"), CALLS)
def test_results_are_of_the_decoded_numbers(backend, method, options, page, scale, monkeypatch):
    scale = "one" if method is policies.RazorAttention and scale == "head" else scale
    evicts = not hasattr(method, "extend") and method is not policies.RazorAttention
    heads = len(options.get("retrieval", range(HK)))
    ours, theirs = two_caches(page, scale, heads, 40 if evicts else 64)
    found, want = (method(cache, **options, backend=backend) for cache in (ours, theirs))
    out = served(found)
    monkeypatch.setattr(razor, "KVCache", type(theirs))  # the short cache
    torch.testing.assert_close(out, served(want), rtol=0, atol=2e-5)
    assert torch.equal(found.kept, want.kept)
    if method is policies.TidalDecode:  # for later layers
        lists = zip(found._lists, want._lists, strict=True)
        assert all(torch.equal(a, b) for pair in lists for a, b in zip(*pair, strict=True))
    assert ours.token_bytes == heads * (D + DV + (8 if scale == "token" else 0))
    if method is not policies.RazorAttention:
        assert found.bytes_held == int(ours.lengths.sum()) * ours.token_bytes
    if scale is None:  # of four bytes in the other cache, but for boxes, sums and index keys
        kinds = (policies.Quest, policies.RazorAttention, policies.Indexer)
        assert 4 * found.bytes_read == want.bytes_read or isinstance(found, kinds)


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("triton", "cuda")])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (policies.Quest, {"budget": 12, "page": 4, "layer": 5}),
        (policies.RefreshKV, {"budget": 6, "stride": 1, "threshold": None}),
    ],
)
def test_other_kernels(method, options, backend):
    tokens, page, scales = draw(), 8, torch.tensor([[0.3, 0.07], [1.7, 0.004]])
    table = torch.tensor([[3, 0, 2], [5, 1, 4]], dtype=torch.int32)
    outs = []
    for name in ("reference", backend):
        device = device_of(name)
        pages = (torch.zeros(6, page, HK, n, device=device).to(FLOAT8) for n in (D, DV))
        k_scale, v_scale = scales.to(device)
        cache = policies.KVCache(*pages, table.to(device), k_scale=k_scale, v_scale=v_scale)
        policy = method(cache, **options, backend=name)
        policy.prefill(*(t[:, :19].to(device) for t in tokens.prompt))
        outs.append(policy.step(*(t.to(device) for t in tokens.steps[0])).cpu())
    torch.testing.assert_close(*outs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [None, "head", "token"])
def test_boxes_of_quest_bound_the_decoded_keys(scale):
    """A box holds the extremes of what operators read, in 16 bits too."""
    tokens = [draw(seed=1).prompt[i].bfloat16() for i in range(3)]
    cache, _ = two_caches(4, scale)
    policy = policies.Quest(cache, budget=16, page=8, layer=5)
    policy.prefill(*(t[:, :15] for t in tokens))
    calls = [(policy.extend, 15, 25), (policy.step, 25, 26), (policy.step, 26, 27)]
    of_k = torch.empty(1, 1, 1) if scale == "token" else cache.k_scale
    for call, first, end in calls:  # the chunk ends a page, fills one, and begins one
        call(*(t[:, first:end] for t in tokens))
        keys = rounded(tokens[1][:, :end].float(), of_k)
        assert torch.equal(cache.keys(torch.float32, end), keys)
        for i, own in enumerate(keys.split(8, 1)):
            assert torch.equal(policy._boxes[:, i, :, 0].float(), own.amin(1))
            assert torch.equal(policy._boxes[:, i, :, 1].float(), own.amax(1))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "emulated"])
def test_codes_move_as_they_are(backend, page, heads):
    """All 256 codes and the scales of tokens, where keys are evicted."""
    device, capacity = device_of(backend), 16
    codes = torch.randperm(256 * HK).view(1, capacity, HK, D) % 256
    codes = codes.to(torch.uint8).repeat(2, 1, 1, 1).to(device)
    scales = torch.rand(2, capacity, HK, device=device)
    shape = (2, capacity) if page is None else (2 * capacity // page, page)
    table = None
    if page is not None:
        table = torch.arange(shape[0], dtype=torch.int32, device=device).view(2, -1)
    k = codes.clone().view(*shape, HK, D).view(FLOAT8)
    of_k, of_v = (s.clone().view(*shape, HK) for s in (scales, 1 - scales))
    cache = policies.KVCache(k, k[..., :DV].clone(), table, k_scale=of_k, v_scale=of_v)
    cache.lengths = cache.lengths + capacity
    cache.longest = capacity
    keep = [[1, 2, 9, 15], [0, 3, 4, 5]]
    keep = torch.tensor(keep, dtype=torch.int32, device=device)
    lists = torch.stack([keep, keep.flip(0)], 1) if heads else keep
    cache.compact(lists, torch.full(lists.shape[:-1], 4, dtype=torch.int32, device=device), backend)
    for b in range(2):
        for h in range(HK):
            own = lists[b, h] if heads else lists[b]
            for found, old in (
                (cache.k.view(torch.uint8), codes),
                (cache.v.view(torch.uint8), codes[..., :DV]),
                (cache.k_scale, scales),
                (cache.v_scale, 1 - scales),
            ):
                found = found.reshape(2, capacity, *found.shape[2:])[b, :4, h]
                assert torch.equal(found, old[b, own.long(), h])


def test_what_cannot_be_is_refused():
    k = torch.zeros(2, 8, HK, D).to(FLOAT8)
    wide, ones = torch.zeros(2, 8, HK, D), torch.ones(2, 8, HK)
    cache = policies.KVCache(k, k.clone(), k_scale=torch.ones(HK))
    for make, rule in (
        (lambda: policies.KVCache(k.int(), k.int()), r"k: must be float16, .* or float8_e4m3fn"),
        (lambda: policies.KVCache(k, wide), r"v: must have the dtype of the cache, float8_e4m3fn"),
        (
            lambda: policies.KVCache(wide, wide.clone(), v_scale=torch.ones(1)),
            r"v_scale: requires a cache in float8_e4m3fn; got float32",
        ),
        (
            lambda: policies.KVCache(k, k.clone(), k_scale=torch.ones(3)),
            r"k_scale: must have shape \[1\], \[2\] or \[2, 8, 2\]; got",
        ),
        (
            lambda: policies.KVCache(k, k.clone(), k_scale=torch.ones(1).double()),
            r"k_scale: must be float32; got float64",
        ),
        (
            lambda: policies.KVCache(k, k.clone(), k_scale=ones),
            r"k_scale: must have a scale of each token, as v_scale, or neither; got \[2, 8, 2\]",
        ),
        (
            lambda: policies.KVCache(k, k[..., :3].clone()),
            r"v: must have even sizes, strides and offset in float8_e4m3fn.*; got \[\[2, 8, 2, 3\]",
        ),
        (lambda: cache.fill(k, k), r"k: must be float16, bfloat16 or float32; got float8_e4m3fn"),
        (lambda: cache.fill(wide, wide.half()), r"v: must have the dtype of k, float32; got flo"),
    ):
        with pytest.raises(RuntimeError, match=r"^tokenmill.policies.KVCache: " + rule):
            make()
    rule = r"^tokenmill.policies.HiP: cache: must be in the dtype of the model, as hip_attention "
    with pytest.raises(RuntimeError, match=rule + r"reads no float8 .*except HiP do\); got float8"):
        policies.HiP(cache)
    cache = policies.KVCache(torch.cat([k, k], 2)[:, :, :2], k.clone(), k_scale=torch.ones(HK))
    razor_policy = policies.RazorAttention(cache, retrieval=(0, 2))
    prompt = (torch.zeros(2, 5, h, D) for h in (8, 4, 4))
    rule = r"^tokenmill.policies.RazorAttention: cache: must have one k_scale for all heads, or "
    with pytest.raises(RuntimeError, match=rule):
        razor_policy.prefill(*prompt)
