"""PAINT against its released code: hasanar1f/PAINT at 2a9e8f8, modPAI/attention.py for the logits,
modPAI/llava/model/multimodal_encoder/clip_encoder.py for the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import device_of
from hypothesis import given
from hypothesis import strategies as st
from tensors import close, draw, every_backend, in_each_16_bits, same_gradients
from tier import examples

import tokenmill as tm
from tokenmill.testing import assert_accurate

ALPHA, BETA = 0.7, 0.3


def released_tokens(first, late):
    """Sets of local and summary patches of one image, from maps [H, 1 + N, 1 + N]: a quarter by the
    class token's row in the first map, excluding the outliers of that row in the other map, which
    are as many of its largest as there are values over the whisker."""
    patches = first.shape[-1] - 1
    row, other = first[:, 0, 1:].sum(0), late[:, 0, 1:].sum(0)
    low, high = np.percentile(other.numpy(), [25, 75])
    outliers = int((other.numpy() > high + 1.5 * (high - low)).sum())
    largest = row.topk(int(patches * 0.25)).indices.tolist()
    summary = set(other.topk(outliers).indices.tolist())
    return set(largest) - summary, summary


def released_attention(q, k, v, raised, last=1):
    """Row by row over the causal triangle; raised: a list of (share, keys) for the last rows."""
    rows, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
    out = []
    for i in range(rows):
        seen = i + 1 + keys - rows
        z = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, :seen]) * q.shape[-1] ** -0.5
        if i >= rows - last:
            more = torch.zeros_like(z)
            for share, places in raised:
                places = [j for j in places if j < seen]
                more[..., places] = share * z[..., places].abs()
            z = z + more
        out.append(torch.einsum("bhj,bjhd->bhd", z.softmax(-1), v[:, :seen]))
    return torch.stack(out, 1)


def gains_of(keys, raised, backend):
    gains = torch.zeros(1, 1, keys)
    for share, places in raised:
        gains[..., places] = share
    return gains.to(device_of(backend))


RAISED = [(ALPHA, [2, 3, 6]), (BETA, [4, 8])]


@every_backend
@pytest.mark.parametrize("rows", [10, 1], ids=["prompt", "step"])
def test_logits_of_the_last_row_are_those_of_the_release(rows, backend):
    q, k, v = leaves = draw(backend, (2, rows, 4, 16), (2, 10, 2, 16), (2, 10, 2, 8))
    want = released_attention(q, k, v, RAISED)
    got = tm.amplified_attention(q, k, v, gains_of(10, RAISED, backend), causal=True,
                                 backend=backend)  # fmt: skip
    close(got, want)
    same_gradients(got, want, leaves)


def test_factors_of_weights_do_not_reach_it():
    """A negative logit of a local token rises less than a positive one of the same size: weights
    change by factors that differ between queries."""
    q, k, v = (t.detach() for t in draw("reference", (1, 10, 4, 16), (1, 10, 2, 16), (1, 10, 2, 8)))
    want = released_attention(q, k, v, RAISED)[:, -1]
    plain = tm.attention(q, k, v, causal=True)[:, -1]
    groups = torch.zeros(1, 1, 10, dtype=torch.int32)
    groups[..., RAISED[0][1]], groups[..., RAISED[1][1]] = 1, 2
    minimum = (plain - want).norm()
    for a in torch.linspace(0.2, 4, 20):
        for b in torch.linspace(0.2, 4, 20):
            factors = torch.tensor([1.0, a, b])
            out = tm.reweighted_attention(
                q, k, v, groups, factors, causal=True, renormalize="all"
            )[:, -1]  # fmt: skip
            minimum = min(minimum, (out - want).norm())
    assert minimum > 0.1 * want.norm()


@every_backend
def test_tokens_are_those_of_the_release(backend):
    batch, patches, heads = 2, 40, 3
    maps, found = [], []
    for seed in (0, 1):
        q, k = (
            t.detach() for t in draw(backend, *2 * [(batch, 1 + patches, heads, 16)], seed=seed)
        )
        if seed:  # the second-last layer has outliers
            k[:, [5, 9, 31]] += 2 * q[:, :1]
        z = torch.einsum("bihd,bjhd->bhij", q, k) * 16**-0.5
        maps.append(z.softmax(-1).cpu())
        found.append(tm.attention_row_scores(q[:, :1], k, skip=1, backend=backend))
    local, summary = tm.paint_tokens(*found, backend=backend)
    for b in range(batch):
        wanted = released_tokens(maps[0][b], maps[1][b])
        got = tuple(set(m[b].nonzero().flatten().tolist()) for m in (local, summary))
        assert got == wanted
        assert len(wanted[1]) >= 3 and len(wanted[0]) >= 6


@every_backend
def test_a_call_from_scores_to_the_step(backend):
    """Tokens of an image after 3 text tokens, and the gains of each request."""
    first = torch.arange(8.0).expand(2, 8).clone()
    first[1] = first[0].flip(0)
    late = torch.tensor([[1.0, 2, 1, 2, 1, 2, 1, 90]]).expand(2, 8).contiguous()
    local, summary = tm.paint_tokens(*(t.to(device_of(backend)) for t in (first, late)),
                                     backend=backend)  # fmt: skip
    gains = torch.nn.functional.pad(ALPHA * local + BETA * summary, (3, 1))[:, None]
    q, k, v = (t.detach() for t in draw(backend, (2, 1, 4, 16), (2, 12, 2, 16), (2, 12, 2, 8)))
    got = tm.amplified_attention(q, k, v, gains, causal=True, backend=backend)
    for b, places in enumerate([[9], [3, 4]]):
        row = slice(b, b + 1)
        want = released_attention(q[row], k[row], v[row], [(ALPHA, places), (BETA, [10])])
        close(got[row], want)


@in_each_16_bits
def test_16_bits_keep_the_error_budget(backend, dtype):
    q, k, v = (
        t.detach()
        for t in draw(backend, (1, 10, 4, 16), (1, 10, 2, 16), (1, 10, 2, 8), dtype=dtype)
    )
    got = tm.amplified_attention(q, k, v, gains_of(10, RAISED, backend), causal=True,
                                 backend=backend)  # fmt: skip
    wide = released_attention(q.double(), k.double(), v.double(), RAISED)
    assert_accurate(got, wide, released_attention(q, k, v, RAISED))


@examples(25)
@given(data=st.data())
def test_any_number_of_rows_and_gains_in_float64(data):
    keys = data.draw(st.integers(1, 6))
    rows = data.draw(st.integers(1, keys))
    last = data.draw(st.integers(1, 7))
    q, k, v, gains = leaves = [
        t.detach().double().requires_grad_()
        for t in draw("cpu", (2, rows, 4, 16), (2, keys, 2, 16), (2, keys, 2, 8), (1, 1, keys))
    ]
    raised = [(gains[0, 0, j], [j]) for j in range(keys)]
    want = released_attention(q, k, v, raised, last)
    got = tm.amplified_attention(q, k, v, gains, rows=last, causal=True)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    same_gradients(got, want, leaves, 1e-9)


def test_without_causal_all_rows_see_all_keys():
    q, k, v = (t.detach() for t in draw("cpu", (1, 5, 4, 16), (1, 9, 2, 16), (1, 9, 2, 8)))
    zero = torch.zeros(1, 4, 9)
    close(tm.amplified_attention(q, k, v, zero), tm.attention(q, k, v))
    rows = tm.amplified_attention(q, k, v, zero + 0.5, rows=2)
    close(rows[:, :3], tm.attention(q, k, v)[:, :3])
    assert not torch.allclose(rows[:, 3:], tm.attention(q, k, v)[:, 3:], atol=1e-2)


def test_scores_may_be_a_view_with_the_negative_bit():
    scores = torch._neg_view(torch.randn(1, 20))
    assert scores.is_neg()
    for found, wanted in zip(
        tm.paint_tokens(scores, scores),
        tm.paint_tokens(scores.clone(), scores.clone()),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_scores_of_nan_are_never_chosen():
    first = torch.tensor([[torch.nan, 1.0, 0.5, 0.2]])
    local, summary = tm.paint_tokens(first, torch.ones(1, 4), local_share=0.5)
    assert local.tolist() == [[False, True, True, False]] and not summary.any()


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"gains": torch.zeros(1, 1, 8)}, "gains: must have 9 columns.*; got 8"),
        ({"gains": torch.zeros(9)}, "gains: must have shape .*; got"),
        ({"gains": torch.zeros(1, 1, 9).long()}, "gains: must be in float32 .*; got int64"),
        ({"gains": torch.full((1, 1, 9), torch.inf)}, "gains: must be finite; got"),
        ({"rows": 0}, "rows: must be at least 1; got 0"),
    ],
)
def test_bad_input(edits, says):
    q, k, v = draw("cpu", (1, 5, 4, 16), (1, 9, 2, 16), (1, 9, 2, 8))
    given = {"gains": torch.zeros(1, 1, 9), **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.amplified_attention: {says}"):
        tm.amplified_attention(q, k, v, **given)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"late_scores": torch.zeros(1, 3)}, "late_scores: must have the shape of first_scores"),
        ({"first_scores": torch.zeros(4)}, "first_scores: must have 2 dimensions .*; got 1"),
        ({"local_share": 1.5}, "local_share: must be 0 to 1; got 1.5"),
        ({"whisker": -1.0}, "whisker: must be finite and not negative; got -1"),
    ],
)
def test_bad_input_of_the_choice(edits, says):
    given = {"first_scores": torch.zeros(1, 4), "late_scores": torch.zeros(1, 4), **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.paint_tokens: {says}"):
        tm.paint_tokens(**given)
