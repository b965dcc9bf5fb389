"""Masks of attention_decode."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import cpu_variants
from each import DTYPES, each_dtype, each_kernel
from masked import (
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

import tokenmill as tm
from tokenmill import masks, registry
from tokenmill.registry import Sample
from tokenmill.testing import compare

DECODE = registry.get("attention_decode")
LENGTHS = (S, 61)


def decode_masks(rows):
    ids = integers(B, S, high=4, g=torch.Generator().manual_seed(4)).sort(-1)[0]
    last = torch.stack([ids[b, n - rows : n] for b, n in enumerate(LENGTHS)])
    begin = integers(B, H, rows, 2, low=-3, high=S, g=torch.Generator().manual_seed(7))
    shuffled = ids[:, torch.randperm(S, generator=torch.Generator().manual_seed(3))]
    return {
        "none of it": None,
        "segments": masks.segments(last, ids),
        "in any order": masks.segments(last, shuffled, rule="not_after", shared=0),
        "ranges": (masks.ranges(begin, begin + 25), masks.segments(last, shuffled)),
        "ranges of all keys": everywhere(rows, S),
    }


@each_isa
@pytest.mark.parametrize(("kind", "normalize"), [("softmax", None), ("relu", "count")])
@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_is_the_last_rows(rows, kind, normalize, backend, isa):
    q, k, v = (x.detach() for x in inputs(backend))
    lengths = torch.tensor(LENGTHS).int().to(q.device)
    last = torch.stack([q[b, n - rows : n] for b, n in enumerate(LENGTHS)])
    options = {"kind": kind, "normalize": normalize, "backend": backend}
    for name, mask in decode_masks(rows).items():
        mask = on(backend, mask)
        found = tm.attention_decode(last, k, v, seqlens_k=lengths, mask=mask, **options)
        for b, n in enumerate(LENGTHS):
            own = part = None
            if mask is not None:
                own = mask if isinstance(mask, tuple) and not hasattr(mask, "_fields") else (mask,)
                part = tuple(_of_request(m, b, n) for m in own)
            wanted = tm.attention(
                last[b : b + 1],
                k[b : b + 1, :n],
                v[b : b + 1, :n],
                causal=True,
                mask=part,
                kind=kind,
                normalize=normalize,
                backend="reference",
            )
            torch.testing.assert_close(found[b : b + 1], wanted, msg=lambda m, name=name: name + m)


def _of_request(mask, b, length):
    if isinstance(mask, masks.Ranges):
        return masks.Ranges(*(t[b : b + 1] if t.shape[0] > 1 else t for t in mask))
    return mask._replace(q_ids=mask.q_ids[b : b + 1], k_ids=mask.k_ids[b : b + 1, :length])


@each_kernel
def test_ranges_of_all_keys_keep_the_bits_of_decoding(backend):
    q, k, v = (x.detach() for x in inputs(backend))
    lengths = torch.tensor(LENGTHS).int().to(q.device)
    call = functools.partial(
        tm.attention_decode, q[:, :2], k, v, seqlens_k=lengths, backend=backend
    )
    assert_same(backend, [call(mask=on(backend, everywhere(2)))], [call()])


@each_isa
@each_dtype
@pytest.mark.parametrize("rows", [1, 3])
def test_hidden_values_touch_no_decoded_row(rows, dtype, backend, isa):
    q, k, v = (x.detach() for x in inputs(backend, dtype=dtype))
    ids = integers(1, S, high=3, g=torch.Generator().manual_seed(2))
    lengths = torch.full((B,), S, dtype=torch.int32, device=q.device)
    for k_ids in (ids, ids.sort(-1)[0]):
        q_ids = torch.tensor([[0, 2, 0]]).int()[:, :rows].contiguous()
        mask = on(backend, masks.segments(q_ids, k_ids))
        call = functools.partial(
            tm.attention_decode, q[:, :rows], seqlens_k=lengths, mask=mask, backend=backend
        )
        clean = call(k, v)
        hidden = (k_ids[0] == 1).to(q.device)
        for value in (NAN, INF):
            other_k, other_v = k.clone(), v.clone()
            other_k[:, hidden] = other_v[:, hidden] = value
            assert_same(backend, [call(other_k, other_v)], [clean])


def decode_sample(mask, length=500, **options):
    def make(dtype, g):
        q, k, v = (
            torch.randn(1, n, h, 24, generator=g).to(dtype)
            for n, h in ((2, 4), (length, 2), (length, 2))
        )
        lengths = torch.tensor([length], dtype=torch.int32)
        return (q, k, v), options | {"seqlens_k": lengths, "mask": mask(g, 2, length)}

    return make


@pytest.mark.parametrize("isa", [i for b, i in cpu_variants() if b == "cpu"], indirect=True)
@pytest.mark.parametrize("mask", [documents, lambda g, *n: (stripes(g, *n, 4), documents(g, *n))])
def test_steps_that_a_mask_hides_cuts_or_leaves_whole(mask, isa):
    sample = Sample("decode", decode_sample(mask, num_splits=3))
    for dtype in DTYPES:
        assert not [c for c in compare(DECODE, sample, "cpu", dtype) if not c.ok]
