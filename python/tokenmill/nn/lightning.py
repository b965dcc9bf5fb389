"""Lightning attention with projections, norm and gate."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_device_of, check_tensor, fail, reads_values
from ..linear.lightning_slopes import lightning_slopes
from ..linear.linear_attention import lightning_attention
from ..linear.linear_attention_decode import linear_attention_decode
from .rules import Slopes, check_input, check_wide_heads

NAME, STATE = "nn.MiniMaxLightningAttention", "nn.MiniMaxLightningState"


class MiniMaxLightningState:
    """The recurrent state of :class:`MiniMaxLightningAttention`, one slot per sequence.

    Args:
        kv: float32 ``[slots, H, D, D]``, sums of outer products of keys and values.

    Example:
        >>> import torch, tokenmill as tm
        >>> state = tm.nn.MiniMaxLightningAttention(64, 4).new_state(8)
        >>> state.kv.shape
        torch.Size([8, 4, 16, 16])
        >>> state.reset(torch.tensor([3]))
    """

    def __init__(self, kv: Tensor) -> None:
        check_tensor(STATE, "kv", kv)
        square = kv.dim() == 4 and kv.shape[2] == kv.shape[3]
        check(square, STATE, "kv", "must have shape [slots, H, D, D]", kv.shape)
        check(kv.dtype == torch.float32, STATE, "kv", "must be float32", kv.dtype)
        self.kv = kv

    def reset(self, slots: Tensor | None = None) -> None:
        """Clears slots. None: all."""
        if slots is None:
            self.kv.zero_()
        else:
            self.kv[slots.long()] = 0


class MiniMaxLightningAttention(Slopes):
    r"""The linear attention of MiniMax-01, whose weights decay with the distance:

    .. math::
       q, k, v = \operatorname{silu}(x W_{qkv}), \qquad
       o_t = \sum_{s \le t} e^{-\lambda_h (t - s)} (q_t \cdot k_s)\, v_s, \qquad
       y = (\sigma(x W_g) \odot \operatorname{RMSNorm}(o)) W_o.

    The norm is over the channels of all heads. The layer trained in the lightning attention paper
    is :class:`TransNormerAttention`: with positions, without activation of values and gate, and
    with a norm without weights.

    Args:
        dim: channels C of the input.
        num_heads: heads H.
        head_dim: channels D of a head. None: C / H.
        layer, num_layers: index of this layer from 0 and number of layers, which determine the
            slopes :math:`\lambda` (see :func:`tokenmill.lightning_slopes`); None for both: the
            slopes of ALiBi.
        convention: convention of the slopes, "minimax" or "paper".
        eps: epsilon of the norm.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]``, or packed ``[T, C]`` with cu_seqlens int32 ``[B + 1]``; to the same;
        float16, bfloat16, float32.

    Weights: qkv_proj ``[3 H D, C]``, for each head the rows of its queries, keys and values;
    output_gate ``[H D, C]``, norm ``[H D]``, out_proj ``[C, H D]``, and the buffer slopes ``[H]``,
    which stays float32 when the module changes its dtype. The state dict of a lightning layer of
    MiniMax in transformers loads unchanged, with its slopes (slope_rate) if present; otherwise the
    number of heads must be a power of two, the only case that transformers defines.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 10 C H D + 4 H D^2 operations per token, whatever the length; a state has 4 H D^2
    bytes.

    Paper: MiniMax-01 (2025), section 2; the sum from Various Lengths, Constant Speed (Qin et al.
    2024), section 3.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.MiniMaxLightningAttention(64, 4, layer=2, num_layers=12)
        >>> x = torch.randn(2, 20, 64)
        >>> with torch.no_grad():
        ...     state = layer.new_state(2)
        ...     y = torch.cat([layer.prefill(x[:, :17], state), layer.decode(x[:, 17:], state)], 1)
        ...     torch.allclose(y, layer(x), atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        layer: int | None = None,
        num_layers: int | None = None,
        convention: Literal["minimax", "paper"] = "minimax",
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads, head_dim = check_wide_heads(NAME, dim, num_heads, head_dim, maximum=256)
        inner = num_heads * head_dim
        self.num_heads, self.head_dim, self.backend = num_heads, head_dim, backend
        self.qkv_proj = nn.Linear(dim, 3 * inner, bias=False)
        self.output_gate = nn.Linear(dim, inner, bias=False)
        self.norm = nn.RMSNorm(inner, eps=as_number(NAME, "eps", eps))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        slopes = lightning_slopes(num_heads, layer, num_layers, convention=convention)
        self.register_buffer("slopes", slopes)
        self.register_load_state_dict_pre_hook(_take_slopes)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = self._qkv(x, packed=cu_seqlens is not None)
        out = lightning_attention(q, k, v, self.slopes, cu_seqlens=cu_seqlens, backend=self.backend)
        return self._gated(out, x)

    def new_state(self, slots: int) -> MiniMaxLightningState:
        """An empty state for a number of sequences."""
        slots = as_int(NAME, "slots", slots, minimum=0)
        shape = (slots, self.num_heads, self.head_dim, self.head_dim)
        return MiniMaxLightningState(torch.zeros(shape, device=self.slopes.device))

    def prefill(
        self, x: Tensor, state: MiniMaxLightningState, slots: Tensor | None = None
    ) -> Tensor:
        """Processes the next tokens x ``[B, N, C]`` of the sequences in slots int32 ``[B]`` (None:
        slot b for sequence b), many at once; the state is updated in place. Needs no_grad, like
        decode.
        """
        self._check_state(x, state, slots, prefill=True)
        q, k, v = self._qkv(x)
        rows = slice(x.shape[0]) if slots is None else slots.long()
        out, final = lightning_attention(
            q, k, v, self.slopes, initial_state=state.kv[rows], return_final_state=True,
            backend=self.backend,
        )  # fmt: skip
        state.kv[rows] = final
        return self._gated(out, x)

    def decode(
        self, x: Tensor, state: MiniMaxLightningState, slots: Tensor | None = None
    ) -> Tensor:
        """Like prefill, for few tokens, usually one; reads and writes each state once. A slot of -1
        skips its sequence, whose result is 0.
        """
        self._check_state(x, state, slots)
        q, k, v = self._qkv(x)
        out = linear_attention_decode(
            q, k, v, state.kv, log_decay=-self.slopes, state_indices=slots, scale=1.0,
            backend=self.backend,
        )  # fmt: skip
        return self._gated(out, x)

    def _qkv(self, x: Tensor, packed: bool = False) -> tuple[Tensor, ...]:
        check_input(NAME, "x", x, self.qkv_proj.weight)
        channels = self.qkv_proj.in_features
        layout = f"[T, {channels}] with cu_seqlens" if packed else f"[B, N, {channels}]"
        shaped = x.dim() == (2 if packed else 3) and x.shape[-1] == channels
        check(shaped, NAME, "x", f"must have shape {layout}", x.shape)
        return F.silu(self.qkv_proj(x)).unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        # autocast does not cast for a norm
        o = self.norm(out.flatten(-2).to(self.norm.weight.dtype))
        y: Tensor = self.out_proj(torch.sigmoid(self.output_gate(x)) * o)
        return y

    def _check_state(
        self, x: Tensor, state: MiniMaxLightningState, slots: Tensor | None, prefill: bool = False
    ) -> None:
        check_tensor(NAME, "x", x)
        check(
            isinstance(state, MiniMaxLightningState),
            NAME,
            "state",
            "must be a MiniMaxLightningState",
            state,
        )
        check_tensor(NAME, "slots", slots, optional=True)
        check_device_of(NAME, "state", state.kv, "the weights", self.slopes)
        wanted = [self.num_heads, self.head_dim, self.head_dim]
        if list(state.kv.shape[1:]) != wanted:
            fail(NAME, "state", f"must have shape [slots, {wanted[0]}, {wanted[1]}, {wanted[2]}]",
                 state.kv.shape)  # fmt: skip
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        check(not trains, NAME, "state", "requires torch.no_grad()", "gradients")
        if slots is None and x.dim() == 3 and x.shape[0] > state.kv.shape[0]:
            fail(NAME, "state", f"must have a slot for each of {x.shape[0]} sequences",
                 state.kv.shape)  # fmt: skip
        if slots is not None and prefill:
            check_device_of(NAME, "slots", slots, "x", x)
            named = slots.dim() == 1 and slots.shape[0] == x.shape[0]
            check(named, NAME, "slots", f"must have shape [{x.shape[0]}]", slots.shape)
            if reads_values(slots) and slots.numel():
                minimum = int(slots.min())
                check(minimum >= 0, NAME, "slots", "must not be negative in prefill", minimum)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


def _take_slopes(module: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    """Takes the slopes of a published layer; keeps the module's own where there are none."""
    assert isinstance(module, MiniMaxLightningAttention)
    for name in ("query_decay", "key_decay", "diagonal_decay"):
        state.pop(prefix + name, None)
    rate = state.pop(prefix + "slope_rate", None)
    if rate is not None:
        state[prefix + "slopes"] = rate.flatten().float()
    state.setdefault(prefix + "slopes", module.slopes)
