"""Jagged nested tensors (torch.nested, layout=torch.jagged) as packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._call.strides import JAGGED
from .._check import check, fail, reads_values

OP = "attention"


def is_nested(t: Any) -> bool:
    """Whether t is a nested tensor."""
    return bool(getattr(t, "is_nested", False))


# Arguments that nested tensors make redundant (lengths), or that need a plain tensor result.
REFUSED = ("bias", "cu_seqlens_q", "cu_seqlens_k", "seqlens_k", "block_table", "out")


def as_packed(
    q: Any, k: Any, v: Any, given: Mapping[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Values of q, k and v, ``[B, *, H, D]``, and cu_seqlens from their offsets."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check_nested(name, t)
    for name in REFUSED:
        if given.get(name) is not None:
            fail(OP, name, "must not be given with nested tensors", given[name])
    q_ends, k_ends, v_ends = q.offsets(), k.offsets(), v.offsets()
    if v_ends is not k_ends and reads_values(v_ends):
        check(torch.equal(v_ends, k_ends), OP, "v", "must have the lengths of k", v_ends.tolist())
    ends = {"cu_seqlens_q": q_ends.int()}
    if k_ends is not q_ends:
        ends["cu_seqlens_k"] = k_ends.int()
    return (q.values(), k.values(), v.values()), ends


def over_nested(
    attention: Callable[..., Any], q: Any, k: Any, v: Any, given: Mapping[str, Any]
) -> Any:
    """Attention of nested tensors. given: its other arguments."""
    packed, ends = as_packed(q, k, v, given)
    found = attention(*packed, **{n: x for n, x in given.items() if n not in REFUSED}, **ends)
    out, *lse = found if isinstance(found, tuple) else (found,)
    out = torch.nested.nested_tensor_from_jagged(out, offsets=q.offsets())
    return (out, *lse) if lse else out


def _check_nested(name: str, t: Any) -> None:
    if not is_nested(t):
        fail(OP, name, "must be nested, as q is", t)
    if t.layout is not torch.jagged:
        fail(OP, name, f"{JAGGED}; layout", t.layout)
    # The ragged dimension must be the second, [B, *, H, D], and its rows contiguous without gaps.
    ok = t.dim() == 4 and t._ragged_idx == 1 and t.lengths() is None
    if not ok:
        fail(OP, name, "must be nested as [B, *, H, D] without gaps (contiguous())", t.dim())
