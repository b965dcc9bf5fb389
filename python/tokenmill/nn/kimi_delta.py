"""Kimi Delta Attention, the linear layer of Kimi Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear import delta_attention, delta_attention_decode
from ._recurrent import (
    MAX_HEAD_DIM,
    GatedRMSNorm,
    RecurrentMixer,
    check_sizes,
    inverse_softplus_steps,
    log_rates,
    short_convolution,
)

NAME = "nn.KimiDeltaAttention"


class KimiDeltaAttention(RecurrentMixer):
    r"""Kimi Delta Attention: the delta rule with a decay per channel:

    .. math::
       q, k, v = \operatorname{silu}(\operatorname{conv}(x W_{qkv})), \qquad
       \beta = \sigma(x W_b), \qquad
       g = -e^{A} \operatorname{softplus}(x W_{fa} W_{fb} + b_{dt}), \qquad
       o = \operatorname{delta}(\hat q, \hat k, v, \beta, g), \qquad
       y = (\operatorname{RMSNorm}(o) \odot \sigma(x W_{ga} W_{gb})) W_o

    with queries and keys of length 1, and the recurrence of :func:`tokenmill.delta_attention`. The
    norm is over the channels of a head.

    Args:
        dim: channels C of the input.
        num_heads: heads H.
        head_dim: channels D of a head, up to 256.
        conv_kernel: taps W of the convolution, 1 to 8.
        eps: epsilon of the norm.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, T, C]``, or packed ``[T, C]`` with cu_seqlens int32 ``[B + 1]``; to the same;
        float16, bfloat16, float32.

    Weights, with the names of transformers, whose state dict loads unchanged: q_proj, k_proj and
    v_proj ``[H D, C]``, conv1d ``[3 H D, 1, W]``, forget_gate.f_a_proj ``[D, C]``,
    forget_gate.f_b_proj ``[H D, D]``, forget_gate.dt_bias ``[H D]``, forget_gate.A_log ``[1, 1, H,
    1]``, b_proj ``[H, C]``, g_a_proj ``[D, C]``, g_b_proj ``[H D, D]``, o_norm ``[D]``, o_proj
    ``[C, H D]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 8 C H D + 4 D (C + H D) operations of projections and 6 H D^2 of the recurrence per
    token, whatever the length; a state has 4 H D^2 bytes.

    Paper: Kimi Linear (2025), section 4.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.KimiDeltaAttention(64, 4, head_dim=16)
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
        num_heads: int = 32,
        head_dim: int = 128,
        *,
        conv_kernel: int = 4,
        eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, conv_kernel, eps, sizes = check_sizes(
            NAME, dim, conv_kernel, eps, num_heads=(num_heads, 2**16),
            head_dim=(head_dim, MAX_HEAD_DIM),
        )  # fmt: skip
        self.num_heads, self.head_dim = sizes
        self.backend = backend
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(dim, inner, bias=False) for _ in range(3)
        )
        self.conv1d = short_convolution(3 * inner, conv_kernel, bias=False)
        self.forget_gate = _ForgetGate(dim, self.num_heads, self.head_dim)
        self.b_proj = nn.Linear(dim, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(dim, self.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.o_norm = GatedRMSNorm(self.head_dim, eps, "sigmoid")
        self.o_proj = nn.Linear(inner, dim, bias=False)

    def _weight(self) -> Tensor:
        return self.q_proj.weight

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_dim, self.head_dim

    def _project(self, x: Tensor) -> tuple[Tensor, Any]:
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        return mixed, (self.g_b_proj(self.g_a_proj(x)), self.b_proj(x), self.forget_gate(x))

    def _recurrence(
        self, mixed: Tensor, rest: Any
    ) -> tuple[Callable[..., Any], Callable[..., Tensor], dict[str, Any]]:
        _, b, log_decay = rest
        q, k, v = mixed.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        arguments = {
            "q": q, "k": k, "v": v, "beta": b.float().sigmoid(), "log_decay": log_decay,
            "qk_l2norm": True,
        }  # fmt: skip
        return delta_attention, delta_attention_decode, arguments

    def _output(self, out: Tensor, mixed: Tensor, rest: Any) -> Tensor:
        gate = rest[0].unflatten(-1, (self.num_heads, -1))
        y: Tensor = self.o_proj(self.o_norm(out, gate).flatten(-2).to(out.dtype))
        return y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class _ForgetGate(nn.Module):
    """The logarithm of the decay, [..., H, D] in float32."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.f_a_proj = nn.Linear(dim, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, num_heads * head_dim, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus_steps(num_heads * head_dim))
        self.A_log = nn.Parameter(log_rates(num_heads, 1.0).view(1, 1, num_heads, 1))

    def forward(self, x: Tensor) -> Tensor:
        step = F.softplus(self.f_b_proj(self.f_a_proj(x)).float() + self.dt_bias.float())
        rate = self.A_log.float().exp().view(-1, 1)
        return -rate * step.unflatten(-1, (rate.shape[0], -1))
