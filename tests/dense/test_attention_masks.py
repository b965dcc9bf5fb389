"""Masks of attention: prefixes, segments and ranges."""

from __future__ import annotations

import functools

import conftest
import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import DTYPES, each_backend, each_dtype
from hypothesis import given
from hypothesis import strategies as st
from masked import (
    EXACT,
    INF,
    NAN,
    B,
    H,
    S,
    assert_same,
    documents,
    each_isa,
    everywhere,
    inputs,
    integers,
    on,
    stripes,
)
from strategies import attention_samples
from tier import examples

import tokenmill as tm
from tokenmill import masks, registry
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("attention")

# --- drawn calls ------------------------------------------------------------------------------


@st.composite
def masked_samples(draw, **limits):
    """Draws a call of attention_samples with a mask, or a tuple of masks in any order."""
    kinds = ("sigmoid", "relu", "elu1", "linear")
    divided = {"kinds": kinds, "normalizers": [None, "sum", "count"]}
    sample = draw(attention_samples(**limits, **draw(st.sampled_from([{}, divided]))))
    classes = draw(st.permutations(("prefix", "segments", "ranges")))
    classes = classes[: draw(st.integers(1, 3))]
    one_batch, one_head, of_keys, sort = draw(st.tuples(*[st.booleans()] * 4))
    count = draw(st.integers(1, 4))
    ids = draw(st.sampled_from([1, 2, 5, 40]))
    rule = draw(st.sampled_from(["equal", "not_after"]))
    shared = draw(st.sampled_from([None, None, 0, 3]))
    longest = draw(st.sampled_from([4, 30, 100]))

    def make(dtype, g):
        (q, k, v), kwargs = sample.make(dtype, g)
        packed = "cu_seqlens_q" in kwargs
        batch = len(kwargs["cu_seqlens_q"]) - 1 if packed else q.shape[0]
        lead = () if packed else (1 if one_batch else batch,)
        drawn = []
        for name in classes:
            if name == "prefix":
                kwargs["causal"] = False
                drawn.append(masks.prefix(integers(batch, low=-2, high=80, g=g)))
            elif name == "ranges":
                shape = (*(lead or (1,)), 1 if one_head else q.shape[-2], q.shape[-3], count)
                begin = integers(*shape, low=-5, high=80, g=g)
                end = begin + integers(*shape, low=-2, high=longest, g=g)
                drawn.append(masks.ranges(begin, end))
            else:
                q_ids, k_ids = (integers(*lead, n, high=ids, g=g) for n in (len_of(q), len_of(k)))
                if sort:
                    q_ids, k_ids = q_ids.sort(-1)[0], k_ids.sort(-1)[0]
                own = not of_keys and len_of(q) == len_of(k)
                found = masks.segments(q_ids, None if own else k_ids, rule=rule, shared=shared)
                drawn.append(found)
        return (q, k, v), kwargs | {"mask": drawn[0] if len(drawn) == 1 else tuple(drawn)}

    terms = f"{classes} one batch {one_batch} one head {one_head} R {count} longest {longest}"
    terms += f" ids {ids} {rule} shared {shared} sorted {sort} of keys {of_keys}"
    return Sample(f"{sample.name} {terms}", make)


def len_of(x):
    return x.shape[-3]


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(60)
@given(sample=masked_samples())
def test_any_masked_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(5)
@given(sample=masked_samples(max_length=40))
def test_any_masked_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


def long(mask, sq=390, sk=700, **options):
    def make(dtype, g):
        q, k, v = (
            torch.randn(1, n, h, d, generator=g).to(dtype)
            for n, h, d in ((sq, 2, 24), (sk, 1, 24), (sk, 1, 40))
        )
        return (q, k, v), options | {"mask": mask(g)}

    return make


LONG = [
    Sample("documents", long(documents, kind="sigmoid")),
    Sample("causal documents", long(documents, causal=True)),
    Sample(
        "shared id, later cells",
        long(lambda g: documents(g, rule="not_after", shared=2), window=(300, 200)),
    ),
    Sample("stripes", long(stripes)),
    Sample(
        "stripes of documents by count",
        long(lambda g: (stripes(g), documents(g)), kind="relu", normalize="count"),
    ),
]


@pytest.mark.parametrize("isa", [i for b, i in cpu_variants() if b == "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", LONG, ids=lambda sample: sample.name)
def test_tiles_that_a_mask_hides_cuts_or_leaves_whole(sample, dtype, isa):
    assert not [c for c in compare(SPEC, sample, "cpu", dtype) if not c.ok]


# --- what masks mean --------------------------------------------------------------------------


def with_gradients(out, leaves):
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=g).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def literally(sees, sq=S, sk=S, shape=(1, 1)):
    """Boolean mask [*shape, sq, sk] from a function of batch, head, query and key."""
    cells = [
        [[[bool(sees(b, h, i, j)) for j in range(sk)] for i in range(sq)] for h in range(shape[1])]
        for b in range(shape[0])
    ]
    return torch.tensor(cells)


