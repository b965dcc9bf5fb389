"""The loss of an indexer against the formula with the scores of all pairs."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tier import examples
from torch.utils._python_dispatch import TorchDispatchMode

import tokenmill as tm
from tokenmill.testing import assert_accurate

module = importlib.import_module("tokenmill.select.indexer_kl_loss")


def by_hand(q, k, weights, indices, counts, target, activation="relu"):
    """Formula with scores [B, Sq, Sk], masked by the lists."""
    z = torch.einsum("bihd,bjd->bihj", q, k)
    z = z.relu() if activation == "relu" else z
    scores = (weights[..., None] * z).sum(2)
    listed, mass = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores)
    for b, i in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        for j, t in zip(indices[b, i, : counts[b, i]], target[b, i], strict=False):
            if not listed[b, i, j]:
                listed[b, i, j], mass[b, i, j] = True, t
    live = (mass.sum(-1) > 0) & listed.any(-1)
    mass = mass / mass.sum(-1, keepdim=True).where(live[..., None], 1)
    p = scores.masked_fill(~listed & live[..., None], -torch.inf).softmax(-1)
    terms = mass * (mass / p.where(mass > 0, 1)).where(mass > 0, 1).log()
    return terms.sum(-1).where(live, 0).sum()


def lists(g, batch, queries, keys, entries, repeats=False):
    """Ascending ids in random counts, garbage after them, and targets, some of which are 0."""
    indices = torch.full((batch, queries, entries), 10**9, dtype=torch.int32)
    maximum = min(keys, entries) + 1
    counts = torch.randint(maximum, (batch, queries), generator=g, dtype=torch.int32)
    target = torch.rand(indices.shape, generator=g, dtype=torch.float64)
    target = target * (torch.rand(indices.shape, generator=g) < 0.8)
    for b in range(batch):
        for i in range(queries):
            n = int(counts[b, i])
            drawn = torch.randint(max(keys, 1), (n,), generator=g)
            drawn = drawn if repeats else torch.randperm(keys, generator=g)[:n]
            indices[b, i, :n] = drawn.sort().values
            target[b, i, n:] = torch.nan
            if (b + i) % 4 == 3:
                target[b, i, :n] = 0
    return indices, counts, target


def inputs(batch=2, queries=7, heads=3, keys=9, dim=5, entries=4, repeats=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, dim), (batch, queries, heads)
    leaves = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    return leaves, lists(g, batch, queries, keys, entries, repeats)


def as_type(leaves, lists, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    return leaves, (*lists[:2], lists[2].to(torch.promote_types(dtype, torch.float32)))


@examples(40)
@given(
    sizes=st.tuples(*(st.integers(low, 6) for low in (0, 0, 1, 0, 1, 0))),
    repeats=st.booleans(), activation=st.sampled_from(["relu", "none"]),
    elements=st.sampled_from([1, 60, 2**22]), part=st.sampled_from([2, 1024]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_formula_with_all_scores(sizes, repeats, activation, elements, part, seed):
    leaves, rest = inputs(*sizes, repeats, seed)
    wanted = by_hand(*leaves, *rest, activation)
    gradients = torch.autograd.grad(wanted, leaves, allow_unused=True, materialize_grads=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_ELEMENTS", elements)
        patch.setattr(module, "PART", part)
        loss = tm.indexer_kl_loss(*leaves, *rest, activation=activation)
        found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_budget(dtype):
    leaves, rest = as_type(*inputs(2, 12, 4, 40, 16, 24), dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = by_hand(*wide, *rest[:2], rest[2].double())
    loss, plain = tm.indexer_kl_loss(*leaves, *rest), by_hand(*leaves, *rest)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_accurate(loss, exact, plain)
    found, rounded = (torch.autograd.grad(y, leaves) for y in (loss, plain))
    for a, b, c in zip(found, torch.autograd.grad(exact, wide), rounded, strict=True):
        assert_accurate(a, b, c, gradient=True)


def test_derivatives_of_both_orders(monkeypatch):
    monkeypatch.setattr(module, "CPU_ELEMENTS", 60)
    leaves, rest = inputs(2, 3, 2, 5, 3, 4)

    def run(*tensors):
        return tm.indexer_kl_loss(*tensors, *rest)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    narrow, others = as_type(leaves, rest, torch.float32)  # native kernels
    for tensors, lists_ in ((leaves, rest), (narrow, others)):
        first = torch.autograd.grad(
            tm.indexer_kl_loss(*tensors, *lists_), tensors, create_graph=True
        )
        second = torch.autograd.grad(sum(t.square().sum() for t in first), tensors)
        if tensors is leaves:
            wanted = second
    for a, b in zip(second, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_transforms_and_compilation():
    leaves, rest = as_type(*inputs(), torch.float32)
    q, k, weights = (t.detach() for t in leaves)

    def loss(k):
        return tm.indexer_kl_loss(q, k, weights, *rest)

    (wanted,) = torch.autograd.grad(tm.indexer_kl_loss(*leaves, *rest), leaves[1])
    assert torch.equal(torch.func.grad(loss)(k), wanted)
    many = torch.func.vmap(torch.func.grad(loss))(torch.stack([2 * k, k]))
    torch.testing.assert_close(many[1], wanted)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (k,), (k,))
    compiled = torch.compile(tm.indexer_kl_loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(*leaves, *rest), leaves[1])
    torch.testing.assert_close(found, wanted)


def test_no_gradient_where_the_indexer_has_the_target():
    leaves, _ = as_type(*inputs(2, 30, 4, 50, 8), torch.float32)
    values = [t.detach() for t in leaves]
    indices, counts, scores = tm.indexer_topk_select(*values, 12, return_values=True)
    target = scores.softmax(-1).mul_(7).requires_grad_()  # the sum does not matter
    loss = tm.indexer_kl_loss(*leaves, indices, counts, target)
    assert abs(loss.item()) < 1e-4
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.abs().max() < 1e-5
    assert torch.autograd.grad(loss + target.sum(), target)[0].eq(1).all()


def test_what_lies_beyond_the_counts_and_in_keys_that_nobody_lists():
    leaves, (indices, counts, target) = as_type(*inputs(), torch.float32)
    q, k, weights = (t.detach().clone() for t in leaves)
    beyond = torch.arange(4) >= counts[..., None]
    clean = indices.masked_fill(beyond, -1), counts, target.masked_fill(beyond, 0.0)
    clean[0][1, 0, :3] = torch.tensor([1, 2, 4])  # a list with unused entries
    clean[1][1, 0] = 3
    clean[2][1, 0, :3] = 0.5
    dirty = (
        torch.where(torch.arange(4) >= clean[1][..., None], 10**9, clean[0]), clean[1],
        torch.where(torch.arange(4) >= clean[1][..., None], torch.nan, clean[2]),
    )  # fmt: skip
    listed = torch.zeros(2, 9, dtype=torch.bool)
    used = (clean[0] >= 0) & (clean[2].sum(-1, keepdim=True) > 0)
    for b in range(2):
        listed[b, clean[0][b][used[b]].long()] = True
    assert not listed.all()
    empty = ~used.any(-1)
    hostile = [
        q.masked_fill(empty[..., None, None], torch.nan),
        k.masked_fill(~listed[..., None], torch.nan),
        weights.masked_fill(empty[..., None], torch.inf),
    ]  # fmt: skip
    results = []
    for values, rest in (((q, k, weights), clean), (hostile, dirty)):
        given = [t.clone().requires_grad_() for t in values]
        loss = tm.indexer_kl_loss(*given, *rest)
        results.append((loss, *torch.autograd.grad(loss, given)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert not results[0][2][~listed].any() and not results[0][1][empty].any()


@pytest.mark.parametrize(
    ("sizes", "elements"), [((1, 1, 5, 3000, 32, 2600), 2**22), ((2, 40, 4, 90, 16, 60), 30_000)]
)
def test_the_same_bits_for_any_number_of_threads(sizes, elements, threads, monkeypatch):
    monkeypatch.setattr(module, "CPU_ELEMENTS", elements)
    leaves, rest = as_type(*inputs(*sizes), torch.float32)
    rest[1][0, 0] = sizes[-1]
    rest[0][0, 0] = torch.arange(sizes[-1])
    rest[2][0, 0] = torch.rand(sizes[-1])
    results = []
    for number in (1, 2, 3):
        threads(number)
        loss = tm.indexer_kl_loss(*leaves, *rest)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


class Largest(TorchDispatchMode):
    """Records the maximum number of elements of a result."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def test_neither_all_scores_nor_all_listed_keys_are_in_memory(monkeypatch):
    monkeypatch.setattr(module, "CPU_ELEMENTS", 2**14)
    leaves, rest = as_type(*inputs(1, 100, 2, 600, 16, 64), torch.float32)
    with Largest() as largest:
        tm.indexer_kl_loss(*leaves, *rest).backward()
    assert 0 < largest.elements <= 2**14 < min(100 * 600, 100 * 64 * 16)


