"""Replaces visual tokens by learned prompt tokens that are assigned to them (Croc)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .._check import (
    InputError,
    as_int,
    as_number,
    check,
    check_choice,
    check_device_of,
    check_tensor,
    fail,
)

OP = "nn.PromptTokenPool"
Match = Literal["hungarian", "nearest"]


class PromptTokenPool(nn.Module):
    r"""A pool of learned prompt tokens. A random fraction of the tokens of an image is replaced,
    each by the prompt token assigned to it.

    With the distances :math:`d_{ij} = \lVert x_i - e_j \rVert_2` between replaced tokens and prompt
    tokens, match "hungarian" assigns distinct prompt tokens with the minimum sum of distances, and
    "nearest" assigns each token its nearest prompt token, possibly the same to several.

    Args:
        dim: channels C of a token.
        num_prompts: number of prompt tokens in the pool, initialised from N(0, 1).
        share: fraction of the tokens that are replaced, rounded up to a number.
        match: "hungarian" or "nearest".

    Shape:
        x ``[B, N, C]``, and optionally chosen bool ``[B, N]`` (None: a random fraction of each
        image, drawn by torch's generator), to (y ``[B, N, C]``, assigned int64 ``[B, N]``): y is x
        with each chosen token replaced by its prompt token, and assigned is the index in the pool,
        -1 for unchanged tokens.

    Gradients flow to x where it is unchanged and to :attr:`prompts` where they replace it, none
    through the assignment.

    "hungarian" solves on the CPU with scipy, image by image: it synchronises a GPU and causes a
    graph break in torch.compile.

    Raises:
        RuntimeError: naming argument, rule and value; with "hungarian" if more tokens are replaced
            than the pool has, or scipy is missing (``pip install 'tokenmill[scipy]'``).

    Complexity: per image with M chosen tokens and P prompt tokens, M P C operations for the
    distances and M^2 P for the assignment ("hungarian").

    Paper: Croc (Xie et al. 2024), section 3, whose text describes the Hungarian assignment. The
    released code takes the nearest prompt token of a pool of 2048, for three quarters of the
    tokens, which it normalises first (``torch.nn.functional.normalize(x, dim=-1)``); the attention
    of its layers uses ``tokenmill.masks.prefix`` up to the first label.

    Example:
        >>> import torch, tokenmill as tm
        >>> pool = tm.nn.PromptTokenPool(8, num_prompts=12, match="nearest")
        >>> x = torch.nn.functional.normalize(torch.randn(2, 16, 8), dim=-1)
        >>> y, assigned = pool(x)
        >>> y.shape, (assigned >= 0).sum(1).tolist()
        (torch.Size([2, 16, 8]), [12, 12])
    """

    def __init__(
        self,
        dim: int,
        num_prompts: int = 2048,
        *,
        share: float = 0.75,
        match: Match = "hungarian",
    ) -> None:
        super().__init__()
        dim, num_prompts = as_int(OP, "dim", dim), as_int(OP, "num_prompts", num_prompts)
        for name, value in (("dim", dim), ("num_prompts", num_prompts)):
            check(value >= 1, OP, name, "must be at least 1", value)
        self.share = as_number(OP, "share", share)
        check(0 <= self.share <= 1, OP, "share", "must be 0 to 1", share)
        check_choice(OP, "match", match, "hungarian", "nearest")
        self.match = match
        self.prompts = nn.Parameter(torch.randn(num_prompts, dim))

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, chosen)
        if chosen is None:
            chosen = self.draw(x)
        assigned = self.assign(x, chosen)
        taken = self.prompts.to(x.dtype)[assigned.clamp(min=0)]
        return torch.where(chosen[..., None], taken, x), assigned

    def draw(self, x: Tensor) -> Tensor:
        """bool ``[B, N]``: a random fraction of the tokens of each image."""
        batch, tokens = x.shape[:2]
        stay = int(tokens * (1 - self.share))
        order = torch.rand(batch, tokens, device=x.device).argsort(-1)
        places = torch.arange(tokens, device=x.device) >= stay
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, places.expand(batch, -1))

    @torch.no_grad()
    def assign(self, x: Tensor, chosen: Tensor) -> Tensor:
        """int64 ``[B, N]``: the prompt token assigned to each chosen token, -1 for the others."""
        wide = torch.promote_types(x.dtype, torch.float32)
        distances = torch.cdist(x.to(wide), self.prompts.to(wide).expand(x.shape[0], -1, -1))
        if self.match == "nearest":
            return torch.where(chosen, distances.argmin(-1), -1)
        return _hungarian(distances, chosen)

    def extra_repr(self) -> str:
        count, dim = self.prompts.shape
        return f"{dim}, num_prompts={count}, share={self.share}, match={self.match!r}"

    def _check(self, x: Tensor, chosen: Tensor | None) -> None:
        check_tensor(OP, "x", x)
        dim = self.prompts.shape[1]
        ok = x.dim() == 3 and x.shape[2] == dim
        check(ok, OP, "x", f"must have shape [B, N, {dim}]", x.shape)
        rule = "must be float16, bfloat16, float32 or float64"
        check(x.is_floating_point() and x.dtype.itemsize > 1, OP, "x", rule, x.dtype)
        check_device_of(OP, "x", x, "prompts", self.prompts)
        check_tensor(OP, "chosen", chosen, optional=True)
        if chosen is not None:
            check(chosen.dtype == torch.bool, OP, "chosen", "must be bool", chosen.dtype)
            if chosen.shape != x.shape[:2]:
                fail(OP, "chosen", f"must have shape {list(x.shape[:2])}", chosen.shape)
            check_device_of(OP, "chosen", chosen, "x", x)


@torch.compiler.disable
def _hungarian(distances: Tensor, chosen: Tensor) -> Tensor:
    """Assignment with the minimum sum of distances [B, N, P] for each row of chosen [B, N]."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as missing:
        raise InputError(
            f"tokenmill.{OP}: match: 'hungarian' needs scipy: pip install 'tokenmill[scipy]', or "
            f"match='nearest'; got {missing}"
        ) from missing
    assigned = torch.full(chosen.shape, -1, dtype=torch.int64)
    pool = distances.shape[2]
    for row, costs, mask in zip(assigned, distances.cpu(), chosen.cpu(), strict=True):
        count = int(mask.sum())
        rule = f"must name at most as many tokens as the pool has, {pool}, with 'hungarian'"
        check(count <= pool, OP, "chosen", rule, count)
        wanted = costs[mask]
        check(bool(wanted.isfinite().all()), OP, "x", "must be finite where chosen", wanted)
        _, columns = linear_sum_assignment(wanted.double().numpy())
        row[mask] = torch.from_numpy(columns)
    return assigned.to(chosen.device)