IDS = torch.tensor([[0, 0, 1, 3, 3, 2, 0, 1, 1, 4], [2, 2, 2, 2, 0, 1, 1, 3, 3, 3]]).int()
KEY_IDS = torch.tensor([[1, 1, 0, 0, 2, 2, 3, 4, 3, 1, 0, 5, 1]]).int()
BEGIN = integers(1, H, 10, 3, low=-4, high=13, g=torch.Generator().manual_seed(5))
END = BEGIN + integers(1, H, 10, 3, low=-1, high=6, g=torch.Generator().manual_seed(6))

MEANINGS = {
    "prefix": (
        masks.prefix(torch.tensor([4, 0]).int()),
        lambda b, h, i, j: j <= i + 3 or j < (4, 0)[b],
    ),
    "segments": (
        masks.segments(IDS, KEY_IDS),
        lambda b, h, i, j: IDS[b, i] == KEY_IDS[0, j],
    ),
    "shared": (
        masks.segments(IDS, KEY_IDS, shared=3),
        lambda b, h, i, j: IDS[b, i] == KEY_IDS[0, j] or 3 in (IDS[b, i], KEY_IDS[0, j]),
    ),
    "not after": (
        masks.segments(IDS, KEY_IDS, rule="not_after", shared=1),
        lambda b, h, i, j: IDS[b, i] >= KEY_IDS[0, j] or 1 in (IDS[b, i], KEY_IDS[0, j]),
    ),
    "ranges": (
        masks.ranges(BEGIN, END),
        lambda b, h, i, j: any(BEGIN[0, h, i, r] <= j < END[0, h, i, r] for r in range(3)),
    ),
    "all": (
        (
            masks.ranges(BEGIN, END),
            masks.prefix(torch.tensor([9, 5]).int()),
            masks.segments(IDS, KEY_IDS, shared=0),
        ),
        lambda b, h, i, j: (
            (j <= i + 3 or j < (9, 5)[b])
            and any(BEGIN[0, h, i, r] <= j < END[0, h, i, r] for r in range(3))
            and (IDS[b, i] == KEY_IDS[0, j] or 0 in (IDS[b, i], KEY_IDS[0, j]))
        ),
    ),
}


@each_backend
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("name", MEANINGS)
def test_a_mask_is_its_matrix(name, kind, backend):
    mask, sees = MEANINGS[name]
    leaves = inputs(backend, 10, 13)
    matrix = literally(sees, 10, 13, (B, H)).to(device_of(backend))
    options = {"kind": kind, "normalize": "count" if kind == "relu" else None, "backend": backend}
    found = tm.attention(*leaves, mask=on(backend, mask), **options)
    wanted = tm.attention(*leaves, bias=matrix, **options)
    assert_same(backend, with_gradients(found, leaves), with_gradients(wanted, leaves), exact=False)
    hidden = ~matrix.any(-1).transpose(1, 2)
    assert (found[hidden] == 0).all()


@each_backend
def test_rows_without_a_key_are_empty(backend):
    """The call has several tiles, some of which have no empty row."""
    leaves = inputs(backend)
    ids = (torch.arange(S) // 10).int()[None]
    mask = on(backend, masks.segments(ids, ids.where(ids % 3 != 1, 20)))
    empty = (ids[0] % 3 == 1).to(device_of(backend))
    sink = torch.randn(H, device=device_of(backend))
    for options in ({}, {"sink": sink}):
        out, lse = tm.attention(*leaves, mask=mask, return_lse=True, backend=backend, **options)
        assert (out[:, empty] == 0).all()
        assert out[:, ~empty].all()
        want = sink[:, None] if options else torch.tensor(-INF)
        torch.testing.assert_close(lse[:, :, empty], want.expand(lse[:, :, empty].shape).to(lse))
        assert lse[:, :, ~empty].isfinite().all()
        dq, dk, dv = with_gradients(out, leaves)[1:]
        assert (dq[:, empty] == 0).all()
        assert (dk[:, empty] == 0).all()
        assert (dv[:, empty] == 0).all()
        assert dq[:, ~empty].all()


@each_backend
def test_no_sequences_have_masks_of_none(backend):
    leaves = [x.detach()[:0].requires_grad_() for x in inputs(backend)]
    ids = torch.zeros(0, S, dtype=torch.int32, device=leaves[0].device)
    mask = (masks.segments(ids), masks.ranges(*(ids[:, None, :, None],) * 2))
    out = tm.attention(*leaves, mask=mask, backend=backend)
    found = with_gradients(out, leaves)
    assert [t.shape for t in found[1:]] == [x.shape for x in leaves]


@each_backend
def test_documents_are_packed_sequences(backend):
    lengths = [1, 33, 20, 36]
    leaves = inputs(backend, batch=1)
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths)).int()
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device_of(backend))
    mask = on(backend, masks.segments(ids[None]))
    for options in ({}, {"causal": True}, {"kind": "elu1", "normalize": "sum"}):
        found = tm.attention(*leaves, mask=mask, backend=backend, **options)
        wanted = tm.attention(
            *(x[0] for x in leaves),
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=36,
            max_seqlen_k=36,
            backend=backend,
            **options,
        )
        found, wanted = with_gradients(found, leaves), with_gradients(wanted[None], leaves)
        assert_same(backend, found, wanted, exact=False)


