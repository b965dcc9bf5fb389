"""CACE's additions to a text recogniser: attention that fades with the distance, and a loss with a
memory of every character.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import masks
from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_device_of,
    check_float32,
    check_tensor,
    fail,
    reads_values,
)
from ..dense.attention import attention
from ._rotary import rotated
from .rules import check_heads, check_input

ATTENTION, LOSS = "nn.CharacterAttention", "nn.CharacterConsistencyLoss"


class CharacterAttention(nn.Module):
    r"""Attention on a grid whose weights fade with the distance, as in the encoder CACE:

    .. math::
       y = \big(\operatorname{softmax}(\rho(q) \rho(k)^\top / \sqrt D) \odot
           \gamma_h^{\operatorname{dist}(i, j)}\big)\, v\, W + b, \qquad \gamma_h = 1 - 2^{-5-h},

    not renormalised, with rotary positions :math:`\rho` in the flattened grid.

    Args:
        dim: channels C of the input.
        num_heads: number of heads h (from 0), a divisor of the channels.
        grid: rows and columns of the tokens. The first stage of the released models has (8, 32).
        decay: whether weights fade. The later, "global" blocks of an encoder have plain weights.
        distance: "chebyshev" or "manhattan".
        rotary: whether queries and keys are rotated by their positions.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        backend: backend of :func:`tokenmill.attention`.

    Shape:
        x ``[B, rows * columns, C]`` to the same; float16, bfloat16, float32.

    Weights, with the names of the released models: qkv ``[3 C, C]``, proj ``[C, C]`` with a bias.
    The buffer gamma ``[H]`` is not in the state dict.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 8 C^2 + 4 C N operations per token.

    Paper: Focus on the Whole Character (Zhou et al. 2024), section 3.2. The frequencies of the
    released code range from 1 to 1/10000, both included.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.CharacterAttention(64, 4, grid=(4, 8))
        >>> layer(torch.randn(2, 32, 64)).shape
        torch.Size([2, 32, 64])
    """

    gamma: Tensor
    angles: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid: tuple[int, int] = (8, 32),
        *,
        decay: bool = True,
        distance: masks.Distance = "chebyshev",
        rotary: bool = True,
        qkv_bias: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(ATTENTION, dim, num_heads)
        for name, flag in (("decay", decay), ("rotary", rotary), ("qkv_bias", qkv_bias)):
            check_bool(ATTENTION, name, flag)
        pair = isinstance(grid, tuple | list) and len(grid) == 2
        check(pair, ATTENTION, "grid", "must be (rows, columns)", grid)
        rows, columns = (as_int(ATTENTION, "grid", n) for n in grid)
        held = rows > 0 and columns > 0 and rows * columns < 2**24
        check(held, ATTENTION, "grid", "must have 1 to 2^24 - 1 cells", grid)
        check(num_heads <= 1024, ATTENTION, "num_heads", "must be at most 1024", num_heads)
        half = dim // num_heads // 2
        even = not rotary or 2 * half * num_heads == dim
        check(even, ATTENTION, "rotary", "must be False with an odd head_dim", rotary)
        self.num_heads, self.grid, self.decay = num_heads, (rows, columns), decay
        self.rotary, self.backend = rotary, backend
        self.mask = masks.grid(columns, distance)  # checks distance
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        gamma = 1 - 2.0 ** (-5.0 - torch.arange(num_heads))
        self.register_buffer("gamma", gamma, persistent=False)
        steps = 10000.0 ** -torch.linspace(0, 1, half)
        angles = torch.arange(rows * columns)[:, None] * steps
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        check_input(ATTENTION, "x", x, self.qkv.weight)
        shape = [self.grid[0] * self.grid[1], self.proj.in_features]
        shaped = x.dim() == 3 and list(x.shape[1:]) == shape
        check(shaped, ATTENTION, "x", f"must have shape [B, {shape[0]}, {shape[1]}]", x.shape)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.rotary:
            q, k = (rotated(t, self.angles, interleaved=True) for t in (q, k))
        fade = None
        if self.decay:
            fade = masks.decay2d(self.gamma, self.mask.width, self.mask.distance)
        out = attention(q, k, v, post_decay=fade, backend=self.backend)
        y: Tensor = self.proj(out.flatten(-2))
        return y

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid={self.grid}, decay={self.decay}"


class CharacterConsistencyLoss(nn.Module):
    r"""The intra-inter consistency loss of CACE: the features of a character are pulled to the
    memory of its class and pushed away from the memories of other classes,

    .. math::
       \ell = \frac{w}{2} \sum_i \frac{|x_i - c_{y_i}|^2}
              {\epsilon + \sum_{j \ne y_i} |x_i - c_j|^2}.

    The centers c are the long-term memory: parameters that persist across batches.

    Args:
        num_classes: number of characters.
        dim: channels C of a feature.
        weight: w. The released configuration has 0.2.
        eps: added to the sum over the other classes.

    Shape:
        features ``[.., C]``, targets of the same leading shape, int32 or int64: the class of each
        character, negative where there is none (padding, the end of a text). To a scalar; float32,
        or float64 for float64 features.

    Weights, with the name of the released models: centers ``[num_classes, C]``, initialised from a
    normal distribution with standard deviation 0.02.

    Raises:
        RuntimeError: naming argument, rule and value. A target out of range raises where the
            package reads values (on a CPU); on a GPU it adds 0.

    Complexity: 2 C num_classes operations per character.

    Paper: Focus on the Whole Character (Zhou et al. 2024), section 3.3. In training the released
    code adds it to the cross entropy for the last quarter of all steps.

    Example:
        >>> import torch, tokenmill as tm
        >>> loss = tm.nn.CharacterConsistencyLoss(36, 64)
        >>> features, targets = torch.randn(2, 5, 64), torch.tensor([[3, 0, 7, -1, -1]] * 2)
        >>> loss(features, targets).shape
        torch.Size([])
    """

    def __init__(
        self, num_classes: int, dim: int, *, weight: float = 0.2, eps: float = 1.0
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("dim", dim)):
            check(0 < as_int(LOSS, name, size) < 2**31, LOSS, name, "must be 1 to 2^31 - 1", size)
        self.weight, self.eps = as_number(LOSS, "weight", weight), as_number(LOSS, "eps", eps)
        check_float32(LOSS, "weight", self.weight)
        check_float32(LOSS, "eps", self.eps)
        check(self.eps > 0, LOSS, "eps", "must be above 0", eps)
        self.centers = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.trunc_normal_(self.centers, std=0.02)

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        check_input(LOSS, "features", features, self.centers)
        classes, channels = self.centers.shape
        shaped = features.dim() >= 1 and features.shape[-1] == channels
        check(shaped, LOSS, "features", f"must have shape [.., {channels}]", features.shape)
        check_tensor(LOSS, "targets", targets)
        whole = targets.dtype in (torch.int32, torch.int64)
        check(whole, LOSS, "targets", "must be int32 or int64", targets.dtype)
        check_device_of(LOSS, "targets", targets, "features", features)
        if targets.shape != features.shape[:-1]:
            fail(LOSS, "targets", f"must have shape {list(features.shape[:-1])}", targets.shape)
        if reads_values(targets) and targets.numel():
            maximum = int(targets.max())
            check(maximum < classes, LOSS, "targets", f"must be below {classes}", maximum)
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(features.dtype, torch.float32)
            x, centers = features.flatten(0, -2).to(dtype), self.centers.to(dtype)
            return self._loss(x, centers, targets.flatten())

    def _loss(self, x: Tensor, centers: Tensor, targets: Tensor) -> Tensor:
        lengths = x.square().sum(1, keepdim=True) + centers.square().sum(1)
        apart = lengths - 2 * x @ centers.T  # [T, classes]
        own = targets[:, None] == torch.arange(len(centers), device=x.device)
        near = (apart * own).sum(1)
        far = (apart * ~own).sum(1)
        return self.weight / 2 * (near / (far + self.eps)).sum()

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, eps={self.eps:g}"
