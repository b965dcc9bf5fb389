"""pattention: attention of tokens to learned parameter tokens (TokenFormer)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import (
    as_number,
    check,
    check_choice,
    check_device_of,
    check_dtype,
    check_dtype_of,
    check_float32,
    check_tensor,
)

OP = "pattention"
Activation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


@Autocast(lower=("x", "key_tokens", "value_tokens")).applied
def pattention(
    x: Tensor,
    key_tokens: Tensor,
    value_tokens: Tensor,
    *,
    activation: Activation = "l2_norm_gelu",
    norm_scale: float | None = None,
    scale: float = 1.0,
    eps: float = 1e-12,
) -> Tensor:
    r"""A linear layer as attention: tokens weigh N pairs of learned keys and values.

    With scores :math:`s = scale\; x K^\top` of a token, its output is :math:`\Theta(s)\, V`:

    * "l2_norm_gelu": :math:`\Theta(s) = \operatorname{gelu}(norm\_scale\; s / \lVert s \rVert_2)`
    * "gelu_l2_norm": :math:`norm\_scale\; \operatorname{gelu}(s) / \lVert \operatorname{gelu}(s)
      \rVert_2`
    * "softmax": :math:`norm\_scale\; \operatorname{softmax}(s)`

    with the exact gelu. The ``[T, N]`` weight matrix is never materialised: tokens are processed in
    blocks, and the backward recomputes their scores. PyTorch computes the products on every device:
    there is no argument `backend`.

    Args:
        x: ``[..., D1]`` float16, bfloat16, float32 or float64.
        key_tokens: ``[N, D1]`` in the dtype of x.
        value_tokens: ``[N, D2]`` in the dtype of x.
        activation: "l2_norm_gelu" (used by all published models), "gelu_l2_norm" or "softmax".
        norm_scale: None = sqrt(N), for "softmax" N. A value that stays constant as tokens are
            appended preserves the function: appending pairs with keys of 0 does not change the
            result of "l2_norm_gelu" and "gelu_l2_norm".
        scale: factor of the scores.
        eps: minimum norm by which scores are divided. A token whose norm is not larger has no
            gradient through its scores.

    Returns:
        ``[..., D2]`` in the dtype of x; a token of zeros gives zeros, except for "softmax".
        Gradients: x, key_tokens, value_tokens, any number of times.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 T N (D1 + D2) operations, and 6 T N D1 + 4 T N D2 for the backward; extra memory
    for a block of scores, 2^20 on a CPU and 2^25 on a GPU.

    Paper: TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters (Wang et al.
    2024), section 3.2. Its equation has the factor sqrt(n) before the softmax-like function; the
    published models compute the form above.

    Example:
        >>> import torch, tokenmill as tm
        >>> x, keys, values = torch.randn(2, 50, 64), torch.randn(96, 64), torch.randn(96, 32)
        >>> tm.pattention(x, keys, values).shape
        torch.Size([2, 50, 32])
    """
    for name, t in (("x", x), ("key_tokens", key_tokens), ("value_tokens", value_tokens)):
        check_tensor(OP, name, t)
    check_dtype(OP, "x", x, float64=True)
    check(x.dim() >= 1, OP, "x", "must have at least 1 dimension [..., D1]", x.dim())
    for name, t, wanted in (
        ("key_tokens", key_tokens, f"[N, {x.shape[-1]}]"),
        ("value_tokens", value_tokens, "[N, D2]"),
    ):
        check_dtype_of(OP, name, t, "x", x)
        check(t.dim() == 2, OP, name, f"must have shape {wanted}", t.shape)
        check_device_of(OP, name, t, "x", x)
    count, width = key_tokens.shape
    rule = f"must have shape [N, {x.shape[-1]}]"
    check(width == x.shape[-1] and count > 0, OP, "key_tokens", rule, key_tokens.shape)
    rule = f"must have a row for each key, {count}"
    check(value_tokens.shape[0] == count, OP, "value_tokens", rule, value_tokens.shape[0])
    check_activation(OP, activation)
    if norm_scale is None:
        norm_scale = default_norm_scale(activation, count)
    numbers = {"norm_scale": norm_scale, "scale": scale, "eps": eps}
    for name, value in numbers.items():
        numbers[name] = as_number(OP, name, value)
        check_float32(OP, name, numbers[name])
    check(numbers["eps"] > 0, OP, "eps", "must be above 0", numbers["eps"])
    weights = _Weights(activation, **numbers)
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    out: Tensor = _Pattention.apply(rows, key_tokens, value_tokens, weights)
    return out.reshape(*x.shape[:-1], value_tokens.shape[1])


def check_activation(op: str, activation: str) -> None:
    check_choice(op, "activation", activation, *ACTIVATIONS)


def default_norm_scale(activation: str, count: int) -> float:
    return float(count) if activation == "softmax" else math.sqrt(count)


class _Weights(NamedTuple):
    """Maps the scores of a block of tokens to weights, forward and backward."""

    activation: str
    norm_scale: float
    scale: float
    eps: float

    def scores(self, x: Tensor, key_tokens: Tensor) -> Tensor:
        """scores: [tokens, N], at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        s = (x @ key_tokens.T).to(wide)
        return s if self.scale == 1 else s * self.scale

    def forward(self, s: Tensor) -> Tensor:
        if self.activation == "softmax":
            return s.softmax(-1) * self.norm_scale
        if self.activation == "l2_norm_gelu":
            return torch.nn.functional.gelu(s * self._factor(_norm(s)))
        g = torch.nn.functional.gelu(s)
        return g * self._factor(_norm(g))

    def backward(self, s: Tensor, dp: Tensor) -> Tensor:
        """Gradient of s, from the gradient of the weights."""
        if self.activation == "softmax":
            p = s.softmax(-1)
            dp = dp * self.norm_scale
            return p * (dp - (p * dp).sum(-1, keepdim=True))
        if self.activation == "l2_norm_gelu":
            norm = _norm(s)
            return self._through_norm(s, norm, _gelu_backward(dp, s * self._factor(norm)))
        g = torch.nn.functional.gelu(s)
        return _gelu_backward(self._through_norm(g, _norm(g), dp), s)

    def _factor(self, norm: Tensor) -> Tensor:
        return self.norm_scale / norm.clamp(min=self.eps)

    def _through_norm(self, t: Tensor, norm: Tensor, d: Tensor) -> Tensor:
        """Gradient of t, given the gradient d of norm_scale t / |t|: norm_scale / |t| (d - u (u.d))
        with u = t / |t|.
        """
        factor = torch.where(norm > self.eps, self._factor(norm), 0.0)
        minimum = norm.clamp(min=self.eps)
        along = torch.linalg.vecdot(t, d).unsqueeze(-1) / minimum / minimum
        return torch.addcmul(factor * d, t, factor * along, value=-1)


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-1, keepdim=True)