SAME = {
    "prefix of nothing": (masks.prefix(torch.tensor([0, -3]).int()), {}, {"causal": True}),
    "prefix of all": (masks.prefix(torch.tensor([S, S + 9]).int()), {}, {}),
    "one segment": (masks.segments(torch.full((1, S), -7).int()), {}, {}),
    "later cells": (
        masks.segments(torch.arange(S).int()[None], rule="not_after"),
        {},
        {"causal": True},
    ),
    "all are shared": (
        masks.segments(torch.full((1, S), 3).int(), torch.arange(S).int()[None], shared=3),
        {"causal": True},
        {"causal": True},
    ),
    "ranges of all keys": (everywhere(), {}, {}),
    "ranges of all keys for each head": (
        everywhere(heads=H),
        {"window": (20, 7)},
        {"window": (20, 7)},
    ),
    "window": (
        masks.ranges(
            (torch.arange(S) - 20).int().view(1, 1, S, 1),
            (torch.arange(S) + 8).int().view(1, 1, S, 1),
        ),
        {},
        {"window": (20, 7)},
    ),
}


@pytest.mark.parametrize(
    ("backend", "dtype"),  # if bits may differ, drawn calls compare the other dtypes
    [(b, d) for b in backends("reference") for d in DTYPES if b in EXACT or d == torch.float32],
    ids=str,
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "elu1"])
@pytest.mark.parametrize("name", SAME)
def test_masks_that_are_something_else(name, kind, backend, dtype):
    mask, options, others = SAME[name]
    leaves = inputs(backend, dtype=dtype)
    call = functools.partial(tm.attention, *leaves, kind=kind, backend=backend)
    found, wanted = call(mask=on(backend, mask), **options), call(**others)
    assert_same(backend, with_gradients(found, leaves), with_gradients(wanted, leaves))


# --- hidden values ----------------------------------------------------------------------------


@each_isa
@each_dtype
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "linear"])
def test_hidden_values_touch_no_row(kind, dtype, backend, isa):
    """Documents lie in any order, and ranges have holes."""
    q, k, v = (x.detach() for x in inputs(backend, dtype=dtype, batch=1))
    ids = integers(1, S, high=3, g=torch.Generator().manual_seed(2))
    begin = torch.tensor([0, 50]).int().expand(1, 1, S, 2).contiguous()
    cases = [
        (masks.segments(ids), ids[0] == 1, ids[0] != 1),
        (masks.segments(ids.sort()[0]), ids[0].sort()[0] == 1, ids[0].sort()[0] != 1),
        (
            masks.ranges(begin, begin + 30),
            (torch.arange(S) >= 30) & (torch.arange(S) < 50),
            torch.arange(S) >= 0,
        ),
    ]
    for mask, poisoned, blind in cases:
        call = functools.partial(
            tm.attention, q, kind=kind, mask=on(backend, mask), backend=backend
        )
        poisoned, blind = poisoned.to(q.device), blind.to(q.device)
        clean = call(k, v)
        for value in (NAN, INF):
            other_k, other_v = k.clone(), v.clone()
            other_k[:, poisoned] = other_v[:, poisoned] = value
            out = call(other_k, other_v)
            assert_same(backend, [out[:, blind]], [clean[:, blind]])
            assert not out[:, ~blind].isfinite().any()


# --- transformations --------------------------------------------------------------------------


def test_gradients_of_a_masked_call():
    g = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, 6, h, 3, generator=g, dtype=torch.float64).requires_grad_()
        for h in (2, 1, 1)
    ]
    mask = (
        masks.segments(torch.tensor([[0, 1, 1, 2, 0, 3]]).int(), shared=2),
        masks.prefix(torch.tensor([2]).int()),
    )
    for kind in ("softmax", "sigmoid", "elu1"):
        call = functools.partial(tm.attention, kind=kind, mask=mask, backend="reference")
        assert torch.autograd.gradcheck(call, leaves)


@each_backend
def test_a_masked_call_compiles_and_maps(backend):
    leaves = [x.detach() for x in inputs(backend)]
    mask = on(backend, masks.segments((torch.arange(S) // 20).int()[None]))

    def call(q, k, v, mask=mask):
        return tm.attention(q, k, v, mask=mask, backend=backend)

    wanted = call(*leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    conftest.assert_same(compiled(*leaves), wanted, backend)
    mapped = torch.vmap(lambda *x: call(*(t[None] for t in x))[0])(*leaves)
    assert_same(backend, [mapped], [wanted])
    ids = integers(B, S, high=4, g=torch.Generator().manual_seed(4)).to(device_of(backend))

    def own(q, k, v, ids):
        mask = masks.segments(ids[None])
        return call(*(t[None] for t in (q, k, v)), mask)[0]

    mapped = torch.vmap(own)(*leaves, ids)
    assert_same(backend, [mapped], [call(*leaves, masks.segments(ids))])
