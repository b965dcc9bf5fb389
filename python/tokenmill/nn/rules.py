"""Argument checks of modules with weights, and steps that several modules share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_device_of, check_dtype_of, check_tensor, fail


def check_input(name: str, argument: str, x: Tensor, weight: Tensor) -> None:
    """Checks an input against the weight of a linear layer."""
    check_tensor(name, argument, x)
    check_device_of(name, argument, x, "the weights", weight)
    # Autocast does not support the meta device.
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        check_dtype_of(name, argument, x, "the weights", weight)


def check_tokens(name: str, x: Tensor, weight: Tensor) -> None:
    """Checks tokens [B, N, C] against a weight [..., C]."""
    check_input(name, "x", x, weight)
    channels = weight.shape[-1]
    shaped = x.dim() == 3 and x.shape[-1] == channels
    check(shaped, name, "x", f"must have shape [B, N, {channels}]", x.shape)


def check_part(name: str, part: str, t: Tensor, shape: list[int], x: Tensor) -> None:
    """Checks one part of a recurrent state."""
    check_tensor(name, "state", t)
    check_device_of(name, "state", t, "x", x)
    if list(t.shape) != shape:
        fail(name, "state", f"must have {part} of shape {shape}", t.shape)


def check_kept(name: str, k: Tensor, v: Tensor, heads: list[int], x: Tensor) -> None:
    """Checks keys and values [B, M, *heads] that a recurrent state keeps."""
    check_tensor(name, "state", k)
    rows = k.shape[1] if k.dim() == 4 else 0
    for part, t in (("k", k), ("v", v)):
        check_part(name, part, t, [x.shape[0], rows, *heads], x)


def four(name: str, argument: str, values: Any) -> list[Any]:
    """One value for each of the four stages of a vision model."""
    held = isinstance(values, tuple | list) and len(values) == 4
    check(held, name, argument, "must be four, one for each stage", values)
    return list(values)


def check_layers(name: str, layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Checks indices of some of `depth` blocks."""
    check(isinstance(layers, tuple | list), name, "layers", "must be several", layers)
    layers = tuple(as_int(name, "layers", i) for i in layers)
    rising = all(i < j for i, j in zip([-1, *layers], [*layers, depth], strict=True))
    check(rising, name, "layers", f"must ascend from 0 to {depth - 1} at most", layers)
    return layers


def check_heads(name: str, dim: int, num_heads: int) -> tuple[int, int]:
    """Checks the channels and the number of heads, a divisor of the channels."""
    dim, num_heads = as_int(name, "dim", dim), as_int(name, "num_heads", num_heads)
    check(1 <= dim < 2**31, name, "dim", "must be 1 to 2^31 - 1", dim)
    divides = num_heads > 0 and dim % num_heads == 0
    check(divides, name, "num_heads", f"must divide dim, {dim}", num_heads)
    return dim, num_heads


def check_wide_heads(
    name: str, dim: int, num_heads: int, head_dim: int | None, maximum: int
) -> tuple[int, int, int]:
    """Checks channels, heads and head_dim, at most `most`; None: the number of heads must divide
    the input channels.
    """
    dim, num_heads = as_int(name, "dim", dim), as_int(name, "num_heads", num_heads)
    check(1 <= dim < 2**31, name, "dim", "must be 1 to 2^31 - 1", dim)
    check(1 <= num_heads <= 2**16, name, "num_heads", "must be 1 to 2^16", num_heads)
    if head_dim is None:
        rule = f"must divide dim, {dim}, unless head_dim is given"
        check(dim % num_heads == 0, name, "num_heads", rule, num_heads)
        head_dim = dim // num_heads
    head_dim = as_int(name, "head_dim", head_dim)
    limit = "2^16" if maximum == 2**16 else str(maximum)
    check(1 <= head_dim <= maximum, name, "head_dim", f"must be 1 to {limit}", head_dim)
    return dim, num_heads, head_dim


def check_mlp_ratio(name: str, mlp_ratio: float, *dims: int) -> float:
    """Hidden channels of an MLP with `dims` input channels."""
    mlp_ratio = as_number(name, "mlp_ratio", mlp_ratio)
    held = mlp_ratio * min(dims) >= 1 and mlp_ratio * max(dims) < 2**31
    check(held, name, "mlp_ratio", "must leave 1 to 2^31 - 1 hidden channels", mlp_ratio)
    return mlp_ratio


def check_chance(name: str, argument: str, chance: float) -> float:
    chance = as_number(name, argument, chance)
    check(0 <= chance < 1, name, argument, "must be at least 0 and below 1", chance)
    return chance


def drop_chances(last: float, blocks: int) -> list[float]:
    """Drop probabilities of stochastic depth: rising linearly from 0 at the first block."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def begin(module: nn.Module) -> None:
    """Initialises a linear layer as vision transformers do."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


M = TypeVar("M", bound="Slopes")


class Slopes(nn.Module):
    """A module with a buffer of slopes that stays float32 when the module changes its dtype."""

    slopes: Tensor

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        slopes = self.slopes
        super()._apply(fn, recurse)
        if not slopes.is_meta:
            self.slopes = slopes.to(self.slopes.device)
        return self


class DropPath(nn.Module):
    """Stochastic depth: in training drops a branch per batch element with a probability, and
    divides kept branches by the probability of keeping.
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.chance == 0:
            return x
        kept = 1 - self.chance
        ones = (1,) * (x.dim() - 1)
        return x * x.new_empty(x.shape[0], *ones).bernoulli_(kept).div_(kept)


class VisionBlock(nn.Module):
    """A vision transformer block around an attention, with the names of DeiT."""

    attn: Any

    def __init__(self, dim: int, hidden: int, attention: nn.Module, chance: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = attention
        layers = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = DropPath(chance)

    def fed(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolves x [B, Y, X, C]; a map without pixels, which PyTorch refuses, returns empty."""
    if x.numel() == 0:
        return x.new_zeros(x.shape)
    y: Tensor = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y


def renamed(
    names: dict[str, str],
    module: nn.Module,
    state: MutableMapping[str, Tensor],
    prefix: str,
    *args: Any,
) -> None:
    """Renames state dict entries to the names of the module; 1x1 convolutions become matrices."""
    for old, new in names.items():
        for kind in ("weight", "bias"):
            if (found := state.pop(prefix + old + kind, None)) is not None:
                state[prefix + new + kind] = found.flatten(1) if found.dim() == 4 else found


def stretching(length: int, size: int, *, align_corners: bool, like: Tensor) -> Tensor:
    """Linear interpolation of `length` values to `size` values, as a matrix ``[size, length]``: the
    gradient of a product has a fixed order of summation, unlike F.interpolate on a GPU.
    """
    values = torch.eye(length, device=like.device)[None]
    rows = F.interpolate(values, size, mode="linear", align_corners=align_corners)[0]
    return rows.T.to(like.dtype)
