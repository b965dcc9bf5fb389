"""Sample calls of linear_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.linear._common import key_features
from ..registry import Sample

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
    """decay: "head", "token", "channel", or one slope per head. lengths packs sequences."""

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
        elif decay in ("token", "channel"):
            gates = torch.randn(*lead, h, *([d] if decay == "channel" else []), generator=g) + 2
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
    Sample("per channel", _sample(b=1, s=70, d=24, dv=40, decay="channel", state=True)),
    Sample("packed, per channel", _sample(lengths=(5, 0, 64, 1), d=20, dv=12, decay="channel")),
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
