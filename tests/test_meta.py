"""Calls on meta tensors: shapes only."""

from __future__ import annotations

import pytest
import torch
from test_contract import clean, draw, each_sample, map_tensors, outputs

import tokenmill as tm


@each_sample
@pytest.mark.parametrize("backend", [None, "reference"])
def test_tensors_on_meta_give_shapes(spec, sample, backend):
    args, kwargs = draw(sample)
    wanted = outputs(clean(spec)(*args, **kwargs))
    args, kwargs = map_tensors((args, kwargs), lambda t: t.to("meta"))
    results = outputs(clean(spec, backend)(*args, **kwargs))
    for result, like in zip(results, wanted, strict=True):
        if isinstance(like, torch.Tensor):
            assert result.is_meta and (result.shape, result.dtype) == (like.shape, like.dtype)


def test_float64_on_meta_keeps_its_gradient():
    q = torch.empty(1, 3, 2, 8, dtype=torch.float64, device="meta", requires_grad=True)
    out = tm.attention(q, q, q)
    assert (out.dtype, out.requires_grad) == (torch.float64, True)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.is_meta and dq.dtype == torch.float64
