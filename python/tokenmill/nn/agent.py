"""Agent attention."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, check, check_bool
from ..dense.attention import attention
from .rules import check_heads, check_input, convolved, stretching

NAME = "nn.AgentAttention"
BASE = 7  # side of the bias maps that are interpolated to the grid, as published


class AgentAttention(nn.Module):
    r"""Attention through a few agent tokens: agents attend to the keys, and queries attend to the
    agents.

    With queries, keys and values of the tokens of a map, and agents A,

    .. math::
       V_A = \operatorname{softmax}(A K^\top / \sqrt{d} + B_1)\, V, \qquad
       y = (\operatorname{softmax}(Q A^\top / \sqrt{d} + B_2)\, V_A + \operatorname{DWConv}(V)) W_o
           + b_o.

    Agents are the means of the queries in the cells of a coarse grid, or given. Each bias is the
    sum of a 7x7 map interpolated to the grid, one number per row and one per column.

    Args:
        dim: channels C of the input.
        num_heads: number of heads H, a divisor of the channels.
        grid: (gy, gx) tokens of the map along Y and X, to which the biases belong; an integer sets
            both.
        agents: (ay, ax) agents along Y and X; an integer sets both.
        class_token: token 0 is not on the map: it is not pooled into agents, and has its own biases
            and no local term.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]`` with N = gy gx, with class_token 1 + gy gx, row-major; agents (None: pooled)
        ``[B, ay ax, C]``, with the channels of all heads, like queries; to ``[B, N, C]``; float16,
        bfloat16, float32.

    Weights: qkv ``[3 C, C]``, proj ``[C, C]`` with a bias, dwc ``[C, 1, 3, 3]`` with a bias; with n
    = ay ax the biases an_bias and na_bias ``[H, n, 7, 7]``, ah_bias ``[1, H, n, gy, 1]``, aw_bias
    ``[1, H, n, 1, gx]``, ha_bias ``[1, H, gy, 1, n]``, wa_bias ``[1, H, 1, gx, n]``, and with
    class_token ac_bias ``[1, H, n, 1]`` and ca_bias ``[1, H, 1, n]``. State dicts of the layers of
    the published models load unchanged: DeiT (with class_token), Swin (the grid is a window), PVT
    (``q`` and ``kv`` instead of qkv) and CSWin (``attns.0.`` before all but qkv and proj, and
    ``get_v`` instead of dwc).

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 8 n C operations per token instead of 4 N C, plus 8 C^2 for the projections. No N x
    n matrix is in memory except the biases, which all sequences share.

    Paper: Agent Attention (Han et al. 2024), section 4. Agents along each side in the released
    models: 7 in DeiT-T and -S (grid 14), 9 in DeiT-B; 3, 4, 7 and 7 in the stages of PVT, Swin and
    CSWin (grids 56, 28, 14 and 7), of which the last stage of Swin and the last two of CSWin keep
    their original attention. Windows and stripes are whole maps there, without shifts. Not
    supported: keys of fewer pixels (sr_ratio above 1), which the code of PVT allows and no released
    model uses, and stripes. :func:`tokenmill.integrations.diffusers.patch` applies agents to Stable
    Diffusion.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.AgentAttention(192, num_heads=3, class_token=True)
        >>> layer(torch.randn(2, 197, 192)).shape
        torch.Size([2, 197, 192])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid: int | tuple[int, int] = 14,
        agents: int | tuple[int, int] = 7,
        *,
        class_token: bool = False,
        qkv_bias: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        check_bool(NAME, "class_token", class_token)
        check_bool(NAME, "qkv_bias", qkv_bias)
        (gy, gx), (ay, ax) = _pair("grid", grid), _pair("agents", agents)
        number = ay * ax
        self.num_heads, self.grid, self.agents = num_heads, (gy, gx), (ay, ax)
        self.class_token, self.backend = class_token, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.an_bias = _bias(num_heads, number, BASE, BASE)
        self.na_bias = _bias(num_heads, number, BASE, BASE)
        self.ah_bias = _bias(1, num_heads, number, gy, 1)
        self.aw_bias = _bias(1, num_heads, number, 1, gx)
        self.ha_bias = _bias(1, num_heads, gy, 1, number)
        self.wa_bias = _bias(1, num_heads, 1, gx, number)
        self.ac_bias = _bias(1, num_heads, number, 1) if class_token else None
        self.ca_bias = _bias(1, num_heads, 1, number) if class_token else None
        self.register_load_state_dict_pre_hook(_released)

    def forward(self, x: Tensor, agents: Tensor | None = None) -> Tensor:
        check_input(NAME, "x", x, self.qkv.weight)
        first, channels = int(self.class_token), self.proj.in_features
        tokens = first + self.grid[0] * self.grid[1]
        shaped = x.dim() == 3 and list(x.shape[1:]) == [tokens, channels]
        check(shaped, NAME, "x", f"must have shape [B, {tokens}, {channels}]", x.shape)
        q, k, v = self.qkv(x).chunk(3, 2)
        if agents is None:
            agents = self._pooled(q[:, first:].unflatten(1, self.grid))
        else:
            check_input(NAME, "agents", agents, self.qkv.weight)
            wanted = [x.shape[0], self.agents[0] * self.agents[1], channels]
            rule = f"must have shape {wanted}"
            check(list(agents.shape) == wanted, NAME, "agents", rule, agents.shape)
            agents = agents.to(q.dtype)
        local = convolved(self.dwc, v[:, first:].unflatten(1, self.grid)).flatten(1, 2)
        q, k, v, a = (t.unflatten(2, (self.num_heads, -1)) for t in (q, k, v, agents))
        gather, ask = self._biases()
        gathered = attention(a, k, v, bias=gather, backend=self.backend)
        out = attention(q, a, gathered, bias=ask, backend=self.backend).flatten(2)
        return self.proj(out + F.pad(local, (0, 0, first, 0)))

    def _pooled(self, q: Tensor) -> Tensor:
        """Pooled queries ``[B, n, C]`` of q ``[B, gy, gx, C]``, as matrix products: the gradient of
        adaptive_avg_pool2d has no fixed order of summation on a GPU.
        """
        rows, columns = (
            F.adaptive_avg_pool1d(torch.eye(length, device=q.device)[None], size)[0].T.to(q.dtype)
            for length, size in zip(self.grid, self.agents, strict=True)
        )
        means = columns @ q  # [B, gy, ax, C]
        return (rows @ means.flatten(2)).unflatten(2, means.shape[2:]).flatten(1, 2)

    def _biases(self) -> tuple[Tensor, Tensor]:
        """B1 ``[1, H, n, N]`` and B2 ``[1, H, N, n]``."""
        rows, columns = (
            stretching(BASE, side, align_corners=False, like=self.an_bias) for side in self.grid
        )
        gather = (rows @ self.an_bias @ columns.mT)[None]
        gather = (gather + (self.ah_bias + self.aw_bias)).flatten(3)
        ask = (rows @ self.na_bias @ columns.mT)[None].flatten(3).mT
        ask = ask + (self.ha_bias + self.wa_bias).flatten(2, 3)
        if self.ac_bias is not None and self.ca_bias is not None:
            gather = torch.cat([self.ac_bias, gather], 3)
            ask = torch.cat([self.ca_bias, ask], 2)
        return gather, ask.contiguous()

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, grid={self.grid}, agents={self.agents}, "
            f"class_token={self.class_token}"
        )


def _released(
    module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *args: Any
) -> None:
    """Renames the entries of the released PVT and CSWin."""
    for name in [n for n in state if n.startswith(prefix)]:
        new = name[len(prefix) :].removeprefix("attns.0.")
        if new.startswith("get_v."):
            new = "dwc." + new.removeprefix("get_v.")
        if prefix + new != name:
            state[prefix + new] = state.pop(name)
    for kind in ("weight", "bias"):
        names = [f"{prefix}{part}.{kind}" for part in ("q", "kv")]
        if all(name in state for name in names):
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


def _pair(argument: str, sides: int | tuple[int, int]) -> tuple[int, int]:
    rule = "must be an integer or a pair (along Y, along X), each 1 to 2^15 - 1"
    both = sides if isinstance(sides, tuple | list) else (sides, sides)
    check(len(both) == 2, NAME, argument, rule, sides)
    y, x = (as_int(NAME, argument, side, rule) for side in both)
    check(min(y, x) >= 1 and max(y, x) < 2**15, NAME, argument, rule, sides)
    return y, x


def _bias(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
