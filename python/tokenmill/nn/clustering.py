"""Token clustering and reconstruction of Expedit, around layers that process clusters only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .._check import as_int, as_number, check, check_tensor
from ..tokens.cluster_tokens import cluster_tokens
from ..tokens.reconstruct_tokens import reconstruct_tokens

CLUSTERING, RECONSTRUCTION = "nn.TokenClustering", "nn.TokenReconstruction"
Preset = Literal["depth", "detection", "sam", "segmenter", "swin"]


@dataclass(frozen=True)
class Released:
    """The settings of a released model."""

    iters: int
    tau: float
    window: int
    k: int


PRESETS: dict[str, Released] = {
    "depth": Released(iters=5, tau=1.0, window=5, k=20),
    "detection": Released(iters=3, tau=1 / 100, window=5, k=25),
    "sam": Released(iters=5, tau=0.01, window=5, k=20),
    "segmenter": Released(iters=5, tau=0.05, window=7, k=3),
    "swin": Released(iters=5, tau=1 / 200, window=7, k=3),
}


def released(name: str, preset: Preset) -> Released:
    known = isinstance(preset, str) and preset in PRESETS
    names = [repr(n) for n in sorted(PRESETS)]
    rule = f"must be {', '.join(names[:-1])} or {names[-1]}"
    check(known, name, "preset", rule, preset)
    return PRESETS[preset]


class TokenClustering(nn.Module):
    r"""Reduces a map of tokens to a smaller map of clusters, for the layers up to a
    :class:`TokenReconstruction`. It has no weights.

    Args:
        grid: (gy, gx) clusters along Y and X; an integer sets both. A side of the map with fewer
            tokens is not reduced.
        preset: released settings, for arguments that are None below and for
            :class:`TokenReconstruction`:

            - "segmenter": iters=5, tau=0.05, window=7, k=3, from its two blocks
            - "sam": iters=5, tau=0.01, window=5, k=20, in each window of attention
            - "depth" (DPT): iters=5, tau=1, window=5, k=20, from its command
            - "swin": iters=5, tau=1/200, window=7, k=3, from its two blocks
            - "detection" (DINO and Mask DINO on Swin-L): iters=3, tau=1/100, window=5, k=25
        iters: number of iterations.
        tau: factor of the squared distance; the Swin models call its inverse by that name.
        window: side of the square of candidate cells around a token's own, odd.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]`` to ``[B, gy, gx, C]``; float16, bfloat16, float32.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 5 Y X window^2 C operations per iteration.

    Paper: Expedit (Liang et al. 2022), section 3.2. :class:`ExpeditedBlocks` wraps the blocks of a
    vision transformer in both.

    Example:
        >>> import torch, tokenmill as tm
        >>> layers = torch.nn.Linear(32, 32)
        >>> cluster, reconstruct = tm.nn.TokenClustering(8), tm.nn.TokenReconstruction()
        >>> x = torch.randn(1, 16, 16, 32)
        >>> clusters = cluster(x)
        >>> reconstruct(x, clusters, layers(clusters)).shape
        torch.Size([1, 16, 16, 32])
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        *,
        preset: Preset = "swin",
        iters: int | None = None,
        tau: float | None = None,
        window: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        usual = released(CLUSTERING, preset)
        rule = "must be an integer or a pair (gy, gx)"
        sides = grid if isinstance(grid, tuple | list) else (grid, grid)
        check(len(sides) == 2, CLUSTERING, "grid", rule, grid)
        rows, columns = (as_int(CLUSTERING, "grid", side, rule) for side in sides)
        self.grid = (rows, columns)
        self.iters = usual.iters if iters is None else as_int(CLUSTERING, "iters", iters)
        self.window = usual.window if window is None else as_int(CLUSTERING, "window", window)
        self.tau = usual.tau if tau is None else as_number(CLUSTERING, "tau", tau)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(CLUSTERING, "x", x)
        check(x.dim() == 4, CLUSTERING, "x", "must have 4 dimensions [B, Y, X, C]", x.dim())
        grid = (min(self.grid[0], x.shape[1]), min(self.grid[1], x.shape[2]))
        return cluster_tokens(x, grid, iters=self.iters, tau=self.tau, window=self.window,
                              backend=self.backend)[0]  # fmt: skip

    def extra_repr(self) -> str:
        return f"grid={self.grid}, iters={self.iters}, tau={self.tau}, window={self.window}"


class TokenReconstruction(nn.Module):
    r"""Restores a map of tokens from processed clusters: each token becomes a combination of the
    clusters with the nearest centroids. It has no weights.

    Args:
        k: number of clusters per token; all where there are fewer.
        preset: released settings, for arguments that are None: see :class:`TokenClustering`.
        tau: factor of the squared distance.
        norm: "l2", weights of Euclidean norm 1, as in all released code (equal tokens are not
            reproduced exactly), or "l1", weights that sum to 1, as described in the paper.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]``, the tokens before clustering; centroids ``[B, gy, gx, C]``, as returned
        by :class:`TokenClustering`; clusters ``[B, gy, gx, D]``, after the layers; to ``[B, Y, X,
        D]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 3 Y X gy gx C operations to find the nearest, 2 Y X k D for the combinations.

    Paper: Expedit (Liang et al. 2022), section 3.2. In the released code gradients also flow
    through the weights, which nothing there trains (here only to clusters), and a token takes all
    clusters tied with the k-th (here the first ones).

    Example: :class:`TokenClustering`
        >>> import tokenmill as tm
        >>> tm.nn.TokenReconstruction(preset="sam")
        TokenReconstruction(k=20, tau=0.01, norm='l2')
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        preset: Preset = "swin",
        tau: float | None = None,
        norm: str = "l2",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        usual = released(RECONSTRUCTION, preset)
        self.k = usual.k if k is None else as_int(RECONSTRUCTION, "k", k)
        self.tau = usual.tau if tau is None else as_number(RECONSTRUCTION, "tau", tau)
        self.norm, self.backend = norm, backend

    def forward(self, x: Tensor, centroids: Tensor, clusters: Tensor) -> Tensor:
        for name, t in (("x", x), ("centroids", centroids), ("clusters", clusters)):
            check_tensor(RECONSTRUCTION, name, t)
            rule = "must have 4 dimensions [B, Y, X, C]"
            check(t.dim() == 4, RECONSTRUCTION, name, rule, t.dim())
        rows = [t.flatten(1, 2) for t in (x, centroids, clusters)]
        k = min(self.k, rows[1].shape[1])
        out = reconstruct_tokens(*rows, k=k, tau=self.tau, norm=self.norm, backend=self.backend)[0]
        return out.unflatten(1, x.shape[1:3])

    def extra_repr(self) -> str:
        return f"k={self.k}, tau={self.tau}, norm={self.norm!r}"
