"""Layers of Based: linear attention with a Taylor feature map, and sliding-window softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_bool
from ..dense.attention import attention
from ..linear._state import MAX_TAYLOR_HEAD_DIM, feature_dim
from ..linear.linear_attention import linear_attention
from ._rotary import angles_at, rotated
from .rules import check_heads, check_kept, check_part, check_tokens, check_wide_heads

TAYLOR, WINDOW, BLOCK = "nn.TaylorAttention", "nn.WindowAttention", "nn.TaylorWindowBlock"


class TaylorWindowState(NamedTuple):
    """The recurrent state of :class:`TaylorWindowBlock`.

    Args:
        sums: float32 ``[B, H, F, D + 1]``, key features times values, and the sum of key features.
        k, v: ``[B, M, H, D]``, keys and values of the last M tokens, as many as a window holds.
        length: int64 ``[B]``, number of tokens so far.

    Example:
        >>> import torch, tokenmill as tm
        >>> block = tm.nn.TaylorWindowBlock(64, 4, feature_dim=8, window=5)
        >>> y, state = block(torch.randn(2, 20, 64), return_state=True)
        >>> state.sums.shape, state.k.shape
        (torch.Size([2, 4, 45, 17]), torch.Size([2, 5, 4, 16]))
    """

    sums: Tensor
    k: Tensor
    v: Tensor
    length: Tensor


class TaylorAttention(nn.Module):
    r"""Causal linear attention with the feature map of Based:

    .. math::
       o_t = \frac{\sum_{s \le t} (1 + u_{ts} + u_{ts}^2 / 2)\, v_s}
                  {\sum_{s \le t} (1 + u_{ts} + u_{ts}^2 / 2)}, \qquad
       u_{ts} = q_t \cdot k_s / \sqrt{d}, \qquad y = o W_o,

    with queries and keys of d = feature_dim channels per head.

    Args:
        dim: channels C of the input.
        num_heads: number of heads H.
        feature_dim: channels d of queries and keys, at most 32.
        head_dim: channels D of values. None: C / H.
        backend: backend of :func:`tokenmill.linear_attention`.

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32. With return_state also the sums,
        float32 ``[B, H, 1 + d + d (d + 1) / 2, D + 1]``, which a later call takes as ``state=``.

    Weights, with the names of the released models: proj_q and proj_k ``[H d, C]``, proj_v ``[H D,
    C]``, out_proj ``[C, H D]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 4 H (d C + D C) + 2 H d^2 D operations per token, whatever the length.

    Paper: Simple linear attention language models balance the recall-throughput tradeoff (Arora et
    al. 2024), section 4. The released code adds 1e-12 (its Triton form 1e-6) to the denominator,
    which is at least half the number of tokens: below float32 rounding.

    Example:
        >>> import torch, tokenmill as tm
        >>> mix = tm.nn.TaylorAttention(64, 4)
        >>> mix(torch.randn(2, 20, 64)).shape
        torch.Size([2, 20, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        feature_dim: int = 16,
        head_dim: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads, head_dim = check_wide_heads(TAYLOR, dim, num_heads, head_dim, maximum=256)
        feature_dim = as_int(TAYLOR, "feature_dim", feature_dim)
        small = 1 <= feature_dim <= MAX_TAYLOR_HEAD_DIM
        check(small, TAYLOR, "feature_dim", f"must be 1 to {MAX_TAYLOR_HEAD_DIM}", feature_dim)
        self.num_heads, self.feature_dim, self.backend = num_heads, feature_dim, backend
        self.head_dim = head_dim
        self.proj_q = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.proj_k = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.proj_v = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_bool(TAYLOR, "return_state", return_state)
        check_tokens(TAYLOR, x, self.proj_q.weight)
        if state is not None:
            rows = feature_dim("taylor2", self.feature_dim)
            shape = [x.shape[0], self.num_heads, rows, self.head_dim + 1]
            check_part(TAYLOR, "sums", state, shape, x)
        heads = (
            project(x).unflatten(-1, (self.num_heads, -1))
            for project in (self.proj_q, self.proj_k, self.proj_v)
        )
        out, sums = linear_attention(
            *heads, feature_map="taylor2", normalize=True, initial_state=state,
            return_final_state=True, backend=self.backend,
        )  # fmt: skip
        y: Tensor = self.out_proj(out.flatten(-2))
        return (y, sums) if return_state else y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, feature_dim={self.feature_dim}"


class WindowAttention(nn.Module):
    """Causal softmax attention to a token and the `window` tokens before it, with rotary positions.

    Args:
        dim: channels C of the input.
        num_heads: number of heads, a divisor of the channels.
        window: number of earlier tokens that a token sees.
        rotary_base: base of the rotary embedding. None: no positions.
        backend: backend of :func:`tokenmill.attention`.

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32. With return_state also (k, v,
        length): keys, rotated, and values ``[B, M, H, D]`` of the last M tokens, at most window of
        them, and int64 ``[B]``, the number of tokens so far; a later call takes them as ``state=``.

    Weights, with the names of the released models: Wqkv ``[3 C, C]``, rows of all queries, keys and
    values; out_proj ``[C, C]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 8 C^2 + 4 C (window + 1) operations per token.

    Paper: Simple linear attention language models balance the recall-throughput tradeoff (Arora et
    al. 2024), section 4. The released models have ``window_size: 256`` in their configuration, half
    of which is the reach to the left: 128 tokens and the token itself.

    Example:
        >>> import torch, tokenmill as tm
        >>> mix = tm.nn.WindowAttention(64, 4, window=8)
        >>> mix(torch.randn(2, 20, 64)).shape
        torch.Size([2, 20, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        window: int = 128,
        *,
        rotary_base: float | None = 10000.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(WINDOW, dim, num_heads)
        window = as_int(WINDOW, "window", window, minimum=0, maximum=2**31 - 1)
        if rotary_base is not None:
            rotary_base = as_number(WINDOW, "rotary_base", rotary_base)
            check(rotary_base > 0, WINDOW, "rotary_base", "must be above 0", rotary_base)
            even = dim // num_heads % 2 == 0
            check(even, WINDOW, "rotary_base", "must be None with an odd head_dim", rotary_base)
        self.num_heads, self.window, self.rotary_base = num_heads, window, rotary_base
        self.backend = backend
        self.Wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor, Tensor] | None = None,
        *,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        check_bool(WINDOW, "return_state", return_state)
        check_tokens(WINDOW, x, self.Wqkv.weight)
        self._check_state(state, x)
        batch, tokens = x.shape[:2]
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        length = x.new_zeros(batch, dtype=torch.int64) if state is None else state[2]
        if self.rotary_base is not None:
            at = length[:, None] + torch.arange(tokens, device=x.device)
            angles = angles_at(at, q.shape[-1], self.rotary_base)
            q, k = rotated(q, angles), rotated(k, angles)
        if state is not None:
            pairs = zip(state[:2], (k, v), strict=True)
            k, v = (torch.cat([old.to(t.dtype), t], 1) for old, t in pairs)
        out = attention(q, k, v, causal=True, window=(self.window, 0), backend=self.backend)
        y: Tensor = self.out_proj(out.flatten(-2))
        if not return_state:
            return y
        first = max(k.shape[1] - self.window, 0)
        return y, (k[:, first:], v[:, first:], length + tokens)

    def _check_state(self, state: tuple[Tensor, Tensor, Tensor] | None, x: Tensor) -> None:
        if state is None:
            return
        triple = isinstance(state, tuple) and len(state) == 3
        check(triple, WINDOW, "state", "must be (k, v, length)", state)
        heads = [self.num_heads, self.Wqkv.in_features // self.num_heads]
        check_kept(WINDOW, state[0], state[1], heads, x)
        check_part(WINDOW, "length", state[2], [x.shape[0]], x)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}"


class TaylorWindowBlock(nn.Module):
    r"""Two consecutive layers of Based: :class:`TaylorAttention`, which recalls from any distance,
    and :class:`WindowAttention`, which is exact nearby. Each has norms before it and a gated
    network after it,

    .. math::
       x' = x + \operatorname{mix}(\operatorname{RMSNorm}(x)), \qquad
       y = x' + (\operatorname{silu}(n W_g) \odot n W_1)\, W_2,
       \quad n = \operatorname{RMSNorm}(x').

    Args:
        dim: channels C of the input.
        num_heads: number of heads of both layers, a divisor of the channels.
        feature_dim: channels of queries and keys of the first layer, at most 32.
        window: number of earlier tokens that a token sees in the second layer.
        mlp_dim: channels of the gated network. None: 2 C.
        rotary_base: rotary base of the second layer, see :class:`WindowAttention`.
        eps: epsilon of the norms.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32. With return_state also a
        :class:`TaylorWindowState`, which a later call takes as ``state=``: prompts and single
        tokens alike.

    Weights: layers.0 and layers.1, each with the names of the released models: mixer, norm1.weight,
    norm2.weight ``[C]``, mlp.fc1 ``[2 mlp_dim, C]``, rows of values, then of gates, and mlp.fc2
    ``[C, mlp_dim]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: the two attention layers, and 12 C mlp_dim operations per token. The size of a state
    does not depend on the length.

    Paper: Simple linear attention language models balance the recall-throughput tradeoff (Arora et
    al. 2024), section 4. A released model of 360 M parameters is 27 layers: 5 such pairs, at 1, 6,
    11, 16 and 21, and gated convolutions of 3 tokens in between, which are plain PyTorch.

    Example:
        >>> import torch, tokenmill as tm
        >>> block = tm.nn.TaylorWindowBlock(64, 4, window=8)
        >>> x = torch.randn(2, 20, 64)
        >>> y, state = block(x[:, :19], return_state=True)
        >>> last = block(x[:, 19:], state)
        >>> torch.allclose(torch.cat([y, last], 1), block(x), atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        *,
        feature_dim: int = 16,
        window: int = 128,
        mlp_dim: int | None = None,
        rotary_base: float | None = 10000.0,
        eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(BLOCK, dim, num_heads)
        mlp_dim = 2 * dim if mlp_dim is None else mlp_dim
        mlp_dim = as_int(BLOCK, "mlp_dim", mlp_dim, minimum=1, maximum=2**30 - 1)
        eps = as_number(BLOCK, "eps", eps)
        taylor = TaylorAttention(dim, num_heads, feature_dim, backend=backend)
        near = WindowAttention(dim, num_heads, window, rotary_base=rotary_base, backend=backend)
        self.layers = nn.ModuleList(_Layer(mixer, dim, mlp_dim, eps) for mixer in (taylor, near))

    def forward(
        self, x: Tensor, state: TaylorWindowState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, TaylorWindowState]:
        check_bool(BLOCK, "return_state", return_state)
        if state is not None:
            held = isinstance(state, TaylorWindowState)
            check(held, BLOCK, "state", "must be a TaylorWindowState", state)
        taylor, near = self.layers
        x, sums = taylor(x, None if state is None else state.sums)
        x, cache = near(x, None if state is None else tuple(state[1:]))
        return (x, TaylorWindowState(sums, *cache)) if return_state else x


class _Layer(nn.Module):
    """A mixer with norms before it and a gated network after it."""

    def __init__(self, mixer: nn.Module, dim: int, mlp_dim: int, eps: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.mlp = _GatedMlp(dim, mlp_dim)

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        check_tokens(BLOCK, x, self.mlp.fc1.weight)
        mixed, after = self.mixer(self._normed(self.norm1, x), state, return_state=True)
        x = x + mixed
        return x + self.mlp(self._normed(self.norm2, x)), after

    @staticmethod
    def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        y: Tensor = norm(x.to(norm.weight.dtype))  # autocast does not cast for a norm
        return y


class _GatedMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        values, gate = self.fc1(x).chunk(2, -1)
        y: Tensor = self.fc2(values * F.silu(gate))
        return y
