"""A bonus of each token on itself: queries read the state before their own token.

    out_t = scale q_t (S_(t-1) + diag(bonus) k_t^T v_t)

S_(t-1) is what linear attention reads at token t where keys, values and decays come a token later:
the first token gets a key, a value and a log decay of 0, and a token that is only read by the final
state ends each sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._call.operator import TorchOp
from .._check import check, check_device_of_q, check_tensor, reads_values


def check_bonus(op: TorchOp, a: dict[str, Any], bonus: Any) -> None:
    """Checks a call before its tokens move, so that errors name the caller's shapes."""
    check_tensor(op.name, "bonus", bonus)
    for name in ("q", "k", "v"):
        if a[name].dim() and a[name].stride(-1) != 1:
            a[name] = a[name].contiguous()
    plain = a["feature_map"] == "identity"
    rule = "must be 'identity' with a bonus"
    check(plain, op.name, "feature_map", rule, a["feature_map"])
    check(not a["normalize"], op.name, "normalize", "must be False with a bonus", True)
    op.check(*a.values(), float64=True)
    wanted = [a["q"].shape[-2], a["q"].shape[-1]]
    check(list(bonus.shape) == wanted, op.name, "bonus", f"must have shape {wanted}", bonus.shape)
    check(bonus.is_floating_point(), op.name, "bonus", "must be floating-point", bonus.dtype)
    check_device_of_q(op.name, "bonus", bonus, a["q"])
    if reads_values(a["q"]):
        op.check_values(op.record(**a))


def _rows_of_packed(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The row of each token where every sequence before it has a token more."""
    order = torch.arange(tokens, device=cu_seqlens.device)
    return order + torch.searchsorted(cu_seqlens[1:].contiguous(), order, right=True)


def _places(cu_seqlens: Tensor | None, tokens: int) -> Callable[[Tensor, bool], Tensor]:
    """Puts tokens at their rows of the longer call, or a row later; 0 elsewhere."""
    if cu_seqlens is None:

        def pad(t: Tensor, later: bool) -> Tensor:
            nothing = t.new_zeros(t.shape[0], 1, *t.shape[2:])
            return torch.cat([nothing, t] if later else [t, nothing], 1)

        return pad
    rows, count = _rows_of_packed(cu_seqlens, tokens), tokens + cu_seqlens.shape[0] - 1

    def spread(t: Tensor, later: bool) -> Tensor:
        at = (rows + 1).clamp(max=count - 1) if later else rows
        return t.new_zeros(count, *t.shape[1:]).index_copy(0, at, t)

    return spread


def move_keys(a: dict[str, Any]) -> None:
    """Changes the arguments of linear attention or of its decode step."""
    q, cu_seqlens, log_decay = a["q"], a.get("cu_seqlens"), a["log_decay"]
    tokens = q.shape[0 if cu_seqlens is not None else 1]
    put = _places(cu_seqlens, tokens)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(q.shape[:-1])  # the first token decays nothing
    if log_decay is not None:
        a["log_decay"] = put(log_decay, True)
    a["q"] = put(q, False)
    a["k"], a["v"] = (put(a[name], True) for name in ("k", "v"))
    if cu_seqlens is not None:
        more = torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=cu_seqlens.device)
        a["cu_seqlens"] = cu_seqlens + more
    if a.get("accepted") is not None:
        a["accepted"] = a["accepted"] + 1


def with_own_tokens(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, bonus: Tensor, scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Results of the longer call y at the rows of q, and what each token adds by itself."""
    if cu_seqlens is None:
        y = y[:, : q.shape[1]]
    else:
        y = y[_rows_of_packed(cu_seqlens, q.shape[0])]
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[-2] // max(k.shape[-2], 1)
    k, v = (t.to(wide).repeat_interleave(group, -2) for t in (k, v))
    own = scale * (q.to(wide) * bonus.to(wide) * k).sum(-1, keepdim=True)
    return (y + own * v).to(y.dtype)
