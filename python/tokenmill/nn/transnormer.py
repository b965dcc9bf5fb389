"""The layer of TransNormerLLM: lightning attention with positions, gate and norms."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_bool
from ..linear.lightning_slopes import lightning_slopes
from ..linear.linear_attention import lightning_attention
from .rules import Slopes, check_heads, check_part, check_tokens

NAME, ATTENTION = "nn.TransNormerLayer", "nn.TransNormerAttention"
MAX_HEAD_DIM = 256


class TransNormerState(NamedTuple):
    """The recurrent state of :class:`TransNormerAttention`.

    Args:
        kv: float32 ``[B, H, F, D]``, decayed sums of outer products of keys and values; F = D, or 2
            D with lrpe.
        length: int64 ``[B]``, number of tokens so far.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TransNormerLayer(64, 4, layer=0, num_layers=12)
        >>> y, state = layer(torch.randn(2, 20, 64), return_state=True)
        >>> state.kv.shape, state.length
        (torch.Size([2, 4, 32, 16]), tensor([20, 20]))
    """

    kv: Tensor
    length: Tensor


class TransNormerAttention(Slopes):
    r"""Gated lightning attention of TransNormerLLM:

    .. math::
       q, k, v, u = x W_{qkvu}, \qquad
       o_t = \sum_{s \le t} e^{-\lambda_h (t - s)}
             (\rho_t(\operatorname{silu}(q_t)) \cdot \rho_s(\operatorname{silu}(k_s)))\, v_s, \qquad
       y = (u \odot \operatorname{SRMSNorm}(o)) W_o

    with SRMSNorm(o) = o / rms(o) over the channels of all heads and no weights. With lrpe
    :math:`\rho_t(x) = [x \cos t\theta, x \sin t\theta]`, so that the product of channel d is
    multiplied by :math:`\cos(\theta_d (t - s))`; without it :math:`\rho` is the identity.

    Args:
        dim: channels C of the input.
        num_heads: number of heads H, a divisor of the channels.
        layer, num_layers: index of this layer from 0 and number of layers, which determine the
            slopes :math:`\lambda` (see :func:`tokenmill.lightning_slopes`).
        lrpe: whether the layer has positions. None: only the first layer, as in the paper. The
            state of such a layer is twice as large.
        convention: convention of the slopes. "minimax" is also the rule of the released
            TransNormerLLM models; "paper" is the formula of the text.
        eps: epsilon of the norm.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32. With return_state also a
        :class:`TransNormerState`, which a later call takes as ``state=``.

    Weights, with the names of the released models: qkvu_proj ``[4 C, C]``, rows of all queries,
    keys, values and gates; out_proj ``[C, C]``; with lrpe lrpe.theta ``[H, 1, D]``, which is
    learned. The buffer slopes ``[H]`` is not in the state dict and stays float32.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 10 C^2 + 4 C F operations per token, whatever the length; a state has 4 C F bytes; F
    = D, or 2 D with lrpe.

    Paper: TransNormerLLM (Qin et al. 2023), section 3.1, and Various Lengths, Constant Speed (Qin
    et al. 2024), section 4. The layer follows the released code of both.

    Example:
        >>> import torch, tokenmill as tm
        >>> mix = tm.nn.TransNormerAttention(64, 4, layer=3, num_layers=12)
        >>> mix(torch.randn(2, 20, 64)).shape
        torch.Size([2, 20, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layer: int,
        num_layers: int,
        lrpe: bool | None = None,
        convention: Literal["minimax", "paper"] = "minimax",
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(ATTENTION, dim, num_heads)
        layer = as_int(ATTENTION, "layer", layer)
        lrpe = layer == 0 if lrpe is None else lrpe
        check_bool(ATTENTION, "lrpe", lrpe)
        head_dim, limit = dim // num_heads, MAX_HEAD_DIM // (1 + lrpe)
        fits = head_dim <= limit
        check(fits, ATTENTION, "num_heads", f"must leave heads of at most {limit}", head_dim)
        self.num_heads, self.backend = num_heads, backend
        self.eps = as_number(ATTENTION, "eps", eps)
        self.qkvu_proj = nn.Linear(dim, 4 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.lrpe = Lrpe(num_heads, head_dim) if lrpe else None
        slopes = lightning_slopes(num_heads, layer, num_layers, convention=convention)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, x: Tensor, state: TransNormerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, TransNormerState]:
        check_bool(ATTENTION, "return_state", return_state)
        self._check(x, state)
        batch, tokens = x.shape[:2]
        qkvu = self.qkvu_proj(x)
        u = qkvu[..., -x.shape[-1] :]
        q, k, v = qkvu[..., : -x.shape[-1]].unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = F.silu(q), F.silu(k)
        length = x.new_zeros(batch, dtype=torch.int64) if state is None else state.length
        if self.lrpe is not None:
            at = length[:, None] + torch.arange(tokens, device=x.device)
            q, k = self.lrpe(q, at), self.lrpe(k, at)
        out, kv = lightning_attention(
            q, k, v, self.slopes, initial_state=None if state is None else state.kv,
            return_final_state=True, backend=self.backend,
        )  # fmt: skip
        y: Tensor = self.out_proj(u * srms_norm(out.flatten(-2), self.eps))
        return (y, TransNormerState(kv, length + tokens)) if return_state else y

    def _check(self, x: Tensor, state: TransNormerState | None) -> None:
        check_tokens(ATTENTION, x, self.qkvu_proj.weight)
        if state is None:
            return
        held = isinstance(state, TransNormerState)
        check(held, ATTENTION, "state", "must be a TransNormerState", state)
        head_dim = x.shape[-1] // self.num_heads
        features = head_dim if self.lrpe is None else 2 * head_dim
        shapes = {
            "kv": [x.shape[0], self.num_heads, features, head_dim],
            "length": [x.shape[0]],
        }
        for part, shape in shapes.items():
            check_part(ATTENTION, part, getattr(state, part), shape, x)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, eps={self.eps:g}"


class TransNormerLayer(nn.Module):
    r"""A decoder layer of TransNormerLLM: :class:`TransNormerAttention` and a gated linear unit
    without activation,

    .. math::
       x' = x + \operatorname{attention}(\operatorname{SRMSNorm}(x)), \qquad
       y = x' + (n W_1 \odot n W_2) W_3, \quad n = \operatorname{SRMSNorm}(x').

    Args:
        dim, num_heads, layer, num_layers, lrpe, convention, eps, backend: see
            :class:`TransNormerAttention`.
        glu_dim: hidden channels of the gated unit. None: 2 C. The released models use 2816 for 1024
            channels.

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32. With return_state also a
        :class:`TransNormerState`, which a later call takes as ``state=``: prompts and single
        tokens alike.

    Weights, with the names of the released models: token_mixer, a :class:`TransNormerAttention`;
    channel_mixer.l1 and .l2 ``[glu_dim, C]``, channel_mixer.l3 ``[C, glu_dim]``. The norms have no
    weights.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: as :class:`TransNormerAttention`, and 6 C glu_dim operations per token.

    Paper: TransNormerLLM (Qin et al. 2023), section 3.1; Various Lengths, Constant Speed (Qin et
    al. 2024), section 4. The layer follows their released code.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TransNormerLayer(64, 4, layer=0, num_layers=12)
        >>> x = torch.randn(2, 20, 64)
        >>> y, state = layer(x[:, :17], return_state=True)
        >>> steps = [y]
        >>> for t in range(17, 20):
        ...     y, state = layer(x[:, t:t + 1], state, return_state=True)
        ...     steps.append(y)
        >>> torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layer: int,
        num_layers: int,
        glu_dim: int | None = None,
        lrpe: bool | None = None,
        convention: Literal["minimax", "paper"] = "minimax",
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.token_mixer = TransNormerAttention(
            dim, num_heads, layer=layer, num_layers=num_layers, lrpe=lrpe, convention=convention,
            eps=eps, backend=backend,
        )  # fmt: skip
        hidden = 2 * dim if glu_dim is None else glu_dim
        hidden = as_int(NAME, "glu_dim", hidden, minimum=1, maximum=2**31 - 1)
        self.channel_mixer = SimpleGatedLinearUnit(dim, hidden)

    def forward(
        self, x: Tensor, state: TransNormerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, TransNormerState]:
        check_bool(NAME, "return_state", return_state)
        check_tokens(NAME, x, self.channel_mixer.l1.weight)
        eps = self.token_mixer.eps
        mixed, after = self.token_mixer(srms_norm(x, eps), state, return_state=True)
        x = x + mixed
        y: Tensor = x + self.channel_mixer(srms_norm(x, eps))
        return (y, after) if return_state else y


class Lrpe(nn.Module):
    """Linearised relative positions: x [B, N, H, D] at positions [B, N] to [B, N, H, 2 D]."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        channels = num_heads * head_dim
        theta = 10000.0 ** (-2 / channels * torch.arange(channels))
        self.theta = nn.Parameter(theta.view(num_heads, 1, head_dim))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        # Angles grow with the sequence length: in 16 bits their rounding error would be whole
        # turns.
        theta = self.theta[:, 0].to(torch.promote_types(x.dtype, torch.float32))
        angles = at[:, :, None, None] * theta
        turned = torch.cat([x * angles.cos(), x * angles.sin()], -1)
        return turned.to(x.dtype)


class SimpleGatedLinearUnit(nn.Module):
    """(x W_1 * x W_2) W_3."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(dim, hidden, bias=False)
        self.l2 = nn.Linear(dim, hidden, bias=False)
        self.l3 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l3(self.l1(x) * self.l2(x))
        return y


def srms_norm(x: Tensor, eps: float) -> Tensor:
    """SimpleRMSNorm: x / rms(x), in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
