"""Calls of sparse_decode_attention that every backend must answer, or must refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument, set_options
from ..dense.attention_cases import Arguments
from ..dense.attention_decode_cases import draw_cache, in_float8
from ..dense.attention_draws import draw_tensor
from ..registry import Malformed, Sample


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
    Sample("extra keys alone", sparse_call((9, 0), entries=0, extra=2, counted=False)),
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


def _several(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[0] = args[0].expand(-1, 2, -1, -1)
    kwargs["pos_mode"] = "cache"


def _ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _scaled(scale: Tensor) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[1:3] = [t.to(torch.float8_e4m3fn) for t in args[1:3]]
        kwargs.update(k_scale=scale)

    return edit


_EXTRA = torch.zeros(3, 2, 2, 32)

# Edits of the first sample: q [3, 1, 4, 32], k_cache and v_cache [3, 64, 2, 32], lengths 37, 64, 5,
# indices [3, 2, 12].
MALFORMED = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, Sq, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "cache dtype",
        "k_cache: must have the dtype of q, float32, or float8_e4m3fn; got float16",
        set_argument(1, lambda k: k.half()),
    ),
    Malformed(
        "wide values",
        "v_cache: must have a head dimension of 1 to 512; got 513",
        set_argument(2, lambda v: v.new_zeros(3, 64, 2, 513)),
    ),
    Malformed(
        "scales of float32",
        "v_scale: goes with caches in float8_e4m3fn alone; got float32",
        set_options(v_scale=torch.ones(1)),
    ),
    Malformed(
        "shape of scales",
        "k_scale: must have shape [1], [2] or [3, 64, 2]; got [3]",
        _scaled(torch.ones(3)),
    ),
    Malformed(
        "dtype of scales", "k_scale: must be float32; got float16", _scaled(torch.ones(2).half())
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got nan", set_options(scale=float("nan"))
    ),
    Malformed(
        "block", "block_k: must be a power of two up to 128; got 12", set_options(block_k=12)
    ),
    Malformed(
        "wide block", "block_k: must be a power of two up to 128; got 256", set_options(block_k=256)
    ),
    Malformed("first keys", "num_sink: must not be negative; got -1", set_options(num_sink=-1)),
    Malformed("last keys", "num_recent: must not be negative; got -3", set_options(num_recent=-3)),
    Malformed(
        "splits", "num_splits: must be 0 (automatic) to 1024; got -1", set_options(num_splits=-1)
    ),
    Malformed(
        "positions",
        "pos_mode: must be 'absolute' or 'cache'; got 'rank'",
        set_options(pos_mode="rank"),
    ),
    Malformed(
        "places of several tokens",
        "pos_mode: 'cache' goes with one query token; q has; got 2",
        _several,
    ),
    Malformed(
        "lengths dtype",
        "seqlens_k: must be int32; got int64",
        set_options(seqlens_k=_ints([37, 64, 5], torch.int64)),
    ),
    Malformed(
        "rank of lists",
        "indices: must have shape [3, heads, K] with 1, 2 or 4 heads; got [3, 12]",
        set_argument(3, lambda t: t[:, 0]),
    ),
    Malformed(
        "heads of lists",
        "indices: must have shape [3, heads, K] with 1, 2 or 4 heads; got [3, 3, 12]",
        set_argument(3, lambda t: t[:, :1].repeat(1, 3, 1)),
    ),
    Malformed(
        "shape of counts",
        "counts: must have shape [3, 2]; got [3, 1]",
        set_argument(4, lambda t: t[:, :1]),
    ),
    Malformed(
        "dtype of lists", "indices: must be int32; got int64", set_argument(3, lambda t: t.long())
    ),
    Malformed(
        "layout of lists",
        "indices: must have a contiguous last dimension; strides; got [12, 36, 3]",
        set_argument(
            3, lambda t: torch.empty_strided(t.shape, (12, 36, 3), dtype=t.dtype).copy_(t)
        ),
    ),
    Malformed(
        "short table",
        "rope: must have shape [positions, pairs], 64 positions or more, 1 to 16 pairs; "
        "got [63, 16]",
        set_options(rope=rotations(63, 16)),
    ),
    Malformed(
        "wide table",
        "rope: must have shape [positions, pairs], 64 positions or more, 1 to 16 pairs; "
        "got [64, 17]",
        set_options(rope=rotations(64, 17)),
    ),
    Malformed(
        "tables that differ",
        "rope: must have cos and sin of one shape; got [64, 8]",
        set_options(rope=(rotations(64, 16)[0], rotations(64, 8)[1])),
    ),
    Malformed(
        "keys without values",
        "extra_v: must be given with extra_k, and only then; got False",
        set_options(extra_k=_EXTRA),
    ),
    Malformed(
        "counts alone",
        "extra_log_count: needs extra_k and extra_v; got [3, 2, 2]",
        set_options(extra_log_count=torch.zeros(3, 2, 2)),
    ),
    Malformed(
        "shape of extra keys",
        "extra_k: must have shape [3, 2, 2, 32]; got [3, 2, 1, 32]",
        set_options(extra_k=_EXTRA[:, :, :1], extra_v=_EXTRA),
    ),
    Malformed(
        "dtype of extra values",
        "extra_v: must have the dtype of q, float32; got float16",
        set_options(extra_k=_EXTRA, extra_v=_EXTRA.half()),
    ),
    Malformed(
        "shape of their counts",
        "extra_log_count: must have shape [3, 2, 2]; got [3, 2]",
        set_options(extra_k=_EXTRA, extra_v=_EXTRA, extra_log_count=torch.zeros(3, 2)),
    ),
    Malformed("sink shape", "sink: must have shape [4]; got [1]", set_options(sink=torch.zeros(1))),
    Malformed(
        "length",
        "seqlens_k: must be 0 to what the cache holds of a request, 64; got 65",
        set_options(seqlens_k=_ints([37, 65, 5])),
        values=True,
    ),
)
