"""The mixer of Mamba-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_bool
from ..linear import linear_attention, linear_attention_decode
from ._recurrent import (
    MAX_HEAD_DIM,
    GatedRMSNorm,
    RecurrentMixer,
    check_sizes,
    inverse_softplus_steps,
    log_rates,
    short_convolution,
)

NAME = "nn.Mamba2"
NO_LIMIT = (0.0, float("inf"))


def decays_and_values(
    x: Tensor, dt: Tensor, A: Tensor, *, dt_bias: Tensor | None, softplus: bool = True,
    limit: Sequence[float] = NO_LIMIT,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The logarithm of the decay, A dt ``[..., H]`` in float32, and the values dt x ``[..., H,
    P]`` in the dtype of x, with A ``[H]`` below 0.
    """
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if softplus else dt
    if tuple(limit) != NO_LIMIT:
        dt = dt.clamp(*limit)
    return dt * A.float(), (x.float() * dt[..., None]).to(x.dtype)


def shared_heads(t: Tensor, heads: int) -> Tensor:
    """B or C ``[..., G, N]`` for each head, ``[..., H, N]``: a view if there is one group."""
    groups, channels = t.shape[-2:]
    wide = t.unsqueeze(-2).expand(*t.shape[:-1], heads // groups, channels)
    return wide.flatten(-3, -2)


class Mamba2(RecurrentMixer):
    r"""The mixer of Mamba-2: a state space model as linear attention with a decay per token:

    .. math::
       x', B, C = \operatorname{silu}(\operatorname{conv}(x W_{xBC})), \qquad
       \Delta = \operatorname{clamp}(\operatorname{softplus}(x W_\Delta + b_{dt})), \qquad
       S_t = e^{-\Delta_t e^A} S_{t-1} + B_t^T (\Delta_t x'_t), \qquad
       o_t = C_t S_t + D x'_t, \qquad
       y = \operatorname{RMSNorm}(o \odot \operatorname{silu}(x W_z)) W_o

    computed by :func:`tokenmill.linear_attention` with queries C, keys B, values :math:`\Delta x'`
    and scale 1. The norm is over the channels of a group.

    Args:
        dim: channels C of the input.
        num_heads: heads H. None: 2 C / P.
        head_dim: channels P of a head, up to 256.
        state_size: channels N of B and C, up to 256.
        n_groups: groups G of heads that share B and C, a divisor of H.
        conv_kernel: taps W of the convolution, 1 to 8.
        conv_bias, bias: whether the convolution and the projections have biases.
        time_step_limit: bounds of :math:`\Delta`, in prompts and in decoding.
        eps: epsilon of the norm.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, T, C]``, or packed ``[T, C]`` with cu_seqlens int32 ``[B + 1]``; to the same;
        float16, bfloat16, float32.

    Weights, with the names of mamba_ssm and transformers, whose state dicts load unchanged (also
    of the mixers of Bamba, GraniteMoeHybrid, Nemotron-H and Zamba2): in_proj ``[2 H P + 2 G N + H,
    C]``, conv1d ``[H P + 2 G N, 1, W]``, dt_bias, A_log and D ``[H]``, norm ``[H P]``, out_proj
    ``[C, H P]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 C (3 H P + 2 G N + H) operations of projections and 4 H N P of the recurrence per
    token, whatever the length; a state has 4 H N P bytes. With several groups B and C are copied
    for each head.

    Paper: Transformers are SSMs (Dao and Gu 2024), section 7.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.Mamba2(64, head_dim=16, state_size=32)
        >>> x = torch.randn(2, 20, 64)
        >>> with torch.no_grad():
        ...     state = layer.new_state(2)
        ...     y = torch.cat([layer.prefill(x[:, :17], state), layer.decode(x[:, 17:], state)], 1)
        ...     torch.allclose(y, layer(x), atol=1e-4)
        True
    """

    name = NAME

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        *,
        state_size: int = 128,
        n_groups: int = 1,
        conv_kernel: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        time_step_limit: Sequence[float] = NO_LIMIT,
        eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        head_dim = as_int(NAME, "head_dim", head_dim, minimum=1, maximum=MAX_HEAD_DIM)
        if num_heads is None:
            dim = as_int(NAME, "dim", dim)
            rule = f"must be a divisor of 2 dim, {2 * dim}, unless num_heads is given"
            check(2 * dim % head_dim == 0, NAME, "head_dim", rule, head_dim)
            num_heads = 2 * dim // head_dim
        dim, conv_kernel, eps, sizes = check_sizes(
            NAME, dim, conv_kernel, eps, num_heads=(num_heads, 2**20),
            state_size=(state_size, MAX_HEAD_DIM), n_groups=(n_groups, 2**16),
        )  # fmt: skip
        self.num_heads, self.state_size, self.n_groups = sizes
        divides = self.num_heads % self.n_groups == 0
        rule = f"must divide the number of heads, {self.num_heads}"
        check(divides, NAME, "n_groups", rule, self.n_groups)
        for argument, value in (("conv_bias", conv_bias), ("bias", bias)):
            check_bool(NAME, argument, value)
        pair = isinstance(time_step_limit, tuple | list) and len(time_step_limit) == 2
        check(pair, NAME, "time_step_limit", "must be two numbers", time_step_limit)
        low, high = (as_number(NAME, "time_step_limit", t) for t in time_step_limit)
        check(0 <= low <= high, NAME, "time_step_limit", "must ascend from 0", [low, high])
        self.time_step_limit, self.head_dim, self.backend = (low, high), head_dim, backend
        inner = self.num_heads * head_dim
        self.channels = inner + 2 * self.n_groups * self.state_size
        self.in_proj = nn.Linear(dim, inner + self.channels + self.num_heads, bias=bias)
        self.conv1d = short_convolution(self.channels, conv_kernel, bias=conv_bias)
        self.dt_bias = nn.Parameter(inverse_softplus_steps(self.num_heads))
        self.A_log = nn.Parameter(log_rates(self.num_heads, 1.0))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedRMSNorm(inner, eps, "silu", groups=self.n_groups, gate_first=True)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def _weight(self) -> Tensor:
        return self.in_proj.weight

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.state_size, self.head_dim

    def _project(self, x: Tensor) -> tuple[Tensor, Any]:
        inner = self.num_heads * self.head_dim
        gate, mixed, dt = self.in_proj(x).split([inner, self.channels, self.num_heads], -1)
        return mixed, (gate, dt)

    def _recurrence(
        self, mixed: Tensor, rest: Any
    ) -> tuple[Callable[..., Any], Callable[..., Tensor], dict[str, Any]]:
        x, b, c = self._parts(mixed)
        decay, v = decays_and_values(
            x, rest[1], -self.A_log.float().exp(), dt_bias=self.dt_bias, limit=self.time_step_limit
        )
        arguments = {
            "q": shared_heads(c, self.num_heads), "k": shared_heads(b, self.num_heads), "v": v,
            "log_decay": decay, "scale": 1.0,
        }  # fmt: skip
        return linear_attention, linear_attention_decode, arguments

    def _output(self, out: Tensor, mixed: Tensor, rest: Any) -> Tensor:
        x, _, _ = self._parts(mixed)
        o = out.float() + self.D.float()[:, None] * x.float()
        y: Tensor = self.out_proj(self.norm(o.flatten(-2), rest[0]).to(out.dtype))
        return y

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., H, P], B and C [..., G, N]."""
        shared = self.n_groups * self.state_size
        x, b, c = mixed.split([mixed.shape[-1] - 2 * shared, shared, shared], -1)
        groups = (self.n_groups, self.state_size)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            b.unflatten(-1, groups),
            c.unflatten(-1, groups),
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"state_size={self.state_size}, n_groups={self.n_groups}"
        )