def test_large_and_small_targets_are_normalised():
    leaves, (indices, counts, target) = as_type(*inputs(), torch.float32)
    wanted = tm.indexer_kl_loss(*leaves, indices, counts, target)
    for factor in (2.0**126, 2.0**-100):
        found = tm.indexer_kl_loss(*leaves, indices, counts, target * factor)
        torch.testing.assert_close(found, wanted)


def test_autocast():
    leaves, rest = as_type(*inputs(), torch.float32)
    q, k, weights = (t.detach() for t in leaves)
    halves = [q.bfloat16(), k.bfloat16(), weights]
    assert not torch.equal(weights, weights.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tm.indexer_kl_loss(*leaves, *rest)
    assert found.dtype == torch.float32
    assert torch.equal(found, tm.indexer_kl_loss(*halves, *rest))
    assert all(t.dtype == torch.float32 for t in torch.autograd.grad(found, leaves))


def edit(index, at, value):
    def change(given):
        given[index] = given[index].clone()
        given[index][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("indices", (0, 0, 0), -1), "indices: must be 0 to 8 up to the count; got -1"),
        (edit("indices", (0, 0, 1), 9), "indices: must be 0 to 8 up to the count; got 9"),
        (edit("indices", (0, 0, 0), 7), "indices: must ascend up to the count; got 3"),
        (edit("counts", (1, 2), 5), "counts: must be 0 to 4; got 5"),
        (edit("counts", (1, 2), -1), "counts: must be 0 to 4; got -1"),
        (edit("target", (0, 0, 1), -0.5), "target: must be finite and not negative .*; got -0.5"),
        (edit("target", (0, 0, 1), torch.nan), "target: must be finite .*; got nan"),
        (edit("target", (0, 0, 1), torch.inf), "target: must be finite .*; got inf"),
        ({"q": torch.zeros(2, 7, 3)}, "q: must have 4 dimensions .*; got 3"),
        ({"k": torch.zeros(2, 9, 6)}, "k: must have the head dimension of q, 5; got 6"),
        ({"k": torch.zeros(1, 9, 5)}, "k: must have the batch size of q, 2; got 1"),
        ({"k": torch.zeros(2, 9, 5).half()}, "k: must have the dtype of q, float32; got float16"),
        ({"weights": torch.zeros(2, 7)}, r"weights: must have shape \[2, 7, 3\]; got \[2, 7\]"),
        ({"indices": torch.zeros(2, 6, 4).int()}, r"indices: must have shape \[2, 7, K\]; got .*"),
        ({"indices": torch.zeros(2, 7, 4).long()}, "indices: must be int32; got int64"),
        ({"counts": torch.zeros(2, 6).int()}, r"counts: must have shape \[2, 7\]; got \[2, 6\]"),
        ({"target": torch.zeros(2, 7, 4).double()}, "target: must be float16.*; got float64"),
        ({"target": torch.zeros(2, 7, 4, 1)}, r"target: must have shape \[2, 7, 4\]; got .*"),
        ({"activation": "gelu"}, "activation: must be 'relu' or 'none'; got 'gelu'"),
        ({"activation": None}, "activation: must be a string; got None"),
    ],
)  # fmt: skip
def test_bad_input(change, says):
    leaves, _ = as_type(*inputs(), torch.float32)
    given = dict(zip(("q", "k", "weights"), (t.detach() for t in leaves), strict=True))
    given["indices"] = torch.tensor([2, 3, 5, -1], dtype=torch.int32).repeat(2, 7, 1)
    given |= {"counts": torch.full((2, 7), 3).int(), "target": torch.ones(2, 7, 4)}
    tm.indexer_kl_loss(**given)
    given.update(change) if isinstance(change, dict) else change(given)
    with pytest.raises(RuntimeError, match=f"^tokenmill.indexer_kl_loss: {says}$"):
        tm.indexer_kl_loss(**given)
