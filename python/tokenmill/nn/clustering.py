"""The token clustering and reconstruction of Expedit, around layers that see clusters alone."""

from __future__ import annotations

from torch import Tensor, nn

from .._check import as_int, as_number, check, check_tensor
from ..tokens.cluster_tokens import cluster_tokens
from ..tokens.reconstruct_tokens import reconstruct_tokens

CLUSTERING, RECONSTRUCTION = "nn.TokenClustering", "nn.TokenReconstruction"


class TokenClustering(nn.Module):
    r"""Reduces a map of tokens to a smaller map of clusters, for the layers between here and a
    :class:`TokenReconstruction`. It has no weights.

    Args:
        grid: (gy, gx) clusters along Y and X; an integer stands for both. A side of the map that
            has fewer tokens keeps its own.
        iters: iterations.
        tau: factor of the squared distance; published code may call its inverse by that name.
        window: side of the square of cells around its own that a token weighs, odd.
        backend: of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]`` to ``[B, gy, gx, C]``; float16, bfloat16, float32.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: Expedit (Liang et al. 2022), section 3.2; defaults are those of its Swin models.

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
        iters: int = 5,
        tau: float = 0.005,
        window: int = 7,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        rule = "must be an integer or a pair (gy, gx)"
        sides = grid if isinstance(grid, tuple | list) else (grid, grid)
        check(len(sides) == 2, CLUSTERING, "grid", rule, grid)
        rows, columns = (as_int(CLUSTERING, "grid", side, rule) for side in sides)
        self.grid = (rows, columns)
        self.iters = as_int(CLUSTERING, "iters", iters)
        self.window = as_int(CLUSTERING, "window", window)
        self.tau, self.backend = as_number(CLUSTERING, "tau", tau), backend

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(CLUSTERING, "x", x)
        check(x.dim() == 4, CLUSTERING, "x", "must have 4 dimensions [B, Y, X, C]", x.dim())
        grid = (min(self.grid[0], x.shape[1]), min(self.grid[1], x.shape[2]))
        return cluster_tokens(x, grid, iters=self.iters, tau=self.tau, window=self.window,
                              backend=self.backend)[0]  # fmt: skip

    def extra_repr(self) -> str:
        return f"grid={self.grid}, iters={self.iters}, tau={self.tau}, window={self.window}"


class TokenReconstruction(nn.Module):
    r"""Restores a map of tokens from what layers made of its clusters: each token becomes the mean
    of the clusters with the nearest centroids. It has no weights.

    Args:
        k: clusters of a token; all where there are fewer.
        tau: factor of the squared distance.
        norm: "l1", weights that sum to 1, or "l2", which published code has.
        backend: of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]``, the tokens before clustering; centroids ``[B, gy, gx, C]``, as
        :class:`TokenClustering` gave them; clusters ``[B, gy, gx, D]``, after the layers; to
        ``[B, Y, X, D]``.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: Expedit (Liang et al. 2022), section 3.2.

    Example: :class:`TokenClustering`
        >>> import tokenmill as tm
        >>> tm.nn.TokenReconstruction(k=20, tau=0.01)
        TokenReconstruction(k=20, tau=0.01, norm='l1')
    """

    def __init__(
        self, k: int = 3, *, tau: float = 0.005, norm: str = "l1", backend: str | None = None
    ) -> None:
        super().__init__()
        self.k = as_int(RECONSTRUCTION, "k", k)
        self.tau = as_number(RECONSTRUCTION, "tau", tau)
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
