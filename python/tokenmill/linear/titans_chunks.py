"""The chunks of titans_memory: products of matrices within a chunk, and a scan over the chunks.

A chunk begins with the memory M and the momentum S. With U = K M - V, the gradient of token j is
k_j^T u_j, and after token t, both counted from 0,

    memory   = W[t, 0] M + W[t, 1] S - sum_j W[t, 2 + j] k_j^T u_j
    momentum =             E[t, 1] S - sum_j E[t, 2 + j] k_j^T u_j

Rows of W and E follow from one another as memory and momentum do: no number is divided by another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._derivatives import keep, kept

# Elements of the matrices W of the chunks that are worked on together.
CPU_ELEMENTS, GPU_ELEMENTS = 2**18, 2**25


class TitansChunks(torch.autograd.Function):
    """(out, states) of q, k [B, S, H, D], v [B, S, H, Dv] and gates [B, S, H].

    Gates, live, initial and states are float32, or float64 beside such q. states [chunks + 1, B H,
    2 D, Dv] are memory above momentum before each chunk and after the last one. initial, in the
    same layout, is the state of chunk 0, or with restart (bool, [chunks]) that of each chunk where
    it is true. live [S] is 0 for places between sequences, whose alpha is 0, eta 1 and theta 0, and
    else 1; None: 1.

    The backward has the inputs and the states, and computes all else again, by differentiable
    functions.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor,
        initial: Tensor, restart: Tensor | None, live: Tensor | None, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x = initial[0]
        outs, states = [], [x]
        for part in _parts(q, chunk):
            block = _Block(q, k, v, alpha, eta, theta, live, part)
            starts, us = [], []
            for i in range(part.chunks):
                x = _restarted(x, initial, restart, part.number + i)
                u = torch.baddbmm(block.of(block.v, i), block.of(block.k, i), _upper(x), beta=-1)
                starts.append(x)
                us.append(u)
                x = torch.baddbmm(
                    _mixed(block.of(block.carry, i), x), block.of(block.k_end, i).mT, u, alpha=-1
                )
                states.append(x)
            read = block.q_start @ torch.cat(starts)
            out = torch.baddbmm(read, block.scores * block.inner, torch.cat(us), alpha=-1)
            outs.append(block.tokens(out).to(q.dtype))
        return torch.cat(outs, 1) if outs else torch.zeros_like(v), torch.stack(states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        keep(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstates: Tensor | None) -> tuple[Any, ...]:
        (q, k, v, alpha, eta, theta, initial, restart, live, chunk), (states,) = kept(ctx)
        if dout is None:
            dout = torch.zeros_like(v)
        dx = torch.zeros_like(states[-1]) if dstates is None else dstates[-1]
        found: list[tuple[Tensor, ...]] = []
        dinitial: list[Tensor] = []
        for part in reversed(_parts(q, chunk)):
            block = _Block(q, k, v, alpha, eta, theta, live, part)
            do = block.rows(dout)
            dread = block.q_start.mT @ do
            dus = -((block.scores * block.inner).mT @ do)
            starts, us, ends = [], [], []  # of states, residuals and their gradients
            for i in reversed(range(part.chunks)):
                number = part.number + i
                start = _restarted(states[number], initial, restart, number)
                key = block.of(block.k, i)
                du = torch.baddbmm(block.of(dus, i), block.of(block.k_end, i), dx, alpha=-1)
                starts.append(start)
                us.append(du)
                ends.append(dx)
                dx = block.of(dread, i) + _mixed(block.of(block.carry, i).mT, dx)
                memory = torch.baddbmm(_upper(dx), key.mT, du)
                dx = torch.cat([memory, _lower(dx)], 1)
                if restart is not None:
                    dinitial.append(torch.where(restart[number], dx, 0))
                    dx = torch.where(restart[number], 0, dx)
                if dstates is not None:
                    dx = dx + dstates[number]
            found.append(_gradients(block, do, *(torch.cat(t[::-1]) for t in (starts, us, ends))))
        inputs = (q, k, v, alpha, eta, theta)
        if not found:
            found = [tuple(torch.zeros_like(t) for t in inputs)]
        grads = [torch.cat(t[::-1], 1) for t in zip(*found, strict=True)]
        grads = [g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
        dinitial = [dx] if restart is None else dinitial[::-1]
        return (*grads, torch.stack(dinitial), None, None, None)


class _Part(NamedTuple):
    """Neighbouring chunks of one size."""

    number: int  # of the first one
    begin: int  # its first token
    chunks: int
    size: int


def _parts(q: Tensor, chunk: int) -> list[_Part]:
    batch, length, heads, _ = q.shape
    whole = length // chunk
    elements = CPU_ELEMENTS if q.device.type == "cpu" else GPU_ELEMENTS
    count = max(1, elements // max(1, batch * heads * chunk * (chunk + 2)))
    parts = [_Part(i, i * chunk, min(count, whole - i), chunk) for i in range(0, whole, count)]
    if length % chunk:
        parts.append(_Part(whole, whole * chunk, 1, length % chunk))
    return parts


class _Block:
    """What is known of the chunks of a part before the states are. All tensors have the dimensions
    [count B H, size, ...]."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor,
        live: Tensor | None, part: _Part,
    ) -> None:  # fmt: skip
        self.part, self.batch, self.heads, self.wide = part, q.shape[0], q.shape[2], alpha.dtype
        self.q, self.k, self.v = self.rows(q), self.rows(k), self.rows(v)
        self.decay, self.eta, self.theta = 1 - self.rows(alpha), self.rows(eta), self.rows(theta)
        self.live = None
        if live is not None:
            tokens = live[part.begin : part.begin + part.chunks * part.size]
            self.live = tokens.view(part.chunks, part.size).repeat_interleave(self.lanes, 0)
        self.w, self.e = weights_of(self.decay, self.eta, self.theta, self.live)
        self.inner = self.w[..., 2:]
        # Of gradients in the memory and the momentum behind the chunk, [..., size, 2]
        self.end = torch.stack([self.w[:, -1, 2:], self.e[:, -1, 2:]], -1)
        # Of memory and momentum in those behind the chunk, [..., 2, 2]
        self.carry = torch.stack([self.w[:, -1, :2], self.e[:, -1, :2]], 1)
        self.k_end = _scaled(self.k, self.end)
        self.q_start = _scaled(self.q, self.w[..., :2])
        self.scores = self.q @ self.k.mT

    @property
    def lanes(self) -> int:
        return self.batch * self.heads

    def rows(self, t: Tensor) -> Tensor:
        """[B, S, H, ...] to [count B H, size, ...] of this part."""
        part = self.part
        t = t[:, part.begin : part.begin + part.chunks * part.size].to(self.wide)
        t = t.unflatten(1, (part.chunks, part.size)).movedim((1, 3), (0, 2))
        return t.flatten(0, 2)

    def tokens(self, t: Tensor) -> Tensor:
        """The way back of `rows`."""
        t = t.unflatten(0, (self.part.chunks, self.batch, self.heads))
        return t.movedim((0, 2), (1, 3)).flatten(1, 2)

    def of(self, t: Tensor, i: int) -> Tensor:
        """The rows of chunk i."""
        return t[i * self.lanes : (i + 1) * self.lanes]


def weights_of(
    decay: Tensor, eta: Tensor, theta: Tensor, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """W and E [N, c, 2 + c] of gates [N, c]."""
    size = decay.shape[1]
    w, e = _before(decay)
    new = F.pad(torch.diag_embed(theta), (2, 0))
    ws, es = [], []
    for t in range(size):
        e = torch.addcmul(new[:, t], eta[:, t, None], e)
        seen = e if live is None else live[:, t, None] * e
        w = torch.addcmul(seen, decay[:, t, None], w)
        ws.append(w)
        es.append(e)
    return torch.stack(ws, 1), torch.stack(es, 1)


def _before(decay: Tensor) -> Tensor:
    """The rows of W and E before the first token, [2, 1, 2 + c]."""
    return torch.eye(2, 2 + decay.shape[1], dtype=decay.dtype, device=decay.device)[:, None]


def _weights_backward(block: _Block, dw: Tensor, de_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of alpha, eta and theta, from those of W and of the last row of E."""
    decay, eta, live = block.decay, block.eta, block.live
    size = decay.shape[1]
    gw, ge = dw[:, -1], de_end
    gws, ges = [], []
    for t in reversed(range(size)):
        if t < size - 1:
            gw = torch.addcmul(dw[:, t], decay[:, t + 1, None], gw)
            ge = eta[:, t + 1, None] * ge
        ge = ge + (gw if live is None else live[:, t, None] * gw)
        gws.append(gw)
        ges.append(ge)
    dalpha, deta = (
        (torch.stack(rows[::-1], 1) * torch.cat([first.expand_as(t[:, :1]), t[:, :-1]], 1)).sum(-1)
        for rows, t, first in zip((gws, ges), (block.w, block.e), _before(decay), strict=True)
    )
    dtheta = torch.stack([ge[:, 2 + t] for t, ge in enumerate(reversed(ges))], 1)
    return -dalpha, deta, dtheta


def _gradients(
    block: _Block, do: Tensor, starts: Tensor, du: Tensor, dends: Tensor
) -> tuple[Tensor, ...]:
    """Of q, k, v, alpha, eta, theta in the chunks of a block, from those of the result, of U and of
    the states behind the chunks."""
    q, k, inner = block.q, block.k, block.inner
    u = torch.baddbmm(block.v, k, _upper(starts), beta=-1)
    dp = -(do @ u.mT)
    dscores = dp * inner
    dq_start, dk_end = do @ starts.mT, -(u @ dends.mT)
    dq = _scaled_backward(dq_start, block.w[..., :2]) + dscores @ k
    dk = _scaled_backward(dk_end, block.end) + dscores.mT @ q + du @ _upper(starts).mT
    dw_start, dend = _factors_backward(dq_start, q), _factors_backward(dk_end, k)
    dcarry = _halves(dends) @ _halves(starts).mT
    dw = torch.cat([dw_start, dp * block.scores], -1)
    last = torch.cat([dcarry, dend.mT], -1)
    dw = torch.cat([dw[:, :-1], dw[:, -1:] + last[:, :1]], 1)
    gates = _weights_backward(block, dw, last[:, 1])
    return tuple(block.tokens(t) for t in (dq, dk, -du, *gates))


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """[N, c, 2 D] of x [N, c, D] and factors [N, c, 2]."""
    return (factors[..., None] * x[..., None, :]).flatten(-2)


def _scaled_backward(d: Tensor, factors: Tensor) -> Tensor:
    return (d.unflatten(-1, (2, d.shape[-1] // 2)) * factors[..., None]).sum(-2)


def _factors_backward(d: Tensor, x: Tensor) -> Tensor:
    return (d.unflatten(-1, (2, d.shape[-1] // 2)) * x[..., None, :]).sum(-1)


def _upper(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def _lower(x: Tensor) -> Tensor:
    return x[:, x.shape[1] // 2 :]


def _halves(x: Tensor) -> Tensor:
    """[N, 2, D Dv] of [N, 2 D, Dv]."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2 * x.shape[2])


def _mixed(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [N, 2, 2] times memory and momentum."""
    return (matrix @ _halves(x)).reshape(x.shape)


def _restarted(x: Tensor, initial: Tensor, restart: Tensor | None, number: int) -> Tensor:
    return x if restart is None else torch.where(restart[number], initial[number], x)
