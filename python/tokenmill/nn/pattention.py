"""The TokenFormer layer, whose parameters are tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._check import as_int, check, check_tensor, fail
from ..dense.pattention import Activation, check_activation, default_norm_scale, pattention

NAME = "nn.Pattention"


class Pattention(nn.Module):
    r"""A linear layer with a growable number of parameter tokens: :func:`tokenmill.pattention` with
    learned keys and values.

    Args:
        in_features, out_features: D1 and D2.
        num_tokens: N, number of key-value pairs.
        activation, scale: as in :func:`tokenmill.pattention`.
        norm_scale: None = sqrt(num_tokens) (for "softmax" num_tokens) at construction. It is kept
            when tokens are appended, so that the function is preserved.

    Shape:
        ``[..., in_features]`` to ``[..., out_features]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: TokenFormer (Wang et al. 2024), sections 3.2 and 3.3. Keys and values are initialised
    from normal distributions of variance 1 / in_features and 1 / num_tokens.

    Example:
        >>> import torch
        >>> from tokenmill import nn
        >>> layer, x = nn.Pattention(64, 32, num_tokens=48), torch.randn(5, 64)
        >>> before = layer(x)
        >>> layer.append(16)
        >>> torch.allclose(layer(x), before, atol=1e-5), layer.num_tokens
        (True, 64)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int,
        *,
        activation: Activation = "l2_norm_gelu",
        norm_scale: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "num_tokens": num_tokens}
        for name, size in sizes.items():
            sizes[name] = as_int(NAME, name, size)
            check(sizes[name] > 0, NAME, name, "must be above 0", sizes[name])
        check_activation(NAME, activation)
        self.activation, self.scale = activation, scale
        if norm_scale is None:
            norm_scale = default_norm_scale(activation, sizes["num_tokens"])
        self.norm_scale = norm_scale
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, in_features))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, out_features))
        nn.init.normal_(self.key_tokens, std=in_features**-0.5)
        nn.init.normal_(self.value_tokens, std=num_tokens**-0.5)

    @property
    def num_tokens(self) -> int:
        return self.key_tokens.shape[0]

    def append(self, count: int, *, values: Tensor | None = None) -> None:
        """Appends pairs of tokens, creating new parameters that the optimiser must be given: keys
        are 0, so the function is preserved, and values are as at construction or [count,
        out_features] given. "softmax" gives weight to keys of 0: it cannot grow without a change.
        """
        if self.activation == "softmax":
            fail(NAME, "activation", "must be of L2 norm to append tokens", self.activation)
        count = as_int(NAME, "count", count)
        check(count > 0, NAME, "count", "must be above 0", count)
        like, width = self.value_tokens, self.value_tokens.shape[1]
        if values is None:
            values = torch.randn(count, width, dtype=like.dtype, device=like.device)
            values *= (self.num_tokens + count) ** -0.5
        check_tensor(NAME, "values", values)
        ok = values.shape == (count, width)
        check(ok, NAME, "values", f"must have shape [{count}, {width}]", values.shape)
        keys = self.key_tokens.new_zeros(count, self.key_tokens.shape[1])
        self.key_tokens = nn.Parameter(torch.cat([self.key_tokens.detach(), keys]))
        self.value_tokens = nn.Parameter(torch.cat([like.detach(), values.to(like)]))

    def forward(self, x: Tensor) -> Tensor:
        return pattention(
            x,
            self.key_tokens,
            self.value_tokens,
            activation=self.activation,
            norm_scale=self.norm_scale,
            scale=self.scale,
        )

    def extra_repr(self) -> str:
        tokens, width = self.value_tokens.shape
        sizes = f"{self.key_tokens.shape[1]}, {width}, num_tokens={tokens}"
        return f"{sizes}, activation={self.activation}, norm_scale={self.norm_scale:g}"
