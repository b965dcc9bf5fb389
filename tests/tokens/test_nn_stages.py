"""DToPExit and FocusSelect against literal readings of their papers."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill import nn

each_backend = pytest.mark.parametrize("backend", [None, "reference"])
kernels = pytest.mark.parametrize("backend", backends("reference"))


def who_stays(p, before, threshold, keep):
    """One picture, p [N, classes], as the released head prunes it (zbwxp/Dynamic-Token-Pruning at
    2baefff, prune_head.py): it predicts active tokens only, and keeps the `keep` most confident
    tokens of each class among those that exit. Ties go to the first."""
    active = [n for n in range(len(p)) if before[n]]
    value = {n: max(p[n].tolist()) for n in active}
    label = {n: p[n].tolist().index(value[n]) for n in active}
    sure = [n for n in active if value[n] > threshold]
    exits = set(sure)
    for c in {label[n] for n in sure}:
        of_class = sorted((n for n in sure if label[n] == c), key=lambda n: (-value[n], n))
        exits -= set(of_class[:keep])
    return {n for n in active if n not in exits}


@kernels
@examples(20)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 30),
    classes=st.integers(1, 4),
    keep=st.integers(0, 3),
    threshold=st.sampled_from([-1.0, 0.5, 0.75, 1.0]),
    levels=st.sampled_from([2, 4, 1000]),
)
def test_tokens_exit_one_by_one(seed, tokens, classes, keep, threshold, levels, backend):
    g = torch.Generator().manual_seed(seed)
    p = torch.randint(0, levels + 1, (2, tokens, classes), generator=g) / levels  # many ties
    x = torch.randn(2, tokens, 3, generator=g)
    before = torch.rand(2, tokens, generator=g) < 0.7
    device = device_of(backend)
    stage = nn.DToPExit(threshold, keep, backend=backend)(*(t.to(device) for t in (x, p, before)))
    stage = nn.ActiveTokens(*(t.cpu() for t in stage))
    for b in range(2):
        stay = sorted(who_stays(p[b], before[b], threshold, keep))
        begin, end = stage.cu_seqlens[b : b + 2].tolist()
        assert stage.indices[begin:end].tolist() == [b * tokens + n for n in stay]
        assert torch.equal(stage.tokens[begin:end], x[b, stay])
        assert stage.active[b].nonzero().flatten().tolist() == stay
    assert (stage.indices[stage.cu_seqlens[-1] :] == -1).all()


@kernels
def test_a_token_that_has_left_takes_no_place_of_its_class(backend):
    """Two exits. In the second one, tokens that left in the first are still more confident than
    active tokens, as in a model that goes on predicting all of them."""
    exits = nn.DToPExit(threshold=0.9, keep=5, backend=backend)
    x = torch.randn(1, 14, 4, device=device_of(backend))
    first, second = torch.zeros(2, 1, 14, 2, device=device_of(backend))
    first[0, :12, 0] = torch.linspace(0.99, 0.91, 12)  # class 0: tokens 0 to 4 are surest
    first[0, 12:, 1] = 0.5
    second[0, :12, 0] = torch.linspace(0.91, 0.99, 12)  # now tokens that have left
    second[0, 12:, 1] = torch.tensor([0.95, 0.93])
    active = exits(x, first).active
    assert active.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 12, 13]
    again = exits(x, second, active)
    assert again.active.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 12, 13]
    one = nn.DToPExit(threshold=0.9, keep=1, backend=backend)(x, second, active)
    assert one.active.nonzero()[:, 1].tolist() == [4, 12]  # surest active token per class


def test_what_has_left_stays_away_and_keeps_its_features():
    x, classes = torch.randn(1, 12, 4), torch.randn(1, 12, 3).softmax(2)
    leave = nn.DToPExit(0.5, 1)
    first = leave(x, classes)
    second = leave(x, torch.ones(1, 12, 3), first.active)
    assert not (second.active & ~first.active).any()
    back = tm.scatter_tokens(first.tokens * 2, first.indices, x)
    assert torch.equal(back, torch.where(first.active[..., None], 2 * x, x))
    never = leave(x, torch.full((1, 12, 3), torch.nan))
    assert never.active.all()


def test_packed_tokens_train():
    x, p = torch.randn(2, 9, 8, requires_grad=True), torch.rand(2, 9, 3)
    stage = nn.DToPExit(0.8, 1)(x, p)
    (gradient,) = torch.autograd.grad(stage.tokens.sum(), x)
    assert torch.equal(gradient, stage.active[..., None].float().expand_as(x))


@each_backend
@examples(12)
@given(
    seed=st.integers(0, 2**31), tokens=st.integers(1, 40), ratio=st.sampled_from([0.0, 0.5, 1.0])
)
def test_foreground_tokens_of_pictures_of_any_size(seed, tokens, ratio, backend):
    g = torch.Generator().manual_seed(seed)
    scores, valid = torch.randn(3, tokens, generator=g), torch.rand(3, tokens, generator=g) < 0.6
    x, positions = torch.randn(3, tokens, 5, generator=g), torch.randn(3, tokens, 2, generator=g)
    focus = nn.FocusSelect(ratio, backend=backend)
    indices = focus(scores, valid)
    wide = [min(int(ratio * v) + 1, v) for v in valid.sum(1).tolist()]
    for number, share in enumerate(focus.cascade):
        layer = focus.layer(indices, number)
        width = int(share * indices.shape[1])
        out = focus.scatter(focus.gather((x, positions), layer)[0] + 1, layer, x)
        for b in range(3):
            able = [n for n in range(tokens) if valid[b, n]]
            best = sorted(able, key=lambda n, b=b: -scores[b, n].item())[: wide[b]][:width]
            assert layer[b].tolist() == best + [-1] * (width - len(best))
            chosen = torch.zeros(tokens, dtype=torch.bool)
            chosen[best] = True
            assert torch.equal(out[b], torch.where(chosen[:, None], x[b] + 1, x[b]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.DToPExit(keep=-1), "nn.DToPExit: keep: must not be negative; got -1"),
        (lambda: nn.DToPExit()(torch.ones(1, 2, 3), torch.ones(1, 3, 3)),
         "nn.DToPExit: probabilities: must have shape [1, 2, classes]; got [1, 3, 3]"),
        (lambda: nn.PoNetMixing(10, 3), "nn.PoNetMixing: num_heads: must divide dim, 10; got 3"),
        (lambda: nn.FocusSelect(1.5), "nn.FocusSelect: ratio: must be 0 to 1; got 1.5"),
        (lambda: nn.FocusSelect(cascade=[0.0]), "nn.FocusSelect: cascade: must be above 0, to 1"),
        (lambda: nn.FocusSelect().layer(torch.zeros(1, 4).int(), 6),
         "nn.FocusSelect: number: must be 0 to 5; got 6"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(build, message):
    with pytest.raises(tm.InputError) as error:
        build()
    assert str(error.value).startswith(f"tokenmill.{message}")
