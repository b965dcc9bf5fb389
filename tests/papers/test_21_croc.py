"""Croc against its released code: deepglint/Croc at e758f86, croc/model/croc_arch.py for the prompt
tokens, croc/model/language_model/croc_llama.py for the mask. The Hungarian assignment follows the
paper's text (the released code imports scipy's solver and takes the nearest token)."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from conftest import device_of
from tensors import close, draw, every_backend, same_gradients

import tokenmill as tm

VISUAL, S, H, D = 5, 12, 4, 16
IGNORED = -100


def attend(q, k, v, sees):
    """Attention of queries over the keys for which sees(row, key) holds."""
    rows = []
    for i in range(S):
        seen = [j for j in range(S) if sees(i, j)]
        for h in range(H):
            p = torch.softmax(k[0, seen, h // 2] @ q[0, i, h] * D**-0.5, 0)
            rows.append(p @ v[0, seen, h // 2])
    return torch.stack(rows).view(1, S, H, D)


@every_backend
def test_the_mask_of_the_release_is_a_prefix_up_to_the_first_label(backend):
    """All tokens see the text before the image, the image and the text before the answer; the
    answer is causal."""
    q, k, v = leaves = draw(backend, (1, S, H, D), (1, S, 2, D), (1, S, 2, D))
    labels = torch.full((1, S), IGNORED)
    labels[:, 8:] = 7
    first = next(i for i in range(S) if labels[0, i] != IGNORED)
    want = attend(q, k, v, lambda i, j: j <= i or j < first)
    lengths = (labels != IGNORED).int().argmax(1).int()
    mask = tm.masks.prefix(lengths.to(device_of(backend)))
    got = tm.attention(q, k, v, mask=mask, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)


@every_backend
def test_text_before_an_image_can_stay_causal(backend):
    """The paper's text: visual tokens see each other, text sees everything before it."""
    q, k, v = leaves = draw(backend, (1, S, H, D), (1, S, 2, D), (1, S, 2, D))
    image = range(3, 3 + VISUAL)
    want = attend(q, k, v, lambda i, j: j <= i or (i in image and j in image))
    end = torch.tensor([image.stop if i in image else i + 1 for i in range(S)]).int()
    mask = tm.masks.ranges(*(t.view(1, 1, S, 1).to(q.device) for t in (torch.zeros_like(end), end)))
    got = tm.attention(q, k, v, mask=mask, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)


def image_tokens(batch=2, tokens=8, dim=6):
    x = torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(x, dim=-1).requires_grad_()


def test_nearest_is_the_release():
    """Each masked token becomes the prompt token at the minimum distance, several the same one."""
    x = image_tokens()
    pool = tm.nn.PromptTokenPool(6, num_prompts=3, match="nearest")
    chosen = torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) < 0.75
    y, assigned = pool(x, chosen)
    want, places = x.clone(), torch.full((2, 8), -1)
    for b, i in chosen.nonzero().tolist():
        distances = [float((x[b, i] - e).detach().norm()) for e in pool.prompts]
        places[b, i] = distances.index(min(distances))
        want[b, i] = pool.prompts[places[b, i]]
    assert torch.equal(assigned, places)
    assert len(set(places[0][chosen[0]].tolist())) < int(chosen[0].sum())
    close(y, want)
    same_gradients(y, want, [x, pool.prompts])


def test_hungarian_has_the_least_sum_of_all_assignments():
    """Each prompt token replaces at most one token of an image."""
    x = image_tokens()
    pool = tm.nn.PromptTokenPool(6, num_prompts=5)
    chosen = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]).bool()
    y, assigned = pool(x, chosen)
    want = x.clone()
    for b in range(2):
        places = chosen[b].nonzero().flatten().tolist()
        distances = torch.stack([(x[b, i] - pool.prompts).detach().norm(dim=1) for i in places])
        best = min(
            itertools.permutations(range(5), len(places)),
            key=lambda js: sum(float(d[j]) for d, j in zip(distances, js, strict=True)),
        )
        nearest = distances.argmin(1).tolist()
        assert assigned[b][chosen[b]].tolist() == list(best)
        want[b, places] = pool.prompts[list(best)]
        assert b or len({*nearest}) < len(nearest)  # a choice that "nearest" never makes
    assert (assigned[~chosen] == -1).all()
    close(y, want)
    same_gradients(y, want, [x, pool.prompts])


def test_three_quarters_of_each_image_are_drawn():
    pool = tm.nn.PromptTokenPool(6, num_prompts=8)
    x = image_tokens(3, 10)
    first, second = (pool(x)[1] >= 0 for _ in range(2))
    assert first.sum(1).tolist() == second.sum(1).tolist() == [8, 8, 8]  # 10 // 4 stay
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_16_bits_are_assigned_in_float32():
    x = image_tokens()
    pool = tm.nn.PromptTokenPool(6, num_prompts=8)
    chosen = torch.ones(2, 8, dtype=torch.bool)
    y, assigned = pool(x.bfloat16(), chosen)
    assert y.dtype == torch.bfloat16
    assert torch.equal(assigned, pool(x.bfloat16().float(), chosen)[1])


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    pool = tm.nn.PromptTokenPool(6, num_prompts=8)
    says = r"^tokenmill.nn.PromptTokenPool: match: 'hungarian' needs scipy: pip install .*\[scipy\]"
    with pytest.raises(RuntimeError, match=says):
        pool(image_tokens())
    tm.nn.PromptTokenPool(6, num_prompts=8, match="nearest")(image_tokens())


@pytest.mark.parametrize(
    ("options", "x", "chosen", "says"),
    [
        (
            {},
            torch.zeros(1, 9, 6, dtype=torch.float8_e4m3fn),
            None,
            "x: must be float16, bfloat16, float32 or float64; got float8_e4m3fn",
        ),
        ({"match": "greedy"}, None, None, "match: must be 'hungarian' or 'nearest'; got 'greedy'"),
        ({"share": 2.0}, None, None, "share: must be 0 to 1; got 2"),
        ({"num_prompts": 0}, None, None, "num_prompts: must be at least 1; got 0"),
        ({}, torch.zeros(1, 8, 5), None, r"x: must have shape \[B, N, 6\]; got"),
        ({}, torch.zeros(1, 8, 6), torch.ones(1, 8), "chosen: must be bool; got float32"),
        ({"num_prompts": 3}, torch.zeros(1, 8, 6), None, "chosen: must name at most .*; got 6"),
        ({}, torch.full((1, 8, 6), torch.nan), None, "x: must be finite where chosen; got"),
    ],
)
def test_bad_input(options, x, chosen, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.nn.PromptTokenPool: {says}"):
        tm.nn.PromptTokenPool(6, **{"num_prompts": 8, **options})(x, chosen)
