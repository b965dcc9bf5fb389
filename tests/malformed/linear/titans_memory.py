"""Malformed calls of titans_memory."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options
from torch import Tensor

from tokenmill.linear.titans_memory_cases import GATES


def _pack(*ends: int, dtype: torch.dtype = torch.int32) -> Any:
    """The first sample as packed sequences of 66 tokens in all."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:] = [a.flatten(0, 1) for a in args]
        kwargs.update({name: kwargs[name].flatten(0, 1) for name in GATES})
        kwargs["cu_seqlens"] = torch.tensor(ends, dtype=dtype)

    return edit


def _state(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


# Edits of the first sample: q, k and v [2, 33, 2, 16], gates [2, 33, 2].
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
        "q: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda q: q.int()),
    ),
    Malformed(
        "head dimension",
        "q: must have a head dimension of at least 1; got 0",
        set_argument(0, lambda q: q[..., :0]),
    ),
    Malformed(
        "dtype mix",
        "k: must have the dtype of q, float32; got float16",
        set_argument(1, lambda k: k.half()),
    ),
    Malformed(
        "device mix",
        "v: must be on the device of q, cpu; got meta",
        set_argument(2, lambda v: v.to("meta")),
    ),
    Malformed(
        "k shape",
        "k: must have the shape of q, [2, 33, 2, 16]; got [2, 33, 1, 16]",
        set_argument(1, lambda k: k[:, :, :1]),
    ),
    Malformed(
        "v shape",
        "v: must have the shape of q up to the head dimension, [2, 33, 2, 16]; got [2, 32, 2, 16]",
        set_argument(2, lambda v: v[:, 1:]),
    ),
    Malformed(
        "value dimension",
        "v: must have a head dimension of at least 1; got 0",
        set_argument(2, lambda v: v[..., :0]),
    ),
    Malformed(
        "gate shape",
        "alpha: must have shape [2, 33, 2]; got [2, 33]",
        set_options(alpha=torch.zeros(2, 33)),
    ),
    Malformed("gate number", "eta: must be a tensor; got 0.5", set_options(eta=0.5)),
    Malformed(
        "gate dtype",
        "theta: must be a floating-point tensor; got int32",
        set_options(theta=torch.zeros(2, 33, 2, dtype=torch.int32)),
    ),
    Malformed("chunk size", "chunk_size: must be at least 1; got 0", set_options(chunk_size=0)),
    Malformed(
        "chunk size word",
        "chunk_size: must be an integer; got 'auto'",
        set_options(chunk_size="auto"),
    ),
    Malformed("loss", "loss: must be 'mse'; got 'l1'", set_options(loss="l1")),
    Malformed(
        "one state",
        "initial_state: must be a pair of tensors (M, S) or None; got a tensor",
        set_options(initial_state=torch.zeros(2)),
    ),
    Malformed(
        "state shape",
        "initial_state: must have shape [2, 2, 16, 16]; got [2, 2, 16, 15]",
        set_options(initial_state=_state(2, 2, 16, 15)),
    ),
    Malformed(
        "state dtype",
        "initial_state: must be float32; got float16",
        set_options(initial_state=_state(2, 2, 16, 16, dtype=torch.float16)),
    ),
    Malformed(
        "final state",
        "return_final_state: must be a bool; got 1",
        set_options(return_final_state=1),
    ),
    Malformed(
        "cu_seqlens dtype", "cu_seqlens: must be int32; got int64", _pack(0, 66, dtype=torch.int64)
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
)
