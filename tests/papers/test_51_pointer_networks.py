"""Additive attention and pointers against the formulas of Pointer Networks."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from hypothesis import given
from hypothesis import strategies as st
from tensors import KERNELS, Largest, assert_keeps_budget, draw, every_backend
from tier import examples

import tokenmill as tm


def by_hand(q, k, v, values=None, mask=None):
    """Computes all tanh values [B, T, N, A]."""
    u = torch.tanh(q[:, :, None] + k[:, None]) @ v
    if mask is not None:
        u = u.masked_fill(~(mask[:, None] if mask.dim() == 2 else mask), -torch.inf)
    return u if values is None else u.softmax(-1).nan_to_num() @ values


PLAIN_SHAPES = [b for b in ("cpu", "reference") if b in KERNELS] or ["reference"]


def inputs(rows=5, keys=7, width=4, channels=3, dtype=torch.float32, batch=2, backend="cpu"):
    shapes = (batch, rows, width), (batch, keys, width), (width,), (batch, keys, channels)
    return draw(backend, *shapes, dtype=dtype)


def some(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


@every_backend
@pytest.mark.parametrize("pooled", [False, True], ids=["scores", "values"])
@pytest.mark.parametrize("mask", [None, some(2, 7), some(2, 5, 7)], ids=["all", "keys", "pairs"])
def test_results_and_gradients(pooled, mask, backend):
    """Results in float32 keep the error budget: twice the error of the formula in float32."""
    given = inputs(backend=backend)[: 4 if pooled else 3]
    mask = None if mask is None else mask.to(device_of(backend))

    def finite(scores):  # without masked pairs
        return scores if pooled or mask is None else scores[scores.isfinite()]

    out = tm.additive_attention(*given, mask=mask, backend=backend)
    assert torch.equal(out.isfinite(), by_hand(*given, mask=mask).isfinite())
    assert_keeps_budget(
        lambda *t: finite(tm.additive_attention(*t, mask=mask, backend=backend)),
        lambda *t: finite(by_hand(*t, mask=mask)),
        given,
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_budget(dtype, backend):
    def run(*tensors):
        return tm.additive_attention(*tensors, backend=backend)

    assert_keeps_budget(run, by_hand, inputs(16, 24, 32, 8, dtype, backend=backend))


@every_backend
def test_pointers(backend):
    """The maximum score of each query; equal to the formula where scores are distinct."""
    q, k, v, _ = (t.detach() for t in inputs(6, 9, 8, backend=backend))
    scores = by_hand(*(t.cpu().double() for t in (q, k, v)))
    best = scores.topk(2).values
    assert ((best[..., 0] - best[..., 1]) > 1e-4).all()
    found = tm.pointer_argmax(q, k, v, backend=backend)
    assert torch.equal(found.cpu(), scores.argmax(-1))


def test_the_reference_in_float64():
    given = inputs(dtype=torch.float64)
    wanted = by_hand(*given)
    out = tm.additive_attention(*given)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    found = torch.autograd.grad(out, given, weight)
    for a, b in zip(found, torch.autograd.grad(wanted, given, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@examples(30)
@given(
    rows=st.integers(0, 3), keys=st.integers(0, 4), width=st.integers(0, 3),
    batch=st.integers(0, 2), pooled=st.booleans(),
    backend=st.sampled_from(PLAIN_SHAPES),
)  # fmt: skip
def test_any_shape(rows, keys, width, batch, pooled, backend):
    given = inputs(rows, keys, width, 2, batch=batch)[: 4 if pooled else 3]
    out = tm.additive_attention(*given, backend=backend)
    torch.testing.assert_close(out, by_hand(*given), rtol=1e-5, atol=1e-6)
    torch.autograd.grad(out.sum(), given)
    pointer = tm.pointer_argmax(*given[:3], backend=backend)
    exact = by_hand(*(t.double() for t in given[:3]))
    wanted = exact.argmax(-1) if keys else torch.full((batch, rows), -1)
    close = keys and exact.topk(min(keys, 2)).values.diff(dim=-1).abs() < 1e-5
    if not (torch.is_tensor(close) and close.any()):
        assert torch.equal(pointer, wanted)


def test_derivatives_of_both_orders():
    given = inputs(2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(tm.additive_attention, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(tm.additive_attention, given, fast_mode=True)


@every_backend
def test_a_query_that_sees_nothing(backend):
    given = inputs(backend=backend)
    mask = torch.ones(2, 5, 7, dtype=torch.bool, device=device_of(backend))
    mask[0, 1] = False
    out = tm.additive_attention(*given, mask=mask, backend=backend)
    assert not out[0, 1].any() and out[0, 2].all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), given))
    assert tm.pointer_argmax(*given[:3], mask=mask, backend=backend)[0, 1] == -1


@every_backend
def test_pointers_pass_over_nan_and_take_the_first_of_equals(backend):
    device = device_of(backend)
    q, v = torch.zeros(1, 1, 1, device=device), torch.ones(1, device=device)
    k = torch.tensor([[[torch.nan], [0.5], [2.0], [2.0]]], device=device)
    assert tm.pointer_argmax(q, k, v, backend=backend).tolist() == [[2]]
    assert tm.pointer_argmax(q, k[:, :1], v, backend=backend).tolist() == [[-1]]


def test_the_tangents_of_all_pairs_are_never_in_memory():
    q, k = (torch.randn(1, 300, 64, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        tm.additive_attention(q, k, torch.randn(64, requires_grad=True)).sum().backward()
    assert 0 < largest.elements <= 2**18 < 300 * 300 * 64


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"k": torch.zeros(2, 7, 5)}, r"k: must have shape \[2, N, 4\]; got \[2, 7, 5\]"),
        ({"v_weight": torch.zeros(5)}, r"v_weight: must have shape \[4\]; got \[5\]"),
        (
            {"v_weight": torch.zeros(4).half()},
            "v_weight: must have the dtype of q.*",
        ),
        ({"values": torch.zeros(2, 6, 3)}, r"values: must have shape \[2, 7, C\]; got \[2, 6, 3\]"),
        ({"mask": torch.ones(2, 7)}, "mask: must be bool; got float32"),
        ({"mask": torch.ones(2, 5).bool()}, r"mask: must have shape .*; got \[2, 5\]"),
        ({"q": torch.zeros(5, 4)}, r"q: must have 3 dimensions \[B, T, A\]; got 2"),
    ],
)
def test_bad_input(edits, says):
    q, k, v, values = (t.detach() for t in inputs())
    call = {"q": q, "k": k, "v_weight": v, "values": values, **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.additive_attention: {says}$"):
        tm.additive_attention(**call)
