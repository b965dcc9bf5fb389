"""VAR against its released code: seilk/VisAttnSink at 98e62d6, src/logic/logic.py, with the numbers
of A_exps/lv1.5_7b.yml."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from tensors import close, draw, every_backend, in_each_16_bits, same_gradients

import tokenmill as tm
from tokenmill.testing import assert_accurate

TAU, RHO, MIN, P = 20, 0.5, 0.2, 0.6
S, H, C, DIMS = 14, 4, 640, (3, 200)
IMAGE = (3, 9)
SINKS = ([0, 4, 10], [0, 2])  # text and image; the second request has no sink in its image
SHAPES = (2, S, H, 16), (2, S, 2, 16), (2, S, 2, 8)


def hidden_states(backend):
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, S, C, generator=g)
    for b, places in enumerate(SINKS):
        hidden[b, places, DIMS[b]] = 60.0 * (-1) ** b
    return hidden.to(device_of(backend))


def released_sinks(hidden):
    """Positions of one request whose normed state exceeds tau in one of the dimensions."""
    normed = hidden.float() / (hidden.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return [i for i, x in enumerate(normed) if max(abs(float(x[d])) for d in DIMS) > TAU]


def released_row(w, sinks, chosen):
    """The weights [Sk] of one query of one head; appends to `chosen` whether they changed."""
    begin, end = IMAGE
    visual = [j for j in sinks if begin <= j < end]
    total = w[begin:end].sum()
    portion = w[visual].sum() / (w[begin:end] + 1e-6).sum()
    assert min(abs(portion - RHO), abs(total - MIN)) > 5e-4  # rounding does not change the choice
    take = bool(visual) and portion <= RHO and total >= MIN
    chosen.append(bool(take))
    if not take:
        return w
    budget = (1 - P) * w[sinks].sum()  # sinks of the text give weight too
    takers = [j for j in range(begin, end) if j not in visual]
    new = w.clone()
    new[sinks] = P * w[sinks]
    new[takers] = w[takers] + budget * w[takers] / w[takers].sum()
    return new


def by_hand(q, k, v, sinks, chosen):
    """Queries are the last tokens; rows before the end of the image do not change."""
    rows, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
    z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    p = z.masked_fill(torch.ones_like(z[0, 0]).tril(keys - rows) == 0, -torch.inf).softmax(-1)
    first = max(IMAGE[1] - (keys - rows), 0)
    changed = torch.stack([
        torch.stack([
            torch.stack([
                w if i < first else released_row(w, sinks[b], chosen) for i, w in enumerate(m)
            ])
            for m in each
        ])
        for b, each in enumerate(p)
    ])  # fmt: skip
    return torch.einsum("bhij,bjhd->bihd", changed, v)


@every_backend
def test_sinks_are_those_of_the_release(backend):
    hidden = hidden_states(backend)
    found = tm.massive_activations(hidden, DIMS, threshold=TAU)
    for b, row in enumerate(found):
        assert row.nonzero().flatten().tolist() == released_sinks(hidden[b]) == SINKS[b]


@every_backend
def test_a_prompt_is_that_of_the_release(backend):
    q, k, v = leaves = draw(backend, *SHAPES)
    hidden, chosen = hidden_states(backend), []
    want = by_hand(q, k, v, [released_sinks(h) for h in hidden], chosen)
    assert 0.1 < sum(chosen[: len(chosen) // 2]) / (len(chosen) // 2) < 1
    assert not any(chosen[len(chosen) // 2 :])  # no sink in the image
    got = tm.redistributed_attention(q, k, v, IMAGE, hidden=hidden, sink_dims=DIMS, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
    plain = tm.attention(q, k, v, causal=True, backend=backend)
    assert not torch.allclose(got[0], plain[0], atol=1e-2)
    close(got[1], plain[1])


@every_backend
def test_steps_of_decoding_keep_the_sinks_of_the_prompt(backend):
    q, k, v = (t.detach()[:1] for t in draw(backend, *SHAPES))
    sinks = tm.massive_activations(hidden_states(backend)[:1, : S - 1], DIMS)
    sinks = torch.nn.functional.pad(sinks, (0, 1))
    chosen: list = []
    want = by_hand(q[:, -1:], k, v, SINKS, chosen)
    got = tm.redistributed_attention(q[:, -1:], k, v, IMAGE, sinks=sinks, backend=backend)
    assert any(chosen)
    close(got, want)


@in_each_16_bits
def test_16_bits_keep_the_error_budget(backend, dtype):
    q, k, v = (t.detach() for t in draw(backend, *SHAPES, dtype=dtype))
    got = tm.redistributed_attention(
        q, k, v, IMAGE, hidden=hidden_states(backend), sink_dims=DIMS, backend=backend
    )
    wide = by_hand(q.double(), k.double(), v.double(), SINKS, [])
    assert_accurate(got, wide, by_hand(q, k, v, SINKS, []))


def test_an_image_that_ends_the_prompt_changes_nothing():
    q, k, v = (t.detach() for t in draw("cpu", *SHAPES))
    plain = tm.attention(q, k, v, causal=True)
    sinks = torch.ones(1, S, dtype=torch.bool)
    for image in ((5, S), (4, 4)):
        assert torch.equal(tm.redistributed_attention(q, k, v, image, sinks=sinks), plain)


def test_only_sinks_in_the_image_leave_nothing_to_give_to():
    """All visual tokens are sinks: their share is 1, so the row is not chosen; with rho = 1 it is
    chosen, and the weight that they give is lost."""
    q, k, v = (t.detach() for t in draw("cpu", *SHAPES))
    sinks = torch.zeros(1, S, dtype=torch.bool)
    sinks[:, slice(*IMAGE)] = True
    plain = tm.attention(q, k, v, causal=True)
    close(tm.redistributed_attention(q, k, v, IMAGE, sinks=sinks), plain)
    out = tm.redistributed_attention(q, k, v, IMAGE, sinks=sinks, rho=1.0, min_visual=0.0)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"image": (3, S + 1)}, "image: must be 0 <= begin <= end <= 14; got"),
        ({"image": 3}, r"image: must be two ints \(begin, end\); got 3"),
        ({"hidden": torch.zeros(2, S, C)}, "sinks: must be given without hidden, .*; got"),
        ({"sinks": None}, "sinks: must be given without hidden, .*; got None"),
        ({"sinks": torch.zeros(2, S)}, "sinks: must be bool; got float32"),
        ({"sinks": torch.zeros(2, 3).bool()}, "sinks: must have shape .*; got"),
        ({"sinks": None, "hidden": torch.zeros(2, 3, C)}, "hidden: must have shape .*; got"),
        ({"sinks": None, "hidden": torch.zeros(2, S, C)}, "sink_dims: must be given with hidden"),
        ({"rho": 2.0}, "rho: must be 0 to 1; got 2"),
        ({"p": -1.0}, "p: must be 0 to 1; got -1"),
    ],
)
def test_bad_input(edits, says):
    q, k, v = draw("cpu", *SHAPES)
    given = {"image": IMAGE, "sinks": torch.zeros(2, S, dtype=torch.bool), **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.redistributed_attention: {says}"):
        tm.redistributed_attention(q, k, v, **given)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"dims": ()}, "dims: must be a sequence of at least one dimension; got"),
        ({"dims": (8,)}, "dims: must be below 8, in size; got 8"),
        ({"hidden": torch.zeros(2, 8)}, "hidden: must have 3 dimensions .*; got 2"),
        ({"threshold": -1.0}, "threshold: must be finite and not negative; got -1"),
    ],
)
def test_bad_input_of_the_choice(edits, says):
    given = {"hidden": torch.zeros(1, 3, 8), "dims": (1,), **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.massive_activations: {says}"):
        tm.massive_activations(**given)
