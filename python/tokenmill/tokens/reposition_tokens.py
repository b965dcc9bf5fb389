"""reposition_tokens: resamples a box of a token grid onto another box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .._check import as_int, check, check_device_of, check_tensor, check_text, fail, is_any
from .gather_tokens import gather_tokens

OP = "reposition_tokens"
BOXES = "subject_boxes"
Mode = Literal["nearest", "bilinear"]


def subject_boxes(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bounding boxes, on a grid, of the tokens of masks.

    Args:
        mask: bool ``[..., N]``, the tokens of a subject; token i is the cell of row i // width and
            column i % width.
        grid: (height, width) with height * width = N.

    Returns:
        int32 ``[..., 4]``: (top, left, bottom, right), bottom and right exclusive; 0 for a mask
        without tokens.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads the masks once; no synchronisation with the host.

    Example:
        >>> import torch, tokenmill as tm
        >>> mask = torch.zeros(4, 5, dtype=torch.bool)
        >>> mask[1:3, 2] = True
        >>> tm.subject_boxes(mask.flatten(), (4, 5)).tolist()
        [1, 2, 3, 3]
    """
    check_tensor(BOXES, "mask", mask)
    check(mask.dtype == torch.bool, BOXES, "mask", "must be bool", mask.dtype)
    check(mask.dim() >= 1, BOXES, "mask", "must have at least 1 dimension [..., N]", mask.dim())
    size = check_grid(BOXES, grid, "mask", mask.shape[-1])
    if mask.shape[-1] == 0:
        return torch.zeros((*mask.shape[:-1], 4), dtype=torch.int32, device=mask.device)
    cells = mask.unflatten(-1, size)
    ends = []
    for axis in (-1, -2):  # rows that hold a token, then columns
        line = cells.any(axis)
        at = torch.arange(line.shape[-1], dtype=torch.int32, device=mask.device)
        far = torch.where(line, at, line.shape[-1]).amin(-1)
        ends.append((far, torch.where(line, at, -1).amax(-1) + 1))
    (top, bottom), (left, right) = ends
    box = torch.stack((top, left, bottom, right), -1)
    return box.masked_fill((bottom == 0)[..., None], 0)


