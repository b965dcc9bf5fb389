"""additive_attention against its definition: tiles, masks, masked values, strides."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_kernel
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

EACH_CPU = pytest.mark.parametrize(
    ("backend", "isa"),
    [pytest.param(b, i, id=i) for b, i in cpu_variants() if b == "cpu"],
    indirect=["isa"],
)


def draw(batch, rows, keys, width, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows + keys)
    shapes = (batch, rows, width), (batch, keys, width), (width,)
    return [(torch.randn(s, generator=g) * scale).to(dtype).requires_grad_() for s in shapes]


def gradients(inputs, backend, cotangent, mask=None):
    there = [t.detach().to(device_of(backend)).requires_grad_() for t in inputs]
    mask = None if mask is None else mask.to(device_of(backend))
    scores = tm.additive_attention(*there, mask=mask, backend=backend)
    found = torch.autograd.grad(scores, there, cotangent.to(scores))
    return scores.detach().cpu(), [g.cpu() for g in found]


def assert_right(inputs, backend, mask=None):
    shape = (inputs[0].shape[0], inputs[0].shape[1], inputs[1].shape[1])
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scores, found = gradients(inputs, backend, cotangent, mask)
    wide = [t.detach().double() for t in inputs]
    oracle, wanted = gradients(wide, "reference", cotangent, mask)
    plain, plainly = gradients(inputs, "reference", cotangent, mask)
    tm.testing.assert_accurate(scores, oracle, plain)
    for name, a, b, c in zip(("q", "k", "v_weight"), found, wanted, plainly, strict=True):
        tm.testing.assert_accurate(a, b, c, gradient=True, name=name)


# A tile of scores is 32 x 256 pairs, a tile of gradients 64 x 128 and one vector.
@EACH_CPU
@pytest.mark.parametrize("shape", [(1, 35, 259, 5), (2, 131, 130, 17), (1, 65, 3, 40)])
def test_tiles_and_parts_of_the_cpu(shape, backend, isa):
    assert_right(draw(*shape), backend)


# Grids that fill the device use 64 x 64 tiles, others 4 x 64, and up to two queries 1 x 16.
@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
def test_tiles_of_the_grid(backend):
    assert_right(draw(132, 9, 2, 2), backend)
    assert_right(draw(1, 6, 130, 34), backend, mask=torch.arange(130)[None] % 67 < 60)


@EACH_CPU
@examples(25)
@given(
    batch=st.integers(0, 2), rows=st.integers(0, 9), keys=st.integers(0, 20),
    width=st.integers(0, 19), masked=st.booleans(), scale=st.sampled_from([1e-4, 1.0]),
)  # fmt: skip
def test_any_shape(backend, isa, batch, rows, keys, width, masked, scale):
    mask = torch.rand(batch, rows, keys) < 0.5 if masked else None
    assert_right(draw(batch, rows, keys, width, scale), backend, mask)


@pytest.mark.parametrize("backend", backends("reference"))
def test_what_the_mask_hides_reaches_nothing(backend):
    inputs = draw(2, 5, 9, 6)
    mask = torch.ones(2, 5, 9, dtype=torch.bool)
    mask[:, :, 7:] = mask[0, 3] = False
    cotangent = torch.randn(2, 5, 9)
    want = gradients(inputs, backend, cotangent, mask)
    with torch.no_grad():
        inputs[0][0, 3] = torch.nan
        inputs[1][:, 7:] = torch.tensor([torch.nan, torch.inf]).repeat(3)
    got = gradients(inputs, backend, cotangent, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not got[1][0][0, 3].any() and not got[1][1][:, 7:].any()


@each_kernel
def test_scores_without_a_gradient_add_nothing(backend):
    inputs = draw(1, 3, 5, 4)
    cotangent = torch.ones(1, 3, 5)
    cotangent[0, 1] = cotangent[0, :, 2] = 0
    want = gradients(inputs, backend, cotangent)[1]
    with torch.no_grad():
        inputs[0][0, 1] = inputs[1][0, 2] = torch.nan
    got = gradients(inputs, backend, cotangent)[1]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", backends("reference"))
def test_nan_and_infinities(backend):
    q = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, 100.0])[None, :, None]
    k = torch.tensor([0.5, torch.inf])[None, :, None]
    q, k, v = (t.to(device_of(backend)) for t in (q, k, torch.ones(1)))
    scores = tm.additive_attention(q, k, v, backend=backend)[0].cpu()
    nan = torch.nan
    wanted = [[0.46211716, 1.0], [nan, nan], [1.0, 1.0], [-1.0, nan], [1.0, 1.0]]
    torch.testing.assert_close(scores, torch.tensor(wanted), equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_strides(backend):
    q, k, v = (t.detach() for t in draw(2, 3, 5, 4))
    mask = torch.rand(2, 3, 5) < 0.5
    want = tm.additive_attention(q, k, v, mask=mask, backend=backend)
    apart = [t.unsqueeze(-1).expand(*t.shape, 2)[..., 0] for t in (q, k, v)]
    turned = [t.mT.contiguous().mT if t.dim() > 1 else t for t in (q, k, v, mask)]
    got = tm.additive_attention(*turned[:3], mask=turned[3], backend=backend)
    assert torch.equal(got, want)
    assert torch.equal(tm.additive_attention(*apart, mask=mask, backend=backend), want)


@pytest.mark.parametrize("backend", backends("reference"))
def test_pointers_on_each_backend(backend):
    q, k, v = (t.detach().to(device_of(backend)) for t in draw(2, 3, 5, 4))
    mask = torch.ones(2, 5, dtype=torch.bool, device=q.device)
    mask[1] = False
    scores = tm.additive_attention(q, k, v, backend=backend)
    found = tm.pointer_argmax(q, k, v, mask=mask, backend=backend)
    assert torch.equal(found[0], scores[0].argmax(-1))
    assert found[1].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
def test_a_query_alone_has_the_bits_that_it_has_among_others(backend):
    q, k, v = (t.detach().to(device_of(backend)) for t in draw(2, 3, 21, 133))
    mask = torch.rand(2, 3, 21, device=q.device) < 0.7
    among = tm.additive_attention(q, k, v, mask=mask, backend=backend)
    alone = tm.additive_attention(q[:, 1:2], k, v, mask=mask[:, 1:2], backend=backend)
    assert torch.equal(alone, among[:, 1:2])
