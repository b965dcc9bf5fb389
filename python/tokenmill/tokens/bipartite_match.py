"""bipartite_match: decides which tokens merge into which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Never

from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_choice,
    check_tensor,
    fail,
    reads_values,
    show,
)
from .._other_names import refuse, refuses_other_names
from ._rows import check_tokens
from .best_match import MAX_CHANNELS, best_match
from .topk_partition import topk_partition

OP = "bipartite_match"
Partition = Literal["alternate", "grid", "index", "kth", "random"]


@refuses_other_names
def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    partition: Partition = "alternate",
    grid: tuple[int, int] | None = None,
    cell: tuple[int, int] = (2, 2),
    destinations: Tensor | None = None,
    group: int | None = None,
    protect_first: int = 0,
    protect_targets: int = 0,
    normalize: bool = True,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    **other: Never,
) -> tuple[Tensor, int, Tensor]:
    r"""Decides which tokens merge into which, for :func:`merge_tokens` and :func:`unmerge_tokens`.

    Tokens are divided into sources and destinations. Each source has a partner, the destination
    with the greatest product (:func:`best_match`, ties to the first), and this product as its
    score. The r sources with the greatest scores (ties to the first) are merged into their
    partners. The rows of the result are the remaining sources in order, then the destinations in
    order.

    Args:
        metric: ``[B, N, C]``, the features that tokens are compared by: in ToMe the mean of the
            keys over the heads, in ToMe for Stable Diffusion the hidden state. float16, bfloat16 or
            float32 (float64 on the reference), any strides with a contiguous last dimension, C up
            to 4096.
        r: number of sources to merge; clamped to the maximum described below, and to 0.
        partition: which tokens are destinations. "alternate": the odd tokens. "grid": one per cell.
            "index": the tokens in destinations. "kth": the last of each group of tokens. "random":
            all but r, the same for every sequence.
        grid: (rows, columns) for "grid", row-major; the first protect_first tokens precede the grid
            and are sources.
        cell: (rows, columns) of a cell. Its destination is its first token, or with a generator a
            random token, the same for every sequence. Tokens outside whole cells are sources.
        destinations: ``[Nd]`` int32 or int64 for "index", tokens in any order.
        group: tokens per group for "kth". Groups begin after the first protect_first tokens, which
            are sources; tokens after the last whole group are sources too, and are not merged.
        protect_first: number of first tokens that are not merged into others (a class token).
        protect_targets: number of first destinations that nothing is merged into (a distillation
            token, which is the first odd token).
        normalize: compare cosines; otherwise unnormalised products.
        threshold: pairs with a smaller score are not merged. The number of merged pairs then
            depends on the sequence, and one number is read from the device.
        generator: random generator for "random" (None: the default one) and "grid".
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (assign, num_out, score): int32 ``[B, N]``, the result row of each token; the number of
        rows; float32 ``[B, Na]`` (float64 on the reference), the scores of the sources in their
        order. num_out is N - r, or with a threshold the maximum number of rows of a sequence:
        others leave their last rows unused. With r = 0 assign is a permutation. r is at most the
        number of unprotected sources, with "alternate" also half of the unprotected tokens (ToMe),
        with "kth" the number of sources in whole groups, with "index" N - Nd - protect_first even
        if destinations are among the first tokens; 0 if all destinations are protected. Not
        differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU destinations out of range or
            repeated are replaced by others.

    Complexity: 2 B Na Nb C operations, and O(N) per sequence for the choice.

    Paper: ToMe (Bolya et al. 2023), section 3; ToMe for Stable Diffusion (Bolya and Hoffman 2023),
    section 4.

    Example:
        >>> import torch, tokenmill as tm
        >>> metric = torch.tensor([[[1.0, 0], [0, 1], [0.1, 1], [1, 0.3]]])
        >>> assign, num_out, score = tm.bipartite_match(metric, 1)
        >>> assign.tolist(), num_out  # token 2 goes to token 1, tokens 0, 1 and 3 stay
        ([[0, 1, 1, 2]], 3)
        >>> x = torch.randn(2, 4096, 320)
        >>> tm.bipartite_match(x, 2048, partition="grid", grid=(64, 64))[1]
        2048
    """
    if other:
        refuse(bipartite_match, other)
    r = as_int(OP, "r", r)
    protect_first = as_int(OP, "protect_first", protect_first)
    protect_targets = as_int(OP, "protect_targets", protect_targets)
    if threshold is not None:
        threshold = as_number(OP, "threshold", threshold, "must be a number or None")
    if grid is not None:
        grid = _as_sizes("grid", grid)
    cell = _as_sizes("cell", cell)
    if group is not None:
        group = as_int(OP, "group", group, "must be a positive integer")
    _check_call(metric, partition, protect_first, protect_targets, normalize)
    _check_partition(metric, partition, grid, destinations, group, protect_first, generator)
    batch, tokens, _ = metric.shape
    if partition == "alternate":
        parts = _alternate(tokens, protect_first, protect_targets)
    elif partition == "grid":
        assert grid is not None
        chosen = _cells(grid, cell, generator, metric.device) + protect_first
        parts = _chosen(chosen, tokens, held=protect_first)
    elif partition == "index":
        assert destinations is not None
        parts = _chosen(destinations, tokens, held=0, protected=protect_first)
    elif partition == "kth":
        assert group is not None
        parts = _groups(group, tokens, protect_first, metric.device)
    else:
        maximum = max(min(r, tokens - max(protect_first, protect_targets + 1)), 0)
        parts = _random(maximum, tokens, protect_first, generator, metric.device)
    targets = metric[:, parts.targets][:, protect_targets:]
    index, score = best_match(
        metric[:, parts.sources], targets, normalize=normalize, backend=backend
    )
    r = max(min(r, parts.may_merge), 0) if targets.shape[1] > 0 else 0
    valid = None if parts.valid is None else parts.valid.expand(batch, -1)
    taken, _ = topk_partition(
        score[:, parts.held :], r, order="index", valid=valid, backend=backend
    )
    merged = torch.zeros_like(score, dtype=torch.bool).scatter_(1, taken.long() + parts.held, True)
    left: Tensor | int = score.shape[1] - r
    num_out = tokens - r
    if threshold is not None:
        merged &= score >= threshold
        left = (~merged).sum(1, keepdim=True, dtype=torch.int32)
        num_out = tokens - (int(merged.sum(1).min()) if batch else 0)
    place = (~merged).cumsum(1, dtype=torch.int32) - 1
    assign = place.new_empty(batch, tokens)
    assign[:, parts.sources] = torch.where(merged, index + (left + protect_targets), place)
    own = torch.arange(tokens - score.shape[1], dtype=torch.int32, device=metric.device)
    assign[:, parts.targets] = left + own
    return assign, num_out, score


class _Parts(NamedTuple):
    """Sources and destinations, each in ascending order."""

    sources: slice | Tensor
    targets: slice | Tensor
    may_merge: int
    held: int  # number of protected first sources
    valid: Tensor | None = None  # unprotected sources, if given as a tensor


def _alternate(tokens: int, protect_first: int, protect_targets: int) -> _Parts:
    held = (protect_first + 1) // 2
    half = (tokens - protect_first - protect_targets) // 2
    return _Parts(slice(0, None, 2), slice(1, None, 2), min((tokens + 1) // 2 - held, half), held)


def _chosen(destinations: Tensor, tokens: int, held: int, protected: int = 0) -> _Parts:
    """Numbers out of range are clamped; a repeated number is replaced by another token. The first
    `protected` tokens may be destinations.
    """
    chosen = torch.zeros(tokens, dtype=torch.int8, device=destinations.device)
    if tokens > 0:
        chosen[destinations.long().clamp(0, tokens - 1)] = 1
    count = tokens - destinations.shape[0]
    sources, targets = chosen.argsort(stable=True).tensor_split([count])
    valid = sources >= protected if protected else None
    return _Parts(sources, targets, max(count - held - protected, 0), held, valid)


def _groups(group: int, tokens: int, held: int, device: torch.device) -> _Parts:
    count = (tokens - held) // group
    last = torch.arange(1, count + 1, device=device) * group + (held - 1)
    parts, behind = _chosen(last, tokens, held), (tokens - held) % group
    if behind == 0:
        return parts
    sources = torch.arange(tokens - held - count, device=device)  # after the protected sources
    may_merge = parts.may_merge - behind
    return parts._replace(may_merge=may_merge, valid=sources < may_merge)


def _random(
    count: int,
    tokens: int,
    protect_first: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> _Parts:
    drawn_on = device if generator is None else generator.device
    drawn = torch.randperm(tokens - protect_first, generator=generator, device=drawn_on)
    others = torch.cat([drawn[count:].to(device) + protect_first,
                        torch.arange(protect_first, device=device)])  # fmt: skip
    return _chosen(others, tokens, held=0)


def _cells(
    grid: tuple[int, int],
    cell: tuple[int, int],
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """The destination of each whole cell."""
    down, across = grid[0] // cell[0], grid[1] // cell[1]
    y = torch.arange(down, device=device)[:, None] * cell[0]
    x = torch.arange(across, device=device) * cell[1]
    places = y * grid[1] + x
    if generator is not None:
        inside = torch.randint(
            cell[0] * cell[1], (down, across), generator=generator, device=generator.device
        ).to(device)
        places = places + inside // cell[1] * grid[1] + inside % cell[1]
    return places.flatten()


def _check_call(
    metric: Tensor,
    partition: str,
    protect_first: int,
    protect_targets: int,
    normalize: bool,
) -> None:
    check_tensor(OP, "metric", metric)
    check_tokens(OP, "metric", metric, float64=True)
    channels = metric.shape[2]
    rule = f"must have 1 to {MAX_CHANNELS} channels"
    check(1 <= channels <= MAX_CHANNELS, OP, "metric", rule, channels)
    check_choice(OP, "partition", partition, "alternate", "grid", "index", "kth", "random")
    tokens = metric.shape[1]
    if not 0 <= protect_first <= tokens:
        fail(OP, "protect_first", f"must be 0 to the number of tokens, {tokens}", protect_first)
    check(protect_targets >= 0, OP, "protect_targets", "must not be negative", protect_targets)
    check_bool(OP, "normalize", normalize)


def _check_partition(
    metric: Tensor,
    partition: str,
    grid: tuple[int, int] | None,
    destinations: Tensor | None,
    group: int | None,
    protect_first: int,
    generator: torch.Generator | None,
) -> None:
    check_tensor(OP, "destinations", destinations, optional=True)
    if generator is not None:
        is_one = isinstance(generator, torch.Generator)
        check(is_one, OP, "generator", "must be a torch.Generator or None", generator)
        drawn = partition in ("grid", "random")
        check(drawn, OP, "generator", "requires partition 'grid' or 'random'", partition)
    if partition != "grid":
        check(grid is None, OP, "grid", "requires partition 'grid'", grid)
    else:
        if grid is None:
            fail(OP, "grid", "must be two positive integers", grid)
        tokens = metric.shape[1] - protect_first
        if grid[0] * grid[1] != tokens:
            rule = f"must have a place for each token after the protected ones, {tokens}"
            fail(OP, "grid", rule, grid)
    if partition != "kth":
        check(group is None, OP, "group", "requires partition 'kth'", group)
    else:
        if group is None or group < 1:
            fail(OP, "group", "must be a positive integer", group)
    if partition != "index":
        check(destinations is None, OP, "destinations", "requires partition 'index'",
              destinations)  # fmt: skip
    else:
        check(destinations is not None, OP, "destinations", "must be a tensor", destinations)
        assert destinations is not None
        _check_destinations(metric, destinations)


def _as_sizes(name: str, pair: Any) -> tuple[int, int]:
    rule = "must be two positive integers"
    if not (isinstance(pair, Sequence) and len(pair) == 2):
        fail(OP, name, rule, pair)
    sizes = as_int(OP, name, pair[0], rule), as_int(OP, name, pair[1], rule)
    check(min(sizes) > 0, OP, name, rule, pair)
    return sizes


def _check_destinations(metric: Tensor, destinations: Tensor) -> None:
    tokens = metric.shape[1]
    fits = destinations.dim() == 1 and destinations.shape[0] <= tokens
    rule = f"must have shape [Nd] with Nd up to the number of tokens, {tokens}"
    check(fits, OP, "destinations", rule, destinations.shape)
    known = destinations.dtype in (torch.int32, torch.int64)
    check(known, OP, "destinations", "must be int32 or int64", destinations.dtype)
    if destinations.device != metric.device:
        rule = f"must be on the device of metric, {show(metric.device)}"
        fail(OP, "destinations", rule, destinations.device)
    if not reads_values(destinations):
        return
    bad = destinations[(destinations < 0) | (destinations >= tokens)]
    if bad.numel():
        fail(OP, "destinations", f"must be 0 to {tokens - 1}", int(bad[0]))
    ordered = destinations.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.numel():
        fail(OP, "destinations", "must not name a token twice", int(twice[0]))
