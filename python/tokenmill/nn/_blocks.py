"""Functions of single rows, on blocks of rows whose temporaries stay in cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ELEMENTS = 1 << 16  # of a block, for each thread


def by_blocks(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """function(x, y) of tensors of one shape whose rows do not depend on each other, on a CPU in
    blocks: a chain of operations in PyTorch would write and read each temporary through memory.
    With gradients, and in compiled calls, all at once.
    """
    # A comparison of sizes in a compiled call would bind its graph to one length.
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x, y)
    width = x.shape[-1]
    rows = ELEMENTS * torch.get_num_threads() // max(width, 1)
    if x.shape != y.shape or rows == 0 or x.numel() <= rows * width:
        return function(x, y)
    parts = zip(*(t.reshape(-1, width).split(rows) for t in (x, y)), strict=True)
    return torch.cat([function(*part) for part in parts]).view(x.shape)
