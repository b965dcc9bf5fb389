"""Vision transformer blocks, the middle ones running on clusters of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, check, check_dtype, check_tensor
from .clustering import Preset, TokenClustering, TokenReconstruction

NAME = "nn.ExpeditedBlocks"
MAX_SIDE = 256  # of a window: a small map is padded to one window


class ExpeditedBlocks(nn.Module):
    r"""Runs the blocks of a trained vision transformer, with blocks ``start`` to ``end`` - 1 on
    clusters instead of tokens:

    .. math::
       x = b_{start - 1}(\dots b_0(x)), \quad c = \operatorname{cluster}(x), \quad
       z = b_{end - 1}(\dots b_{start}(c)), \quad
       x = b_{last}(\dots b_{end}(\operatorname{reconstruct}(x, c, z))).

    Tokens before the map (the class token) are not clustered, go through all blocks and are put
    back. The blocks hold all weights.

    Args:
        blocks: modules from tokens to tokens; a norm after the last block may be one of them.
        start: the first block that sees clusters, from 0.
        end: the first block that sees tokens again; None = no block.
        grid: (gy, gx) clusters along Y and X, per window with ``partition``; an integer sets both.
        preset: settings of :class:`TokenClustering` and :class:`TokenReconstruction`, for arguments
            that are None here.
        iters, tau, window: arguments of the clustering; tau is used by the reconstruction too.
        k, norm: arguments of the reconstruction.
        prefix: number of tokens before the map: 1, a class token; 0, none.
        partition: side of the windows in which to cluster, 1 to 256, for models with window
            attention; the map is zero-padded to whole windows. None = cluster the whole map. Blocks
            with window attention must be configured with side gy while they run on clusters, as the
            release does.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, prefix + Y X, C]``, with shape = (Y, X), or None for a square map, to the same;
        the middle blocks see ``[B, prefix + gy gx, C]``. With prefix=0 also x ``[B, Y, X, C]``;
        then the blocks see maps. float16, bfloat16, float32.

    Settings of the release (SAM clusters before the block that its command names, Segmenter and DPT
    after it; Segmenter counts the last norm among the blocks):

    - SAM, ViT-H, "1.5 x faster": start=6, end=None, grid=9, preset="sam", partition=14, prefix=0
    - SAM, ViT-H, "1.2 x faster": start=14, grid=10, preset="sam", partition=14, prefix=0
    - DPT hybrid, KITTI: start=5, grid=16, preset="depth", and :meth:`features` for its decoder
    - DPT hybrid, NYU: start=7, grid=28, preset="depth"

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: the blocks, the middle ones on gy gx tokens, and :class:`TokenClustering` and
    :class:`TokenReconstruction` once each.

    Paper: Expedit (Liang et al. 2022), section 3.

    Example:
        >>> import torch, tokenmill as tm
        >>> layers = [torch.nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        ...           for _ in range(4)]
        >>> blocks = tm.nn.ExpeditedBlocks(layers, 1, 3, (4, 6), preset="segmenter")
        >>> blocks(torch.randn(2, 1 + 8 * 12, 32), (8, 12)).shape
        torch.Size([2, 97, 32])
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        start: int,
        end: int | None,
        grid: int | tuple[int, int],
        *,
        preset: Preset = "segmenter",
        iters: int | None = None,
        tau: float | None = None,
        window: int | None = None,
        k: int | None = None,
        norm: str = "l2",
        prefix: int = 1,
        partition: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        listed = isinstance(blocks, tuple | list | nn.ModuleList | nn.Sequential)
        modules = list(blocks) if listed else []
        made = len(modules) > 0 and all(isinstance(b, nn.Module) for b in modules)
        check(made, NAME, "blocks", "must be one or more modules", blocks)
        start = as_int(NAME, "start", start)
        end = len(modules) if end is None else as_int(NAME, "end", end)
        check(0 <= start < len(modules), NAME, "start", f"must be 0 to {len(modules) - 1}", start)
        check(start < end <= len(modules), NAME, "end", f"must be {start + 1} to {len(modules)}",
              end)  # fmt: skip
        prefix = as_int(NAME, "prefix", prefix, minimum=0, maximum=2**31 - 1)
        if partition is not None:
            partition = as_int(NAME, "partition", partition, "must be an integer or None")
            rule = f"must be 1 to {MAX_SIDE}"
            check(1 <= partition <= MAX_SIDE, NAME, "partition", rule, partition)
        self.blocks = nn.ModuleList(modules)
        self.start, self.end, self.prefix, self.partition = start, end, prefix, partition
        given: dict[str, Any] = {"preset": preset, "tau": tau, "backend": backend}
        self.cluster = TokenClustering(grid, iters=iters, window=window, **given)
        self.reconstruct = TokenReconstruction(k, norm=norm, **given)

    def forward(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        return self.features(x, (len(self.blocks) - 1,), shape)[0]

    def features(
        self, x: Tensor, layers: Sequence[int], shape: tuple[int, int] | None = None
    ) -> list[Tensor]:
        """The tokens after the given blocks, ascending, from 0; after blocks that run on clusters
        they are reconstructed, as for DPT.
        """
        last = len(self.blocks) - 1
        rule = f"must be some of 0 to {last}, ascending"
        check(isinstance(layers, tuple | list), NAME, "layers", rule, layers)
        layers = [as_int(NAME, "layers", i, rule) for i in layers]
        rising = all(i < j for i, j in zip([-1, *layers], [*layers, last + 1], strict=True))
        check(rising, NAME, "layers", rule, layers)
        sides = self._sides(x, shape)
        before = after = x
        count = (1, 1)
        found = []
        for i, block in enumerate(self.blocks):
            if i == self.start:
                first, tokens = self._split(x, sides)
                before, count = _windows(tokens, self.partition)
                after = self.cluster(before)
                small = _merged(after, count)
                x = small if x.dim() == 4 else torch.cat([first, small.flatten(1, 2)], 1)
            if i == self.end:
                x = self._restored(x, before, after, count, sides)
            x = block(x)
            if i in layers:
                clustered = self.start <= i < self.end
                found.append(self._restored(x, before, after, count, sides) if clustered else x)
        return found

    def _restored(
        self,
        x: Tensor,
        before: Tensor,
        after: Tensor,
        count: tuple[int, int],
        sides: tuple[int, int],
    ) -> Tensor:
        """Tokens reconstructed from clusters x, given the windows before clustering and their
        centroids.
        """
        grid = (after.shape[1], after.shape[2])
        first, small = self._split(x, (count[0] * grid[0], count[1] * grid[1]))
        tokens = _merged(self.reconstruct(before, after, _parts(small, grid)), count)
        tokens = tokens[:, : sides[0], : sides[1]]
        return tokens if x.dim() == 4 else torch.cat([first, tokens.flatten(1, 2)], 1)

    def _sides(self, x: Tensor, shape: Any) -> tuple[int, int]:
        """Y and X of the map in x."""
        check_tensor(NAME, "x", x)
        check_dtype(NAME, "x", x, float64=False)
        maps = x.dim() == 4 and self.prefix == 0
        also = "" if self.prefix else " or [B, Y, X, C]"
        rule = f"must have shape [B, {self.prefix} + Y X, C]{also} with Y X at least 1"
        held = maps or (x.dim() == 3 and x.shape[1] > self.prefix)
        check(held and min(x.shape[1:3]) > 0, NAME, "x", rule, x.shape)
        if maps:
            return x.shape[1], x.shape[2]
        tokens = x.shape[1] - self.prefix
        rule = f"must be a pair (Y, X) with Y X = {tokens}"
        if shape is None:
            side = math.isqrt(tokens)
            check(side * side == tokens, NAME, "shape", rule, None)
            return side, side
        check(isinstance(shape, tuple | list) and len(shape) == 2, NAME, "shape", rule, shape)
        rows, columns = (as_int(NAME, "shape", side, rule) for side in shape)
        check(rows > 0 and rows * columns == tokens, NAME, "shape", rule, shape)
        return rows, columns

    def _split(self, x: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Splits x into the tokens before the map, and the map."""
        if x.dim() == 4:
            return x[:0], x
        return x[:, : self.prefix], x[:, self.prefix :].unflatten(1, sides)

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}, prefix={self.prefix}, " + (
            f"partition={self.partition}"
        )


def _windows(x: Tensor, side: int | None) -> tuple[Tensor, tuple[int, int]]:
    """[B ny nx, side, side, C] from [B, Y, X, C], and (ny, nx)."""
    if side is None:
        return x, (1, 1)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    return _parts(x, (side, side)), (x.shape[1] // side, x.shape[2] // side)


def _parts(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Windows of a map, [B ny nx, *size, C]."""
    x = x.unflatten(2, (x.shape[2] // size[1], size[1]))
    x = x.unflatten(1, (x.shape[1] // size[0], size[0]))  # [B, ny, y, nx, x, C]
    return x.transpose(2, 3).flatten(0, 2)


def _merged(windows: Tensor, count: tuple[int, int]) -> Tensor:
    """The map of windows [B ny nx, y, x, C]."""
    batch = windows.shape[0] // (count[0] * count[1])
    x = windows.unflatten(0, (batch, *count)).transpose(2, 3)  # [B, ny, y, nx, x, C]
    return x.flatten(3, 4).flatten(1, 2)
