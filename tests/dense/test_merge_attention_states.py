"""merge_attention_states: weights sum to 1 for any lse."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill._check import check_wide
from tokenmill._kv_cache import check_cache_scale

LOWEST = torch.finfo(torch.float32).min


def merge(backend, outs, lses):
    return tm.merge_attention_states(
        outs.to(device_of(backend)), lses.to(device_of(backend)), backend=backend
    )


@each_backend
@examples(15)
@given(
    data=st.data(),
    parts=st.integers(1, 5),
    level=st.sampled_from([0.0, 30.0, -3e3, 3e4, 1e6, -1e8, 1e30, LOWEST]),
    value=st.sampled_from([1.0, -1e-3, 123.4]),
)
def test_equal_outs_are_the_result(backend, data, parts, level, value):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    noise = 10 ** data.draw(st.integers(-2, 1)) * torch.randn(parts, 1, 2, 7, generator=generator)
    lses = (noise + level).clamp(min=LOWEST)
    lses[torch.rand(lses.shape, generator=generator) < 0.1] = -torch.inf
    outs = torch.full((parts, 1, 7, 2, 5), value)
    out, _ = merge(backend, outs, lses)
    seen = (lses > -torch.inf).any(0).mT[..., None].to(out.device)
    want = torch.where(seen, value, 0.0).expand(out.shape)
    torch.testing.assert_close(out, want, rtol=6e-7, atol=0)


@each_backend
def test_weights_of_the_gradient_sum_to_one(backend):
    lses = torch.randn(3, 1, 2, 9) + torch.tensor([0.0, 3e3, -1e7])[:, None, None, None]
    for level in (lses, lses[:1] + torch.randn(3, 1, 2, 9)):
        outs = torch.randn(3, 1, 9, 2, 4, requires_grad=True)
        moved, level = outs.to(device_of(backend)), level.to(device_of(backend)).requires_grad_()
        out, lse = merge(backend, moved, level)
        douts, dlses = torch.autograd.grad((out.sum() + lse.sum()), (moved, level))
        torch.testing.assert_close(douts.sum(0), torch.ones_like(out), rtol=6e-7, atol=0)
        torch.testing.assert_close(dlses.sum(0), torch.ones_like(lse), rtol=3e-6, atol=0)


@each_backend
def test_a_finite_mask_over_all_keys_gives_the_mean_of_the_parts(backend):
    q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 8, 1, 4), torch.rand(1, 8, 1, 4)
    mask = torch.full((1, 1, 1, 4), LOWEST)
    parts = [
        tm.attention(q, k[:, s], v[:, s], bias=mask, return_lse=True, backend="reference")
        for s in (slice(0, 4), slice(4, 8))
    ]
    outs, lses = (torch.stack(t) for t in zip(*parts, strict=True))
    out, _ = merge(backend, outs, lses)
    torch.testing.assert_close(out.cpu(), v.mean(1, keepdim=True), rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_alone_has_the_bits_that_it_has_among_many(backend, dtype):
    outs, lses = torch.randn(3, 1, 1, 2, 72).to(dtype), torch.randn(3, 1, 2, 1)
    lses[1, 0, 0] = -torch.inf
    alone = merge(backend, outs, lses)
    many = merge(backend, outs.expand(-1, -1, 70, -1, -1), lses.expand(-1, -1, -1, 70))
    assert_same([x.expand_as(y) for x, y in zip(alone, many, strict=True)], many, backend)


def test_a_rule_about_wide_dtypes_names_that_of_the_call():
    for dtype, wide in ((torch.bfloat16, "float32"), (torch.float64, "float64")):
        first = torch.zeros(1, 1, 2, 1, 4, dtype=dtype)
        with pytest.raises(ValueError, match=f"op: t: must be {wide}; got float16"):
            check_wide("op", "t", torch.zeros(1).half(), first)
        check_wide("op", "t", torch.zeros(1, dtype=getattr(torch, wide)), first)
    outs, lses = first, torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="lses: must be float64; got float32"):
        tm.merge_attention_states(outs, lses)
    cache, scale = torch.zeros(1, 2, 1, 4, dtype=torch.float8_e4m3fn), torch.ones(1).half()
    with pytest.raises(ValueError, match="k_scale: must be float32 or float64; got float16"):
        check_cache_scale("op", "k_scale", scale, "k_cache", cache, outs.dtype)
