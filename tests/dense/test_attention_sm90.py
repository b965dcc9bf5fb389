"""The sm_90a forward of attention on the PTX machine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import backends
from sm90 import check_every_order, check_explained, hopper

import tokenmill as tm
from tokenmill import _emulator, _explain, registry
from tokenmill._call import kernels
from tokenmill.dense.attention_draws import draw_tensor

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

F16, BF16 = torch.float16, torch.bfloat16
NAN, INF = float("nan"), float("inf")


def inputs(sq, sk=None, *, b=1, h=1, hk=1, d=64, dtype=F16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, sq, h, d), (b, sk or sq, hk, d), (b, sk or sq, hk, d)]
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def run(q, k, v, backend="emulated", **options):
    """Returns (out,) or (out, lse)."""
    if options.get("kind", "softmax") == "softmax":
        options["return_lse"] = True
    found = tm.attention(q, k, v, backend=backend, **options)
    return found if isinstance(found, tuple) else (found,)


def check_budget(q, k, v, **options):
    """Compares with float64 within the error budget; returns the results."""
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
    "sigmoid, wide, bfloat16": (
        {"sq": 40, "sk": 130, "d": 128, "dtype": BF16},
        {"kind": "sigmoid"},
    ),
    "softmax, heads of 96": ({"sq": 70, "sk": 300, "d": 96, "h": 2}, {"window": (200, 10)}),
    "softmax, heads of 192": (
        {"sq": 65, "sk": 129, "d": 192, "dtype": BF16},
        {"causal": True, "sink": torch.tensor([0.5])},
    ),
    "softmax, heads of 256": (
        {"sq": 130, "sk": 200, "d": 256, "b": 2},
        {"causal": True, "softcap": 4.0, "scale": 0.5},
    ),
    "softmax, heads of 256, one key": ({"sq": 40, "sk": 1, "d": 256, "dtype": BF16}, {}),
    "sigmoid, heads of 96": (
        {"sq": 65, "sk": 130, "d": 96, "dtype": BF16},
        {"kind": "sigmoid", "score_bias": -6.0},
    ),
    "sigmoid, heads of 192": (
        {"sq": 130, "sk": 190, "d": 192},
        {"kind": "sigmoid", "score_bias": "neg_log_n", "causal": True},
    ),
    "sigmoid, heads of 256": (
        {"sq": 70, "sk": 193, "d": 256, "h": 2, "hk": 1},
        {"kind": "sigmoid", "window": (100, 20)},
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


ORDERS = {
    "softmax": ({"sq": 200, "sk": 640, "h": 2}, {"window": (500, 0)}),
    "softmax, wide": ({"sq": 64, "sk": 640, "d": 128}, {}),
    "softmax, heads of 96": ({"sq": 64, "sk": 600, "d": 96}, {}),
    "softmax, heads of 192": ({"sq": 64, "sk": 300, "d": 192}, {}),
    "softmax, heads of 256": ({"sq": 64, "sk": 300, "d": 256}, {}),
    "sigmoid": ({"sq": 200, "sk": 640, "h": 2}, {"window": (500, 0), "kind": "sigmoid"}),
    "sigmoid, wide": ({"sq": 64, "sk": 640, "d": 128}, {"kind": "sigmoid"}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_of_events_gives_the_same_bits(name):
    """More key tiles than pipeline stages; with two heads, more query tiles too."""
    shapes, options = ORDERS[name]
    q, k, v = inputs(**shapes)
    check_every_order(lambda: run(q, k, v, **options))


@pytest.mark.parametrize(("head_dim", "keys"), [(64, 300), (256, 40)])
def test_blocks_take_several_tiles(head_dim, keys):
    """More tiles than SMs, so that barriers and stages continue from tile to tile."""
    shape = inputs(33, keys, h=134, d=head_dim)
    check_budget(*shape, kind="sigmoid", window=(keys - 20, -1))


def test_the_largest_scores_keep_the_weights():
    """Half an ulp of their exponents is 256 or more."""
    g = torch.Generator().manual_seed(3)
    q, v = torch.full((1, 32, 1, 64), 20000.0).half(), torch.randn(1, 130, 1, 64, generator=g)
    k = torch.arange(1, 131).mul(16).view(1, 130, 1, 1).expand(v.shape)  # all weight: last key
    with hopper():
        out, lse = run(q, k.half(), v.half())
        single, _ = run(q, (q - 16)[:, :1], v.half()[:, :1])
    assert (out == v.half()[:, -1:]).all() and (single == v.half()[:, :1]).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 8 * 20000.0 * 2080))


def test_a_bias_of_nan_shows_in_rows_that_see_a_key():
    q, k, v = inputs(39, 6)
    with hopper():
        (out,) = run(q, k, v, kind="sigmoid", causal=True, score_bias=NAN)
    assert (out[:, :33] == 0).all() and out[:, 33:].isnan().all()


PACKED = {
    "softmax": (64, {}),
    "softmax, heads of 96": (96, {}),
    "sigmoid": (64, {"kind": "sigmoid", "score_bias": -6.0}),
    "softmax, heads of 192": (192, {}),
    "sigmoid, heads of 256": (256, {"kind": "sigmoid"}),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name):
    """Sequences end inside tiles; one is empty, one has only queries, one fills its tile."""
    head_dim, options = PACKED[name]
    q, k, v = (x[0] for x in inputs(290, 340, h=2, d=head_dim))
    cu_q, cu_k = (
        torch.tensor(ends, dtype=torch.int32)
        for ends in ([0, 70, 70, 200, 264, 290], [0, 60, 60, 300, 300, 340])
    )
    check_budget(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, **options)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_rows_without_a_sequence(head_dim):
    q, k, v = (x[0] for x in inputs(300, d=head_dim))
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
    """q, k and v in one projection; heads before tokens."""
    packed = torch.randn(2, 70, 3, 2, 64, generator=torch.Generator().manual_seed(1)).half()
    check_budget(*packed.unbind(2))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(70, h=2, hk=2))
    check_budget(q, k, v, causal=True)


# Queries, keys, and trailing tokens.
SQUARE = 140, 140, 20
CUT = 60, 180, 15  # earlier rows see more than 64 keys of the last tile of 96
LATER = [
    ("softmax", 128, NAN, SQUARE),
    ("softmax", 128, INF, SQUARE),
    ("softmax", 96, INF, SQUARE),
    ("softmax", 192, INF, CUT),
    ("softmax", 256, NAN, SQUARE),
    ("sigmoid", 64, NAN, SQUARE),
    ("sigmoid", 64, INF, SQUARE),
    ("sigmoid", 192, NAN, SQUARE),
]


@pytest.mark.parametrize(("kind", "head_dim", "value", "shape"), LATER)
def test_a_later_token_touches_no_earlier_row(kind, head_dim, value, shape):
    queries, keys, late = shape
    q, k, v = inputs(queries, keys, d=head_dim)
    with hopper():
        (clean, *_) = run(q, k, v, kind=kind, causal=True)
        k[:, -late:, :, ::3] = NAN
        v[:, -late:, :, ::3] = v[:, -9:, :, 1] = value
        (out, *_) = run(q, k, v, kind=kind, causal=True)
    assert torch.equal(out[:, :-late], clean[:, :-late])
    assert not out[:, -late:, :, ::3].isfinite().any()


@pytest.mark.parametrize("head_dim", [64, 256])
def test_values_that_are_not_finite_show_where_they_are_seen(head_dim):
    q, k, v = inputs(140, d=head_dim)
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
    "q: must have head_dim 64, 96, 128, 192 or 256": ({"sq": 32, "d": 80}, {}),
    "kind: must be 'softmax' or 'sigmoid'": ({"sq": 32}, {"kind": "relu"}),
    "normalize: must be 'none'": ({"sq": 32}, {"kind": "sigmoid", "normalize": "sum"}),
    "bias: must be None": ({"sq": 32}, {"bias": draw_tensor(1, 1, 1, 32)}),
    "alibi_slopes: must be None": ({"sq": 32}, {"alibi_slopes": torch.ones(1)}),
    "scale: must be 2^-126 or more in float32; got -1.0": ({"sq": 32}, {"scale": -1.0}),
    "scale: must be 2^-126 or more in float32; got 1e-46": ({"sq": 32}, {"scale": 1e-46}),
    "softcap: must be below 1e38 and at most 2^64 scale; got 3e+38": (
        {"sq": 32},
        {"softcap": 3e38},
    ),
    "softcap: must be below 1e38 and at most 2^64 scale; got 9e+37": (
        {"sq": 32},
        {"softcap": 9e37, "scale": 1e-8},
    ),
    "q: must have 32 tokens for each sequence; got 31": ({"sq": 31}, {}),
}


def check_explanation(why, q, k, v, **options):
    """Asserts that the kernel that runs is the one that explain names, and checks its results."""
    found = check_explained("attention", why, q, k, v, **options)
    options.pop("out", None)
    wanted = tm.attention(q, k, v, backend="reference", **options)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("why", TAKEN)
def test_explain_names_the_kernel_that_runs(why):
    shapes, options = TAKEN[why]
    q, k, v = inputs(**shapes)
    if callable(options.get("bias")):
        options = {"bias": options["bias"](q.dtype, torch.Generator())}
    check_explanation(why, q, k, v, **options)


def test_explain_knows_widths_keys_masks_and_sequences():
    q, k, v = inputs(64)
    check_explanation("v: must have the head_dim of q", q, k, v[..., :32].contiguous())
    check_explanation("k: must have tokens", q, k[:, :0], v[:, :0])
    end = torch.arange(1, 65, dtype=torch.int32).view(1, 1, 64, 1)
    mask = tm.masks.ranges(end - 1, end)
    check_explanation("mask_ranges: must be None", q, k, v, mask=mask)
    for ends, why in (
        ([0, 31, 64], ""),
        ([0, 20, 30, 64], "q: must have 32 tokens for each sequence; got 64"),
    ):
        cu = torch.tensor(ends, dtype=torch.int32)
        check_explanation(why, q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_explain_knows_the_layouts_of_tensor_maps():
    q, k, v = inputs(64, h=2, hk=2)
    start = "must start at a multiple of 16 bytes; got 2 bytes past one"
    strides = "must have strides that are multiples of 8, of 64 or more; got "

    def shifted(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)

    check_explanation(f"q: {start}", shifted(q), k, v)
    check_explanation(f"out: {start}", q, k, v, out=shifted(q))
    padded = torch.empty(1, 64, 2, 68, dtype=q.dtype)[..., :64]
    check_explanation(f"out: {strides}(8704, 136, 68, 1)", q, k, v, out=padded)
    check_explanation(f"v: {strides}(8704, 136, 68, 1)", q, k, padded.copy_(v))
    check_explanation(f"k: {strides}(8192, 128, 0, 1)", q, k[:, :, :1].expand(q.shape), v)
    overlapping = k.flatten().as_strided((1, 64, 2, 64), (4096, 64, 8, 1))
    check_explanation(f"k: {strides}(4096, 64, 8, 1)", q, overlapping, v)


@pytest.mark.parametrize("built", [True, False])
def test_explain_names_the_kernel_of_a_card(built, monkeypatch):
    def table(*call):
        *rows, last = kernels.table(*call)
        return [*(replace(row, built=built) for row in rows), replace(last, built=True)]

    monkeypatch.setattr(_explain, "_current_capability", lambda *_: 90)
    monkeypatch.setattr(_explain, "table", table)
    spec = registry.get("attention")
    kernel = _explain.kernel_name(spec, "cuda", spec.lower(*inputs(32)))
    ending = "/kernel_sm90" if built else " (not kernel_sm90: the build has no 90a)"
    assert kernel == f"csrc/dense/attention{ending}, float16"


def test_other_devices_have_the_kernel_of_every_chip():
    q, k, v = inputs(32)
    assert "sm90" not in tm.explain("attention", q, k, v, backend="emulated").kernel
