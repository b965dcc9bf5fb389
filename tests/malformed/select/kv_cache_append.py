"""Malformed calls of kv_cache_append."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Call, ints, refused, refused_values
from malformed.rules import cache_scales, dtype, float8, rank, same_dtype, shared, written_caches
from torch import zeros


def _rope(pairs: int = 8, positions: Any = (0, 1, 2, 3, 4), kind: Any = torch.int32) -> Any:
    return torch.ones(9, pairs), zeros(9, 8), torch.tensor(positions, dtype=kind)


def _float8_keys(call: Call) -> None:
    call.update(k_cache=call["k_cache"].to(torch.float8_e4m3fn), v_cache=None, v=None)


def _scaled_alike(call: Call) -> None:
    float8("k_cache", "v_cache")(call)
    call["k_scale"] = call["v_scale"] = torch.ones(3, 4, 2)


_PAIRS = "rope: must have shape [positions, pairs], 1 position or more, 1 to"
_ROPE_OFFSET = "rope_offset: must be 0 to 14, two columns or more before the end; got"

# Edits of the first sample: caches [3, 4, 2, 16], new rows [5, 2, 16], slots [5].
CALLS = (
    *written_caches([3, 4, 2, 16], "float8_e4m3fn"),
    refused(
        "k_cache: must have the dtype of k, float32, or float8_e4m3fn; got float16",
        k_cache=torch.Tensor.half,
        v_cache=torch.Tensor.half,
    ),
    refused(
        "v_cache: must have the shape of k_cache up to the head dimension, [3, 4, 2, 16]; "
        "got [2, 4, 2, 16]",
        v_cache=lambda t: t[1:],
    ),
    rank("k", "[T, Hk, D]"),
    refused("v: requires v_cache; got [5, 2, 16]", v_cache=None),
    refused("v: must be given with v_cache; got None", v=None),
    refused("v_scale: requires v_cache; got [2]", _float8_keys, v_scale=torch.ones(2)),
    refused(
        "k_cache: must have a head dimension of 1 to 576; got 577",
        k_cache=zeros(3, 4, 2, 577),
        v_cache=None,
    ),
    refused(
        "v_cache: must have a head dimension of 1 to 512; got 513", v_cache=zeros(3, 4, 2, 513)
    ),
    refused("k: must have shape [5, 2, 16]; got [5, 1, 16]", k=lambda t: t[:, 1:]),
    refused("v: must have shape [5, 2, 16]; got [4, 2, 16]", v=lambda t: t[1:]),
    same_dtype("v", "k", "bfloat16"),
    refused("slots: must have shape [5]; got [3]", slots=ints(1, 2, 3)),
    *dtype("slots", "must have dtype int32 or int64", "int16"),
    refused("q: requires rope; got [5, 4, 16]", q=zeros(5, 4, 16)),
    refused("q: must have shape [5, H, 16]; got [4, 4, 16]", q=zeros(4, 4, 16)),
    refused(
        "k: number of heads must divide that of q, 3 (GQA); got 2",
        rope=_rope(),
        q=zeros(5, 3, 16),
    ),
    refused("rope: must be (cos, sin, positions); got 'tuple'", rope=_rope()[:2]),
    refused(f"{_PAIRS} 8 pairs; got [9, 9]", rope=_rope(pairs=9)),
    refused(f"{_PAIRS} 6 pairs; got [9, 8]", rope=_rope(), rope_offset=3),
    refused(f"{_ROPE_OFFSET} 15", rope=_rope(), rope_offset=15),
    refused(f"{_ROPE_OFFSET} -1", rope=_rope(), rope_offset=-1),
    refused("rope_offset: requires rope; got 2", rope_offset=2),
    refused("rope: must have cos and sin of one shape; got [9, 8]", rope=_rope(pairs=4)),
    refused("rope: must have positions of shape [5]; got [2]", rope=_rope(positions=(0, 1))),
    refused(
        "rope: must have positions of dtype int32 or int64; got float32",
        rope=_rope(kind=torch.float32),
    ),
    *cache_scales("v_scale", [3, 4, 2], float8("k_cache", "v_cache")),
    shared(
        "k_cache",
        "k",
        [128, 32, 16, 1],
        lambda call: call.update(k=call["k_cache"].view(12, 2, 16)[:5]),
    ),
    shared("v_scale", "k_scale", [8, 2, 1], _scaled_alike),
    refused_values(
        "slots: must be -1 or below the slots of the cache, 12; got 12",
        slots=ints(3, 12, 5, -1, 7),
    ),
    refused_values(
        "slots: must be -1 or below the slots of the cache, 12; got -2",
        slots=ints(3, 4, -2, 5, 5),
    ),
    refused_values("slots: must not name a slot twice; got 5", slots=ints(9, 5, -1, 5, 9)),
    refused_values(
        "rope: must have positions of 0 to below the rows of cos and sin, 9; got 9",
        rope=_rope(positions=(0, 8, 9, -1, 2)),
        q=zeros(5, 4, 16),
    ),
    *(
        refused_values(
            f"v_scale: must be above 0 and finite; got {bad:g}",
            float8("k_cache", "v_cache"),
            v_scale=torch.tensor([1.0, bad]),
        )
        for bad in (-1.0, float("nan"))
    ),
)
