"""Malformed calls of sparse_decode_attention."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options
from torch import Tensor

from tokenmill.sparse.sparse_decode_attention_cases import rotations


def _several(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[0] = args[0].expand(-1, 2, -1, -1)
    kwargs["pos_mode"] = "cache"


def _scaled(scale: Tensor) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[1:3] = [t.to(torch.float8_e4m3fn) for t in args[1:3]]
        kwargs.update(k_scale=scale)

    return edit


_EXTRA = torch.zeros(3, 2, 2, 32)


# Edits of the first sample: q [3, 1, 4, 32], k_cache and v_cache [3, 64, 2, 32], lengths 37, 64, 5,
# indices [3, 2, 12].
CALLS = (
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
        "v_scale: requires a cache in float8_e4m3fn; got float32",
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
        "pos_mode: 'cache' requires one query token; q has; got 2",
        _several,
    ),
    Malformed(
        "lengths dtype",
        "seqlens_k: must be int32; got int64",
        set_options(seqlens_k=ints(37, 64, 5, dtype=torch.int64)),
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
        set_options(seqlens_k=ints(37, 65, 5)),
        values=True,
    ),
)
