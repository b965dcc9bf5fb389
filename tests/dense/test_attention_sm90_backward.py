"""The sm_90a backward of attention on the PTX machine."""

from __future__ import annotations

import math

import pytest
import sm90
import torch
from conftest import backends

import tokenmill as tm
from tokenmill import _emulator
from tokenmill.dense.attention import SPEC

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

F16, BF16 = torch.float16, torch.bfloat16
KERNEL = "attention_backward_sm90_kernel"
MODES = (*sm90.MODES[:2], f"{sm90.MODES[2]},resident_blocks=3")


def inputs(sq, sk=None, *, b=1, h=1, hk=1, d=64, dtype=F16):
    """Returns q, k, v and dout."""
    g = torch.Generator().manual_seed(0)
    shapes = [(b, sq, h, d), (b, sk or sq, hk, d), (b, sk or sq, hk, d), (b, sq, h, d)]
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def gradients(q, k, v, dout, attend=None, **options):
    """Gradients of q, k, v and of options that require one; for softmax with return_lse, through
    lse too."""
    asked = {n: t for n, t in options.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *asked.values())]
    options |= dict(zip(asked, leaves[3:], strict=True))
    found = (attend or tm.attention)(*leaves[:3], **options)
    out, *lse = found if isinstance(found, tuple) else (found,)
    cotangents = [dout, *(torch.ones_like(x) for x in lse)]
    return torch.autograd.grad([out, *lse], leaves, cotangents)


def plain(q, k, v, **options):
    """PyTorch in the dtype of q."""
    count = 2 if options.get("return_lse") else 1
    return SPEC.plain(SPEC.record(q, k, v, **options))[:count]


def run(tensors, mode=MODES[0], taken=True, **options):
    with sm90.hopper(mode), _emulator.counting() as launches:
        found = gradients(*tensors, backend="emulated", **options)
    assert any(KERNEL in launch["kernel"] for launch in launches) == taken
    return found


def check_budget(tensors, mode=MODES[0], taken=True, **options):
    found = run(tensors, mode, taken, **options)
    wide = gradients(*(x.double() for x in tensors), backend="reference", **options)
    eager = gradients(*tensors, attend=plain, **options)
    for i, (actual, oracle, baseline) in enumerate(zip(found, wide, eager, strict=True)):
        tm.testing.assert_accurate(actual, oracle, baseline, gradient=True, name=f"gradient {i}")
    return found


