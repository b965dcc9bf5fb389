"""A later token never affects an earlier row: masked values may be NaN or infinite."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import backends, cpu_variants, device_of

import tokenmill as tm

# Rows of these keep their bits; Triton's rows may move by one bit.
BACKENDS = [
    *(pytest.param(b, isa, id=isa) for b, isa in cpu_variants() if b == "cpu"),
    *(pytest.param(b, None, id=b) for b in backends("reference") if b not in ("cpu", "triton")),
]
HEADS, KV_HEADS, TOKENS = 4, 2, 40


def decode(function, q, k, v, **options):
    """The last four tokens in one call, against a cache of all tokens."""
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    out = function(q[:, -4:], k, v, seqlens_k=lengths, **options)
    return out if isinstance(out, torch.Tensor) else out[0]


def listed(q, k, v, **options):
    """Each block of 8 queries attends to blocks of 8 keys: its own, the previous and the first."""
    blocks = -(-q.shape[1] // 8)
    own = torch.arange(blocks, dtype=torch.int32)
    rows = [sorted({0, max(b - 1, 0), b}) for b in own.tolist()]
    table = torch.tensor([r + [-1] * (3 - len(r)) for r in rows], dtype=torch.int32)
    counts = torch.tensor([len(r) for r in rows], dtype=torch.int32)
    shape = (q.shape[0], KV_HEADS)
    return tm.block_sparse_attention(
        q,
        k,
        v,
        table.expand(*shape, -1, -1).contiguous().to(q.device),
        counts.expand(*shape, -1).contiguous().to(q.device),
        block_q=8,
        block_k=8,
        causal=True,
        **options,
    )


def listed_decode(q, k, v, *, seqlens_k, **options):
    shape = (q.shape[0], KV_HEADS)
    ids = torch.tensor([3, 7, 20], dtype=torch.int32, device=q.device).expand(*shape, -1)
    counts = torch.full(shape, 3, dtype=torch.int32, device=q.device)
    return tm.sparse_decode_attention(
        q, k, v, ids.contiguous(), counts, seqlens_k=seqlens_k, num_recent=9, **options
    )


def decays(q, k, v, **options):
    gate = torch.linspace(-0.5, 0, q.shape[1], device=q.device)
    per_token = gate[None, :, None].expand(q.shape[0], -1, HEADS).contiguous()
    return tm.linear_attention(q, k, v, log_decay=per_token, **options)


CALLS = {
    "softmax": functools.partial(tm.attention, causal=True),
    "sigmoid": functools.partial(tm.sigmoid_attention, causal=True),
    "window": functools.partial(tm.attention, window=(5, 0)),
    "softcap": functools.partial(tm.attention, causal=True, softcap=5.0),
    "decode": functools.partial(decode, tm.attention_decode),
    "listed": listed,
    "landmarks": functools.partial(tm.landmark_attention, block=9),
    "listed-decode": functools.partial(decode, listed_decode),
    "linear": tm.linear_attention,
    "taylor": functools.partial(tm.linear_attention, feature_map="taylor2", normalize=True),
    "gated": decays,
}


NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# First changed token, and its new value.
LATER = [(TOKENS - 1, NAN), (TOKENS - 3, INF), (18, -1e38)]


def inputs(dtype, backend, dim=24):
    torch.manual_seed(0)
    batch = 1 if backend == "emulated" else 2
    shapes = [(batch, TOKENS, h, dim) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s).to(dtype).to(device_of(backend)) for s in shapes]


@pytest.mark.parametrize(("backend", "isa"), BACKENDS, indirect=["isa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_later_token_touches_no_earlier_row(name, dtype, backend, isa):
    q, k, v = inputs(dtype, backend)
    call = functools.partial(CALLS[name], backend=backend)
    clean = call(q, k, v)
    rows = clean.shape[1]
    for first, value in LATER[:2] if backend == "emulated" else LATER:
        later_k, later_v = k.clone(), v.clone()
        for x in (later_k, later_v):
            x[:, first:, :, ::3] = torch.tensor(value).to(x)  # -1e38 becomes -inf in float16
        out = call(q, later_k, later_v)
        seen = max(first - TOKENS + rows, 0)
        assert torch.equal(out[:, :seen], clean[:, :seen])
        assert not torch.equal(out[:, seen:], clean[:, seen:])


@pytest.mark.parametrize(("backend", "isa"), BACKENDS, indirect=["isa"])
def test_a_later_decay_touches_no_earlier_row(backend, isa):
    q, k, v = inputs(torch.float32, backend)
    gate = -torch.rand(q.shape[:3]).to(q.device)
    later = gate.clone()
    later[:, 19:] = NAN
    clean, out = (tm.linear_attention(q, k, v, log_decay=g, backend=backend) for g in (gate, later))
    assert torch.equal(out[:, :19], clean[:, :19])
    assert out[:, 19:].isnan().all()


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cpu", "cuda", "emulated")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_finite_shows_where_it_is_seen(name, dtype, backend):
    q, k, v = inputs(dtype, backend)
    clean = CALLS[name](q, k, v, backend=backend)
    for token, values in {37: (NAN, INF, -INF, INF), 38: (0.0, INF, 1.0, -INF)}.items():
        v[:, token, :, :4] = torch.tensor(values, dtype=dtype)
    out = CALLS[name](q, k, v, backend=backend)
    wanted = CALLS[name](q, k, v, backend="reference")
    assert not wanted.isfinite().all()
    assert torch.equal(out.isfinite(), wanted.isfinite())
    assert torch.equal(out[..., 4:], clean[..., 4:])


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("name", ["softmax", "decode", "listed", "landmarks", "linear"])
def test_later_tokens_of_wide_heads(name, dim, dtype, backend):
    """Each head_dim has its own kernel on GPUs."""
    q, k, v = inputs(dtype, backend, dim)
    call = functools.partial(CALLS[name], backend=backend)
    clean = call(q, k, v)
    for x in (k, v):
        x[:, 37:, :, 1::2] = NAN
    v[:, 37:, :, -2] = INF
    out = call(q, k, v)
    seen = out.shape[1] - 3
    assert torch.equal(out[:, :seen], clean[:, :seen])
    assert not out[:, seen:, :, 1::2].isfinite().any()


TRITON = list(zip(CALLS, itertools.cycle([torch.float32, torch.float16]), strict=False))


@pytest.mark.parametrize("backend", [b for b in backends() if b == "triton"])
@pytest.mark.parametrize(("name", "dtype"), TRITON, ids=str)
def test_a_later_token_touches_no_earlier_row_in_triton(name, dtype, backend):
    """Rows with NaN in their tile are recomputed, with another tiling: a last bit may move."""
    torch.manual_seed(0)
    shapes = [(1, TOKENS, h, 24) for h in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(s).to(dtype).to(device_of(backend)) for s in shapes)
    call = functools.partial(CALLS[name], backend=backend)
    clean = call(q, k, v)
    rows = clean.shape[1]
    for first, value in [(TOKENS - 2, float("nan")), (TOKENS - 3, float("inf"))]:
        later_k, later_v = k.clone(), v.clone()
        later_k[:, first:, :, ::3] = later_v[:, first:, :, ::3] = value
        out = call(q, later_k, later_v)
        seen = first - TOKENS + rows
        bits = 2 * torch.finfo(dtype).eps  # eps of sums up to the largest result
        largest = max(clean[:, :seen].abs().max().item(), 1.0)
        torch.testing.assert_close(out[:, :seen], clean[:, :seen], rtol=bits, atol=bits * largest)
        assert torch.isnan(out[:, seen:]).any()


def tf32(x):
    """Rounds to 11 bits, ties away from zero: cvt.rna.tf32.f32."""
    return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


@pytest.fixture
def tf32_products(monkeypatch):
    """Makes Triton's interpreter compute float32 products as tensor cores do, by tf32x3."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder, a, b, total, *options):
        if a.data.dtype != np.float32:
            return exact(builder, a, b, total, *options)
        big_a, big_b = tf32(a.data), tf32(b.data)
        small = (a.data - big_a) @ big_b + big_a @ (b.data - big_b)
        product = np.where(np.isnan(small), np.float32(0), small) + big_a @ big_b
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.filterwarnings("ignore:.*(invalid value|overflow).*:RuntimeWarning")
@pytest.mark.parametrize("backend", [b for b in backends() if b == "triton"])
@pytest.mark.parametrize("name", ["softmax", "decode", "listed"])
def test_the_largest_floats_touch_no_earlier_row_in_triton(name, backend, tf32_products):
    """These values become infinite as tensor-core operands."""
    q, k, v = (x[:1] for x in inputs(torch.float32, backend))
    clean = CALLS[name](q, k, v, backend=backend)
    maximum = torch.finfo(torch.float32).max
    v[:, 37:, :, ::3] = torch.tensor([maximum, -3.402e38, 3.402e38])[:, None, None]
    out = CALLS[name](q, k, v, backend=backend)
    seen = out.shape[1] - 3
    torch.testing.assert_close(out[:, :seen], clean[:, :seen], rtol=1e-5, atol=1e-5)
    assert not out[:, seen:, :, ::3].isfinite().any()


@pytest.mark.parametrize("backend", [b for b in backends() if b == "triton"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("linear", torch.bfloat16), ("listed-decode", torch.float32)], ids=str
)
def test_what_is_not_finite_shows_where_it_is_seen_in_triton(name, dtype, backend):
    q, k, v = (x[:1] for x in inputs(dtype, backend))
    for token, values in {37: (NAN, INF, -INF, INF), 38: (0.0, INF, 1.0, -INF)}.items():
        v[:, token, :, :4] = torch.tensor(values, dtype=dtype)
    k[:, 39] = NAN
    out = CALLS[name](q, k, v, backend=backend)
    wanted = CALLS[name](q, k, v, backend="reference")
    assert not wanted.isfinite().all()
    assert torch.equal(out.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("backend", [b for b in backends() if b == "triton"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_triton_keeps_what_a_row_sees_beside_what_it_does_not(value, backend):
    q, k, v = torch.randn(3, 1, TOKENS, 1, 40, device=device_of(backend)).unbind()
    v[:, 20, :, 33] = value
    v[:, 30, :, 33] = v[:, 25, :, 34] = float("nan")
    out = tm.attention(q, k, v, causal=True, backend=backend)
    expected = tm.attention(q, k, v, causal=True, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
