"""Malformed calls of kv_cache_compact."""

from __future__ import annotations

import torch
from malformed import Call, ints, refused, refused_values
from malformed.rules import dtype, lengths, option, shared, sliced, written_caches


def _pages_of_heads(call: Call) -> None:
    call.update({n: call[n][:, None].repeat_interleave(2, 1) for n in ("keep", "counts")})
    call.update(block_table=ints([0], [1]))


def _shared_page(call: Call) -> None:
    call.update({n: call[n].reshape(10, 8, 2, 32) for n in ("k_cache", "v_cache")})
    call.update(block_table=ints([0, 1, 2, 3, 4], [5, 6, 2, 8, 9]))


def _kept_keys(call: Call) -> None:
    call["keep"] = call["k_cache"].view(torch.int32)[:, 3, 0, :20]


_SLOTS = "keep: must name slots below the length of the request, 40; got"

# Edits of the first sample: caches [2, 40, 2, 32], keep [2, 20], counts [20, 7].
CALLS = (
    *written_caches([2, 40, 2, 32]),
    refused(
        "v_cache: must have the shape of k_cache up to the head dimension, [2, 40, 2, 32]; "
        "got [2, 39, 2, 32]",
        v_cache=lambda t: t[:, 1:],
    ),
    refused("keep: must have shape [B, K] or [B, 2, K]; got [2, 1, 20]", keep=lambda t: t[:, None]),
    *dtype("keep", "must be int32", "int64"),
    refused("counts: must have shape [2]; got [1]", counts=lambda t: t[1:]),
    refused(
        "k_cache: must have the requests of keep, 2; got 1",
        sliced("k_cache", "v_cache", at=slice(1)),
    ),
    refused("block_table: must have shape [2, pages]; got [1, 3]", block_table=ints([0, 1, 2])),
    refused(
        "k_cache: must have pages of a power of two of tokens; got 40", block_table=ints([0], [1])
    ),
    refused("keep: per head requires a dense cache; got [2, 2, 20]", _pages_of_heads),
    *lengths("seqlens_k", 2, 40, of="what the cache holds of a request, "),
    *option("rerotate", "must be a base of at least 1, or a tensor of inverse frequencies", -1.0),
    refused("rerotate: must have 1 to 16 frequencies; got [2, 17]", rerotate=torch.ones(17)),
    shared("k_cache", "keep", [2560, 64, 32, 1], _kept_keys),
    refused_values("block_table: must not name a page twice where keys lie; got 2", _shared_page),
    refused_values("counts: must be 0 to the entries of keep, 20; got 21", counts=ints(3, 21)),
    refused_values(f"{_SLOTS} 40", keep=lambda t: torch.full_like(t, 40)),
    refused_values("keep: must ascend; got 5", keep=lambda t: torch.full_like(t, 5)),
    refused_values(f"{_SLOTS} -1", counts=ints(20, 8)),
)
