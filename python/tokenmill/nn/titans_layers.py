"""The three Titans architectures that combine attention and a neural memory."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import masks
from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_choice,
)
from ..dense.attention import attention
from .rules import check_kept, check_tokens, check_wide_heads
from .titans import TitansMemory, TitansState


class TitansLayerState(NamedTuple):
    """The recurrent state of :class:`TitansMAG` and :class:`TitansMAL`.

    Args:
        memory: state of their memory.
        k, v: ``[B, M, H, D]``, keys and values of the last M tokens, at most window - 1 of them.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TitansMAG(64, 4, window=6)
        >>> y, state = layer(torch.randn(2, 20, 64), return_state=True)
        >>> state.k.shape
        torch.Size([2, 5, 4, 16])
    """

    memory: TitansState
    k: Tensor
    v: Tensor


class _Layer(nn.Module):
    """Attention with persistent tokens, and a memory."""

    name: str

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None,
        persistent: int,
        memory: TitansMemory | None,
        gated: bool,
        eps: float,
        backend: str | None,
    ) -> None:
        super().__init__()
        dim, num_heads, head_dim = check_wide_heads(
            self.name, dim, num_heads, head_dim, maximum=256
        )
        persistent = as_int(self.name, "persistent", persistent, minimum=0, maximum=2**20 - 1)
        if memory is None:
            memory = TitansMemory(dim, num_heads, head_dim, backend=backend)
        held = isinstance(memory, TitansMemory)
        check(held, self.name, "memory", "must be a TitansMemory or None", memory)
        channels = memory.qkv_proj.in_features
        check(channels == dim, self.name, "memory", f"must have {dim} channels", channels)
        inner = num_heads * head_dim
        self.num_heads, self.head_dim, self.backend = num_heads, head_dim, backend
        self.persistent = nn.Parameter(0.02 * torch.randn(persistent, dim))
        self.qkv_proj = nn.Linear(dim, 3 * inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.memory = memory
        if gated:
            eps = as_number(self.name, "eps", eps)
            self.norm, self.gate_norm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def _check_x(self, x: Tensor, return_state: bool) -> None:
        check_bool(self.name, "return_state", return_state)
        check_tokens(self.name, x, self.qkv_proj.weight)

    def _check_state(self, x: Tensor, state: TitansLayerState | None) -> None:
        if state is None:
            return
        held = isinstance(state, TitansLayerState)
        check(held, self.name, "state", "must be a TitansLayerState", state)
        check_kept(self.name, state.k, state.v, [self.num_heads, self.head_dim], x)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = attention(q, k, v, **options, backend=self.backend)
        y: Tensor = self.out_proj(out.flatten(-2))
        return y

    def _after_persistent(self, x: Tensor) -> Tensor:
        """x [B, N, C] with the persistent tokens prepended."""
        first = self.persistent.to(x.dtype).expand(x.shape[0], *self.persistent.shape)
        return torch.cat([first, x], 1)

    def _gated(self, y: Tensor, m: Tensor) -> Tensor:
        """norm(y) * sigmoid(norm(m)), each norm with its learned vector."""
        dtype = self.norm.weight.dtype  # autocast does not cast for a norm
        gate = torch.sigmoid(self.gate_norm(m.to(dtype)))
        return (self.norm(y.to(dtype)) * gate).to(y.dtype)

    def _kept(self, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Keys and values still visible to the next token."""
        first = max(k.shape[1] - (window - 1), 0)
        return k[:, first:], v[:, first:]

    def extra_repr(self) -> str:
        tokens = f"persistent={self.persistent.shape[0]}"
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, {tokens}"


