"""The soft causal mask of iLLaMA against the matrices of its paper and of its release
(techmonsterwang/iLLaMA at dfc93b9, models/illama.py)."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tensors import draw
from tier import examples

import tokenmill as tm
from tokenmill.testing import assert_accurate


def by_hand(q, k, v, alpha, scale=None):
    """softmax(q k) times alpha + (1 - alpha) tril, not renormalized."""
    rows, keys, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(shared, 2) for t in (k, v))
    z = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    lower = torch.ones_like(z[0, 0]).tril(keys - rows)
    weights = z.softmax(-1) * (alpha + (1 - alpha) * lower)
    return torch.einsum("bhij,bjhd->bihd", weights.nan_to_num(), v)


def inputs(rows, keys, dtype=torch.float32, backend="cpu"):
    shapes = (2, rows, 4, 16), (2, keys, 2, 16), (2, keys, 2, 8)
    return draw(backend, *shapes, dtype=dtype)


@each_backend
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.0, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(19, 19), (5, 3)])
def test_is_the_softmax_times_the_soft_mask(backend, alpha, rows, keys):
    given = inputs(rows, keys, backend=backend)
    if isinstance(alpha, torch.Tensor):
        given.append(alpha.to(device_of(backend)).requires_grad_())
    else:
        given.append(alpha)
    leaves = [t for t in given if isinstance(t, torch.Tensor)]
    out = tm.soft_causal_attention(*given, backend=backend)
    wanted = by_hand(*given)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(wanted)
    found = torch.autograd.grad(out, leaves, weight)
    for a, b in zip(found, torch.autograd.grad(wanted, leaves, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_keep_the_error_budget(backend, dtype):
    given = [t.detach() for t in inputs(40, 40, dtype, backend)]
    out = tm.soft_causal_attention(*given, 0.3, backend=backend)
    wanted = by_hand(*(t.double() for t in given), 0.3)
    assert_accurate(out, wanted, by_hand(*given, 0.3))


@examples(20)
@given(alpha=st.floats(0, 1), scale=st.sampled_from([None, 0.0, -0.4, 3.0]))
def test_reference_is_exact_in_float64(alpha, scale):
    given = [t.detach().double() for t in inputs(7, 9)]
    out = tm.soft_causal_attention(*given, alpha, scale=scale)
    torch.testing.assert_close(out, by_hand(*given, alpha, scale), rtol=1e-12, atol=1e-12)


def test_gradcheck():
    given = [t.detach().double().requires_grad_() for t in inputs(4, 4)]
    given.append(torch.tensor(0.4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(tm.soft_causal_attention, given, fast_mode=True)


@pytest.mark.parametrize(
    ("alpha", "says"),
    [
        (float("nan"), "alpha: must be finite in float32; got nan"),
        (1e300, r"alpha: must be finite in float32; got 1e\+300"),
        ("x", "alpha: must be a number or a tensor; got 'x'"),
        (torch.zeros(2), "alpha: must be a number or have no dimensions; got 1"),
        (torch.tensor(1), "alpha: must be a floating-point tensor; got int64"),
    ],
    ids=["nan", "huge", "text", "vector", "integer"],
)
def test_bad_alpha(alpha, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.soft_causal_attention: {says}$"):
        tm.soft_causal_attention(*inputs(3, 3), alpha)
