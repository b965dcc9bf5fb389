"""The neural memory of Titans with its projections, gates and norm."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from .._autocast import Autocast
from .._check import as_int, as_number, check, check_float32
from ..linear.titans_memory import titans_memory
from ..linear.titans_rules import check_chunk_size
from ..reference.linear.titans_memory import weights_of
from .rules import check_input, check_wide_heads

NAME = "nn.TitansMemory"


class TitansMemory(nn.Module):
    r"""A memory of each head that learns while it reads, in place of attention.

    .. math::
       q, k, v = \operatorname{silu}(\operatorname{conv}(x W_{qkv})), \qquad
       \alpha, \eta, \theta = \sigma(x W_g + b_g), \qquad
       y = (\sigma(x W_o) \odot \operatorname{RMSNorm}(M_t(q_t))) W_y,

    with q and k of length 1, theta times max_step, and M the memory of
    :func:`tokenmill.titans_memory`: with depth 1 a matrix and this operator, with more a network of
    depth matrices with gelu between them, whose gradients of each token torch.func computes. That
    is slow, and its training keeps every weight of the memory for each token.

    Args:
        dim: channels C of the input.
        num_heads: heads H, each with a memory of its own.
        head_dim: channels D of a head. None: C / H.
        depth: matrices of a memory. The paper compares 1 to 4.
        expansion: hidden channels of a deeper memory, as a multiple of D.
        chunk_size: tokens whose gradients are taken at the same memory.
        conv_size: tokens that the causal convolution of each channel of queries, keys and values
            sees; 1 weighs the token alone.
        max_step: the largest theta. None: 2 / D, a step of 1 for the mean of the squared errors of
            the channels instead of half of their sum.
        eps: of the norm, which is over the channels of a head.

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32, float64.

    Weights: qkv_proj ``[3 H D, C]``, rows of all queries, keys and values; conv ``[conv_size,
    3 H D]``, the last row that of the token itself; gates ``[3 H, C]`` with a bias, rows of alpha,
    eta and theta; output_gate ``[H D, C]``, norm ``[D]``, out_proj ``[C, H D]``; and memory, the
    matrices ``[H, in, out]`` that a sequence begins with. They are learned; those of depth 1 begin
    as 0, deeper ones as normal numbers of variance 1 / in.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: with depth 1 12 C H D operations and those of :func:`tokenmill.titans_memory` for
    each token.

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), section 3.1 for the
    memory and 4.4 for silu, the lengths of queries and keys, convolution, norm and gate. The paper
    does not say what its gates are functions of beside x, how large a step may be, the convolution
    or the activation of a deep memory. Sigmoids, max_step, gelu and expansion are those of
    titans-pytorch, the widely used implementation, without its norm and sum around a memory;
    conv_size is that of the usual linear recurrences. The bias of alpha begins as -4, so that half
    of the memory is left after 38 tokens, those of eta and theta as 0.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TitansMemory(64, 4)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
        >>> tm.nn.TitansMemory(64, 4, depth=2, chunk_size=8)(torch.randn(2, 20, 64)).shape
        torch.Size([2, 20, 64])
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
    ) -> None:
        super().__init__()
        dim, num_heads, head_dim = check_wide_heads(NAME, dim, num_heads, head_dim, most=2**16)
        small = {"depth": depth, "expansion": expansion, "conv_size": conv_size}
        for name, size in small.items():
            small[name] = as_int(NAME, name, size)
            check(1 <= small[name] <= 64, NAME, name, "must be 1 to 64", small[name])
        chunk_size = check_chunk_size(NAME, chunk_size)
        max_step = 2 / head_dim if max_step is None else as_number(NAME, "max_step", max_step)
        check_float32(NAME, "max_step", max_step)
        inner = num_heads * head_dim
        self.num_heads, self.head_dim, self.chunk_size = num_heads, head_dim, chunk_size
        self.max_step = max_step
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

    def forward(self, x: Tensor) -> Tensor:
        check_input(NAME, "x", x, self.qkv_proj.weight)
        channels = self.qkv_proj.in_features
        shaped = x.dim() == 3 and x.shape[-1] == channels
        check(shaped, NAME, "x", f"must have shape [B, N, {channels}]", x.shape)
        qkv = F.silu(_convolved(self.qkv_proj(x), self.conv))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = (F.normalize(t, dim=-1).to(v.dtype) for t in (q, k))
        wide = torch.promote_types(v.dtype, torch.float32)
        gates = torch.sigmoid(self.gates(x).to(wide)).unflatten(-1, (3, self.num_heads))
        alpha, eta, theta = gates.unbind(2)
        theta = theta * self.max_step
        first = [w.to(wide).expand(x.shape[0], *w.shape) for w in self.memory]
        if len(first) == 1:
            state = first[0], torch.zeros_like(first[0])
            out = titans_memory(
                q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=self.chunk_size,
                initial_state=state,
            )  # fmt: skip
        else:
            out = _deep_memory(q, k, v, alpha, eta, theta, first, self.chunk_size)
        out = self.norm(out.to(self.norm.weight.dtype)).flatten(-2)
        y: Tensor = self.out_proj(torch.sigmoid(self.output_gate(x)) * out)
        return y

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}, depth={len(self.memory)}"
        return f"{sizes}, chunk_size={self.chunk_size}, max_step={self.max_step:g}"


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel of x [B, N, C] with its causal filter, weight [size, C]."""
    size, length = weight.shape[0], x.shape[1]
    padded = F.pad(x, (0, 0, size - 1, 0))
    y = weight[0] * padded[:, :length]
    for i in range(1, size):
        y = y + weight[i] * padded[:, i : i + length]
    return y.to(x.dtype)


@Autocast(lower=("q", "k", "v")).applied
def _deep_memory(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor,
    first: list[Tensor], chunk: int,
) -> Tensor:  # fmt: skip
    """titans_memory of memories that are networks, which begin with the matrices of first, [B, H,
    in, out] each."""
    if q.numel() == 0:
        return torch.zeros_like(v)
    shapes = [w.shape[2:] for w in first]

    def recall(memory: Tensor, x: Tensor) -> Tensor:
        for i, part in enumerate(memory.split([shape.numel() for shape in shapes])):
            x = (F.gelu(x) if i else x) @ part.view(shapes[i])
        return x

    def loss(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (recall(memory, key) - value).square().sum()

    gradients_of = vmap(vmap(grad(loss), (None, 0, 0)))
    read = vmap(vmap(recall))
    memory = torch.cat([w.flatten(2) for w in first], 2).flatten(0, 1)  # [B H, numbers]
    state = torch.stack([memory, torch.zeros_like(memory)], 1)
    lanes = [t.to(memory.dtype).transpose(1, 2).flatten(0, 1) for t in (q, k, v, alpha, eta, theta)]
    outs = []
    for queries, keys, values, forget, keep, step in zip(
        *(t.split(chunk, 1) for t in lanes), strict=True
    ):
        w, es = weights_of(1 - forget, keep, step)
        gradients = gradients_of(state[:, 0], keys, values)  # [B H, tokens, numbers]
        outs.append(read(w[..., :2] @ state - w[..., 2:] @ gradients, queries))
        end = torch.stack([w[:, -1], es[-1]], 1)
        state = end[..., :2] @ state - end[..., 2:] @ gradients
    return torch.cat(outs, 1).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2).to(q.dtype)