class TitansMAC(_Layer):
    r"""Memory as context: attention within a segment sees what is recalled for the segment, and the
    memory learns the results of attention.

    For segment t, with persistent tokens P and the memory M,

    .. math::
       h_t = M^*_{t-1}(S_t), \qquad y_t = \operatorname{Attn}([P, h_t, S_t]), \qquad
       M_t = M_{t-1}(y_t), \qquad o_t = y_t \otimes M^*_t(y_t)

    where M* reads without learning, y_t are the results for the tokens of the segment, and
    :math:`a \otimes b = \operatorname{RMSNorm}(a) \odot \sigma(\operatorname{RMSNorm}(b))`.

    Args:
        dim: channels C of the input.
        num_heads: number of heads H of the attention.
        head_dim: channels D of a head. None: C / H.
        segment: tokens per segment. The last segment may be shorter.
        persistent: number of learned tokens P that every segment sees.
        retrieved: the part of h_t, which has one token per token of the segment, that a token sees:
            "past" (up to its own position) or "segment" (all, as in the figure of the paper: a
            token then depends on later tokens of its segment).
        memory: a :class:`TitansMemory` of C channels; its chunk_size cuts each segment. None: a
            memory with one matrix per head, of the same num_heads and head_dim.
        eps: epsilon of the two norms.
        backend: backend of the attention, and of a memory created by the layer.

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32. With return_state also a
        :class:`TitansState`, which a later call takes as ``state=``: the two calls equal one call
        with all tokens if the first has whole segments. To generate, keep the state of the last
        whole segment and call with the tokens of the open segment.

    Weights: persistent ``[P, C]``, qkv_proj ``[3 H D, C]``, out_proj ``[C, H D]``, norm and
    gate_norm ``[C]``, memory.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: attention of N / segment segments to P + 2 segment keys, and a memory that reads N
    tokens twice; segments are processed sequentially.

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), section 4.1, equations
    21 to 25, and section 4.2 for the product. Two choices ensure that no token depends on a later
    one: "past" above, and :math:`M^*_t(y_t)`, which is read for each token after this token was
    learned, not after the segment. Positional embedding of the attention is left to the caller: the
    paper specifies none. No code of the authors is released; titans-pytorch, the widely used
    implementation, has learned tokens instead of h_t and adds the memory's output to the residual
    stream.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TitansMAC(64, 4, segment=16)
        >>> x = torch.randn(2, 40, 64)
        >>> y, state = layer(x[:, :32], return_state=True)
        >>> torch.allclose(layer(x[:, 32:], state), layer(x)[:, 32:], atol=1e-4)
        True
    """

    name = "nn.TitansMAC"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        segment: int = 128,
        persistent: int = 4,
        retrieved: Literal["past", "segment"] = "past",
        memory: TitansMemory | None = None,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, persistent, memory, True, eps, backend)
        segment = as_int(self.name, "segment", segment, minimum=1, maximum=2**20 - 1)
        check_choice(self.name, "retrieved", retrieved, "past", "segment")
        self.segment, self.retrieved = segment, retrieved

    def forward(
        self, x: Tensor, state: TitansState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, TitansState]:
        self._check_x(x, return_state)
        outs = []
        for part in x.split(self.segment, 1):
            y = self._read(part, self.memory.recall(part, state))
            learned, state = self.memory(y, state, return_state=True)
            outs.append(self._gated(y, learned))
        out = torch.cat(outs, 1)
        if not return_state:
            return out
        assert state is not None
        return out, state

    def _read(self, part: Tensor, recalled: Tensor) -> Tensor:
        """Attention of a segment's tokens to persistent tokens, recalled tokens and the segment."""
        tokens, first = part.shape[1], self.persistent.shape[0]
        seen = self._after_persistent(torch.cat([recalled, part], 1))
        q, k, v = self._heads(seen)
        q = q[:, first + tokens :]
        if self.retrieved == "segment":  # persistent and recalled tokens lie before the segment
            return self._attend(q, k, v, causal=True)
        row = torch.arange(tokens, device=part.device, dtype=torch.int32)
        begin = torch.stack([torch.zeros_like(row), torch.full_like(row, first + tokens)], -1)
        end = torch.stack([row + 1 + first, row + 1 + first + tokens], -1)
        return self._attend(q, k, v, mask=masks.ranges(begin[None, None], end[None, None]))


