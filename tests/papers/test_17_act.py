"""ACT against its released code: GATECH-EIC/ACT at a267af7, models/llama_modelling_aug.py, with the
numbers of scripts/evaluation.sh."""

from __future__ import annotations

import pytest
import torch
from tensors import close, draw, every_backend, in_each_16_bits, same_gradients

import tokenmill as tm
from tokenmill.testing import assert_accurate

BETA, THRESHOLD = 0.4, 0.1
S, H = 12, 4
SHAPES = (2, S, H, 16), (2, S, 2, 16), (2, S, 2, 8)
SEED = 370  # no column mean is near the threshold


def causal_weights(q, k):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return z.masked_fill(torch.ones_like(z[0, 0]).tril() == 0, -torch.inf).softmax(-1)


def sinks_of(p, threshold):
    """Sinks of one head [S, S]: columns whose mean over the rows from the diagonal down exceeds the
    threshold, except the first."""
    means = p.sum(0) / torch.arange(len(p), 0, -1, device=p.device)
    assert ((means - threshold).abs() > 1e-3).all()  # rounding does not change the choice
    return (means > threshold).nonzero().flatten().tolist()[1:]


def released(p, beta=BETA, threshold=THRESHOLD):
    """The calibrated weights of one head [S, S]. (Row 0 of the released code is 1 at key 0, the
    only key it sees.)"""
    sinks = sinks_of(p, threshold)
    rest = p.clone()
    rest[:, sinks] = 0
    freed = (1 - beta) * p[:, sinks].sum(1, keepdim=True)
    kept = p - rest
    return beta * kept + rest + freed * rest / rest.sum(1, keepdim=True)


def by_hand(q, k, v, heads, **numbers):
    p = causal_weights(q, k)
    changed = torch.stack(
        [
            torch.stack([released(m, **numbers) if h in heads else m for h, m in enumerate(each)])
            for each in p
        ]
    )
    return torch.einsum("bhij,bjhd->bihd", changed, v.repeat_interleave(H // v.shape[2], 2))


@every_backend
@pytest.mark.parametrize("heads", [[1, 2], None, []], ids=["two heads", "all", "none"])
def test_chosen_heads_are_those_of_the_release(heads, backend):
    q, k, v = leaves = draw(backend, *SHAPES, seed=SEED)
    p = causal_weights(q, k)
    counts = [len(sinks_of(m, THRESHOLD)) for m in p.flatten(0, 1)]
    assert max(counts) > min(counts) and max(counts) >= 3
    want = by_hand(q, k, v, range(H) if heads is None else heads)
    got = tm.sink_calibrated_attention(q, k, v, heads=heads, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)


def test_the_mean_is_over_the_rows_that_see_a_key():
    """The last key is seen by one row: a third of its weight makes it a sink, although the mean
    over all rows is far below the threshold."""
    q, k, v = (t.detach() for t in draw("reference", *SHAPES))
    k[:, -1] = q[:, -1].unflatten(1, (2, 2)).mean(2) * 4
    p = causal_weights(q, k)
    assert (p[..., -1].mean(-1) < THRESHOLD).all()
    assert all(S - 1 in sinks_of(m, THRESHOLD) for m in p[:, 0])
    close(tm.sink_calibrated_attention(q, k, v), by_hand(q, k, v, range(H)))


def test_the_first_sink_stays_wherever_it_is():
    q, k, v = (t.detach() for t in draw("reference", *SHAPES))
    k[:, 0] = -3 * q[:, 1:].unflatten(2, (2, 2)).mean((1, 3))
    k[:, 3:6] = 2 * q.unflatten(2, (2, 2)).mean((1, 3))[:, None]
    numbers = {"beta": 0.0, "threshold": 0.35}
    p = causal_weights(q, k)
    assert any(0 not in m.sum(0).div(torch.arange(S, 0, -1)).gt(0.35).nonzero()
               for m in p.flatten(0, 1))  # fmt: skip
    close(tm.sink_calibrated_attention(q, k, v, **numbers), by_hand(q, k, v, range(H), **numbers))


@in_each_16_bits
def test_16_bits_keep_the_error_budget(backend, dtype):
    q, k, v = (t.detach() for t in draw(backend, *SHAPES, seed=SEED, dtype=dtype))
    got = tm.sink_calibrated_attention(q, k, v, heads=[0, 3], backend=backend)
    wide = by_hand(q.double(), k.double(), v.double(), [0, 3])
    plain = by_hand(q, k, v, [0, 3])
    assert_accurate(got, wide, plain)


def test_no_choice_leaves_plain_attention():
    q, k, v = (t.detach() for t in draw("cpu", *SHAPES))
    plain = tm.attention(q, k, v, causal=True)
    close(tm.sink_calibrated_attention(q, k, v, threshold=1.0), plain)
    close(tm.sink_calibrated_attention(q, k, v, beta=1.0), plain)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"heads": [4]}, "heads: must be 0 to 3; got 4"),
        ({"heads": [1, 1]}, "heads: must name each head once; got"),
        ({"heads": 2}, "heads: must be a sequence of heads or None; got 2"),
        ({"beta": 1.5}, "beta: must be 0 to 1; got 1.5"),
        ({"threshold": -0.1}, "threshold: must be 0 to 1; got -0.1"),
    ],
)
def test_bad_input(edits, says):
    q, k, v = draw("cpu", *SHAPES)
    with pytest.raises(RuntimeError, match=f"^tokenmill.sink_calibrated_attention: {says}"):
        tm.sink_calibrated_attention(q, k, v, **edits)
