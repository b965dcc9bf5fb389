"""Valid and malformed sample calls of linear_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument, set_options
from ..reference.linear._common import key_features
from ..registry import Malformed, Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def draw_state(
    shape: tuple[int, int, int, int],
    feature_map: str,
    normalize: bool,
    dtype: torch.dtype,
    g: torch.Generator,
) -> Tensor:
    """A state [N, H, F, Dv(+ 1)] after a few tokens; shape is N, H, D, Dv."""
    n, heads, d, dv = shape
    k = torch.randn(n, 3, heads, d, generator=g)
    v = torch.randn(n, 3, heads, dv, generator=g)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    features = key_features(k, feature_map)
    return torch.einsum("nthf,nthe->nhfe", features, v).contiguous().to(_wide(dtype))


def _sample(
    b: int = 2,
    s: int = 33,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    lengths: tuple[int, ...] | None = None,
    decay: str | tuple[float, ...] | None = None,
    state: bool = False,
    **options: Any,
) -> Any:
    """decay: "head", "token", or one slope per head. lengths packs sequences."""

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        n, lead = b, [b, s]
        kwargs = dict(options)
        if lengths is not None:
            n, lead = len(lengths), [sum(lengths)]
            kwargs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        q, k, v = (
            torch.randn(*lead, heads, size, generator=g).to(dtype)
            for heads, size in ((h, d), (hk, d), (hk, dv))
        )
        if decay == "head":
            kwargs["log_decay"] = -torch.rand(h, generator=g).to(_wide(dtype))
        elif decay == "token":
            gates = torch.randn(*lead, h, generator=g) + 2
            kwargs["log_decay"] = torch.nn.functional.logsigmoid(gates).to(_wide(dtype))
        elif decay is not None:
            kwargs["log_decay"] = -torch.tensor(decay, dtype=_wide(dtype))
        if state:
            feature_map = options.get("feature_map", "identity")
            normalize = options.get("normalize", False)
            kwargs["initial_state"] = draw_state((n, h, d, dv), feature_map, normalize, dtype, g)
            kwargs["return_final_state"] = True
        return (q, k, v), kwargs

    return make


SAMPLES = (
    Sample("lightning", _sample(decay="head")),
    Sample("no decay", _sample(s=65, hk=4, dv=24, state=True)),
    Sample(
        "gated",
        _sample(s=130, hk=1, d=24, dv=40, decay="token", state=True, chunk_size=32),
    ),
    Sample(
        "steep", _sample(b=1, s=129, hk=4, d=16, dv=16, decay=(1e-3, 0.1, 2.0, 20.0), state=True)
    ),
    Sample("normalized", _sample(decay="head", state=True, feature_map="elu1", normalize=True)),
    Sample("normalized, no decay", _sample(s=64, dv=17, feature_map="elu1", normalize=True)),
    Sample("relu", _sample(s=20, d=18, feature_map="relu", decay="head", scale=0.5)),
    Sample(
        "silu, packed, gated",
        _sample(lengths=(5, 0, 64, 1), d=20, dv=12, feature_map="silu", decay="token", state=True),
    ),
    Sample(
        "packed",
        _sample(lengths=(33, 0, 3), hk=4, decay="head", chunk_size=16, return_final_state=True),
    ),
    Sample(
        "packed, normalized",
        _sample(lengths=(1, 40), feature_map="elu1", normalize=True, decay="token", state=True),
    ),
    Sample("taylor2", _sample(s=40, hk=1, d=8, dv=20, feature_map="taylor2", state=True)),
    Sample(
        "taylor2, normalized, gated",
        _sample(b=1, s=70, h=2, d=16, dv=16, feature_map="taylor2", normalize=True, decay="token"),
    ),
    Sample(
        "taylor2, packed",
        _sample(
            lengths=(17, 0, 4), d=5, feature_map="taylor2", normalize=True, decay="head", state=True
        ),
    ),
    Sample("wide heads", _sample(b=1, s=18, h=2, hk=1, d=200, dv=136, decay="head", state=True)),
    Sample("narrow heads", _sample(h=3, hk=1, d=1, dv=3, decay="head")),
    Sample("one token", _sample(s=1, decay="head", state=True)),
    Sample("no tokens", _sample(s=0, decay="head", state=True)),
    Sample("packed, no tokens", _sample(lengths=(0, 0), decay="head", state=True)),
    Sample("no sequences", _sample(lengths=(), return_final_state=True)),
)


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
MALFORMED = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "packed rank",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens=torch.tensor([0, 33], dtype=torch.int32)),
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