@overload
def reposition_tokens(
    xs: Tensor, source: Tensor, target: Tensor, grid: tuple[int, int], *, mode: Mode = ...,
    backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def reposition_tokens(
    xs: Sequence[Tensor], source: Tensor, target: Tensor, grid: tuple[int, int], *,
    mode: Mode = ..., backend: str | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
def reposition_tokens(
    xs: Tensor | Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    grid: tuple[int, int],
    *,
    mode: Mode = "nearest",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Scales and moves a box of a token grid onto another box; the other cells are 0.

    Row i of a target box of h rows comes from row :math:`\lfloor i\,h_s / h \rfloor` of a source
    box of :math:`h_s` rows ("nearest"), or from the two rows around
    :math:`(i + \tfrac12)\, h_s / h - \tfrac12`, clamped to the box ("bilinear"); columns likewise,
    as ``torch.nn.functional.interpolate`` of the box, whose factor is float32.

    Args:
        xs: ``[B, N, C]`` or ``[B, N, H, D]`` (keys or values), float16, bfloat16 or float32
            (float64 on the reference), any strides with a contiguous last dimension; or several.
        source, target: int32 or int64 ``[B | 1, 4]``, boxes (top, left, bottom, right), bottom and
            right exclusive (:func:`subject_boxes`). Cells outside the grid, and a target whose
            source is empty, give 0.
        grid: (height, width) with height * width = N; token i is the cell of row i // width and
            column i % width.
        mode: "nearest" or "bilinear".
        backend: backend of :func:`gather_tokens` (see :func:`tokenmill.explain`).

    Returns:
        shapes and dtypes of xs. Sums of "bilinear" are float32, rounded once. Gradients: xs;
        deterministic, unlike ``grid_sample`` on a GPU.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: one gather of B N C elements, four for "bilinear"; no synchronisation with the host.

    Paper: Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and
    Reposition Attention (IR-Diffusion, He et al. 2024), reposition attention; "nearest" as in the
    released code. A projection to keys and values without a bias may come before or after it.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.arange(9.0).view(1, 9, 1)  # 3 x 3
        >>> source, target = torch.tensor([[[0, 0, 1, 2]], [[1, 0, 3, 3]]]).int()
        >>> tm.reposition_tokens(x, source, target, (3, 3)).view(3, 3).tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
        >>> tm.reposition_tokens(x, source, target, (3, 3), mode="bilinear").view(3, 3).tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]]
    """
    tensors = [xs] if isinstance(xs, Tensor) else xs
    if not isinstance(tensors, list | tuple) or not tensors:
        fail(OP, "xs", "must be a tensor or several", xs)
    size = _check(tensors, source, target, grid, mode)
    indices, weights = _samples(source.long(), target.long(), size, mode)
    batch = tensors[0].shape[0]
    indices = indices.expand(batch, -1, -1).flatten(1)  # [B, taps * N]
    found = []
    for x in tensors:
        rows = gather_tokens(x, indices, backend=backend)
        if weights is not None:
            taps = rows.unflatten(1, (4, -1))
            w = weights.reshape(*weights.shape, *(1,) * (taps.dim() - 3))
            wide = torch.promote_types(x.dtype, torch.float32)
            rows = (taps.to(wide) * w.to(wide)).sum(1).to(x.dtype)
        found.append(rows)
    return found[0] if isinstance(xs, Tensor) else tuple(found)


def _samples(
    source: Tensor, target: Tensor, size: tuple[int, int], mode: str
) -> tuple[Tensor, Tensor | None]:
    """int32 [B | 1, taps, N]: source cells of each cell, -1 for none; and the weights of the four
    taps of "bilinear".
    """
    near = mode == "nearest"
    places: list[tuple[Tensor, ...]] = []
    shares, inside = [], []
    for axis in (0, 1):
        begin, end = source[:, axis, None], source[:, axis + 2, None]
        start, stop = target[:, axis, None], target[:, axis + 2, None]
        at = torch.arange(size[axis], device=source.device)[None]
        old, new = end - begin, (stop - start).clamp(min=1)
        step = at - start
        ok = (at >= start) & (at < stop) & (old > 0)
        if near:
            # interpolate has a float32 factor: 23 * 14 / 46 is 6 in float32.
            factor = old.float() / new.float()
            place = (step.float() * factor).floor().long().minimum(old - 1)
            places.append((begin + place,))
        else:
            # (2 step + 1) old / (2 new) - 1/2, clamped to the box, as a fraction over 2 new.
            top = ((2 * step + 1) * old - new).clamp(min=0)
            low = (top // (2 * new)).minimum(old - 1).clamp(min=0)
            high = (low + 1).minimum((old - 1).clamp(min=0))
            share = (top - low * 2 * new).double() / (2 * new)
            places.append((begin + low, begin + high))
            shares.append((1 - share, share))
        inside.append(ok)
    height, width = size
    cells, weights = [], []
    for a, y in enumerate(places[0]):
        for b, x in enumerate(places[1]):
            ok = (inside[0] & (y >= 0) & (y < height))[:, :, None]
            ok = ok & (inside[1] & (x >= 0) & (x < width))[:, None]
            cell = y[:, :, None] * width + x[:, None]
            cells.append(torch.where(ok, cell, -1).flatten(1))
            if not near:
                weights.append((shares[0][a][:, :, None] * shares[1][b][:, None]).flatten(1))
    return torch.stack(cells, 1).int(), None if near else torch.stack(weights, 1)


def check_grid(op: str, grid: tuple[int, int], name: str, tokens: int) -> tuple[int, int]:
    rule = "must be two ints (height, width)"
    if not (isinstance(grid, tuple | list) and len(grid) == 2):
        fail(op, "grid", rule, grid)
    height, width = (as_int(op, "grid", side, rule) for side in grid)
    check(height >= 0 and width >= 0, op, "grid", "must not be negative", [height, width])
    rule = f"must have height * width = {tokens}, the tokens of {name}"
    check(height * width == tokens, op, "grid", rule, [height, width])
    return height, width


def _check(
    tensors: Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    grid: tuple[int, int],
    mode: str,
) -> tuple[int, int]:
    for x in tensors:
        check_tensor(OP, "xs", x)
        ok = x.dim() in (3, 4)
        check(ok, OP, "xs", "must have 3 or 4 dimensions [B, N, C] or [B, N, H, D]", x.dim())
        check(x.is_floating_point(), OP, "xs", "must be floating-point", x.dtype)
        if x.shape[:2] != tensors[0].shape[:2]:
            fail(OP, "xs", "must have one batch size and number of tokens", x.shape)
    first = tensors[0]
    size = check_grid(OP, grid, "xs", first.shape[1])
    check_text(OP, "mode", mode)
    check(mode in ("nearest", "bilinear"), OP, "mode", "must be 'nearest' or 'bilinear'", mode)
    for name, box in (("source", source), ("target", target)):
        check_tensor(OP, name, box)
        ok = box.dtype in (torch.int32, torch.int64)
        check(ok, OP, name, "must be int32 or int64", box.dtype)
        if not is_any(tuple(box.shape), (1, 4), (first.shape[0], 4)):
            fail(OP, name, f"must have shape [{first.shape[0]} or 1, 4]", box.shape)
        check_device_of(OP, name, box, "xs", first)
    return size