GRADED = torch.tensor([-0.5, -3.0], requires_grad=True)
CASES = {
    "softmax": ({"sq": 130, "sk": 260, "h": 2, "b": 2}, {}),
    "softmax causal, rows that see nothing": ({"sq": 300, "sk": 140}, {"causal": True}),
    "softmax, wide, three heads of a group": (
        {"sq": 150, "sk": 300, "h": 3, "d": 128, "dtype": BF16},
        {"window": (70, 20)},
    ),
    "softmax, gradient of lse": ({"sq": 64, "sk": 40, "d": 128}, {"return_lse": True}),
    "softmax, gradients of sink and score_bias": (
        {"sq": 64, "sk": 128, "h": 2},
        {
            "sink": torch.tensor([0.5, -1.0], requires_grad=True),
            "score_bias": torch.tensor([0.2, -2.0], requires_grad=True),
        },
    ),
    "softmax, bfloat16, few queries": (
        {"sq": 32, "sk": 300, "dtype": BF16},
        {"window": (30, 0), "scale": 0.5},
    ),
    "sigmoid": ({"sq": 130, "sk": 260, "h": 4, "hk": 2}, {"kind": "sigmoid", "causal": True}),
    "sigmoid, wide": (
        {"sq": 140, "sk": 200, "d": 128, "h": 2},
        {"kind": "sigmoid", "score_bias": torch.tensor([-5.0, 1.0])},
    ),
    "sigmoid, small weights": (
        {"sq": 64, "sk": 256, "dtype": BF16},
        {"kind": "sigmoid", "score_bias": "neg_log_n"},
    ),
    "sigmoid, small weights, half": (
        {"sq": 64, "sk": 130},
        {"kind": "sigmoid", "score_bias": -math.log(4096)},
    ),
    "softmax, heads of 96": (
        {"sq": 70, "sk": 200, "h": 2, "d": 96},
        {"causal": True, "return_lse": True},
    ),
    "sigmoid, heads of 96": (
        {"sq": 130, "sk": 130, "d": 96, "dtype": BF16},
        {"kind": "sigmoid", "softcap": 3.0, "score_bias": -3.0},
    ),
    "softmax, heads of 192, two of a group": (
        {"sq": 100, "sk": 200, "h": 2, "d": 192, "dtype": BF16},
        {"window": (70, 20), "softcap": 1.5},
    ),
    "softmax, heads of 192, gradients of sink and score_bias": (
        {"sq": 65, "sk": 63, "h": 2, "hk": 2, "d": 192},
        {
            "sink": torch.tensor([0.5, -1.0], requires_grad=True),
            "score_bias": torch.tensor([0.2, -2.0], requires_grad=True),
        },
    ),
    "softmax, heads of 256": (
        {"sq": 200, "sk": 130, "b": 2, "d": 256},
        {"causal": True, "return_lse": True},
    ),
    "sigmoid, heads of 192": (
        {"sq": 129, "sk": 129, "h": 2, "d": 192},
        {"kind": "sigmoid", "causal": True, "score_bias": GRADED},
    ),
    "sigmoid, heads of 256, one key": ({"sq": 65, "sk": 1, "d": 256}, {"kind": "sigmoid"}),
    "sigmoid, heads of 256": (
        {"sq": 130, "sk": 127, "h": 2, "d": 256, "dtype": BF16},
        {"kind": "sigmoid", "window": (70, 9), "score_bias": GRADED},
    ),
    "sigmoid fast, heads of 256, capped": (
        {"sq": 32, "sk": 65, "d": 256},
        {"kind": "sigmoid", "softcap": 2.0, "precision": "fast", "score_bias": -2.0},
    ),
    "softmax, capped": ({"sq": 70, "sk": 130, "h": 2}, {"softcap": 1.5, "causal": True}),
    "softmax, capped, wide": (
        {"sq": 70, "sk": 130, "d": 128, "dtype": BF16},
        {"softcap": 0.7, "return_lse": True},
    ),
    "sigmoid, capped": ({"sq": 130}, {"kind": "sigmoid", "softcap": 1.0, "score_bias": -2.0}),
    "sigmoid fast, capped": (
        {"sq": 64, "d": 128},
        {"kind": "sigmoid", "softcap": 2.0, "precision": "fast", "window": (9, 3)},
    ),
    "sigmoid, gradient of score_bias": (
        {"sq": 140, "sk": 300, "h": 4, "hk": 2, "b": 2},
        {
            "kind": "sigmoid",
            "causal": True,
            "score_bias": torch.tensor([0.3, -3.0, 1.0, -6.0], requires_grad=True),
        },
    ),
    "sigmoid fast, gradient of score_bias": (
        {"sq": 70, "sk": 130, "d": 128, "dtype": BF16},
        {
            "kind": "sigmoid",
            "precision": "fast",
            "window": (20, 0),
            "score_bias": torch.tensor([-1.0], requires_grad=True),
        },
    ),
    "sigmoid fast": (
        {"sq": 130, "sk": 130, "d": 128, "dtype": BF16},
        {"kind": "sigmoid", "precision": "fast", "scale": -0.1, "causal": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_keep_the_budget(name):
    shapes, options = CASES[name]
    check_budget(inputs(**shapes), **options)


@pytest.mark.parametrize(
    "shape, options",
    [
        ({"d": 128}, {"causal": True}),
        ({"d": 96}, {"window": (100, -1)}),
        ({"h": 2}, {"kind": "sigmoid", "window": (200, 90), "score_bias": GRADED}),
        ({"sq": 150, "sk": 200, "h": 2, "d": 192}, {"kind": "sigmoid", "score_bias": GRADED}),
        ({"sq": 200, "sk": 200, "h": 2, "d": 256}, {"causal": True}),
    ],
    ids=["softmax", "heads of 96", "sigmoid", "heads of 192", "heads of 256"],
)
def test_every_order_of_events_and_blocks_gives_the_same_bits(shape, options):
    """Four CTAs add to the tiles of dQ."""
    tensors = inputs(**{"sq": 260, "sk": 400, **shape})
    first, *others = (run(tensors, mode, **options) for mode in MODES)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_blocks_that_begin_last_wait_for_none_that_have_not_begun():
    """132 of 134 CTAs run at once, and each waits for the CTAs of later keys."""
    check_budget(inputs(32, 128 * 134), "async=latest,order=reverse")


def test_small_slopes_in_float16_keep_their_digits():
    """The weights are 2^-20."""
    q, k, v, dout = inputs(64, 130)
    tensors = q, k, v, 1024 * dout
    options = {"kind": "sigmoid", "score_bias": -20 * math.log(2)}
    wide = gradients(*(x.double() for x in tensors), backend="reference", **options)
    for actual, oracle in zip(run(tensors, **options), wide, strict=True):
        assert (actual - oracle).norm() < 1e-3 * oracle.norm()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("device", ["sm_80", "sm_90a"])
def test_the_largest_scale_leaves_scores_of_zero(device, kind):
    """The largest scale times log2(e) is finite."""
    q, k, v, dout = inputs(32, 40)
    for scale in (2.0**127, -(2.0**127)):
        options = {"kind": kind, "scale": scale}
        with _emulator.configured(f"device={device},check=1"):
            _, dk, dv = gradients(0 * q, k, v, dout, backend="emulated", **options)
        _, _, wanted = gradients(0 * q, k, v, dout, backend="reference", **options)
        assert (dk == 0).all()
        torch.testing.assert_close(dv, wanted, rtol=2e-3, atol=2e-3)


def test_keys_and_queries_that_see_nothing_have_no_gradient():
    dq, dk, dv = run(inputs(340, 300), window=(20, 0))
    assert (dq[:, :40] == 0).all() and dq[:, 40:].any(dim=-1).all()
    tensors = inputs(40, 300, d=128)
    dq, dk, dv = run(tensors, window=(20, 0), kind="sigmoid")
    assert (dk[:, :240] == 0).all() and (dv[:, :240] == 0).all() and dv[:, 240:].any(dim=-1).all()


@pytest.mark.parametrize("d, clear", [(64, 128), (256, 256)])
def test_a_later_token_touches_no_earlier_tile(d, clear):
    """The causal mask hides NaN tokens from whole tiles."""
    q, k, v, dout = inputs(300, d=d)
    clean = run((q, k, v, dout), causal=True)
    for x in (k, v):
        x[:, 280:] = math.nan
    dirty = run((q, k, v, dout), causal=True)
    assert torch.equal(dirty[0][:, :clear], clean[0][:, :clear]) and dirty[0][:, 280:].isnan().all()


@pytest.mark.parametrize("d, clear", [(64, 128), (192, 64)])
def test_an_earlier_query_touches_no_later_tile(d, clear):
    """The causal mask hides NaN queries and NaN gradients from whole tiles."""
    q, k, v, dout = inputs(300, d=d)
    clean = run((q, k, v, dout), causal=True)
    q[:, :10] = math.nan
    dout[:, 20:30] = math.nan
    dirty = run((q, k, v, dout), causal=True)
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a[:, clear:], b[:, clear:]) and a[:, :10].isnan().all()


def packed(sq, sk=None, **shape):
    return tuple(x[0] for x in inputs(sq, sk, **shape))


def ends(*rows):
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    "shape, options",
    [
        ({"h": 2}, {"causal": True}),
        ({"h": 4, "hk": 2}, {"softcap": 1.5, "window": (40, 10)}),
        ({"d": 128}, {"kind": "sigmoid", "score_bias": "neg_log_n"}),
        ({"d": 192}, {"kind": "sigmoid", "causal": True}),
        ({"d": 256, "h": 2}, {"window": (40, 10), "return_lse": True}),
    ],
    ids=["softmax", "softmax, capped", "sigmoid", "heads of 192", "heads of 256"],
)
def test_packed_sequences(shape, options):
    """One sequence is empty, one has only keys, one only queries, one fills its tile."""
    cu_q, cu_k = ends(0, 70, 70, 70, 110, 174, 200), ends(0, 60, 60, 100, 100, 300, 340)
    check_budget(packed(200, 340, **shape), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)


@pytest.mark.parametrize("d, precision", [(64, "accurate"), (192, "fast")])
def test_packed_sequences_have_gradients_of_score_bias_each(d, precision):
    cu_q, cu_k = ends(0, 70, 70, 200), ends(0, 60, 100, 300)
    bias = torch.tensor([[0.5, -1.0], [0.0, 0.0], [-4.0, 1.0]], requires_grad=True)
    options = {"kind": "sigmoid", "precision": precision, "score_bias": bias}
    check_budget(packed(200, 300, h=2, d=d), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)


@pytest.mark.parametrize("kind, d", [("softmax", 96), ("sigmoid", 64), ("softmax", 256)])
def test_a_packed_sequence_has_the_bits_that_it_has_alone(kind, d):
    """This holds in every order of events; rows outside all sequences, NaN here, have no
    gradient."""
    tensors = packed(262, d=d)
    alone = [run([x[None, a:b] for x in tensors], kind=kind) for a, b in ((5, 70), (70, 250))]
    for x in tensors:
        x[:5] = x[250:] = math.nan
    cu = ends(5, 70, 250)
    for mode in MODES:
        found = run(tensors, mode, kind=kind, cu_seqlens_q=cu, cu_seqlens_k=cu)
        for i, x in enumerate(found):
            assert torch.equal(x[5:250], torch.cat([y[i][0] for y in alone]))
            assert (x[:5] == 0).all() and (x[250:] == 0).all()


@pytest.mark.parametrize("d", [64, 256])
def test_a_packed_sequence_takes_no_nan_of_another_one(d):
    tensors = packed(160, d=d)
    cu = ends(0, 100, 160)
    clean = run(tensors, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for x in tensors:
        x[100:] = math.nan
    for a, b in zip(run(tensors, cu_seqlens_q=cu, cu_seqlens_k=cu), clean, strict=True):
        assert torch.equal(a[:100], b[:100]) and a[100:].isnan().all()


@pytest.fixture
def nan_of_what_is_not_written():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("rows", [(9, -7, 90, 40, 2**31 - 1), (150, 20, 80, 100, 130)])
def test_cu_seqlens_out_of_order_and_range_stay_in_bounds(rows, d, nan_of_what_is_not_written):
    """No CTA waits for a turn that never comes, and all rows are written."""
    other = ends(0, 40, 80, 120, 170)
    for cu_q, cu_k in ((ends(*rows), other), (other, ends(*rows))):
        for x in run(packed(170, d=d), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k):
            assert x.isfinite().all()


def test_strides():
    """q, k and v in one projection; heads before tokens."""
    packed = torch.randn(2, 70, 3, 2, 64, generator=torch.Generator().manual_seed(1)).half()
    dout = torch.randn(2, 2, 70, 64, generator=torch.Generator().manual_seed(2)).half()
    check_budget((*packed.unbind(2), dout.transpose(1, 2)), kind="sigmoid")


def unaligned(x):
    padded = torch.zeros(x.numel() + 8, dtype=x.dtype)
    return padded[1 : 1 + x.numel()].view(x.shape).copy_(x)


ZEROS = torch.zeros(1, 1, 32, 1, dtype=torch.int32)
LEFT = {
    "q: must have head_dim 64, 96, 128, 192 or 256; got 80": {},
    "softcap: must be below 1e38": {"softcap": 1e38},
    "scale: must be 2^-126 or more": {"softcap": 2.0, "scale": -1.0},
    "q: must have 32 tokens for each sequence": {
        "cu_seqlens_q": ends(0, 20, 32),
        "cu_seqlens_k": ends(0, 20, 32),
    },
    "score_bias: must not require a gradient with a softcap": {
        "kind": "sigmoid",
        "softcap": 2.0,
        "score_bias": torch.zeros(1, dtype=F16, requires_grad=True),
    },
    "kind: must be 'softmax' or 'sigmoid'": {"kind": "relu"},
    "normalize: must be 'none'": {"kind": "sigmoid", "normalize": "sum"},
    "bias: must be None": {"bias": torch.ones(32, 32)},
    "mask_ranges: must be None": {"mask": tm.masks.ranges(ZEROS, ZEROS + 9)},
    "alibi_slopes: must be None": {"alibi_slopes": torch.ones(1)},
    "q: must start at a multiple of 16 bytes": {},
    "k: must have strides": {},
    "k: must have tokens": {},
}


def explained(q, k, v, **options):
    with _emulator.configured("device=sm_90a"):
        return tm.explain("attention", q, k, v, backend="emulated", **options).kernel


@pytest.mark.parametrize("why", LEFT)
def test_explain_names_the_rule_of_a_call_that_is_left(why):
    """The sm_80 backward computes such a call correctly."""
    q, k, v, dout = inputs(32, d=80 if why.endswith("80") else 64)
    options = LEFT[why]
    if "cu_seqlens_q" in options:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
    if why.startswith("q: must start"):
        q = unaligned(q)
    if why == "k: must have strides":
        k = k[:, :1].expand(-1, 32, -1, -1)
    if why == "k: must have tokens":
        k, v = k[:, :0], v[:, :0]
        assert all((x == 0).all() for x in run((q, k, v, dout), taken=False))
    else:
        check_budget((q, k, v, dout), taken=False, **options)
    kernel = explained(q.detach().requires_grad_(), k, v, **options)
    assert "attention's backward (not kernel_backward_sm90: " in kernel and why in kernel


def test_explain_names_the_backward_of_calls_that_need_one():
    q, k, v, dout = inputs(32)
    assert "backward" not in explained(q, k, v)
    q.requires_grad_()
    assert "/kernel_sm90 and kernel_backward_sm90" in explained(q, k, v, softcap=1e-46)
    with torch.no_grad():
        assert "backward" not in explained(q, k, v)
    run((q, k, v, dout), softcap=1e-46)  # rounds to 0 in float32


def test_a_gradient_of_the_output_that_is_broadcast_is_left():
    q, k, v, dout = inputs(32)
    check_budget((q, k, v, dout[:, :1].expand(q.shape)), taken=False)
