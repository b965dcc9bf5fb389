"""SelectorSummary against MULTI-LANE (De Min et al. 2024), section 3, and the release
(tdemin16/multi-lane at 5ee982c, multi_lane/blocks.py): patches are detached, and are keys and
values at once."""

from __future__ import annotations

import pytest
import torch
from literal import assert_reads_as

import tokenmill as tm


def summaries(w, x, selectors=None, tasks=None):
    """One task and one image after the other."""
    selectors = w["selectors"] if selectors is None else selectors
    if tasks is not None:
        selectors = selectors[tasks]
    out = []
    for own in selectors:
        of_task = []
        for b, patches in enumerate(x):
            s, patches = own if own.dim() == 2 else own[b], patches.detach()
            of_task.append(torch.softmax(s @ patches.T / patches.shape[1] ** 0.5, 1) @ patches)
        out.append(torch.stack(of_task))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("batch", "tokens", "dim", "selectors", "tasks"),
    [(2, 197, 768, 20, 2), (3, 1, 5, 4, 1), (1, 7, 300, 1, 3)],
)
def test_the_equations(batch, tokens, dim, selectors, tasks):
    module = tm.nn.SelectorSummary(dim, selectors, tasks)
    x = torch.randn(batch, tokens, dim)
    assert_reads_as(module, summaries, x, backend="cpu")


def test_chosen_tasks_and_given_selectors():
    module = tm.nn.SelectorSummary(6, 2, 4)
    x = torch.randn(2, 9, 6)
    tasks = torch.tensor([3, 1])
    assert_reads_as(module, summaries, x, None, tasks, backend="cpu")
    for shape in ((3, 2, 5, 6), (3, 5, 6)):
        given = torch.randn(shape, requires_grad=True)
        want = summaries({}, x.double(), given.double())
        torch.testing.assert_close(module(x, given), want.float(), rtol=1e-5, atol=1e-6)


def test_patches_have_a_gradient_if_asked_alone():
    x = torch.randn(1, 4, 6, requires_grad=True)
    assert torch.autograd.grad(tm.nn.SelectorSummary(6)(x).sum(), x, allow_unused=True) == (None,)
    learnt = tm.nn.SelectorSummary(6, detach=False)
    (gradient,) = torch.autograd.grad(learnt(x).square().sum(), x)
    exact = x.detach().double().requires_grad_()
    rows = learnt.selectors.double()[0]
    want = torch.softmax(rows @ exact[0].T / 6**0.5, 1) @ exact[0]
    (want,) = torch.autograd.grad(want.square().sum(), exact)
    torch.testing.assert_close(gradient, want.float(), rtol=1e-4, atol=1e-5)


def test_no_patches_and_large_logits():
    module = tm.nn.SelectorSummary(4, 3)
    assert (module(torch.zeros(2, 0, 4)) == 0).all()
    assert module(torch.zeros(0, 5, 4)).shape == (1, 0, 3, 4)
    half = tm.nn.SelectorSummary(4, 3).half()
    out = half(torch.full((1, 2, 4), 200.0).half())  # e^200 overflows float16
    assert torch.equal(out, torch.full_like(out, 200.0))


def test_a_task_begins_where_the_one_before_it_is():
    module = tm.nn.SelectorSummary(4, 3, 2)
    module.begin_task(1)
    assert torch.equal(*module.selectors)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.SelectorSummary(0), "dim: must be 1 to"),
        (lambda: tm.nn.SelectorSummary(4)(torch.zeros(2, 4)), r"x: must have shape \[B, N, 4\]"),
        (lambda: tm.nn.SelectorSummary(4)(torch.zeros(2, 3, 4), torch.zeros(1, 3, 2, 4)),
         "selectors: must have the batch size of x, 2"),
        (lambda: tm.nn.SelectorSummary(4)(torch.zeros(2, 3, 4), tasks=torch.zeros(1)),
         "tasks: must be int32 or int64"),
        (lambda: tm.nn.SelectorSummary(4).begin_task(1), "task: must be 1 to num_tasks - 1, 0"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.SelectorSummary: {error}"):
        call()