def _gelu_backward(d: Tensor, z: Tensor) -> Tensor:
    gradient: Tensor = torch.ops.aten.gelu_backward(d, z)
    return gradient


# Elements in a block of scores: small enough for the CPU cache, large enough to fill a GPU.
CPU_SCORES, GPU_SCORES = 2**20, 2**25


def _blocks(x: Tensor, count: int) -> list[slice]:
    """Splits tokens into blocks of about equal size: a short last block would cost as much as a
    full one.
    """
    maximum = max(1, (CPU_SCORES if x.device.type == "cpu" else GPU_SCORES) // count)
    tokens = max(x.shape[0], 1)
    blocks = max(1, (tokens + maximum // 2) // maximum)
    size = -(-tokens // blocks)
    return [slice(i, i + size) for i in range(0, tokens, size)]


class _Pattention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, weights: _Weights) -> Tensor:
        parts = []
        for block in _blocks(x, key_tokens.shape[0]):
            p = weights.forward(weights.scores(x[block], key_tokens))
            parts.append(p.to(x.dtype) @ value_tokens)
        return torch.cat(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.weights = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, key_tokens, value_tokens), weights = ctx.saved_tensors, ctx.weights
        if dy is None:
            return None, None, None, None
        need_x, need_keys, need_values, _ = ctx.needs_input_grad
        dx: list[Tensor] = []
        dk: Tensor | None = None
        dv: Tensor | None = None
        for block in _blocks(x, key_tokens.shape[0]):
            s = weights.scores(x[block], key_tokens)
            if need_values:
                p = weights.forward(s).to(x.dtype)
                dv = _plus_product(dv, p.T, dy[block], s.dtype)
            if not (need_x or need_keys):
                continue
            ds = weights.backward(s, (dy[block] @ value_tokens.T).to(s.dtype)) * weights.scale
            ds = ds.to(x.dtype)
            if need_x:
                dx.append(ds @ key_tokens)
            if need_keys:
                dk = _plus_product(dk, ds.T, x[block], s.dtype)
        return (
            torch.cat(dx) if need_x else None,
            None if dk is None else dk.to(x.dtype),
            None if dv is None else dv.to(x.dtype),
            None,
        )


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """total + a b in the dtype `wide`."""
    if total is not None and a.dtype == wide:
        return torch.addmm(total, a, b)
    part = (a @ b).to(wide)
    return part if total is None else total + part
