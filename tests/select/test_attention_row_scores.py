"""attention_row_scores: attention weights of a few queries."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEAD_DIMS, layouts
from tier import examples

import tokenmill as tm
from tokenmill.registry import Sample

SPEC = tm.registry.get("attention_row_scores")
NAN = float("nan")


def draw(b, r, n, h, hk, d, device="cpu"):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(b, r, h, d, generator=g), torch.randn(b, n, hk, d, generator=g)
    return q.to(device), k.to(device)


@st.composite
def calls(draw, longest):
    b, r = draw(st.integers(0, 2)), draw(st.sampled_from([0, 1, 1, 2, 5, 9]))
    n = draw(st.one_of(st.sampled_from([0, 1, 15, 64, 65, 130]), st.integers(0, longest)))
    hk, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 11)]))
    d = draw(HEAD_DIMS)
    options = {
        "causal": draw(st.booleans()),
        "reduce": draw(st.sampled_from(["none", "sum", "mean", "max"])),
        "skip": draw(st.integers(0, min(n, 20))),
        "scale": draw(st.sampled_from([None, 0.0, 0.4, -0.2])),
    }
    lengths = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, n), min_size=b, max_size=b))
    order = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))

    def make(dtype, g):
        q = layouts((b, r, hk * group, d), dtype, g)[order[0]]()
        k = layouts((b, n, hk, d), dtype, g)[order[1]]()
        given = {} if lengths is None else {"seqlens_k": torch.tensor(lengths, dtype=torch.int32)}
        return (q, k), options | given

    return Sample(f"q {(b, r, hk * group, d)} k {(n, hk)} {options} {lengths}", make)


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(25)
@given(data=st.data())
def test_any_call_keeps_the_error_budget(backend, isa, data):
    sample = data.draw(calls(40 if backend == "triton" else 300))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    found = tm.testing.compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok]


@each_backend
def test_class_token_of_evit(backend):
    """Mean over heads of row 0 of the attention map, excluding the class token's own column."""
    q, k = draw(2, 197, 197, 3, 3, 64, device_of(backend))
    maps = torch.einsum("bihd,bjhd->bhij", q, k).mul(64**-0.5).softmax(-1)
    found = tm.attention_row_scores(q[:, :1], k, skip=1, backend=backend)
    torch.testing.assert_close(found, maps[:, :, 0, 1:].mean(1), rtol=1e-5, atol=1e-7)


@each_backend
def test_sums_are_those_of_columns(backend):
    q, k = draw(2, 5, 40, 4, 2, 32, device_of(backend))
    lengths = torch.tensor([40, 23], dtype=torch.int32, device=q.device)
    options = {"causal": True, "seqlens_k": lengths, "backend": backend}
    rows = tm.attention_row_scores(q, k, reduce="sum", **options)
    columns = tm.attention_column_scores(q, k, **options)
    torch.testing.assert_close(rows, columns.sum(1), rtol=1e-5, atol=1e-6)


@each_backend
def test_nothing_beyond_the_lengths_counts(backend):
    q, k = draw(2, 2, 70, 2, 1, 32, device_of(backend))
    lengths = torch.tensor([33, 0], dtype=torch.int32, device=q.device)
    k[0, 33:], k[1] = NAN, NAN
    found = tm.attention_row_scores(q, k, reduce="sum", seqlens_k=lengths, backend=backend)
    torch.testing.assert_close(found[0].sum(), torch.tensor(4.0, device=q.device))
    assert (found[0, 33:] == 0).all() and (found[1] == 0).all()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_lengths_out_of_range_are_clamped(backend):
    q, k = draw(2, 1, 9, 1, 1, 8, device_of(backend))
    wild = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32, device=q.device)
    found = tm.attention_row_scores(q, k, seqlens_k=wild, backend=backend)
    want = tm.attention_row_scores(q[:1], k[:1], backend=backend)
    assert torch.equal(found[:1], want) and (found[1] == 0).all()


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(15)
@given(data=st.data())
def test_argmax_is_the_first_of_the_largest(backend, isa, data):
    """Integer scores are exact, and many are equal."""
    b, r, hk, group = (data.draw(st.integers(1, 3)) for _ in range(4))
    n = data.draw(st.integers(0, 40 if backend == "triton" else 300))
    skip, causal = data.draw(st.integers(0, min(n, 4))), data.draw(st.booleans())
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k = (torch.randint(-2, 3, (b, s, h, 5), generator=g) for s, h in ((r, hk * group), (n, hk)))
    lengths = torch.randint(0, n + 1, (b,), generator=g, dtype=torch.int32)
    q, k, lengths = (t.to(device_of(backend)) for t in (q.float(), k.float(), lengths))
    found = tm.attention_row_scores(
        q, k, reduce="argmax", skip=skip, causal=causal, seqlens_k=lengths, backend=backend
    )
    assert found.dtype == torch.int32 and found.shape == (b, hk * group, r)
    z = torch.einsum("brhd,bjhd->bhrj", q, k.repeat_interleave(group, 2)).tolist()
    for i, length in enumerate(lengths.tolist()):
        for h in range(hk * group):
            for row in range(r):
                end = min(length, max(row + length - r + 1, 0)) if causal else length
                seen = z[i][h][row][skip:end]
                want = skip + seen.index(max(seen)) if seen else -1
                assert found[i, h, row] == want


@each_backend
def test_argmax_of_nan_infinities_and_empty_rows(backend):
    x = [[1.0, NAN, 3.0], [1.0, float("inf"), NAN], [-float("inf")] * 3, [0.0, 0.0, 0.0]]
    k = torch.tensor(x, device=device_of(backend))[:, :, None, None]
    q = torch.ones(4, 1, 1, 1, device=k.device)
    lse = torch.zeros(4, 1, 1, device=k.device)
    lse[3] = -torch.inf
    for options, last in (({}, 0), ({"lse": lse}, -1)):
        found = tm.attention_row_scores(q, k, reduce="argmax", backend=backend, **options)
        assert found.flatten().tolist() == [1, 1, 0, last]


def test_the_rule_about_lse_names_the_dtype_of_the_call():
    for dtype, wide in ((torch.float16, "float32"), (torch.float64, "float64")):
        q = torch.randn(1, 4, 1, 8).to(dtype)
        record = SPEC.record(q, q)._replace(lse=torch.zeros(1, 1, 4).half())
        with pytest.raises(ValueError, match=f"op: lse: must be {wide}; got float16"):
            SPEC.forward.check(*record, float64=True, op="op")
