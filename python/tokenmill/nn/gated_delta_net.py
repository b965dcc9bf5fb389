"""Gated DeltaNet, the linear layer of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, check
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

NAME = "nn.GatedDeltaNet"


class GatedDeltaNet(RecurrentMixer):
    r"""Gated DeltaNet: the delta rule with a decay per head, as in Qwen3-Next and Qwen3.5:

    .. math::
       q, k, v = \operatorname{silu}(\operatorname{conv}(x W_{qkv})), \qquad
       \beta = \sigma(x W_b), \qquad
       g = -e^{A} \operatorname{softplus}(x W_a + b_{dt}), \qquad
       o = \operatorname{delta}(\hat q, \hat k, v, \beta, g), \qquad
       y = (\operatorname{RMSNorm}(o) \odot \operatorname{silu}(x W_z)) W_o

    with queries and keys of length 1, and the recurrence of :func:`tokenmill.delta_attention`. The
    norm is over the channels of a head.

    Args:
        dim: channels C of the input.
        num_heads: heads Hk of queries and keys.
        num_v_heads: heads Hv of values, a multiple of Hk. None: 2 Hk.
        head_dim: channels D of queries and keys of a head, up to 256.
        head_v_dim: channels Dv of values, up to 256. None: D.
        conv_kernel: taps W of the convolution, 1 to 8.
        eps: epsilon of the norm.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, T, C]``, or packed ``[T, C]`` with cu_seqlens int32 ``[B + 1]``; to the same;
        float16, bfloat16, float32.

    Weights, with the names of Qwen3.5: in_proj_qkv ``[2 Hk D + Hv Dv, C]``, in_proj_z ``[Hv Dv,
    C]``, in_proj_b and in_proj_a ``[Hv, C]``, conv1d ``[2 Hk D + Hv Dv, 1, W]``, dt_bias and A_log
    ``[Hv]``, norm ``[Dv]``, out_proj ``[C, Hv Dv]``. The state dicts of the layers of Qwen3.5 and
    Qwen3-Next in transformers load unchanged; the in_proj_qkvz and in_proj_ba of Qwen3-Next, whose
    rows are in groups by key head, are put in this order.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 4 C (Hk D + Hv Dv) + 2 C Hv Dv operations of projections and 6 Hv D Dv of the
    recurrence per token, whatever the length; a state has 4 Hv D Dv bytes.

    Paper: Gated Delta Networks (Yang et al. 2024), section 3.3.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.GatedDeltaNet(64, 2, head_dim=16)
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
        num_heads: int = 16,
        num_v_heads: int | None = None,
        head_dim: int = 128,
        head_v_dim: int | None = None,
        *,
        conv_kernel: int = 4,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        num_heads = as_int(NAME, "num_heads", num_heads)
        dim, conv_kernel, eps, sizes = check_sizes(
            NAME, dim, conv_kernel, eps, num_heads=(num_heads, 2**16),
            num_v_heads=(2 * num_heads if num_v_heads is None else num_v_heads, 2**17),
            head_dim=(head_dim, MAX_HEAD_DIM),
            head_v_dim=(head_dim if head_v_dim is None else head_v_dim, MAX_HEAD_DIM),
        )  # fmt: skip
        self.num_heads, self.num_v_heads, self.head_dim, self.head_v_dim = sizes
        whole = self.num_v_heads % self.num_heads == 0
        rule = f"must be a multiple of num_heads, {self.num_heads}"
        check(whole, NAME, "num_v_heads", rule, self.num_v_heads)
        self.backend = backend
        inner = self.num_v_heads * self.head_v_dim
        channels = 2 * self.num_heads * self.head_dim + inner
        self.in_proj_qkv = nn.Linear(dim, channels, bias=False)
        self.in_proj_z = nn.Linear(dim, inner, bias=False)
        self.in_proj_b = nn.Linear(dim, self.num_v_heads, bias=False)
        self.in_proj_a = nn.Linear(dim, self.num_v_heads, bias=False)
        self.conv1d = short_convolution(channels, conv_kernel, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus_steps(self.num_v_heads))
        self.A_log = nn.Parameter(log_rates(self.num_v_heads, 0.01))
        self.norm = GatedRMSNorm(self.head_v_dim, eps, "silu")
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.register_load_state_dict_pre_hook(_take_grouped_rows)

    def _weight(self) -> Tensor:
        return self.in_proj_qkv.weight

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_v_heads, self.head_dim, self.head_v_dim

    def _project(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.in_proj_qkv(x), (self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x))

    def _recurrence(
        self, mixed: Tensor, rest: Any
    ) -> tuple[Callable[..., Any], Callable[..., Tensor], dict[str, Any]]:
        _, b, a = rest
        keys = self.num_heads * self.head_dim
        q, k, v = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], -1)
        rate = F.softplus(a.float() + self.dt_bias.float())
        arguments = {
            "q": q.unflatten(-1, (self.num_heads, -1)),
            "k": k.unflatten(-1, (self.num_heads, -1)),
            "v": v.unflatten(-1, (self.num_v_heads, -1)),
            "beta": b.float().sigmoid(),
            "log_decay": -self.A_log.float().exp() * rate,
            "qk_l2norm": True,
        }
        return delta_attention, delta_attention_decode, arguments

    def _output(self, out: Tensor, mixed: Tensor, rest: Any) -> Tensor:
        z = rest[0].unflatten(-1, (self.num_v_heads, -1))
        y: Tensor = self.out_proj(self.norm(out, z).flatten(-2).to(out.dtype))
        return y

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_v_heads={self.num_v_heads}, "
            f"head_dim={self.head_dim}, head_v_dim={self.head_v_dim}"
        )


def _take_grouped_rows(module: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    """Splits the projections of Qwen3-Next, whose rows are in groups: for each key head its query,
    key, values and gates, and its beta and decay.
    """
    assert isinstance(module, GatedDeltaNet)
    heads, keys = module.num_heads, module.head_dim
    each = module.num_v_heads // heads
    values = each * module.head_v_dim
    qkvz = state.pop(prefix + "in_proj_qkvz.weight", None)
    if qkvz is not None:
        q, k, v, z = qkvz.unflatten(0, (heads, -1)).split([keys, keys, values, values], 1)
        qkv = [t.flatten(0, 1) for t in (q, k, v)]
        state[prefix + "in_proj_qkv.weight"] = torch.cat(qkv)
        state[prefix + "in_proj_z.weight"] = z.flatten(0, 1)
    ba = state.pop(prefix + "in_proj_ba.weight", None)
    if ba is not None:
        for name, t in zip("ba", ba.unflatten(0, (heads, -1)).split(each, 1), strict=True):
            state[f"{prefix}in_proj_{name}.weight"] = t.flatten(0, 1)
