"""Malformed calls of kv_cache_append."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options


def _row(args: list[Any], kwargs: dict[str, Any]) -> None:
    """New keys that share memory with the cache."""
    args[2] = args[0].view(12, 2, 16)[:5]


def _shared_scale(args: list[Any], kwargs: dict[str, Any]) -> None:
    _float8(args, kwargs)
    kwargs.update(k_scale=torch.ones(3, 4, 2))
    kwargs.update(v_scale=kwargs["k_scale"])


def _float8(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[:2] = [t.to(torch.float8_e4m3fn) for t in args[:2]]


def _scaled(scale: torch.Tensor, float8: bool = True, values: bool = True) -> Any:
    def change(args: list[Any], kwargs: dict[str, Any]) -> None:
        if not values:
            args[0], args[1], args[3] = args[0].to(torch.float8_e4m3fn), None, None
            kwargs.update(v_scale=scale)
            return
        if float8:
            _float8(args, kwargs)
        kwargs.update(v_scale=scale)

    return change


def _turned(rows: int = 9, pairs: int = 8, positions: Any = (0, 1, 2, 3, 4), **options: Any) -> Any:
    def change(args: list[Any], kwargs: dict[str, Any]) -> None:
        at = torch.tensor(positions, dtype=options.get("dtype", torch.int32))
        kwargs.update(rope=(torch.ones(rows, pairs), torch.zeros(rows, 8), at))
        if "offset" in options:
            kwargs.update(rope_offset=options["offset"])
        if "heads" in options:
            kwargs.update(q=torch.zeros(5, options["heads"], 16))

    return change


def _slots(*values: int) -> Any:
    return set_argument(4, lambda _: ints(*values))


# Edits of the first sample: caches [3, 4, 2, 16], new rows [5, 2, 16], slots [5].
CALLS = (
    Malformed(
        "rank",
        "v_cache: must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D]); got 3",
        set_argument(1, lambda t: t[0]),
    ),
    Malformed(
        "dtype of the cache",
        "k_cache: must have the dtype of k, float32, or float8_e4m3fn; got float16",
        lambda a, k: a.__setitem__(slice(0, 2), [t.half() for t in a[:2]]),
    ),
    Malformed(
        "two dtypes",
        "v_cache: must have the dtype of k_cache, float32; got float8_e4m3fn",
        set_argument(1, lambda t: t.to(torch.float8_e4m3fn)),
    ),
    Malformed(
        "shape of the cache",
        "v_cache: must have the shape of k_cache up to the head dimension, [3, 4, 2, 16]; "
        "got [2, 4, 2, 16]",
        set_argument(1, lambda t: t[1:]),
    ),
    Malformed(
        "rank of k",
        "k: must have 3 dimensions [T, Hk, D]; got 2",
        set_argument(2, lambda t: t[0]),
    ),
    Malformed(
        "values without a cache",
        "v: requires v_cache; got [5, 2, 16]",
        set_argument(1, lambda _: None),
    ),
    Malformed(
        "no values",
        "v: must be given with v_cache; got None",
        set_argument(3, lambda _: None),
    ),
    Malformed(
        "scales of no values",
        "v_scale: requires v_cache; got [2]",
        _scaled(torch.ones(2), values=False),
    ),
    Malformed(
        "wide keys",
        "k_cache: must have a head dimension of 1 to 576; got 577",
        lambda a, k: a.__setitem__(slice(0, 2), [torch.zeros(3, 4, 2, 577), None]),
    ),
    Malformed(
        "wide values",
        "v_cache: must have a head dimension of 1 to 512; got 513",
        set_argument(1, lambda _: torch.zeros(3, 4, 2, 513)),
    ),
    Malformed(
        "shape of k",
        "k: must have shape [5, 2, 16]; got [5, 1, 16]",
        set_argument(2, lambda t: t[:, 1:]),
    ),
    Malformed(
        "tokens of v",
        "v: must have shape [5, 2, 16]; got [4, 2, 16]",
        set_argument(3, lambda t: t[1:]),
    ),
    Malformed(
        "dtype of v",
        "v: must have the dtype of k, float32; got bfloat16",
        set_argument(3, lambda t: t.bfloat16()),
    ),
    Malformed("slots", "slots: must have shape [5]; got [3]", _slots(1, 2, 3)),
    Malformed(
        "dtype of slots",
        "slots: must have dtype int32 or int64; got int16",
        set_argument(4, lambda t: t.short()),
    ),
    Malformed(
        "queries without rope",
        "q: requires rope; got [5, 4, 16]",
        set_options(q=torch.zeros(5, 4, 16)),
    ),
    Malformed(
        "shape of q",
        "q: must have shape [5, H, 16]; got [4, 4, 16]",
        set_options(q=torch.zeros(4, 4, 16)),
    ),
    Malformed(
        "GQA", "k: number of heads must divide that of q, 3 (GQA); got 2", _turned(heads=3)
    ),
    Malformed(
        "rope",
        "rope: must be (cos, sin, positions); got 'tuple'",
        set_options(rope=(torch.ones(9, 8), torch.zeros(9, 8))),
    ),
    Malformed(
        "pairs",
        "rope: must have shape [positions, pairs], 1 position or more, 1 to 8 pairs; got [9, 9]",
        _turned(pairs=9),
    ),
    Malformed(
        "pairs behind an offset",
        "rope: must have shape [positions, pairs], 1 position or more, 1 to 6 pairs; got [9, 8]",
        _turned(offset=3),
    ),
    Malformed(
        "offset",
        "rope_offset: must be 0 to 14, two columns or more before the end; got 15",
        _turned(offset=15),
    ),
    Malformed(
        "negative offset",
        "rope_offset: must be 0 to 14, two columns or more before the end; got -1",
        _turned(offset=-1),
    ),
    Malformed(
        "offset without rope",
        "rope_offset: requires rope; got 2",
        set_options(rope_offset=2),
    ),
    Malformed("sin", "rope: must have cos and sin of one shape; got [9, 8]", _turned(pairs=4)),
    Malformed(
        "shape of positions",
        "rope: must have positions of shape [5]; got [2]",
        _turned(positions=(0, 1)),
    ),
    Malformed(
        "dtype of positions",
        "rope: must have positions of dtype int32 or int64; got float32",
        _turned(dtype=torch.float32),
    ),
    Malformed(
        "scales of float32",
        "v_scale: requires a cache in float8_e4m3fn; got float32",
        _scaled(torch.ones(1), float8=False),
    ),
    Malformed(
        "shape of scales",
        "v_scale: must have shape [1], [2] or [3, 4, 2]; got [3, 4, 1]",
        _scaled(torch.ones(3, 4, 1)),
    ),
    Malformed(
        "scales of another shape",
        "v_scale: must have shape [1], [2] or [3, 4, 2]; got [3]",
        _scaled(torch.ones(3)),
    ),
    Malformed(
        "dtype of scales", "v_scale: must be float32; got float16", _scaled(torch.ones(1).half())
    ),
    Malformed(
        "repeated slots of a cache",
        "k_cache: must have each element at an address of its own; strides; got [0, 32, 16, 1]",
        set_argument(0, lambda t: t[:1].expand(3, -1, -1, -1)),
    ),
    Malformed(
        "one cache twice",
        "v_cache: must not share memory with k_cache; strides; got [128, 32, 16, 1]",
        lambda a, k: a.__setitem__(1, a[0]),
    ),
    Malformed(
        "keys of the cache",
        "k_cache: must not share memory with k; strides; got [128, 32, 16, 1]",
        _row,
    ),
    Malformed(
        "one scale twice",
        "v_scale: must not share memory with k_scale; strides; got [8, 2, 1]",
        _shared_scale,
    ),
    Malformed(
        "slot",
        "slots: must be -1 or below the slots of the cache, 12; got 12",
        _slots(3, 12, 5, -1, 7),
        values=True,
    ),
    Malformed(
        "negative slot",
        "slots: must be -1 or below the slots of the cache, 12; got -2",
        _slots(3, 4, -2, 5, 5),
        values=True,
    ),
    Malformed(
        "slot twice", "slots: must not name a slot twice; got 5", _slots(9, 5, -1, 5, 9),
        values=True,
    ),
    Malformed(
        "position",
        "rope: must have positions of 0 to below the rows of cos and sin, 9; got 9",
        _turned(positions=(0, 8, 9, -1, 2), heads=4),
        values=True,
    ),
    Malformed(
        "negative scale",
        "v_scale: must be above 0 and finite; got -1",
        _scaled(torch.tensor([1.0, -1.0])),
        values=True,
    ),
    Malformed(
        "scale of NaN",
        "v_scale: must be above 0 and finite; got nan",
        _scaled(torch.tensor([float("nan")])),
        values=True,
    ),
)  # fmt: skip
