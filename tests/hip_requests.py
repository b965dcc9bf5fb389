"""Requests of different lengths in one call, compared with a call per request."""

from __future__ import annotations

import torch
from conftest import device_of
from each import ints

FORMS = (
    "padded", "padded over pages", "packed", "packed queries", "packed over pages", "pages",
)  # fmt: skip
QUERIES, KEYS = (27, 0, 9, 1), (50, 20, 9, 41)
PAGE = 16


def forms(backends):
    """Forms of each backend; Triton's slow interpreter gets two forms that reach every branch."""
    few = ("packed", "padded over pages")
    return [(f, b) for b in backends for f in FORMS if b != "triton" or f in few]


def ends(lengths):
    return ints(0, *lengths).cumsum(0).int()


def pages_of(rows):
    """Keys [S, Hk, D] of requests in pages, some of which belong to no request, and a
    block_table."""
    maximum = -(-max(map(len, rows)) // PAGE)
    order = torch.randperm(maximum * len(rows), generator=torch.Generator().manual_seed(1))
    table = order.view(len(rows), maximum).int()
    cache = rows[0].new_full((len(order) + 1, PAGE, *rows[0].shape[1:]), float("nan"))
    for numbers, x in zip(table, rows, strict=True):
        for i, part in enumerate(x.split(PAGE)):
            cache[numbers[i], : len(part)] = part
    return cache, table


def padded(rows, maximum):
    out = rows[0].new_full((len(rows), maximum, *rows[0].shape[1:]), float("nan"))
    for to, x in zip(out, rows, strict=True):
        to[: len(x)] = x
    return out


class Requests:
    """(q, k, v) and options of a call; alone: the same per request; only: one
    request. Unused elements are NaN."""

    def __init__(self, form, backend, dtype=torch.float32, only=None):
        g = torch.Generator().manual_seed(0)
        queries, keys = (17,) * len(KEYS) if form == "pages" else QUERIES, KEYS

        def draw(lengths, heads, dim):
            return [torch.randn(n, heads, dim, generator=g).to(dtype) for n in lengths]

        q, k, v = draw(queries, 2, 24), draw(keys, 1, 24), draw(keys, 1, 16)
        if only is not None:
            q, k, v, queries, keys = (x[only : only + 1] for x in (q, k, v, queries, keys))
        self.packed = form.startswith("packed")
        self.queries = queries
        device = device_of(backend)
        self.alone = [[t[None].to(device) for t in x] for x in zip(q, k, v, strict=True)]
        self.options = {"cu_seqlens_q": ends(queries)} if self.packed else {}
        if form.startswith("padded"):
            self.options["seqlens_q"] = ints(*queries)
        rows = torch.cat(q) if self.packed else padded(q, max(queries))
        if form == "packed":
            self.options["cu_seqlens_k"] = ends(keys)
            tensors = [rows, torch.cat(k), torch.cat(v)]
        else:
            self.options["seqlens_k"] = ints(*keys)
            tensors = [rows, padded(k, max(keys)), padded(v, max(keys))]
        if "pages" in form:
            tensors[1:] = [pages_of(t)[0] for t in (k, v)]
            self.options["block_table"] = pages_of(k)[1]
        self.tensors = [t.to(device) for t in tensors]
        self.options = {n: t.to(device) for n, t in self.options.items()}

    def rows(self, b):
        """Rows of request b among all queries of results [(B,) Sq | T, ...]."""
        first = sum(self.queries[:b])
        if self.packed:
            return (slice(first, first + self.queries[b]),)
        return b, slice(self.queries[b])

    def lists(self, b, block_q):
        """Rows of request b among lists [(B,) H, R, ...]."""
        count = -(-self.queries[b] // block_q)
        first = sum(self.queries[:b]) // block_q + b
        if self.packed:
            return slice(None), slice(first, first + count)
        return b, slice(None), slice(count)
