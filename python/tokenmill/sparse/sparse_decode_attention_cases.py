"""Sample calls of sparse_decode_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dense.attention_cases import Arguments
from ..dense.attention_decode_cases import draw_cache, in_float8
from ..dense.attention_draws import draw_tensor
from ..registry import Sample


def draw_lists(
    lengths: Sequence[int], heads: int, entries: int, block_k: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascending lists of blocks of each request, -1 after the last entry."""
    indices = torch.full((len(lengths), heads, entries), -1, dtype=torch.int32)
    counts = torch.zeros(len(lengths), heads, dtype=torch.int32)
    for b, length in enumerate(lengths):
        blocks = -(-length // block_k)
        for h in range(heads):
            count = min(entries, blocks)
            if count > 1 and h > 0:
                count -= int(torch.randint(0, min(3, count), (), generator=g))
            ids = torch.randperm(blocks, generator=g)[:count].sort().values
            indices[b, h, :count], counts[b, h] = ids.int(), count
    return indices, counts


def rotations(positions: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Tables of a rotary embedding with base 100."""
    angle = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(pairs) / pairs)
    return angle.cos(), angle.sin()


def sparse_call(
    lengths: Sequence[int] = (37, 64, 5),
    sq: int = 1,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    lists: int = 2,
    entries: int = 12,
    block_k: int = 1,
    page_size: int | None = None,
    capacity: int = 64,
    extra: int = 0,
    counted: bool = True,
    pairs: int = 0,
    return_mass: bool = True,
    float8: Sequence[str | None] | None = None,
    latent: bool = False,
    **options: Any,
) -> Any:
    """lists: 1, hk or h; pairs > 0: a rotary embedding; extra keys, with counts or without. float8:
    kind of scales of caches in float8_e4m3fn. latent: values are the first channels of the keys.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        batch = len(lengths)
        q = torch.randn(batch, sq, h, d, generator=g).to(dtype)
        (k, v), where = draw_cache(lengths, page_size, capacity, ((hk, d), (hk, dv)), dtype, g)
        if float8 is not None:
            (k, v), scales = in_float8([k, v], float8, g)
            where |= scales
        if latent:
            v = k[..., :dv]
        indices, counts = draw_lists(lengths, lists, entries, block_k, g)
        kwargs: dict[str, Any] = {**where, "block_k": block_k, "return_mass": return_mass}
        if pairs:
            kwargs["rope"] = rotations(capacity, pairs)
        if extra:
            for name, dim in (("extra_k", d), ("extra_v", dv)):
                kwargs[name] = torch.randn(batch, extra, hk, dim, generator=g).to(dtype)
            if counted:
                kwargs["extra_log_count"] = torch.randint(
                    0, 9, (batch, hk, extra), generator=g
                ).log()
        drawn = {n: o(dtype, g) if callable(o) else o for n, o in options.items()}
        return (q, k, v, indices, counts), kwargs | drawn

    return make


SAMPLES = (
    Sample("list of each KV head", sparse_call()),
    Sample("shared list", sparse_call(lists=1, num_sink=4, num_recent=8)),
    Sample("list of each query head", sparse_call(lists=4, num_recent=3)),
    Sample(
        "blocks in pages",
        sparse_call((50, 0, 128), block_k=8, entries=5, page_size=16, capacity=128, num_sink=5),
    ),
    Sample(
        "blocks wider than pages",
        sparse_call((61, 21), block_k=16, entries=3, page_size=1, capacity=64, num_recent=20),
    ),
    Sample(
        "several tokens",
        sparse_call(
            (70, 3, 128), sq=5, entries=40, capacity=128, d=24, dv=40, num_sink=3, num_recent=9
        ),
    ),
    Sample(
        "every term",
        sparse_call(
            (33, 60),
            sq=3,
            h=6,
            entries=20,
            block_k=2,
            num_sink=2,
            num_recent=7,
            extra=3,
            pairs=12,
            scale=0.4,
            softcap=3.0,
            sink=draw_tensor(6),
        ),
    ),
    Sample("only extra keys", sparse_call((9, 0), entries=0, extra=2, counted=False)),
    Sample(
        "first and last keys by their place",
        sparse_call((64, 5, 12), entries=0, pairs=16, num_sink=4, num_recent=8, pos_mode="cache"),
    ),
    Sample(
        "list by place, pairs interleaved",
        sparse_call(pairs=9, d=20, num_sink=3, num_recent=4, pos_mode="cache", interleaved=True),
    ),
    Sample("rotated by position", sparse_call(pairs=16, lists=1, page_size=8, return_mass=False)),
    Sample("splits", sparse_call((300, 80), capacity=300, entries=200, num_splits=3)),
    Sample("wide heads", sparse_call((40,), h=3, hk=1, lists=1, d=200, dv=136, pairs=100)),
    Sample("many rows", sparse_call((90,), sq=5, h=17, hk=1, lists=1, d=16, dv=64, capacity=96)),
    Sample("nothing listed", sparse_call(entries=0)),
    Sample("no room", sparse_call((0, 0), capacity=0, num_sink=3, num_recent=3)),
    Sample("no queries", sparse_call(sq=0)),
    Sample("no requests", sparse_call(())),
    Sample("float8", sparse_call(lists=1, num_recent=5, float8=(None, None))),
    Sample(
        "float8 in pages, scales of heads",
        sparse_call(
            (50, 0, 61), block_k=4, entries=5, page_size=8, num_sink=5, float8=("one", "head")
        ),
    ),
    Sample(
        "float8, scales of tokens, every term",
        sparse_call(
            (33, 60),
            sq=3,
            h=6,
            entries=10,
            page_size=16,
            num_sink=2,
            num_recent=7,
            extra=3,
            pairs=12,
            softcap=3.0,
            sink=draw_tensor(6),
            float8=("token", "token"),
        ),
    ),
    Sample(
        "latent",
        sparse_call(
            (30, 7), h=3, hk=1, lists=1, entries=9, d=576, dv=512, capacity=32, latent=True
        ),
    ),
    Sample(
        "latent, float8",
        sparse_call(
            (20,),
            h=3,
            hk=1,
            lists=3,
            entries=4,
            d=272,
            dv=260,
            pairs=8,
            page_size=8,
            capacity=24,
            num_recent=2,
            float8=("token", None),
            latent=True,
        ),
    ),
)
