"""The neural memory of Titans with projections, gates and norm."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from .._call.autocast import Autocast
from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_float32,
)
from ..linear.titans_memory import titans_memory
from ..reference.linear.titans_memory import weights_of
from .rules import check_part, check_tokens, check_wide_heads

NAME = "nn.TitansMemory"


class TitansState(NamedTuple):
    """The recurrent state of :class:`TitansMemory`.

    Args:
        memory: one tensor ``[B, H, in, out]`` per matrix of a memory, after the last token.
        momentum: as memory, the momentum of gradient descent.
        tail: ``[B, conv_size - 1, 3 H D]``, the last inputs that the convolution still needs.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TitansMemory(64, 4, chunk_size=8)
        >>> y, state = layer(torch.randn(2, 16, 64), return_state=True)
        >>> state.memory[0].shape, state.tail.shape
        (torch.Size([2, 4, 16, 16]), torch.Size([2, 3, 192]))
    """

    memory: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    tail: Tensor


class TitansMemory(nn.Module):
    r"""A per-head memory trained at test time, instead of attention.

    .. math::
       q, k, v = \operatorname{silu}(\operatorname{conv}(x W_{qkv})), \qquad
       \alpha, \eta, \theta = \sigma(x W_g + b_g), \qquad
       y = (\sigma(x W_o) \odot \operatorname{RMSNorm}(M_t(q_t))) W_y,

    with q and k of length 1, theta times max_step, and M the memory of
    :func:`tokenmill.titans_memory`: with depth 1 a matrix and this operator; otherwise a network of
    depth matrices with gelu between them, with per-token gradients from torch.func. The latter is
    slow, and its training keeps every weight of the memory for each token.

    Args:
        dim: channels C of the input.
        num_heads: number of heads H, each with its own memory.
        head_dim: channels D of a head. None: C / H.
        depth: number of matrices of a memory. The paper compares 1 to 4.
        expansion: hidden channels of a deeper memory, as a multiple of D.
        chunk_size: tokens whose gradients are taken at the same memory.
        conv_size: width in tokens of the causal depthwise convolution of queries, keys and values;
            1 only scales the token.
        max_step: maximum theta. None: 2 / D, which is a step of 1 for the mean of the squared
            errors over channels instead of half of their sum.
        eps: epsilon of the norm, which is over the channels of a head.
        backend: backend of :func:`tokenmill.titans_memory` (see :func:`tokenmill.explain`); not
            used by a memory of several matrices.

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32, float64. With return_state also a
        :class:`TitansState`, which a later call takes as ``state=``: the two calls equal one call
        with all tokens if the first has a multiple of chunk_size tokens, because a call starts a
        new chunk. :meth:`recall` reads a memory without changing it.

    Weights: qkv_proj ``[3 H D, C]``, rows of all queries, keys and values; conv ``[conv_size, 3 H
    D]``, the last row for the token itself; gates ``[3 H, C]`` with a bias, rows of alpha, eta and
    theta; output_gate ``[H D, C]``, norm ``[D]``, out_proj ``[C, H D]``; and memory, the initial
    matrices ``[H, in, out]`` of a sequence. They are learned; initialised to 0 with depth 1,
    otherwise from normal distributions of variance 1 / in.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: with depth 1, 12 C H D operations per token and the cost of
    :func:`tokenmill.titans_memory`.

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), section 3.1 for the
    memory and 4.4 for silu, the lengths of queries and keys, convolution, norm and gate. The paper
    does not specify what its gates depend on other than x, the maximum step, the convolution or the
    activation of a deep memory. Sigmoids, max_step, gelu and expansion follow titans-pytorch, the
    widely used implementation, without its norm and residual around a memory; conv_size follows
    common linear recurrences. The bias of alpha is initialised to -4, so that half of the memory is
    left after 38 tokens, the biases of eta and theta to 0.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TitansMemory(64, 4)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
        >>> tm.nn.TitansMemory(64, 4, depth=2, chunk_size=8)(torch.randn(2, 20, 64)).shape
        torch.Size([2, 20, 64])
        >>> x = torch.randn(1, 192, 64)
        >>> first, state = layer(x[:, :64], return_state=True)
        >>> torch.allclose(layer(x)[:, 64:], layer(x[:, 64:], state), atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        depth: int = 1,
        expansion: int = 4,
        chunk_size: int = 64,
        conv_size: int = 4,
        max_step: float | None = None,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads, head_dim = check_wide_heads(NAME, dim, num_heads, head_dim, maximum=2**16)
        small = {"depth": depth, "expansion": expansion, "conv_size": conv_size}
        for name, size in small.items():
            small[name] = as_int(NAME, name, size, minimum=1, maximum=64)
        chunk_size = as_int(NAME, "chunk_size", chunk_size, minimum=1)
        max_step = 2 / head_dim if max_step is None else as_number(NAME, "max_step", max_step)
        check_float32(NAME, "max_step", max_step)
        inner = num_heads * head_dim
        self.num_heads, self.head_dim, self.chunk_size = num_heads, head_dim, chunk_size
        self.max_step, self.backend = max_step, backend
        self.qkv_proj = nn.Linear(dim, 3 * inner, bias=False)
        self.conv = nn.Parameter(torch.randn(small["conv_size"], 3 * inner))
        with torch.no_grad():
            self.conv.mul_(small["conv_size"] ** -0.5)
        self.gates = nn.Linear(dim, 3 * num_heads)
        nn.init.zeros_(self.gates.bias)
        nn.init.constant_(self.gates.bias[:num_heads], -4)
        hidden = [small["expansion"] * head_dim] * (small["depth"] - 1)
        sizes = [head_dim, *hidden, head_dim]
        spread = 0.0 if small["depth"] == 1 else 1.0
        self.memory = nn.ParameterList(
            spread * rows**-0.5 * torch.randn(num_heads, rows, columns)
            for rows, columns in pairwise(sizes)
        )
        self.output_gate = nn.Linear(dim, inner, bias=False)
        self.norm = nn.RMSNorm(head_dim, eps=as_number(NAME, "eps", eps))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, state: TitansState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, TitansState]:
        check_bool(NAME, "return_state", return_state)
        self._check(x, state)
        projected = self.qkv_proj(x)
        tail = projected.new_zeros(x.shape[0], self.conv.shape[0] - 1, projected.shape[2])
        if state is not None:
            tail = state.tail.to(projected.dtype)
        seen = torch.cat([tail, projected], 1)
        qkv = F.silu(_convolved(seen, self.conv))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = (F.normalize(t, dim=-1).to(v.dtype) for t in (q, k))
        wide = torch.promote_types(v.dtype, torch.float32)
        gates = torch.sigmoid(self.gates(x).to(wide)).unflatten(-1, (3, self.num_heads))
        alpha, eta, theta = gates.unbind(2)
        theta = theta * self.max_step
        after: tuple[Tensor, ...]
        moved: tuple[Tensor, ...]
        first = self._memory(x.shape[0], wide, state)
        begun = [torch.zeros_like(w) for w in first]
        if state is not None:
            begun = [w.to(wide) for w in state.momentum]
        if len(first) == 1:
            out, (memory, momentum) = titans_memory(
                q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=self.chunk_size,
                initial_state=(first[0], begun[0]), return_final_state=True, backend=self.backend,
            )  # fmt: skip
            after, moved = (memory,), (momentum,)
        else:
            out, after, moved = _deep_memory(
                q, k, v, alpha, eta, theta, first, begun, self.chunk_size
            )
        y = self._gated(out, x)
        if not return_state:
            return y
        return y, TitansState(after, moved, seen[:, x.shape[1] :])

    def recall(self, x: Tensor, state: TitansState | None = None) -> Tensor:
        """Reads the memory for tokens x ``[B, N, C]`` without learning them: y of the equation
        above with the memory of the state (None: the initial memory) for every token. The
        convolution sees only the tokens of x, not earlier ones.
        """
        self._check(x, state)
        inner = self.num_heads * self.head_dim
        queries = F.linear(x, self.qkv_proj.weight[:inner])
        size = self.conv.shape[0]
        q = F.silu(_convolved(F.pad(queries, (0, 0, size - 1, 0)), self.conv[:, :inner]))
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        wide = torch.promote_types(q.dtype, torch.float32)
        q = F.normalize(q, dim=-1).to(q.dtype)
        return self._gated(_read(q, self._memory(x.shape[0], wide, state)), x)

    def _memory(self, batch: int, dtype: torch.dtype, state: TitansState | None) -> list[Tensor]:
        """The initial matrices [B, H, in, out] of a call."""
        if state is not None:
            return [w.to(dtype) for w in state.memory]
        return [w.to(dtype).expand(batch, *w.shape) for w in self.memory]

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        out = self.norm(out.to(self.norm.weight.dtype)).flatten(-2)
        y: Tensor = self.out_proj(torch.sigmoid(self.output_gate(x)) * out)
        return y

    def _check(self, x: Tensor, state: TitansState | None) -> None:
        check_tokens(NAME, x, self.qkv_proj.weight)
        if state is None:
            return
        check(isinstance(state, TitansState), NAME, "state", "must be a TitansState", state)
        tail = [x.shape[0], self.conv.shape[0] - 1, 3 * self.num_heads * self.head_dim]
        matrices = [[x.shape[0], *w.shape] for w in self.memory]
        wanted = {"memory": matrices, "momentum": matrices, "tail": [tail]}
        for part, shapes in wanted.items():
            _check_part(part, shapes, getattr(state, part), x)

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}, depth={len(self.memory)}"
        return f"{sizes}, chunk_size={self.chunk_size}, max_step={self.max_step:g}"


