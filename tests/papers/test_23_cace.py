"""The decay of CACE against matrices: normalized weights decay with distance on a grid."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from hypothesis import given
from hypothesis import strategies as st
from tensors import Largest, assert_keeps_budget, close, draw, each_backend, same_gradients
from tier import examples

import tokenmill as tm

EVERY = pytest.mark.parametrize("backend", backends("reference"))
DISTANCES = ("chebyshev", "manhattan")


def by_hand(q, k, v, gamma, width, distance="chebyshev", window=None, visible=None):
    """(softmax(q k) D) v with D = gamma^distance, 0 beyond the window."""
    rows, shared = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(shared, 2) for t in (k, v))
    z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if visible is not None:
        z = z.masked_fill(~visible, -torch.inf)
    cells = torch.arange(rows, device=q.device)
    y, x = (c.to(gamma.dtype) for c in (cells // width, cells % width))
    dy, dx = ((c[:, None] - c).abs() for c in (y, x))
    apart = torch.maximum(dy, dx) if distance == "chebyshev" else dy + dx
    fade = gamma[..., None, None] ** apart
    if window is not None:
        fade = fade * (apart <= window)
    return torch.einsum("bhij,bjhd->bihd", z.softmax(-1) * fade, v)


def inputs(rows, backend="cpu", dtype=torch.float32, heads=4):
    shapes = (2, rows, heads, 16), (2, rows, 2, 16), (2, rows, 2, 8)
    gamma = 1 - 2.0 ** -(1 + torch.arange(heads))
    return [
        *draw(backend, *shapes, dtype=dtype),
        gamma.to(device_of(backend), dtype).requires_grad_(),
    ]


@EVERY
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("window", [None, 2])
def test_is_the_softmax_times_the_decay(backend, distance, window):
    q, k, v, gamma = inputs(23, backend)
    decay = tm.masks.decay2d(gamma, 5, distance, window)
    out, lse = tm.attention(q, k, v, post_decay=decay, return_lse=True, backend=backend)
    wanted = by_hand(q, k, v, gamma, 5, distance, window)
    close(out, wanted)
    same_gradients(out, wanted, [q, k, v, gamma])
    plain = tm.attention(q, k, v, return_lse=True, backend=backend)[1]
    close(lse, plain)  # lse of the weights before decay


@each_backend
def test_the_released_defaults(backend):
    """Eight heads on a grid of 8 by 32, gamma_h = 1 - 2^(-5 - h)."""
    q, k, v, _ = inputs(256, backend, heads=8)
    gamma = (1 - 2.0 ** -(5 + torch.arange(8))).to(q)
    with Largest() as largest:
        out = tm.attention(q, k, v, post_decay=tm.masks.decay2d(gamma, width=32), backend=backend)
    assert backend == "reference" or largest.elements < 2 * 8 * 256 * 256
    close(out, by_hand(q, k, v, gamma, 32))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_keep_the_error_budget(backend, dtype):
    def function(q, k, v):
        decay = tm.masks.decay2d(gamma, 7)
        return tm.attention(q, k, v, post_decay=decay, backend=backend)

    *given, gamma = inputs(40, backend, dtype)
    gamma = gamma.detach()
    assert_keeps_budget(function, lambda q, k, v: by_hand(q, k, v, gamma.to(q.dtype), 7), given)


@each_backend
def test_gammas_of_0_and_1(backend):
    """0^0 = 1: each query sees only itself; the derivative comes from its neighbors."""
    q, k, v, _ = inputs(12, backend)
    gamma = torch.tensor([0.0, 1.0, 0.0, 0.5], device=q.device).requires_grad_()
    out = tm.attention(q, k, v, post_decay=tm.masks.decay2d(gamma, 4), backend=backend)
    wanted = by_hand(q, k, v, gamma, 4)
    close(out, wanted)
    close(out[:, :, 1], tm.attention(q, k, v, backend=backend)[:, :, 1])
    same_gradients(out, wanted, [q, k, v, gamma])


@each_backend
def test_goes_with_masks_and_a_batch_of_gammas(backend):
    q, k, v, _ = inputs(18, backend)
    gamma = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)).to(q)
    decay = tm.masks.decay2d(gamma, 6, window=3)
    out = tm.attention(q, k, v, post_decay=decay, causal=True, window=(9, 0), backend=backend)
    apart = torch.arange(18, device=q.device)[:, None] - torch.arange(18, device=q.device)
    close(out, by_hand(q, k, v, gamma, 6, window=3, visible=(apart >= 0) & (apart <= 9)))


@each_backend
def test_goes_with_every_term_and_the_gradient_of_lse(backend):
    q, k, v, gamma = inputs(21, backend)
    g = torch.Generator().manual_seed(5)
    bias, score_bias, sink = (
        torch.randn(shape, generator=g).to(q.device).requires_grad_()
        for shape in ((1, 4, 21, 21), (4,), (4,))
    )
    terms = {"bias": bias, "score_bias": score_bias, "sink": sink, "softcap": 2.0, "window": (9, 4)}
    decay = tm.masks.decay2d(gamma, 4)
    out, lse = tm.attention(q, k, v, post_decay=decay, **terms, return_lse=True, backend=backend)
    i = torch.arange(21, device=q.device)
    apart = torch.maximum(*((c[:, None] - c).abs() for c in (i // 4, i % 4)))
    k2, v2 = (t.repeat_interleave(2, 2) for t in (k, v))
    z = 2 * torch.tanh(torch.einsum("bihd,bjhd->bhij", q, k2) / 8) + bias
    z = (z + score_bias[:, None, None]).masked_fill(
        (i[:, None] - i > 9) | (i - i[:, None] > 4), -torch.inf
    )
    wanted_lse = torch.cat([z, sink[:, None, None].expand(2, 4, 21, 1)], -1).logsumexp(-1)
    p = (z - wanted_lse[..., None]).exp() * gamma[:, None, None] ** apart
    wanted = torch.einsum("bhij,bjhd->bihd", p, v2)
    close(out, wanted)
    close(lse, wanted_lse)
    of = [q, k, v, gamma, bias, score_bias, sink]
    same_gradients(
        torch.cat([out.flatten(), lse.flatten()]),
        torch.cat([wanted.flatten(), wanted_lse.flatten()]),
        of,
    )


@each_backend
def test_a_key_that_takes_all_weight_still_fades(backend):
    """A bias of +inf acts as the largest finite logit: the logit has no gradient, but its weight
    decays."""
    q, k, v, gamma = inputs(6, backend)
    bias = torch.zeros(1, 1, 6, 6, device=q.device)
    bias[..., 4] = torch.inf
    out = tm.attention(q, k, v, post_decay=tm.masks.decay2d(gamma, 6), bias=bias, backend=backend)
    apart = (torch.arange(6, device=q.device) - 4).abs()
    fade = gamma ** apart[:, None]
    wanted = fade[None, :, :, None] * v[:, 4].repeat_interleave(2, 1)[:, None]
    close(out, wanted)


@examples(20)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 50),
    distance=st.sampled_from(DISTANCES),
    window=st.sampled_from([None, 0, 1, 5]),
    backend=st.sampled_from(["cpu", "reference"]),
)
def test_any_grid(rows, width, distance, window, backend):
    q, k, v, gamma = inputs(rows)
    decay = tm.masks.decay2d(gamma, width, distance, window)
    out = tm.attention(q, k, v, post_decay=decay, backend=backend)
    close(out, by_hand(q, k, v, gamma, width, distance, window))


def test_gradcheck():
    given = [t.detach().double().requires_grad_() for t in inputs(6)]

    def function(q, k, v, gamma):
        return tm.attention(q, k, v, post_decay=tm.masks.decay2d(gamma, 3, "manhattan"))

    assert torch.autograd.gradcheck(function, given, fast_mode=True)


@EVERY
@pytest.mark.parametrize("distance", DISTANCES)
def test_slopes_over_a_grid_fall_before_the_softmax(backend, distance):
    q, k, v, gamma = inputs(23, backend)
    slopes = -gamma.detach().log()
    slopes.requires_grad_()
    grid = tm.masks.grid(5, distance)
    out = tm.attention(q, k, v, alibi_slopes=slopes, alibi_grid=grid, backend=backend)
    cells = torch.arange(23, device=q.device)
    dy, dx = ((c[:, None] - c).abs() for c in (cells // 5, cells % 5))
    apart = (torch.maximum(dy, dx) if distance == "chebyshev" else dy + dx).float()
    shared = [t.repeat_interleave(2, 2) for t in (k, v)]
    z = torch.einsum("bihd,bjhd->bhij", q, shared[0]) / 4 - slopes[:, None, None] * apart
    wanted = torch.einsum("bhij,bjhd->bihd", z.softmax(-1), shared[1])
    close(out, wanted)
    same_gradients(out, wanted, [q, k, v, slopes])


@pytest.mark.parametrize("backend", [b for b in ("cpu", "reference") if b in backends("reference")])
@pytest.mark.parametrize("kind", ["sigmoid", "relu", "elu1", "linear", "taylor2"])
def test_the_window_of_a_grid_hides_whatever_the_kind(backend, kind):
    q, k, v, gamma = (t.detach() for t in inputs(30, backend))
    slopes, grid = -gamma.log(), tm.masks.grid(6, window=2)
    cells = torch.arange(30)
    apart = torch.maximum(*((c[:, None] - c).abs() for c in (cells // 6, cells % 6)))
    bias = -slopes[None, :, None, None] * apart
    bias = bias.masked_fill(apart > 2, -torch.inf)
    for normalize in (None, "sum", "count"):
        options = {"kind": kind, "normalize": normalize, "backend": backend}
        out = tm.attention(q, k, v, alibi_slopes=slopes, alibi_grid=grid, **options)
        close(out, tm.attention(q, k, v, bias=bias, **options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"post_decay": 0.5}, "post_decay: must be a tokenmill.masks.decay2d; got 0.5"),
        ({"kind": "sigmoid"}, "post_decay: needs kind 'softmax', not; got 'sigmoid'"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes: must be None with post_decay; got a tens"),
        ({"alibi_grid": 3, "alibi_slopes": torch.ones(4), "post_decay": None},
         "alibi_grid: must be a tokenmill.masks.grid; got 3"),
        ({"alibi_grid": tm.masks.grid(3), "post_decay": None},
         "grid_width: needs alibi_slopes; got 3"),
        ({"post_decay": tm.masks.decay2d(torch.ones(3), 2)},
         r"alibi_slopes: must have shape \[4\] or \[2, 4\]; got \[3\]"),
    ],
)  # fmt: skip
def test_bad_calls(options, says):
    q, k, v, gamma = inputs(6)
    given = {"post_decay": tm.masks.decay2d(gamma, 3)} | options
    with pytest.raises(RuntimeError, match=f"^tokenmill.attention: {says}"):
        tm.attention(q, k, v, **given)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0,), "width: must be a positive int32; got 0"),
        ((2, "euclid"), "distance: must be 'chebyshev' or 'manhattan'; got 'euclid'"),
    ],
)
def test_bad_grids(arguments, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.masks.grid: {says}$"):
        tm.masks.grid(*arguments)
    with pytest.raises(RuntimeError, match=r"window: must not be negative; got -1$"):
        tm.masks.grid(2, window=-1)
    with pytest.raises(RuntimeError, match=r"decay2d: gamma: must be a floating-point tensor"):
        tm.masks.decay2d(torch.ones(2, dtype=torch.int32), 2)


def test_keys_must_be_the_cells_of_the_queries():
    q, k, v, gamma = inputs(6)
    with pytest.raises(RuntimeError, match="k: must be as long as q with a grid, 6; got 5"):
        tm.attention(q, k[:, 1:], v[:, 1:], post_decay=tm.masks.decay2d(gamma, 3))
