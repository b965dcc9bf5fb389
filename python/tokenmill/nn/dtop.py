"""Early exit of tokens (DToP)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._check import (
    as_int,
    as_number,
    check,
    check_device_of,
    check_dtype,
    check_tensor,
    fail,
    show,
)
from ..tokens.gather_tokens import gather_tokens
from ..tokens.mask_partition import mask_partition

NAME = "nn.DToPExit"


class ActiveTokens(NamedTuple):
    """The active tokens, packed, and their positions."""

    tokens: Tensor  # [T, C], zeros after the last token
    cu_seqlens: Tensor  # [B + 1] int32
    indices: Tensor  # [T] int32, b * N + n; -1 after the last token
    active: Tensor  # [B, N] bool


class DToPExit(nn.Module):
    """Early exit: tokens that an intermediate head classifies confidently leave the model.

    An active token exits if the probability of its likeliest class is above the threshold. So that
    a later stage still sees every class in the image, the ``keep`` most confident exiting tokens of
    each class stay active. They are chosen among active tokens only: an exited token takes no place
    and does not return, whatever its probabilities.

    The remaining tokens are packed for :func:`attention` with cu_seqlens (an image may have none
    left). Their results are written back with ``scatter_tokens(y, stage.indices, x)``, which leaves
    exited tokens unchanged; passing (B, N) instead of x sets them to zero, as in the published
    code. Predictions are kept likewise: ``torch.where(active, new, old)``.

    Args:
        threshold: probability above which a token exits; with 1 no token exits.
        keep: number of tokens of each class, per image, that stay active whatever their
            probability; ties go to the first.
        max_total: capacity for packed tokens. None: B·N, a static bound.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]``, probabilities ``[B, N, classes]``, active ``[B, N]`` bool (None: all) to
        ActiveTokens(tokens ``[T, C]``, cu_seqlens ``[B + 1]``, indices ``[T]``, active ``[B, N]``).

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads the probabilities once and sorts B·N numbers twice; one read of the remaining
    tokens.

    Paper: Dynamic Token Pruning (Tang et al. 2023), section 3.2. Threshold 0.9 and 5 tokens per
    class are its defaults, after blocks 6 and 8 of 12; a probability is the product of the softmax
    over (class, no class) of a query and the sigmoid of its mask in the segmentation heads.

    Example:
        >>> import torch
        >>> from tokenmill import nn
        >>> x = torch.randn(2, 50, 8)
        >>> stage = nn.DToPExit(keep=2)(x, torch.full((2, 50, 3), 0.95))
        >>> stage.cu_seqlens.tolist(), stage.active.sum().item()
        ([0, 2, 4], 4)
    """

    def __init__(
        self,
        threshold: float = 0.9,
        keep: int = 5,
        max_total: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        keep = as_int(NAME, "keep", keep, minimum=0)
        if max_total is not None:
            max_total = as_int(NAME, "max_total", max_total)
        self.threshold = as_number(NAME, "threshold", threshold)
        self.keep, self.max_total = keep, max_total
        self.backend = backend

    def forward(
        self, x: Tensor, probabilities: Tensor, active: Tensor | None = None
    ) -> ActiveTokens:
        check_tensor(NAME, "x", x)
        check(x.dim() == 3, NAME, "x", "must have 3 dimensions [B, N, C]", x.dim())
        check_tensor(NAME, "probabilities", probabilities)
        check_dtype(NAME, "probabilities", probabilities, float64=True)
        check_device_of(NAME, "probabilities", probabilities, "x", x)
        fits = probabilities.dim() == 3 and probabilities.shape[:2] == x.shape[:2]
        if not fits:
            rule = f"must have shape [{x.shape[0]}, {x.shape[1]}, classes]"
            fail(NAME, "probabilities", rule, probabilities.shape)
        if probabilities.shape[2] == 0:
            fail(NAME, "probabilities", "must have at least 1 class", probabilities.shape)
        if active is not None:
            check_tensor(NAME, "active", active)
            check(active.dtype == torch.bool, NAME, "active", "must be bool", active.dtype)
            check_device_of(NAME, "active", active, "x", x)
            if active.shape != x.shape[:2]:
                fail(NAME, "active", f"must have shape {show(x.shape[:2])}", active.shape)
        staying = ~self._exits(probabilities.detach(), active)
        if active is not None:
            staying = staying & active
        indices, cu_seqlens, _ = mask_partition(
            staying, max_total=self.max_total, backend=self.backend
        )
        tokens = gather_tokens(x, indices, backend=self.backend)
        return ActiveTokens(tokens, cu_seqlens, indices, staying)

    def _exits(self, probabilities: Tensor, active: Tensor | None) -> Tensor:
        confidence, likeliest = probabilities.max(2)
        sure = confidence > self.threshold  # false for NaN
        if active is not None:
            sure = sure & active
        # Ranks among the tokens of an image that exit with the same class, most confident first.
        by_confidence = torch.sort(
            torch.where(sure, confidence, -torch.inf), dim=1, descending=True, stable=True
        ).indices
        group = torch.where(sure, likeliest, probabilities.shape[2]).gather(1, by_confidence)
        group, order = torch.sort(group, dim=1, stable=True)
        place = torch.arange(group.shape[1], device=group.device)
        starts = torch.ones_like(group, dtype=torch.bool)
        starts[:, 1:] = group[:, 1:] != group[:, :-1]
        rank = place - torch.where(starts, place, 0).cummax(1).values
        token = by_confidence.gather(1, order)
        leaves = (rank >= self.keep) & (group < probabilities.shape[2])
        return torch.zeros_like(sure).scatter(1, token, leaves)
