"""Communication volume, steps and operations of each schedule."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    """Communication and work of a rank in one call."""

    forward_bytes: int  # sent by one rank
    backward_bytes: int
    steps: int  # sequential collectives of the forward
    flops: float  # forward, maximum over ranks


def plan(
    *,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    ranks: int,
    itemsize: int = 2,
    causal: bool = False,
    order: str = "contiguous",
) -> dict[str, Cost]:
    """The cost of each schedule of :func:`attention`.

    Args:
        batch, length, heads, kv_heads, head_dim, value_dim: sizes of the whole call; value_dim None
            = head_dim.
        ranks: number of ranks that share the sequence.
        itemsize: bytes per element.
        causal, order: as in :func:`attention`.

    Returns:
        A :class:`Cost` for "ring", "allgather" and "ulysses".

    Example:
        >>> import tokenmill.distributed as tmd
        >>> costs = tmd.plan(batch=1, length=65536, heads=32, kv_heads=8, head_dim=128, ranks=8)
        >>> costs["ulysses"].forward_bytes < costs["ring"].forward_bytes
        True
    """
    value_dim = head_dim if value_dim is None else value_dim
    tokens = -(-length // ranks)
    keys = batch * tokens * kv_heads * (head_dim + value_dim)
    copies = max(ranks // kv_heads, 1)
    rows = batch * tokens * heads
    away = ranks - 1
    # Elements that leave the rank: a fraction (P - 1) / P of queries, results and (copied) keys.
    moved = (rows * (head_dim + value_dim) + keys * copies) * away // ranks
    pairs = float(tokens) * length
    if causal:
        # The last rank in contiguous order computes nearly its whole rectangle.
        pairs *= 1 - 0.5 / ranks if order == "contiguous" else 0.5
    flops = 2.0 * batch * heads * pairs * (head_dim + value_dim)
    share = 2.0 * batch * heads * length * length * (0.5 if causal else 1.0) / ranks
    home = ranks if away else 0  # gradients of keys and values return in float32
    return {
        "ring": Cost(keys * itemsize * away, keys * (itemsize * away + 4 * home), away, flops),
        "allgather": Cost(keys * itemsize * away, keys * itemsize * away, 1, flops),
        "ulysses": Cost(moved * itemsize, moved * itemsize, 4, share * (head_dim + value_dim)),
    }


def linear_bytes(batch: int, heads: int, feature_dim: int, value_dim: int, ranks: int) -> int:
    """Bytes that a rank sends in a forward of linear attention: the state of its shard and its
    decay.
    """
    return 4 * batch * heads * (feature_dim * value_dim + 1) * (ranks - 1)


def decode_bytes(batch: int, rows: int, heads: int, value_dim: int, ranks: int) -> int:
    """Bytes that a rank sends in a decode step: results and statistics in float32."""
    return 4 * batch * rows * heads * (value_dim + 1) * (ranks - 1)


def cheapest(able: list[str], q: Tensor, k: Tensor, v: Tensor, ranks: int, length: int) -> str:
    """The supported schedule with the fewest bytes, forward and backward; ties prefer ring to
    allgather, for its memory.
    """
    if ranks == 1 and "ulysses" in able:
        return "ulysses"  # the plain call
    costs = plan(
        batch=q.shape[0] if q.dim() == 4 else 1,
        length=length,
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        ranks=ranks,
        itemsize=q.element_size(),
    )
    return min(able, key=lambda name: costs[name].forward_bytes + costs[name].backward_bytes)