def _check_part(part: str, shapes: list[Any], given: Any, x: Tensor) -> None:
    """Checks the shapes of one part of a state."""
    given = given if isinstance(given, tuple) else (given,)
    rule = f"must have {len(shapes)} tensors of {part}"
    check(len(given) == len(shapes), NAME, "state", rule, len(given))
    for t, shape in zip(given, shapes, strict=True):
        check_part(NAME, part, t, shape, x)


def _convolved(seen: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution: seen [B, size - 1 + N, C], weight [size, C] to [B, N, C]."""
    size, length = weight.shape[0], seen.shape[1] - weight.shape[0] + 1
    y = weight[0] * seen[:, :length]
    for i in range(1, size):
        y = y + weight[i] * seen[:, i : i + length]
    return y.to(seen.dtype)


def _network(memory: Tensor, x: Tensor, shapes: list[torch.Size]) -> Tensor:
    """Applies the matrices, stored consecutively, to x [.., in]."""
    for i, part in enumerate(memory.split([shape.numel() for shape in shapes])):
        x = (F.gelu(x) if i else x) @ part.view(shapes[i])
    return x


def _flat(matrices: list[Tensor]) -> Tensor:
    """Flattens matrices of [B, H, in, out] each to [B H, numbers]."""
    return torch.cat([w.flatten(2) for w in matrices], 2).flatten(0, 1)


@Autocast(lower=("q",)).applied
def _read(q: Tensor, memory: list[Tensor]) -> Tensor:
    """Reads memories [B, H, in, out] with q [B, N, H, D]."""
    wide = q.to(memory[0].dtype).transpose(1, 2)
    if len(memory) == 1:
        return (wide @ memory[0]).transpose(1, 2).to(q.dtype)
    if q.numel() == 0:
        return torch.zeros_like(q)
    shapes = [w.shape[2:] for w in memory]
    read = vmap(lambda matrices, x: _network(matrices, x, shapes))
    out: Tensor = read(_flat(memory), wide.flatten(0, 1))
    return out.unflatten(0, wide.shape[:2]).transpose(1, 2).to(q.dtype)


@Autocast(lower=("q", "k", "v")).applied
def _deep_memory(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor,
    first: list[Tensor], begun: list[Tensor], chunk: int,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
    """titans_memory of memories that are networks, initialised with the matrices first, [B, H, in,
    out] each, and their momentum; returns out, memory and momentum.
    """
    if q.numel() == 0:
        return torch.zeros_like(v), tuple(first), tuple(begun)
    shapes = [w.shape[2:] for w in first]

    def recall(memory: Tensor, x: Tensor) -> Tensor:
        return _network(memory, x, shapes)

    def loss(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (recall(memory, key) - value).square().sum()

    gradients_of = vmap(vmap(grad(loss), (None, 0, 0)))
    read = vmap(vmap(recall))
    state = torch.stack([_flat(first), _flat(begun)], 1)  # [B H, 2, numbers]
    lanes = [t.to(state.dtype).transpose(1, 2).flatten(0, 1) for t in (q, k, v, alpha, eta, theta)]
    outs = []
    for queries, keys, values, forget, keep, step in zip(
        *(t.split(chunk, 1) for t in lanes), strict=True
    ):
        w, es = weights_of(1 - forget, keep, step)
        gradients = gradients_of(state[:, 0], keys, values)  # [B H, tokens, numbers]
        outs.append(read(w[..., :2] @ state - w[..., 2:] @ gradients, queries))
        end = torch.stack([w[:, -1], es[-1]], 1)
        state = end[..., :2] @ state - end[..., 2:] @ gradients
    lead = (q.shape[0], q.shape[2])
    out = torch.cat(outs, 1).unflatten(0, lead).transpose(1, 2).to(q.dtype)
    final = state.unflatten(0, lead)  # [B, H, 2, numbers]
    memory, momentum = (
        tuple(
            part.unflatten(-1, shape)
            for part, shape in zip(
                final[:, :, i].split([s.numel() for s in shapes], -1), shapes, strict=True
            )
        )
        for i in range(2)
    )
    return out, memory, momentum
