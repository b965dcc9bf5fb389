"""Applies an operator's tuned values to the forward tiles of its kernel."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from tokenmill._knobs import TABLE, triton_values

T = TypeVar("T", bound=Any)
FIELDS = {
    "stages": "num_stages",
    "warps": "num_warps",
    "block_m": "block_m",
    "block_n": "block_n",
}
SHARED_BYTES = 99 * 1024  # shared memory per program available on every GPU


def tuned(op: str, tiles: T, q: Tensor, value_dim: int, plain: bool) -> T:
    """Returns tiles with tuned fields replaced, unless the value is TABLE. Tuned values apply only
    to calls like those they were measured with: 16-bit elements, head_dim up to 128, plain (no term
    that takes more registers or shared memory). Tiles whose keys and values would not fit in shared
    memory are left unchanged."""
    wide = max(q.shape[-1], value_dim)
    if not plain or q.element_size() != 2 or wide > 128:
        return tiles
    width = 64 if wide <= 64 else 128
    changed = {
        field: number
        for name, field in FIELDS.items()
        if (number := triton_values.get(f"{op}.triton{width}.{name}", TABLE)) != TABLE
    }
    if not changed:
        return tiles
    taken = tiles._replace(**changed)
    rows = getattr(taken, "block_m", 0) + 2 * taken.num_stages * getattr(taken, "block_n", 0)
    return taken if 2 * rows * width <= SHARED_BYTES else tiles
