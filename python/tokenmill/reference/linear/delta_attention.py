"""delta_attention, token by token, and again in chunks.

    S_t = decay_t S_(t-1) + k_t^T u_t,   u_t = beta_t (v_t - k_t decay_t S_(t-1)),
    out_t = scale q_t S_t

with decay_t = e^log_decay_t, a number or a diagonal. `delta_attention` carries the state from token
to token. `delta_attention_chunked` takes the same record and solves for the u of CHUNK tokens: with
G_i the sum of log_decay in the chunk, and A strictly lower triangular,

    A_ij = beta_i (k_i e^(G_i - G_j)) . k_j,   (1 + A) U = diag(beta) (V - (K e^G) S)

A second, independent computation of the same numbers, and in the dtype of the inputs what plain
PyTorch code would do. PyTorch's autograd differentiates both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 16
L2NORM_EPSILON = 1e-6
Results = tuple[Tensor, Tensor]  # out and state of a batch of sequences


def delta_attention(a: Any) -> Results:
    """q, k [B, S, Hk, D], v [B, S, Hv, Dv], beta [B, S, Hv], log_decay [B, S, Hv] | [B, S, Hv, D]
    (packed [T, ...]), initial_state [B, Hv, D, Dv] or None.
    """
    return _by_sequence(_tokens, a, torch.promote_types(a.q.dtype, torch.float32))


def delta_attention_chunked(a: Any, *, upcast: bool = True) -> Results:
    """upcast=False keeps 16-bit inputs in 16 bits throughout, as plain PyTorch code would: the
    baseline of the error budget.
    """
    dtype = torch.promote_types(a.q.dtype, torch.float32) if upcast else a.q.dtype
    return _by_sequence(_chunks, a, dtype)


def _tokens(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> Results:
    """q, k [B, H, S, D], v [B, H, S, Dv], beta [B, H, S, 1], log_decay [B, H, S, D | 1], state
    [B, H, D, Dv].
    """
    decay, outs = torch.exp(log_decay)[..., None], [v[:, :, :0]]
    for t in range(q.shape[2]):
        key = k[:, :, t, None]
        state = decay[:, :, t] * state
        u = beta[:, :, t, None] * (v[:, :, t, None] - key @ state)
        state = state + key.mT @ u
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2), state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> Results:
    # e^-128 is 0 in float32, and sums of this bound lose no digits that matter.
    log_decay = log_decay.clamp(min=-128.0 if log_decay.dtype != torch.float64 else -1e4)
    outs = [v[:, :, :0]]
    for first in range(0, q.shape[2], CHUNK):
        rows = slice(first, first + CHUNK)
        queries, keys, gates = q[:, :, rows], k[:, :, rows], log_decay[:, :, rows].cumsum(2)
        n = keys.shape[2]
        # [B, H, i, j, D | 1]; exponents of pairs with j > i are not used.
        exponents = gates[:, :, :, None] - gates[:, :, None]
        visible = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        decay = torch.exp(exponents.masked_fill(~visible[..., None], -torch.inf)).to(q.dtype)
        of_keys, of_queries = (
            torch.einsum("bhid,bhjd,bhijd->bhij", x, keys, decay) for x in (keys, queries)
        )
        enters = torch.exp(gates).to(q.dtype)
        stays = torch.exp(gates[:, :, -1:] - gates).to(q.dtype)
        rest = beta[:, :, rows] * (v[:, :, rows] - (keys * enters) @ state)
        lower = (beta[:, :, rows] * of_keys).tril(-1)
        us: list[Tensor] = []
        for i in range(n):
            u = rest[:, :, i : i + 1]
            if i:
                u = u - lower[:, :, i : i + 1, :i] @ torch.cat(us, 2)
            us.append(u)
        u = torch.cat(us, 2)
        outs.append((queries * enters) @ state + of_queries @ u)
        state = enters[:, :, -1, :, None] * state + (keys * stays).mT @ u
    return torch.cat(outs, 2), state


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2NORM_EPSILON)


def _by_sequence(one: Callable[..., Results], a: Any, dtype: torch.dtype) -> Results:
    """Outputs of the operator from `one` over a batch of sequences of equal length, in a dtype."""
    wide = torch.promote_types(a.q.dtype, torch.float32)
    decay = torch.zeros_like(a.beta) if a.log_decay is None else a.log_decay
    per_channel = decay.dim() > a.beta.dim()
    inputs = (a.q, a.k, a.v, a.beta[..., None], decay if per_channel else decay[..., None])
    sequences: list[tuple[Tensor, ...]] = [inputs]
    if a.cu_seqlens is not None:
        ends = a.cu_seqlens.tolist()
        rows = [slice(*ends[n : n + 2]) for n in range(len(ends) - 1)]
        sequences = [tuple(t[None, each] for t in inputs) for each in rows]
    heads, shape = a.v.shape[-2], (a.v.shape[-2], a.q.shape[-1], a.v.shape[-1])
    outs, states = [], []
    for n, tensors in enumerate(sequences):
        q, k, v, beta, gates = (t.transpose(1, 2) for t in tensors)
        q, k, v, beta = (t.to(dtype) for t in (q, k, v, beta))
        if a.qk_l2norm:
            q, k = _normalized(q), _normalized(k)
        q, k = (t.repeat_interleave(heads // max(t.shape[1], 1), 1) for t in (q, k))
        each = slice(None) if a.cu_seqlens is None else slice(n, n + 1)
        state = a.initial_state
        if state is None:
            begin = q.new_zeros(q.shape[0], *shape)
        else:
            begin = state[each].to(dtype)
        out, after = one(q * a.scale, k, v, beta, gates.to(wide), begin)
        outs.append(out.transpose(1, 2))
        states.append(after.to(wide))
    if not sequences:
        outs, states = [a.v.new_zeros(1, *a.v.shape)], [a.q.new_zeros(0, *shape, dtype=wide)]
    out = torch.cat(outs, 1 if a.cu_seqlens is not None else 0)
    out = (out if a.cu_seqlens is None else out[0]).to(a.q.dtype)
    return out, torch.cat(states) if a.return_final_state else a.q.new_empty(0, dtype=wide)
