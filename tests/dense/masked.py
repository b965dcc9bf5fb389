"""Shared code of mask tests: backends, inputs, masks, comparisons."""

from __future__ import annotations

import conftest
import pytest
import torch
from conftest import cpu_variants, device_of

from tokenmill import masks
from tokenmill.testing import map_tensors

INF, NAN = float("inf"), float("nan")
EXACT = ("cpu", "reference")  # row results do not depend on tile boundaries

each_isa = pytest.mark.parametrize(
    ("backend", "isa"),
    [pytest.param(b, i, id=i or b) for b, i in cpu_variants()],
    indirect=["isa"],
)


def integers(*shape, low=0, high, g=None):
    return torch.randint(low, high, shape, generator=g, dtype=torch.int32)


def documents(g, sq=390, sk=700, **options):
    """Sorted ragged documents; some have no key or no query."""
    q_ids, k_ids = (integers(1, n, high=9, g=g).sort(-1)[0] for n in (sq, sk))
    return masks.segments(q_ids.where(q_ids != 4, 3), k_ids.where(k_ids != 6, 7), **options)


def stripes(g, sq=390, sk=700, heads=2):
    """A near range, a far range and an empty range per query and head."""
    at = torch.arange(sq, dtype=torch.int32)[:, None] * sk // sq
    begin = torch.cat([at - 40, at // 2 - 100, at + 90], -1)
    begin = begin + integers(1, heads, 1, 3, high=70, g=g)
    begin, width = torch.broadcast_tensors(begin, torch.tensor([60, 33, 0], dtype=torch.int32))
    return masks.ranges(begin.contiguous(), (begin + width).contiguous())


B, S, H, HK, D = 2, 90, 4, 2, 16


def inputs(backend, *lengths, dtype=torch.float32, batch=B, seed=0):
    """q takes the first length and head count, k and v take the last ones."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, lengths[0] if lengths else S, H, D)]
    shapes += [(batch, lengths[-1] if lengths else S, HK, D)] * 2
    leaves = [torch.randn(s, generator=g).to(device_of(backend), dtype) for s in shapes]
    return [x.requires_grad_() for x in leaves]


def on(backend, mask):
    return map_tensors(mask, lambda t: t.to(device_of(backend)))


def assert_same(backend, found, wanted, exact=True):
    if exact and backend in EXACT:
        return conftest.assert_same(found, wanted, backend)
    for a, b in zip(found, wanted, strict=True):
        eps = torch.finfo(a.dtype).eps  # 16 bits: rounding of the stored result
        torch.testing.assert_close(a, b, rtol=max(1e-4, 2 * eps), atol=max(1e-5, eps))


def everywhere(rows=S, keys=S, heads=1, count=2):
    begin = torch.tensor([0, 5]).int()[:count].expand(1, heads, rows, count).contiguous()
    end = torch.tensor([keys, 9]).int()[:count].expand(1, heads, rows, count).contiguous()
    return masks.ranges(begin, end)
