"""The forward of attention for compute capability 9.0a, on the PTX machine."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from conftest import backends

import tokenmill as tm
from tokenmill import _emulator
from tokenmill.dense.attention_draws import draw_tensor

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

F16, BF16 = torch.float16, torch.bfloat16
NAN, INF = float("nan"), float("inf")
MODES = (
    "async=latest",
    "async=earliest,order=reverse",
    "async=seed:1,order=seeded,fuel=300",
)


@contextlib.contextmanager
def hopper(mode: str = MODES[0]):
    with _emulator.configured(f"device=sm_90a,check=1,{mode}"):
        yield


def inputs(sq, sk=None, *, b=1, h=1, hk=1, d=64, dtype=F16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, sq, h, d), (b, sk or sq, hk, d), (b, sk or sq, hk, d)]
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def run(q, k, v, backend="emulated", **options):
    """(out,) or (out, lse)"""
    if options.get("kind", "softmax") == "softmax":
        options["return_lse"] = True
    found = tm.attention(q, k, v, backend=backend, **options)
    return found if isinstance(found, tuple) else (found,)


def check_budget(q, k, v, **options):
    """Against float64, within the budget; returns the results."""
    with hopper(), _emulator.counting() as launches:
        found = run(q, k, v, **options)
    (launch,) = launches
    assert "attention_forward_sm90_kernel" in launch["kernel"]
    wide, plain = (
        run(*(x.to(dtype) for x in (q, k, v)), backend="reference", **options)
        for dtype in (torch.float64, q.dtype)
    )
    for i, (actual, oracle, eager) in enumerate(zip(found, wide, plain, strict=True)):
        assert torch.equal(actual.isinf(), oracle.isinf())
        finite = oracle.isfinite()
        parts = (x[finite] for x in (actual, oracle, eager))
        tm.testing.assert_accurate(*parts, name=f"result {i}")
    return found


CASES = {
    "softmax": ({"sq": 130, "sk": 260, "h": 2, "hk": 1}, {}),
    "softmax causal, rows that see nothing": ({"sq": 200, "sk": 140}, {"causal": True}),
    "softmax, wide": ({"sq": 65, "sk": 129, "d": 128, "dtype": BF16}, {"causal": True}),
    "softmax window, three heads of a group": (
        {"sq": 150, "sk": 300, "h": 3, "dtype": BF16},
        {"window": (70, 20)},
    ),
    "softmax sink": ({"sq": 64, "sk": 128, "h": 2, "b": 2}, {"sink": torch.tensor([0.5, -1.0])}),
    "softmax, few keys": ({"sq": 40, "sk": 3}, {"scale": 3.0}),
    "softmax softcap": ({"sq": 64, "sk": 200}, {"softcap": 2.0, "scale": 1.0}),
    "sigmoid": ({"sq": 130, "sk": 260, "h": 2, "hk": 1}, {"kind": "sigmoid"}),
    "sigmoid, small weights": (
        {"sq": 64, "sk": 384, "dtype": BF16},
        {"kind": "sigmoid", "score_bias": "neg_log_n", "causal": True},
    ),
    "sigmoid, small weights, half": (
        {"sq": 64, "sk": 256},
        {"kind": "sigmoid", "score_bias": -math.log(4096)},
    ),
    "sigmoid, wide": (
        {"sq": 140, "sk": 200, "d": 128, "h": 2},
        {"kind": "sigmoid", "score_bias": torch.tensor([-5.0, 1.0]), "causal": True},
    ),
    "sigmoid fast": (
        {"sq": 33, "sk": 130, "dtype": BF16},
        {"kind": "sigmoid", "precision": "fast"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_results_keep_the_budget(name):
    shapes, options = CASES[name]
    check_budget(*inputs(**shapes), **options)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_every_order_of_events_gives_the_same_bits(kind):
    """Two heads of more tiles of queries and keys than there are stages."""
    q, k, v = inputs(200, 640, h=2)
    options = {"kind": kind, "window": (500, 0)}
    with _emulator.configured("device=sm_90a"):
        first = run(q, k, v, **options)
    for mode in MODES:
        with hopper(mode):
            again = run(q, k, v, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_blocks_take_several_tiles():
    """More tiles than multiprocessors, so that barriers and stages go on from tile to tile."""
    check_budget(*inputs(33, 140, h=134), kind="sigmoid", window=(100, -1))


PACKED = [{}, {"kind": "sigmoid", "score_bias": -6.0}]


@pytest.mark.parametrize("options", PACKED, ids=["softmax", "sigmoid"])
def test_packed_sequences(options):
    """They end inside of tiles; one is empty, one has queries alone, one fills its tile."""
    q, k, v = (x[0] for x in inputs(290, 340, h=2))
    cu_q, cu_k = (
        torch.tensor(ends, dtype=torch.int32)
        for ends in ([0, 70, 70, 200, 264, 290], [0, 60, 60, 300, 300, 340])
    )
    check_budget(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, **options)


def test_rows_without_a_sequence():
    q, k, v = (x[0] for x in inputs(300))
    inner = torch.tensor([0, 65, 250], dtype=torch.int32)
    with hopper():
        out, lse = run(q, k, v, cu_seqlens_q=inner + 5, cu_seqlens_k=inner + 5)
        wanted = run(*(x[5:255] for x in (q, k, v)), cu_seqlens_q=inner, cu_seqlens_k=inner)
    assert torch.equal(out[5:255], wanted[0]) and torch.equal(lse[:, 5:255], wanted[1])
    outside = [*range(5), *range(255, 300)]
    assert (out[outside] == 0).all() and (lse[:, outside] == -INF).all()


def test_a_sequence_does_not_see_what_is_packed_behind_it():
    q, k, v = (x[0] for x in inputs(160))
    cu = torch.tensor([0, 100, 160], dtype=torch.int32)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "kind": "sigmoid", "score_bias": -6.0}
    with hopper():
        (clean,) = run(q, k, v, **options)
        for x in (q, k, v):
            x[100:] = NAN
        (out,) = run(q, k, v, **options)
    assert torch.equal(out[:100], clean[:100])
    assert out[100:].isnan().all()


def test_strides():
    """One projection for all; heads in front of tokens."""
    packed = torch.randn(2, 70, 3, 2, 64, generator=torch.Generator().manual_seed(1)).half()
    check_budget(*packed.unbind(2))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(70, h=2, hk=2))
    check_budget(q, k, v, causal=True)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_later_token_touches_no_earlier_row(kind, value):
    q, k, v = inputs(140, d=128 if kind == "softmax" else 64)
    with hopper():
        (clean, *_) = run(q, k, v, kind=kind, causal=True)
        k[:, 120:, :, ::3] = NAN
        v[:, 120:, :, ::3] = v[:, 131:, :, 1] = value
        (out, *_) = run(q, k, v, kind=kind, causal=True)
    assert torch.equal(out[:, :120], clean[:, :120])
    assert not out[:, 120:, :, ::3].isfinite().any()


def test_values_that_are_not_finite_show_where_they_are_seen():
    q, k, v = inputs(140)
    v[:, 5, :, 7] = v[:, 100, :, 9] = INF
    v[:, 130, :, 7] = -INF
    with hopper():
        (out, _) = run(q, k, v, causal=True)
    (wanted, _) = run(q, k, v, backend="reference", causal=True)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())


def test_results_agree_with_the_kernel_of_every_chip():
    q, k, v = inputs(130, h=4, hk=2, d=128)
    with hopper():
        found = run(q, k, v, causal=True)
    other = run(q, k, v, causal=True)
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


TAKEN = {
    "": ({"sq": 32}, {}),
    "q: must be float16 or bfloat16": ({"sq": 32, "dtype": torch.float32}, {}),
    "q: must have head_dim 64 or 128": ({"sq": 32, "d": 80}, {}),
    "kind: must be 'softmax' or 'sigmoid'": ({"sq": 32}, {"kind": "relu"}),
    "normalize: must be 'none'": ({"sq": 32}, {"kind": "sigmoid", "normalize": "sum"}),
    "bias: must be None": ({"sq": 32}, {"bias": draw_tensor(1, 1, 1, 32)}),
    "alibi_slopes: must be None": ({"sq": 32}, {"alibi_slopes": torch.ones(1)}),
    "scale: must be above 0": ({"sq": 32}, {"scale": -1.0}),
    "q: must have 32 tokens": ({"sq": 31}, {}),
}


@pytest.mark.parametrize("why", TAKEN)
def test_explain_names_the_kernel_that_runs(why):
    shapes, options = TAKEN[why]
    q, k, v = inputs(**shapes)
    if callable(options.get("bias")):
        options = {"bias": options["bias"](q.dtype, torch.Generator())}
    with _emulator.configured("device=sm_90a"), _emulator.counting() as launches:
        kernel = tm.explain("attention", q, k, v, backend="emulated", **options).kernel
        run(q, k, v, **options)
    takes = "sm90" in launches[0]["kernel"]
    assert takes == ("attention/kernel_sm90 in" in kernel) == (why == "")
    assert why in kernel


def test_other_devices_have_the_kernel_of_every_chip():
    q, k, v = inputs(32)
    assert "sm90" not in tm.explain("attention", q, k, v, backend="emulated").kernel
