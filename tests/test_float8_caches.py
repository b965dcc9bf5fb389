"""float8_e4m3fn caches with scales, and latent caches: operators give the results of the decoded
numbers."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_backend

import tokenmill as tm
from tokenmill import registry
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.select.kv_block_scores_cases import SAMPLES as SCORES
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call
from tokenmill.testing import map_tensors

NAN = float("nan")
FLOAT8 = torch.float8_e4m3fn


CALLS = {
    "decode": (
        "attention_decode",
        decode_call((40, 9), sq=2, page_size=8, capacity=48, float8=("token", "head")),
    ),
    "packed": (
        "attention_decode",
        decode_call((30, 21), queries=(3, 20), float8=("head", "token"), causal=False),
    ),
    "sparse": (
        "sparse_decode_attention",
        sparse_call((40, 21), sq=2, num_recent=4, pairs=8, float8=("token", "token")),
    ),
    "scores": (
        "kv_block_scores",
        next(s.make for s in SCORES if s.name == "float8 in pages, scales of tokens"),
    ),
}
each_call = pytest.mark.parametrize("name", CALLS)


def drawn(name, backend, dtype=torch.float32):
    """Function, positional arguments and keywords."""
    op, make = CALLS[name]
    call = make(dtype, torch.Generator().manual_seed(0))
    args, kwargs = map_tensors(call, lambda t: t.to(device_of(backend)))
    return registry.get(op).function, list(args), kwargs


def run(function, args, kwargs, backend):
    """All results of a call."""
    found = function(*args, **kwargs, backend=backend)
    return found if isinstance(found, tuple) else (found,)


def dequantised(args, kwargs):
    """The same call on caches in float32."""
    args, kwargs = list(args), dict(kwargs)
    for at, name in ((1, "k_scale"), (2, "v_scale")):
        if args[at : at + 1] and args[at].dtype == FLOAT8:
            scale = kwargs.pop(name, torch.ones(1, device=args[at].device))
            args[at] = args[at].float() * scale[..., None]
    return args, kwargs


@each_backend
@each_call
def test_they_stand_for_codes_times_scales(name, backend):
    function, args, kwargs = drawn(name, backend)
    found = run(function, args, kwargs, backend)
    want = run(function, *dequantised(args, kwargs), "reference")
    for f, w in zip(found, want, strict=True):
        torch.testing.assert_close(f, w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("where", ["k_scale", "v_scale", "codes"])
@each_backend
def test_nan_shows_where_it_is_seen_alone(where, backend):
    """NaN is in the newest key, which only the last query sees."""
    for name in ("decode", "sparse"):
        function, args, kwargs = drawn(name, backend)
        lengths, table = kwargs["seqlens_k"], kwargs.get("block_table")
        shape = args[1].shape[:3]
        kwargs = {**kwargs, "v_scale": torch.ones(shape, device=args[1].device)}
        kwargs["k_scale"] = kwargs["v_scale"].clone()
        clean = run(function, args, kwargs, backend)[0]
        j = int(lengths[0]) - 1
        slot = (0, j) if table is None else (int(table[0, j // 8]), j % 8)
        at = *slot, 1  # second KV head of the first request
        if where == "codes":
            args[2] = args[2].clone()
            args[2].view(torch.uint8)[at] = 0x7F
        else:
            kwargs[where] = kwargs[where].clone()
            kwargs[where][at] = NAN
        found = run(function, args, kwargs, backend)[0]
        assert found[0, 1, 2:].isnan().all()
        found[0, 1, 2:] = clean[0, 1, 2:]
        torch.testing.assert_close(found, clean, rtol=1e-6, atol=1e-6)


@each_backend
def test_attention_takes_them(backend):
    function, args, kwargs = drawn("packed", backend, torch.bfloat16)
    found = run(tm.attention, args, kwargs, backend)
    assert torch.equal(found[0], run(function, args, kwargs, backend)[0])


def test_scales_without_a_cache_are_refused():
    q = torch.randn(1, 4, 2, 8)
    rule = r"^tokenmill.attention: v_scale: requires a cache \(seqlens_k\); got a tensor of"
    with pytest.raises(RuntimeError, match=rule):
        tm.attention(q, q, q, v_scale=torch.ones(1))


@each_backend
def test_tokens_are_selected_from_them(backend):
    """Integers: equal scores have the same bits."""
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-2, 3, (2, 1, 4, 16), generator=g).float().to(device_of(backend))
    keys = torch.randint(-8, 9, (2, 40, 2, 16), generator=g).to(q)
    scale = torch.tensor([0.25, 2.0]).to(q)
    options = {"k": 5, "num_sink": 2, "num_recent": 4, "scale": 0.125}
    found = run(tm.token_select, (q, keys.to(FLOAT8)), {**options, "k_scale": scale}, backend)
    want = tm.token_select(q, keys * scale[:, None], **options, backend="reference")
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


@each_backend
def test_what_was_appended_is_read(backend):
    """Per-token scales are used as kv_cache_append writes them."""
    device = device_of(backend)
    k, v = torch.randn(2, 20, 2, 16, device=device).bfloat16()
    caches = torch.zeros(2, 3, 8, 2, 16, device=device).to(FLOAT8)
    scales = dict(zip(("k_scale", "v_scale"), torch.ones(2, 3, 8, 2, device=device), strict=True))
    tm.kv_cache_append(*caches, k, v, torch.arange(20, device=device), **scales)
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    kwargs = {"seqlens_k": torch.tensor([20], dtype=torch.int32, device=device), **scales}
    q = torch.randn(1, 1, 4, 16, device=device).bfloat16()
    kwargs["block_table"] = table
    found = run(tm.attention_decode, (q, *caches), kwargs, backend)[0]
    want = tm.attention(q, k[None], v[None], backend="reference")
    torch.testing.assert_close(found, want, rtol=0.1, atol=0.1)


@each_backend
@pytest.mark.parametrize("dims", [(576, 512), (300, 40)])
def test_values_may_be_the_first_channels_of_keys(dims, backend):
    options = {"h": 3, "hk": 1, "d": dims[0], "dv": dims[1], "capacity": 24, "latent": True}
    calls = [
        ("attention_decode", decode_call((20, 3), **options)),
        ("sparse_decode_attention", sparse_call((20, 3), lists=1, entries=4, **options)),
    ]
    for op, make in calls:
        args, kwargs = make(torch.float32, torch.Generator().manual_seed(1))
        args, kwargs = map_tensors((args, kwargs), lambda t: t.to(device_of(backend)))
        assert args[2].data_ptr() == args[1].data_ptr()
        function = registry.get(op).function
        found = run(function, args, kwargs, backend)
        copies = (*args[:2], args[2].contiguous(), *args[3:])
        want = run(function, copies, kwargs, "reference")
        for f, w in zip(found, want, strict=True):
            torch.testing.assert_close(f, w, rtol=2e-5, atol=2e-5)


@each_backend
def test_sparse_decode_writes_into_out(backend):
    args, kwargs = sparse_call((30, 5), num_recent=2)(torch.float32, torch.Generator())
    args, kwargs = map_tensors((args, kwargs), lambda t: t.to(device_of(backend)))
    want = tm.sparse_decode_attention(*args, **kwargs, backend=backend)
    out = torch.full((2, 3, 4, 40), NAN, device=device_of(backend))[:, 1:2, :, 4:36]
    found = tm.sparse_decode_attention(*args, **kwargs, out=out, backend=backend)
    assert found[0] is out
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    rule = "out: must not share memory with q; strides"
    with pytest.raises(RuntimeError, match=rule):
        tm.sparse_decode_attention(*args, **kwargs, out=args[0], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 3, 4])
@each_backend
def test_drafts_read_a_cache_without_scales(rows, dtype, backend):
    """Rows that see different keys take the scales of values one by one, where there are some."""
    device = device_of(backend)
    k, v = torch.randn(2, 2, 64, 2, 16, device=device).to(torch.float8_e4m3fn)
    q = torch.randn(2, rows, 4, 16, device=device).to(dtype)
    call = {"seqlens_k": torch.tensor([45, 30], dtype=torch.int32, device=device)}
    one = torch.ones(1, device=device)
    found = tm.attention_decode(q, k, v, **call, backend=backend)
    expected = tm.attention_decode(q, k, v, **call, k_scale=one, v_scale=one, backend=backend)
    torch.testing.assert_close(found, expected)
