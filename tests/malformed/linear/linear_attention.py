"""Malformed calls of linear_attention."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options
from torch import Tensor


def _pack(*ends: int, dtype: torch.dtype = torch.int32, **changes: Any) -> Any:
    """The first sample as packed sequences of 66 tokens in all."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:] = [a.flatten(0, 1) for a in args]
        kwargs.update({"cu_seqlens": torch.tensor(ends, dtype=dtype), **changes})

    return edit


def _narrow(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def _taylor2_of_33(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[:2] = torch.zeros(2, 33, 4, 33), torch.zeros(2, 33, 2, 33)
    kwargs["feature_map"] = "taylor2"


# Edits of the first sample: q [2, 33, 4, 32], k and v [2, 33, 2, 32], log_decay [4].
CALLS = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "packed rank",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens=ints(0, 33)),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int64",
        set_argument(0, lambda q: q.long()),
    ),
    Malformed(
        "dtype mix",
        "v: must have the dtype of q, float32; got float16",
        set_argument(2, lambda v: v.half()),
    ),
    Malformed(
        "device mix",
        "v: must be on the device of q, cpu; got meta",
        set_argument(2, lambda v: v.to("meta")),
    ),
    Malformed(
        "head dimension",
        "q: must have a head dimension of 1 to 256; got 257",
        lambda a, k: a.__setitem__(slice(None), [torch.zeros(2, 33, 4, 257)] * 3),
    ),
    Malformed(
        "head dimensions differ",
        "k: must have the head dimension of q, 32; got 16",
        set_argument(1, lambda k: k[..., :16]),
    ),
    Malformed(
        "batch", "k: must have the batch size of q, 2; got 1", set_argument(1, lambda k: k[:1])
    ),
    Malformed(
        "v shape",
        "v: must have the shape of k up to the head dimension, [2, 33, 2, 32]; got [2, 32, 2, 32]",
        set_argument(2, lambda v: v[:, 1:]),
    ),
    Malformed(
        "GQA ratio",
        "k: number of heads must divide that of q, 4 (GQA); got 3",
        lambda a, k: a.__setitem__(slice(1, 3), [torch.zeros(2, 33, 3, 32)] * 2),
    ),
    Malformed(
        "lengths differ",
        "k: must have the length of q, 33; got 32",
        lambda a, k: a.__setitem__(slice(1, 3), [t[:, 1:] for t in a[1:]]),
    ),
    Malformed(
        "feature map",
        "feature_map: must be 'identity', 'elu1', 'relu', 'silu' or 'taylor2'; got 'softmax'",
        set_options(feature_map="softmax"),
    ),
    Malformed(
        "taylor2 width",
        "q: must have a head dimension of 1 to 32 with 'taylor2'; got 33",
        _taylor2_of_33,
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got nan", set_options(scale=float("nan"))
    ),
    Malformed(
        "scale tensor",
        "scale: must be a number; got a tensor of shape []",
        set_options(scale=torch.ones(())),
    ),
    Malformed(
        "log_decay shape",
        "log_decay: must have shape [4] or [2, 33, 4]; got [2, 4]",
        set_options(log_decay=torch.zeros(2, 4)),
    ),
    Malformed(
        "log_decay dtype",
        "log_decay: must be float32; got int64",
        set_options(log_decay=torch.zeros(4, dtype=torch.int64)),
    ),
    Malformed(
        "log_decay number",
        "log_decay: must be a tensor or None; got -0.5",
        set_options(log_decay=-0.5),
    ),
    Malformed(
        "log_decay positive",
        "log_decay: must not be positive; largest; got 0.5",
        set_options(log_decay=torch.tensor([-1.0, 0.5, 0.25, 0.0])),
        values=True,
    ),
    Malformed(
        "state shape",
        "initial_state: must have shape [2, 4, 32, 32]; got [2, 2, 32, 32]",
        set_options(initial_state=torch.zeros(2, 2, 32, 32)),
    ),
    Malformed(
        "state without normaliser",
        "initial_state: must have shape [2, 4, 32, 33]; got [2, 4, 32, 32]",
        set_options(initial_state=torch.zeros(2, 4, 32, 32), normalize=True),
    ),
    Malformed(
        "state dtype",
        "initial_state: must be float32; got bfloat16",
        set_options(initial_state=torch.zeros(2, 4, 32, 32, dtype=torch.bfloat16)),
    ),
    Malformed(
        "chunk size",
        "chunk_size: must be a power of two from 16 to 256; got 48",
        set_options(chunk_size=48),
    ),
    Malformed(
        "chunk size word",
        "chunk_size: must be an integer or None; got 'auto'",
        set_options(chunk_size="auto"),
    ),
    Malformed(
        "cu_seqlens dtype", "cu_seqlens: must be int32; got int64", _pack(0, 66, dtype=torch.int64)
    ),
    Malformed(
        "cu_seqlens shape",
        "cu_seqlens: must have 1 dimension of at least 1 element; got [0]",
        _pack(),
    ),
    Malformed("cu_seqlens start", "cu_seqlens: must start at 0; got 1", _pack(1, 66), values=True),
    Malformed(
        "cu_seqlens order",
        "cu_seqlens: must not decrease; got [0, 70, 66]",
        _pack(0, 70, 66),
        values=True,
    ),
    Malformed(
        "cu_seqlens end",
        "cu_seqlens: must end at the number of tokens, 66; got 65",
        _pack(0, 33, 65),
        values=True,
    ),
    Malformed(
        "out shape",
        "out: must have shape [2, 33, 4, 32]; got [2, 33, 2, 32]",
        set_options(out=torch.zeros(2, 33, 2, 32)),
    ),
    Malformed(
        "out dtype",
        "out: must have the dtype of q, float32; got float16",
        set_options(out=torch.zeros(2, 33, 4, 32, dtype=torch.float16)),
    ),
    Malformed(
        "out layout",
        "out: must have a contiguous last dimension; strides",
        set_options(out=_narrow(torch.zeros(2, 33, 4, 32))),
    ),
    Malformed(
        "expanded out",
        "out: must have each element at an address of its own; strides; got [0, 128, 32, 1]",
        set_options(out=torch.zeros(33, 4, 32).expand(2, 33, 4, 32)),
    ),
    Malformed(
        "out over q",
        "out: must not share memory with q; strides; got [4224, 128, 32, 1]",
        lambda a, k: k.update(out=a[0]),
    ),
)
