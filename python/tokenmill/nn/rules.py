"""What modules with weights check before torch does."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import check_device_of, check_tensor, fail, show


def check_input(name: str, argument: str, x: Tensor, weight: Tensor) -> None:
    """A tensor that a linear layer with this weight takes."""
    check_tensor(name, argument, x)
    check_device_of(name, argument, x, "the weights", weight)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        fail(name, argument, f"must have the dtype of the weights, {show(weight.dtype)}", x.dtype)
