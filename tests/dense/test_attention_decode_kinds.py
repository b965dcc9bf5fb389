"""attention_decode with kinds that use the logit itself, and with normalize."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_dtype
from hypothesis import given
from test_attention_decode import GPU_KERNELS, SPEC, close, decode_samples, drawn
from test_attention_kinds import KINDS, NORMALIZERS, each_form
from tier import examples

import tokenmill as tm
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.registry import Sample
from tokenmill.testing import compare

EVERY = {"kinds": (*KINDS, "sigmoid"), "normalizers": NORMALIZERS}


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(50)
@given(sample=decode_samples(200, **EVERY))
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@examples(6)
@given(sample=decode_samples(150, **EVERY))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@pytest.mark.parametrize("heads", [(2, 1), (12, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_caches_cross_every_border(dtype, heads, backend, isa):
    """Partial sums of ranges add up in the order of the keys."""
    longest = 3000 if backend == "cpu" else 600
    options = {"h": heads[0], "hk": heads[1], "d": 16, "dv": 16, "capacity": longest}
    options |= {"kind": "elu1", "normalize": "sum", "return_lse": True}
    for schedule in ("split", "stream_k"):
        call = decode_call((longest, 33, longest // 2 + 1), schedule=schedule, **options)
        found = compare(SPEC, Sample("long", call), backend, dtype, device=device_of(backend))
        assert not [c for c in found if not c.ok], schedule


@each_form("reference")
def test_decode_is_causal_attention_of_the_last_tokens(kind, normalize, backend):
    """Covers no window, and a window that excludes the first keys of a request."""
    for left in (-1, 6):
        options = {"kind": kind, "normalize": normalize, "window": (left, 0)}
        options["return_lse"] = normalize == "sum"
        (q, k, v), kwargs = drawn(backend, (13, 2, 0), sq=3, capacity=16, **options)
        found = tm.attention_decode(q, k, v, backend=backend, **kwargs)
        for b, length in enumerate((13, 2, 0)):
            alone = tm.attention(
                *(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]),
                causal=True,
                backend=backend,
                **options,
            )
            if normalize != "sum":
                close(found[b : b + 1], alone)
                continue
            for of_all, one in zip(found, alone, strict=True):
                close(of_all[b : b + 1], one)


@each_backend
def test_a_request_without_keys_has_sum_0(backend):
    for kind in (*KINDS, "sigmoid"):
        options = {"kind": kind, "normalize": "sum", "return_lse": True}
        args, kwargs = drawn(backend, (0, 4), page_size=4, capacity=8, sq=2, **options)
        out, s = tm.attention_decode(*args, backend=backend, **kwargs)
        assert torch.all(out[0] == 0) and torch.all(s[0] == 0)
        assert out[1].isfinite().all()
        assert kind == "relu" or torch.all(s[1] != 0)


@pytest.mark.parametrize(
    ("backend", "isa"), [v for v in cpu_variants() if v[0] == "cpu"], indirect=["isa"], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", (*KINDS, "sigmoid"))
def test_the_only_key_of_a_row_gives_its_value(kind, dtype, backend, isa):
    """A single weight is divided by itself as the product with V sees it: rounded to 16 bits in
    16-bit calls. The weights here are not representable in 16 bits."""
    (q, k, v), kwargs = drawn(backend, (0, 1, 0), dtype, h=6, d=32, dv=40, capacity=1)
    bias = torch.linspace(1.1, 2.9, 6)
    options = {"kind": kind, "normalize": "sum", "scale": 0.0, "score_bias": bias}
    options["return_lse"] = True
    kwargs |= options
    value = v[1].repeat_interleave(3, 1)
    out, s = tm.attention_decode(q, k, v, **kwargs, backend=backend)
    assert torch.equal(out[1], value)
    wide = (x.double() for x in (q, k, v))
    _, exact = tm.attention_decode(*wide, **kwargs, backend="reference")
    assert tm.testing.error(s, exact) < 2**-14  # sum of weights before rounding
    rows, _ = tm.attention(q[1:2].expand(-1, 5, -1, -1), k[1:2], v[1:2], **options, backend=backend)
    assert torch.equal(rows[0], value.expand(5, -1, -1))