class TitansMAG(_Layer):
    r"""Memory as gate: sliding-window attention and a memory in parallel.

    .. math::
       y = \operatorname{SW-Attn}^*([P, x]), \qquad o = y \otimes M([P, x])

    where a token sees all persistent tokens P and a window of tokens that ends with itself, and
    :math:`a \otimes b = \operatorname{RMSNorm}(a) \odot \sigma(\operatorname{RMSNorm}(b))`.

    Args:
        dim, num_heads, head_dim, persistent, memory, eps, backend: as in :class:`TitansMAC`.
        window: number of tokens that a token sees, including itself.

    Shape:
        x ``[B, N, C]`` to the same; float16, bfloat16, float32. With return_state also a
        :class:`TitansLayerState`, which a later call takes as ``state=``: the two calls equal one
        call with all tokens if the first ends a chunk of the memory, which reads P + N tokens. With
        chunk_size 1 every call does.

    Weights: as :class:`TitansMAC`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: attention of N tokens to P + window keys each, and a memory that reads P + N tokens.

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), section 4.2, equations
    26 to 28. The nonlinearity of the product is a sigmoid of the memory's side, as titans-pytorch
    gates the output of attention.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TitansMAG(64, 4, window=8, memory=tm.nn.TitansMemory(64, 4, chunk_size=1))
        >>> x = torch.randn(2, 20, 64)
        >>> y, state = layer(x[:, :19], return_state=True)
        >>> torch.allclose(layer(x[:, 19:], state), layer(x)[:, 19:], atol=1e-4)
        True
    """

    name = "nn.TitansMAG"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        window: int = 128,
        persistent: int = 4,
        memory: TitansMemory | None = None,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, persistent, memory, True, eps, backend)
        self.window = as_int(self.name, "window", window, minimum=1, maximum=2**31 - 1)

    def forward(
        self, x: Tensor, state: TitansLayerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, TitansLayerState]:
        self._check_x(x, return_state)
        self._check_state(x, state)
        first, tokens = self.persistent.shape[0], x.shape[1]
        seen = self._after_persistent(x)
        q, k, v = self._heads(seen)
        persistent, near = ((k[:, :first], v[:, :first]), (k[:, first:], v[:, first:]))
        if state is None:
            learned, after = self.memory(seen, return_state=True)
            learned = learned[:, first:]
        else:
            near = _joined((state.k, state.v), near)
            learned, after = self.memory(x, state.memory, return_state=True)
        k, v = _joined(persistent, near)
        past = k.shape[1] - tokens
        at = torch.arange(past, past + tokens, device=x.device, dtype=torch.int32)
        begin = torch.stack([torch.zeros_like(at), (at + 1 - self.window).clamp(min=first)], -1)
        end = torch.stack([torch.full_like(at, first), at + 1], -1)
        mask = masks.ranges(begin[None, None], end[None, None])
        y = self._attend(q[:, first:], k, v, mask=mask)
        out = self._gated(y, learned)
        if not return_state:
            return out
        return out, TitansLayerState(after, *self._kept(*near, self.window))


class TitansMAL(_Layer):
    r"""Memory as layer: a memory, then sliding-window attention over its output.

    .. math::
       y = M([P, x]), \qquad o = \operatorname{SW-Attn}(y)

    Args:
        dim, num_heads, head_dim, persistent, memory, backend: as in :class:`TitansMAC`.
        window: number of tokens that a token sees, including itself. The memory's output for the
            persistent tokens P precedes the first token.

    Shape:
        as :class:`TitansMAG`, state included.

    Weights: persistent ``[P, C]``, memory, qkv_proj ``[3 H D, C]``, out_proj ``[C, H D]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: a memory that reads P + N tokens, and attention of N tokens to a window.

    Paper: Titans: Learning to Memorize at Test Time (Behrouz et al. 2025), section 4.3, equations
    29 to 31.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.TitansMAL(64, 4, window=8)
        >>> layer(torch.randn(2, 20, 64)).shape
        torch.Size([2, 20, 64])
    """

    name = "nn.TitansMAL"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        window: int = 128,
        persistent: int = 4,
        memory: TitansMemory | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, persistent, memory, False, 0.0, backend)
        self.window = as_int(self.name, "window", window, minimum=1, maximum=2**31 - 1)

    def forward(
        self, x: Tensor, state: TitansLayerState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, TitansLayerState]:
        self._check_x(x, return_state)
        self._check_state(x, state)
        tokens = x.shape[1]
        if state is None:
            learned, after = self.memory(self._after_persistent(x), return_state=True)
        else:
            learned, after = self.memory(x, state.memory, return_state=True)
        q, k, v = self._heads(learned)
        if state is not None:
            k, v = _joined((state.k, state.v), (k, v))
        q = q[:, q.shape[1] - tokens :]
        out = self._attend(q, k, v, causal=True, window=(self.window - 1, 0))
        if not return_state:
            return out
        return out, TitansLayerState(after, *self._kept(k, v, self.window))


def _joined(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenates keys and values along the tokens."""
    k, v = (torch.cat([a.to(b.dtype), b], 1) for a, b in zip(before, after, strict=True))
    return k, v
