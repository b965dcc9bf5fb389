"""Foreground token selection of Focus-DETR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_device_of, check_tensor, fail, show
from ..tokens.gather_tokens import gather_tokens
from ..tokens.scatter_tokens import scatter_tokens
from ..tokens.topk_partition import topk_partition

NAME = "nn.FocusSelect"


class FocusSelect(nn.Module):
    r"""Selects foreground tokens, fewer in each layer of an encoder, for images of any size.

    An image with v tokens contributes its :math:`\lfloor ratio \cdot v \rfloor + 1` best tokens (at
    most v), and layer l processes the first :math:`\lfloor cascade_l \cdot w \rfloor` of them,
    where w is the width of the selection. Best first, so the tokens of a layer are a subset of the
    previous layer's.

    Args:
        ratio: fraction of the tokens of an image.
        cascade: fraction of the width, per layer.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        forward: scores ``[B, N]``, valid ``[B, N]`` bool (None: all) to indices ``[B, w]`` int32, w
        = min(floor(ratio N) + 1, N), in the order of the scores; -1 after the last token of an
        image.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: one selection; each layer reads and writes its tokens once.

    Paper: Focus-DETR (Zheng et al. 2023), section 3.2. There w is the maximum over the images of
    the batch, which is only known on the device; here it is the bound for N, and rows after the
    last token of an image are zeros and are not written back.

    Example:
        >>> import torch
        >>> from tokenmill import nn
        >>> focus, x = nn.FocusSelect(), torch.randn(2, 100, 16)
        >>> indices = focus(torch.rand(2, 100))
        >>> layer = focus.layer(indices, 2)
        >>> tokens, positions = focus.gather((x, torch.randn(2, 100, 4)), layer)
        >>> tokens.shape, focus.scatter(tokens * 2, layer, x).shape
        (torch.Size([2, 30, 16]), torch.Size([2, 100, 16]))
    """

    def __init__(
        self,
        ratio: float = 0.5,
        cascade: Sequence[float] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2),
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        ratio = as_number(NAME, "ratio", ratio)
        check(0 <= ratio <= 1, NAME, "ratio", "must be 0 to 1", ratio)
        several = isinstance(cascade, Sequence) and not isinstance(cascade, str)
        check(several, NAME, "cascade", "must be a sequence of numbers", cascade)
        shares = tuple(as_number(NAME, "cascade", share) for share in cascade)
        for share in shares:
            check(0 < share <= 1, NAME, "cascade", "must be above 0, to 1", share)
        self.ratio, self.cascade, self.backend = ratio, shares, backend

    def forward(self, scores: Tensor, valid: Tensor | None = None) -> Tensor:
        check_tensor(NAME, "scores", scores)
        check(scores.dim() == 2, NAME, "scores", "must have 2 dimensions [B, N]", scores.dim())
        tokens = scores.shape[1]
        width = min(int(self.ratio * tokens) + 1, tokens)
        if valid is None:
            return topk_partition(scores, width, backend=self.backend)[0]
        check_tensor(NAME, "valid", valid)
        check(valid.dtype == torch.bool, NAME, "valid", "must be bool", valid.dtype)
        check_device_of(NAME, "valid", valid, "scores", scores)
        if valid.shape != scores.shape:
            fail(NAME, "valid", f"must have shape {show(scores.shape)}", valid.shape)
        present = valid.sum(1)
        count = torch.minimum((self.ratio * present).floor().long() + 1, present)
        return topk_partition(scores, count, max_k=width, valid=valid, backend=self.backend)[0]

    def layer(self, indices: Tensor, number: int) -> Tensor:
        """The tokens of a layer, ``[B, floor(cascade w)]``, a view of the first layer's tokens."""
        check_tensor(NAME, "indices", indices)
        check(indices.dim() == 2, NAME, "indices", "must have 2 dimensions [B, w]", indices.dim())
        number = as_int(NAME, "number", number)
        if not 0 <= number < len(self.cascade):
            fail(NAME, "number", f"must be 0 to {len(self.cascade) - 1}", number)
        return indices[:, : int(self.cascade[number] * indices.shape[1])]

    def gather(self, xs: Sequence[Tensor], indices: Tensor) -> tuple[Tensor, ...]:
        """Gathers the rows of the tokens from several tensors [B, N, C]."""
        return gather_tokens(xs, indices, backend=self.backend)

    def scatter(self, tokens: Tensor, indices: Tensor, base: Tensor) -> Tensor:
        """Writes the rows of the tokens back to their positions in base."""
        return scatter_tokens(tokens, indices, base, backend=self.backend)
