"""Equations of Titans, token by token, for one sequence and head at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def by_hand(q, k, v, alpha, eta, theta, memory, recall, chunk, momentum=None):
    """Equations of sections 3.1 and 3.2: y_t = M_t(q_t), where recall applies the memory tensors to
    a query, and the surprise of a token is the gradient of the loss |M(k) - v|^2 at the memory
    before its chunk. Returns results, memory and momentum."""
    momentum = [torch.zeros_like(m) for m in memory] if momentum is None else momentum
    outs = []
    for t in range(len(q)):
        if t % chunk == 0:
            before = memory
        with torch.enable_grad():
            # Copies: keys and values may depend on the memory, too, but are constants here.
            leaves = [m.clone() for m in before]
            for leaf in leaves:
                if not leaf.requires_grad:
                    leaf.requires_grad_()
            loss = (recall(leaves, k[t]) - v[t]).square().sum()
            surprise = torch.autograd.grad(loss, leaves, create_graph=True)
        momentum = [eta[t] * s - theta[t] * g for s, g in zip(momentum, surprise, strict=True)]
        memory = [(1 - alpha[t]) * m + s for m, s in zip(memory, momentum, strict=True)]
        outs.append(recall(memory, q[t]))
    return torch.stack(outs), memory, momentum


def linear(memory, x):
    return x @ memory[0]


def network(memory, x):
    for i, matrix in enumerate(memory):
        x = (F.gelu(x) if i else x) @ matrix
    return x


def of_heads(q, k, v, alpha, eta, theta, memory, recall, chunk):
    """by_hand for [B, S, H, ...] and memories [H, in, out]; theta refers to half of the loss."""
    batch, _, heads, _ = q.shape
    rows = [
        torch.stack([
            by_hand(
                *(t[b, :, h] for t in (q, k, v, alpha, eta, theta / 2)), [m[h] for m in memory],
                recall, chunk,
            )[0]
            for h in range(heads)
        ], 1)
        for b in range(batch)
    ]  # fmt: skip
    return torch.stack(rows)


class Memory:
    """nn.TitansMemory with these weights. A state holds memory and momentum per sequence and head,
    and the projected tokens read so far."""

    def __init__(self, layer, weights, prefix=""):
        self.heads, self.dim, self.chunk = layer.num_heads, layer.head_dim, layer.chunk_size
        self.step, self.depth = layer.max_step, len(layer.memory)
        self.w = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}

    def begin(self, batch):
        first = [self.w[f"memory.{i}"] for i in range(self.depth)]
        cells = [[([m[h] for m in first], None) for h in range(self.heads)] for _ in range(batch)]
        return cells, None

    def learn(self, x, state):
        """Results for tokens that the memory learns, and the state after them."""
        cells, read = state
        projected = x @ self.w["qkv_proj.weight"].T
        rows = projected if read is None else torch.cat([read, projected], 1)
        q, k, v = self._activated(rows, x.shape[1], self.w["conv"]).unbind(2)
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        gates = torch.sigmoid(x @ self.w["gates.weight"].T + self.w["gates.bias"])
        alpha, eta, theta = gates.unflatten(-1, (3, self.heads)).unbind(2)
        outs, after = [], []
        for b, row in enumerate(cells):
            heads = [
                by_hand(
                    *(t[b, :, h] for t in (q, k, v, alpha, eta, self.step / 2 * theta)), memory,
                    network, self.chunk, momentum,
                )
                for h, (memory, momentum) in enumerate(row)
            ]  # fmt: skip
            outs.append(torch.stack([out for out, _, _ in heads], 1))
            after.append([(memory, momentum) for _, memory, momentum in heads])
        return self._gated(torch.stack(outs), x), (after, rows)

    def recall(self, x, state):
        """Results for tokens that the memory does not learn."""
        inner = self.heads * self.dim
        rows = x @ self.w["qkv_proj.weight"][:inner].T
        q = self._activated(rows, x.shape[1], self.w["conv"][:, :inner])[:, :, 0]
        q = q / q.norm(dim=-1, keepdim=True)
        out = [
            torch.stack([network(memory, q[b, :, h]) for h, (memory, _) in enumerate(row)], 1)
            for b, row in enumerate(state[0])
        ]
        return self._gated(torch.stack(out), x)

    def _activated(self, rows, tokens, conv):
        """silu of the convolution at the last tokens, [B, N, parts, H, D]."""
        first, size = rows.shape[1] - tokens, len(conv)
        seen = [
            sum(conv[-1 - back] * rows[:, t - back] for back in range(min(size, t + 1)))
            for t in range(first, first + tokens)
        ]
        return F.silu(torch.stack(seen, 1)).unflatten(-1, (-1, self.heads, self.dim))

    def _gated(self, out, x):
        out = rms(out, self.w["norm.weight"])
        gate = torch.sigmoid(x @ self.w["output_gate.weight"].T)
        return (gate * out.flatten(2)) @ self.w["out_proj.weight"].T


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
