"""titans_memory in blocks of tokens, and again token by token.

    S_t = eta_t S_(t-1) - theta_t k_t^T (k_t G - v_t),   M_t = (1 - alpha_t) M_(t-1) + S_t,
    out_t = q_t M_t

with G the memory before the chunk of token t. `titans_memory` processes the tokens of a chunk
together, at most BLOCK at a time. A block begins with M and S. With U = K G - V, after its token t

    memory   = W[t, 0] M + W[t, 1] S - sum_j W[t, 2 + j] k_j^T u_j
    momentum =             E[t, 1] S - sum_j E[t, 2 + j] k_j^T u_j

Rows of W and E obey the same recurrence as memory and momentum, without divisions.
`titans_memory_by_token` takes the same record: a second, independent computation of the same
numbers. PyTorch's autograd differentiates both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
Results = tuple[Tensor, Tensor, Tensor]  # out, memory, momentum of a batch of sequences


def titans_memory(a: Any) -> Results:
    """q, k [B, S, H, D], v [B, S, H, Dv], gates [B, S, H] (packed [T, ...]), initial states [B, H,
    D, Dv] or None.
    """
    return _by_sequence(_blocks, a, torch.promote_types(a.q.dtype, torch.float32))


def titans_memory_by_token(a: Any, *, upcast: bool = True) -> Results:
    """upcast=False keeps 16-bit inputs in 16 bits throughout, as plain PyTorch code would: the
    baseline of the error budget.
    """
    dtype = torch.promote_types(a.q.dtype, torch.float32) if upcast else a.q.dtype
    return _by_sequence(_tokens, a, dtype)


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    memory: Tensor,
    momentum: Tensor,
    chunk_size: int,
) -> Results:
    """q, k [B, H, S, D], v [B, H, S, Dv], gates [B, H, S], states [B, H, D, Dv]."""
    length = q.shape[2]
    outs = [v[:, :, :0]]
    for begin in range(0, length, chunk_size):
        start, end = memory, min(begin + chunk_size, length)
        for first in range(begin, end, BLOCK):
            rows = slice(first, min(first + BLOCK, end))
            queries, keys = q[:, :, rows], k[:, :, rows]
            alpha, eta, theta = (gate[:, :, rows].flatten(0, 1) for gate in gates)
            w, es = weights_of(1 - alpha, eta, theta)
            w, e = w.unflatten(0, q.shape[:2]), es[-1].unflatten(0, q.shape[:2])
            u = keys @ start - v[:, :, rows]
            pairs = (queries @ keys.mT) * w[..., 2:]
            outs.append(
                w[..., :1] * (queries @ memory) + w[..., 1:2] * (queries @ momentum) - pairs @ u
            )
            to_memory, to_momentum = (x[..., None] for x in (w[:, :, -1], e))
            memory = (
                to_memory[:, :, :1] * memory
                + to_memory[:, :, 1:2] * momentum
                - (to_memory[:, :, 2:] * keys).mT @ u
            )
            momentum = to_momentum[:, :, 1:2] * momentum - (to_momentum[:, :, 2:] * keys).mT @ u
    return torch.cat(outs, 2), memory, momentum


def weights_of(decay: Tensor, eta: Tensor, theta: Tensor) -> tuple[Tensor, list[Tensor]]:
    """W [N, n, 2 + n] from gates [N, n], and the rows of E, [N, 2 + n] each."""
    w, e = torch.eye(2, 2 + decay.shape[1], dtype=decay.dtype, device=decay.device)
    new = torch.diag_embed(theta, 2, 0, 2)  # [2 + n, N, 2 + n]
    ws, es = [], []
    for t in range(decay.shape[1]):
        e = eta[:, t, None] * e + new[t]
        w = decay[:, t, None] * w + e
        ws.append(w)
        es.append(e)
    return torch.stack(ws, 1), es


def _tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    memory: Tensor,
    momentum: Tensor,
    chunk_size: int,
) -> Results:
    outs, start = [v[:, :, :0]], memory
    alpha, eta, theta = (gate[..., None, None] for gate in gates)
    for t in range(q.shape[2]):
        if t % chunk_size == 0:
            start = memory
        key, value = k[:, :, t, None], v[:, :, t, None]
        momentum = eta[:, :, t] * momentum - theta[:, :, t] * (key.mT @ (key @ start - value))
        memory = (1 - alpha[:, :, t]) * memory + momentum
        outs.append(q[:, :, t, None] @ memory)
    return torch.cat(outs, 2), memory, momentum


def _by_sequence(one: Callable[..., Results], a: Any, dtype: torch.dtype) -> Results:
    """Outputs of the operator from `one` over a batch of sequences of equal length, in a dtype."""
    q, v = a.q, a.v
    inputs = (q, a.k, v, a.alpha, a.eta, a.theta)
    wide = torch.promote_types(q.dtype, torch.float32)
    sequences = [inputs]
    if a.cu_seqlens is not None:
        ends = a.cu_seqlens.tolist()
        rows = [slice(*ends[n : n + 2]) for n in range(len(ends) - 1)]
        sequences = [tuple(t[None, each] for t in inputs) for each in rows]
    outs, memories, momenta = [], [], []
    for n, tensors in enumerate(sequences):
        of_heads = [t.transpose(1, 2).to(dtype) for t in tensors]
        shape = (*of_heads[0].shape[:2], q.shape[-1], v.shape[-1])
        each = slice(None) if a.cu_seqlens is None else slice(n, n + 1)
        begin = [
            q.new_zeros(shape, dtype=dtype) if x is None else x[each].to(dtype)
            for x in (a.initial_memory, a.initial_momentum)
        ]
        out, memory, momentum = one(*of_heads[:3], tuple(of_heads[3:]), *begin, a.chunk_size)
        outs.append(out.transpose(1, 2))
        memories.append(memory.to(wide))
        momenta.append(momentum.to(wide))
    if not sequences:
        outs = [v.new_zeros(1, *v.shape)]
        memories = momenta = [q.new_zeros(0, q.shape[1], q.shape[2], v.shape[2], dtype=wide)]
    out = torch.cat(outs, 1 if a.cu_seqlens is not None else 0)
    out = (out if a.cu_seqlens is None else out[0]).to(q.dtype)
    if a.return_final_state:
        return out, torch.cat(memories), torch.cat(momenta)
    return out, q.new_empty(0, dtype=wide), q.new_empty(0, dtype=wide)
