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
from torch import Tensor

from .._check import fail
from .._derivatives import keep, kept

# Elements of the matrices W of the chunks that are worked on together.
CPU_ELEMENTS, GPU_ELEMENTS = 2**18, 2**25


class TitansChunks(torch.autograd.Function):
    """(out, states) of q, k [B, S, H, D], v [B, S, H, Dv] and gates [B, S, H].

    Gates, live, initial and states are float32, or float64 beside such q. states [chunks + 1, B H,
    2 D, Dv] are memory above momentum before each chunk and after the last one. initial, in the
    same layout, is the state of chunk 0, or with restart (bool, [chunks]) that of each chunk where
    it is true. live [S] is 0 for places between sequences, whose alpha is 0, eta 1 and theta 0, and
    else 1; None: 1. Without save, states are the last one alone, and there is no backward.

    The backward has the inputs and the states, and computes all else again, by differentiable
    functions.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor,
        initial: Tensor, restart: Tensor | None, live: Tensor | None, chunk: int, save: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        parts = _parts(q, chunk)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        chunks = [part.chunks for part in parts]
        states = initial.new_empty((sum if save else max)([0, *chunks]) + 1, *initial.shape[1:])
        last = states[0].copy_(initial[0])
        for part in parts:
            block = _Block(q, k, v, alpha, eta, theta, live, part)
            here = states[part.number :] if save else states
            if not save:
                here[0] = last
            u = torch.empty_like(block.v)
            for i in range(part.chunks):
                rows, x = block.of(i), here[i]
                if restart is not None:
                    number = part.number + i
                    x = torch.where(restart[number], initial[number], x)
                torch.baddbmm(block.v[rows], block.k[rows], _upper(x), beta=-1, out=u[rows])
                last, moved = here[i + 1], _carried(block.carry[rows], x)
                torch.baddbmm(moved, block.k_end[rows].mT, u[rows], alpha=-1, out=last)
            read = block.q_start @ block.starts(here, initial, restart)
            block.place(read.baddbmm_(block.scores.mul_(block.inner), u, alpha=-1), out)
        return out, states if save else last[None]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Calls are further sequences of one call."""
        size, folded = info.batch_size, list(inputs)
        if in_dims[7] is not None:
            fail("titans_memory", "cu_seqlens", "must not be batched by vmap", inputs[7])
        for i, at in enumerate((0, 0, 0, 0, 0, 0, 1)):
            dim, t = in_dims[i], inputs[i]
            shape = (*t.shape[:at], size, *t.shape[at:])
            t = t.unsqueeze(at).expand(shape) if dim is None else t.movedim(dim, at)
            folded[i] = t.flatten(at, at + 1)
        out, states = TitansChunks.apply(*folded)
        found = out.unflatten(0, (size, out.shape[0] // size))
        return (found, states.unflatten(1, (size, states.shape[1] // size))), (0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        keep(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dstates: Tensor | None) -> tuple[Any, ...]:
        (q, k, v, alpha, eta, theta, initial, restart, live, chunk, _), (states,) = kept(ctx)
        if dout is None:
            dout = torch.zeros_like(v)
        dx = torch.zeros_like(states[-1]) if dstates is None else dstates[-1]
        found: list[tuple[Tensor, ...]] = []
        dinitial: list[Tensor] = []
        for part in reversed(_parts(q, chunk)):
            block = _Block(q, k, v, alpha, eta, theta, live, part)
            do = block.rows(dout)
            dread = block.q_start.mT @ do
            direct = (block.scores * block.inner).mT @ do
            dvs, dends = [], []
            for i in reversed(range(part.chunks)):
                number, rows = part.number + i, block.of(i)
                dv = torch.baddbmm(direct[rows], block.k_end[rows], dx)
                dvs.append(dv)
                dends.append(dx)
                dx = dread[rows] + _carried(block.carry[rows], dx, to=1)
                memory = torch.baddbmm(_upper(dx), block.k[rows].mT, dv, alpha=-1)
                dx = torch.cat([memory, _lower(dx)], 1)
                if restart is not None:
                    dinitial.append(torch.where(restart[number], dx, 0))
                    dx = torch.where(restart[number], 0, dx)
                if dstates is not None:
                    dx = dx + dstates[number]
            starts = block.starts(states[part.number :], initial, restart)
            found.append(
                _gradients(block, do, starts, torch.cat(dvs[::-1]), torch.cat(dends[::-1]))
            )
        inputs = (q, k, v, alpha, eta, theta)
        if not found:
            found = [tuple(torch.zeros_like(t) for t in inputs)]
        grads = [torch.cat(t[::-1], 1) for t in zip(*found, strict=True)]
        grads = [g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
        dinitial = [dx] if restart is None else dinitial[::-1]
        return (*grads, torch.stack(dinitial), None, None, None, None)


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
        self.w, self.es = weights_of(self.decay, self.eta, self.theta, self.live)
        self.inner = self.w[..., 2:]
        end = torch.stack([self.w[:, -1], self.es[-1]], 1)
        # Of memory and momentum, [..., 2, 2], and of gradients, [..., size, 2], in memory and
        # momentum behind the chunk
        self.carry, self.end = end[..., :2], end[..., 2:].mT.contiguous()
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
        """The way back of `rows`, [B, tokens of this part, H, ...]."""
        return self._by_chunk(t).flatten(1, 2)

    def place(self, t: Tensor, whole: Tensor) -> None:
        """Writes what `rows` would read of whole [B, S, H, ...]."""
        part = self.part
        tokens = whole[:, part.begin : part.begin + part.chunks * part.size]
        tokens.unflatten(1, (part.chunks, part.size)).copy_(self._by_chunk(t))

    def _by_chunk(self, t: Tensor) -> Tensor:
        t = t.unflatten(0, (self.part.chunks, self.batch, self.heads))
        return t.movedim((0, 2), (1, 3))

    def of(self, i: int) -> slice:
        """The rows of chunk i."""
        return slice(i * self.lanes, (i + 1) * self.lanes)

    def starts(self, states: Tensor, initial: Tensor, restart: Tensor | None) -> Tensor:
        """The states that the chunks begin with, [chunks B H, 2 D, Dv], of those before them."""
        x = states[: self.part.chunks]
        if restart is not None:
            chunks = slice(self.part.number, self.part.number + self.part.chunks)
            x = torch.where(restart[chunks, None, None, None], initial[chunks], x)
        return x.flatten(0, 1)


def weights_of(
    decay: Tensor, eta: Tensor, theta: Tensor, live: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """W [N, c, 2 + c] of gates [N, c], and the rows of E, [N, 2 + c] each."""
    w, e = _before(decay)
    new = torch.diag_embed(theta, 2, 0, 2).unbind()  # [2 + c, N, 2 + c]
    seen = None if live is None else _columns(live)
    ws, es = [], []
    for t, (a, b) in enumerate(zip(_columns(decay), _columns(eta), strict=True)):
        e = torch.addcmul(new[t], b, e)
        w = torch.addcmul(e if seen is None else seen[t] * e, a, w)
        ws.append(w)
        es.append(e)
    return torch.stack(ws).transpose(0, 1), es


def _columns(t: Tensor) -> tuple[Tensor, ...]:
    """c of [N, 1] of [N, c]."""
    return t.t().contiguous()[..., None].unbind()


def _before(decay: Tensor) -> Tensor:
    """The rows of W and E before the first token, [2, 2 + c]."""
    return torch.eye(2, 2 + decay.shape[1], dtype=decay.dtype, device=decay.device)


def _weights_backward(
    block: _Block, dw: Tensor, dw_end: Tensor, de_end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of alpha, eta and theta [N, c], from those of W [c, N, 2 + c], and further ones
    of the last rows of W and E."""
    a, b = _columns(block.decay), _columns(block.eta)
    seen = None if block.live is None else _columns(block.live)
    last = len(a) - 1
    rows = dw.unbind()
    gw, ge = rows[last] + dw_end, de_end
    gws, ges = [], []
    for t in range(last, -1, -1):
        if t < last:
            gw = torch.addcmul(rows[t], a[t + 1], gw)
            ge = b[t + 1] * ge
        ge = ge + (gw if seen is None else seen[t] * gw)
        gws.append(gw)
        ges.append(ge)
    da, db = (
        torch.cat([(g[:1] * first).sum(-1), (g[1:] * x).sum(-1)]).t()
        for g, x, first in zip(
            (torch.stack(gws[::-1]), torch.stack(ges[::-1])),
            (block.w.transpose(0, 1)[:-1], torch.stack(block.es)[:-1]),
            _before(block.decay),
            strict=True,
        )
    )
    dtheta = torch.stack([ge[:, 2 + t] for t, ge in enumerate(reversed(ges))], 1)
    return -da, db, dtheta


def _gradients(
    block: _Block, do: Tensor, starts: Tensor, dv: Tensor, dends: Tensor
) -> tuple[Tensor, ...]:
    """Of q, k, v, alpha, eta, theta in the chunks of a block, from those of the result, of v and of
    the states behind the chunks."""
    q, k = block.q, block.k
    memory = _upper(starts)
    wrong = torch.baddbmm(block.v, k, memory, alpha=-1)  # -U
    dp = do @ wrong.mT
    dscores = dp * block.inner
    dq_start, dk_end = do @ starts.mT, wrong @ dends.mT
    dq = torch.baddbmm(_scaled_backward(dq_start, block.w[..., :2]), dscores, k)
    dk = torch.baddbmm(_scaled_backward(dk_end, block.end), dscores.mT, q)
    dk = torch.baddbmm(dk, dv, memory.mT, alpha=-1)
    dw_start, dend = _factors_backward(dq_start, q), _factors_backward(dk_end, k)
    dw = torch.cat([dw_start.transpose(0, 1), (dp * block.scores).transpose(0, 1)], -1)
    end = torch.cat([_halves(dends) @ _halves(starts).mT, dend.mT], -1)  # [N, 2, 2 + c]
    gates = _weights_backward(block, dw, end[:, 0], end[:, 1])
    return tuple(block.tokens(t) for t in (dq, dk, dv, *gates))


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """[N, c, 2 D] of x [N, c, D] and factors [N, c, 2]."""
    return (factors[..., None] * x[..., None, :]).flatten(-2)


def _scaled_backward(d: Tensor, factors: Tensor) -> Tensor:
    first, second = d.split(d.shape[-1] // 2, -1)
    return torch.addcmul(first * factors[..., :1], second, factors[..., 1:])


def _factors_backward(d: Tensor, x: Tensor) -> Tensor:
    return (d.unflatten(-1, (2, d.shape[-1] // 2)) * x[..., None, :]).sum(-1)


def _upper(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def _lower(x: Tensor) -> Tensor:
    return x[:, x.shape[1] // 2 :]


def _halves(x: Tensor) -> Tensor:
    """[N, 2, D Dv] of [N, 2 D, Dv]."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2 * x.shape[2])


def _carried(carry: Tensor, x: Tensor, to: int = 0) -> Tensor:
    """carry [N, 2, 2] times memory and momentum; to = 1: its transpose. carry[:, 1, 0] is 0."""
    halves = x.unflatten(1, (2, x.shape[1] // 2))
    y = halves * carry.diagonal(dim1=1, dim2=2)[..., None, None]
    y[:, to] += carry[:, 0, 1, None, None] * halves[:, 1 - to]
    return y.flatten(1, 2)
