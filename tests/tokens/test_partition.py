"""topk_partition and mask_partition: every backend gives exactly the result of the definition."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

INF, NAN = float("inf"), float("nan")


def by_definition(scores, k, largest, order, valid, first, last):
    """Partitions one row in plain Python."""
    n = len(scores)

    def place(i):
        if i < first or i >= n - last:
            return 0, 0.0, i
        if not valid[i]:
            return 3, 0.0, i
        score = scores[i] if largest else -scores[i]
        return (1, -score, i) if score > -INF else (2, 0.0, i)

    ordered = sorted(range(n), key=place)
    keep = ordered[:k]
    return keep if order == "score" else sorted(keep), sorted(ordered[k:])


def partitioned(scores, k, backend, **options):
    device = device_of(backend)
    moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    k = k.to(device) if isinstance(k, torch.Tensor) else k
    keep, rest = tm.topk_partition(scores.to(device), k, backend=backend, **moved)
    return keep.cpu(), rest.cpu()


VALUES = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "few": lambda g, n: torch.randn(n, generator=g).round(),
    "equal": lambda g, n: torch.full((n,), 0.25),
    "zeros": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0),
    "nan": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.6, NAN, 1.0),
    "infinite": lambda g, n: torch.randn(n, generator=g).sign() * INF,
    "subnormal": lambda g, n: torch.randn(n, generator=g) * 1e-41,
    "huge": lambda g, n: torch.randn(n, generator=g) * 60000,
}


@st.composite
def calls(draw):
    n = draw(st.one_of(st.sampled_from([0, 1, 16, 17, 197]), st.integers(0, 300)))
    k = draw(st.one_of(st.sampled_from([0, n]), st.integers(0, n)))
    rows = draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = [draw(st.sampled_from(list(VALUES))) for _ in range(rows)]
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    storage = torch.full((rows, n + 3), NAN, dtype=dtype)
    offset = draw(st.integers(0, 3))
    scores = storage[:, offset : offset + n]
    scores.copy_(torch.stack([VALUES[kind](g, n) for kind in kinds]))
    first = draw(st.integers(0, min(k, 3)))
    options = {
        "largest": draw(st.booleans()),
        "order": draw(st.sampled_from(["score", "index"])),
        "protect_first": first,
        "protect_last": draw(st.integers(0, min(k - first, 3))),
    }
    if draw(st.booleans()):
        options["valid"] = (torch.rand(rows, n + 2, generator=g) < 0.7)[:, 1 : n + 1]
    return scores, k, options


@each_backend
@examples(30)
@given(call=calls())
def test_topk_partition_is_as_defined(backend, call):
    scores, k, options = call
    keep, rest = partitioned(scores, k, backend, **options)
    valid = options.get("valid", torch.ones_like(scores, dtype=torch.bool))
    for r, row in enumerate(scores.float()):
        want = by_definition(
            row.tolist(), k, options["largest"], options["order"], valid[r].tolist(),
            options["protect_first"], options["protect_last"],
        )  # fmt: skip
        assert (keep[r].tolist(), rest[r].tolist()) == want


@each_backend
@examples(20)
@given(call=calls(), seed=st.integers(0, 99))
def test_k_of_each_row(backend, call, seed):
    """The call equals one call per row, padded with -1."""
    scores, maximum, options = call
    rows, n = scores.shape
    minimum = options["protect_first"] + options["protect_last"]
    k = torch.randint(minimum, maximum + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    keep, rest = partitioned(scores, k, backend, max_k=maximum, **options)
    assert (keep.shape, rest.shape) == ((rows, maximum), (rows, n))
    valid = options.pop("valid", torch.ones_like(scores, dtype=torch.bool))
    for r, count in enumerate(k.tolist()):
        one = slice(r, r + 1)
        want = partitioned(scores[one], count, "reference", valid=valid[one], **options)
        for found, wanted in zip((keep[r], rest[r]), want, strict=True):
            assert found.tolist() == wanted[0].tolist() + [-1] * (len(found) - wanted.shape[1])


@each_backend
@pytest.mark.parametrize("n", [900, 2049, 5000])
def test_long_rows(backend, n):
    """Many ties at the threshold, more kept tokens than a CTA sorts in its own memory, and scores
    that differ only in their last bits."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, n, generator=g)
    close = 1 + torch.rand(n, generator=g) * 2**-10
    scores = torch.stack([*scores, scores[0].round(), close, close.sort().values])
    for k in (2 * n // 3, torch.tensor([n, 0, 3, n // 2, 2 * n // 3])):
        want = partitioned(scores, k, "reference")
        got = partitioned(scores, k, backend)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_backend
def test_distinct_scores_are_permuted_alike(backend):
    g = torch.Generator().manual_seed(0)
    scores = torch.randperm(60, generator=g).float()[None]
    order = torch.randperm(60, generator=g)
    keep, rest = partitioned(scores, 20, backend)
    moved_keep, moved_rest = partitioned(scores[:, order], 20, backend)
    assert torch.equal(order[moved_keep[0]].int(), keep[0])
    assert torch.equal(order[moved_rest[0]].sort().values.int(), rest[0])


@each_backend
def test_scores_that_require_a_gradient(backend):
    keep, rest = partitioned(torch.randn(2, 9, requires_grad=True), 4, backend)
    assert not keep.requires_grad and not rest.requires_grad


def packed(mask, backend, **options):
    found = tm.mask_partition(mask.to(device_of(backend)), backend=backend, **options)
    return [t.cpu() for t in found]


@each_backend
@examples(20)
@given(
    batch=st.integers(0, 4),
    tokens=st.one_of(st.integers(0, 40), st.just(1500)),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    spare=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 99),
)
def test_mask_partition_is_as_defined(backend, batch, tokens, share, spare, seed):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, tokens + 3, generator=g) < share)[:, 2 : tokens + 2]
    total = int(mask.sum())
    max_total = None if spare is None else total + spare
    indices, cu_seqlens, inverse = packed(mask, backend, max_total=max_total)
    flat = mask.flatten()
    assert len(indices) == (batch * tokens if max_total is None else max_total)
    assert indices[:total].tolist() == flat.nonzero().flatten().tolist()
    assert (indices[total:] == -1).all()
    assert cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert (inverse[~mask] == -1).all()
    assert inverse[mask].tolist() == list(range(total))


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@pytest.mark.parametrize("max_total", [0, 5, 6, 29])
def test_tokens_beyond_the_total_are_dropped(backend, max_total):
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, 3] = False
    indices, cu_seqlens, inverse = packed(mask, backend, max_total=max_total)
    want = mask.flatten().nonzero().flatten()
    assert indices.tolist() == want[:max_total].tolist()
    assert cu_seqlens.tolist() == [min(n, max_total) for n in (0, 9, 19, 29)]
    place = mask.flatten().cumsum(0).view(3, 10) - 1
    assert inverse.tolist() == torch.where(mask & (place < max_total), place, -1).tolist()
