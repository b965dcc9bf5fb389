"""multi_subject_attention: isolates the subjects of an image and repositions their references."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import masks
from .._call.autocast import Autocast
from .._check import (
    check,
    check_bool,
    check_device_of_q,
    check_dtype_of,
    check_last_contiguous,
    check_qkv,
    check_tensor,
    fail,
    is_any,
    reads_values,
)
from ..tokens.reposition_tokens import Mode, check_grid, reposition_tokens, subject_boxes
from .attention import attention

OP = "multi_subject_attention"


@Autocast(lower=("q", "k", "v", "k_ref", "v_ref")).applied
def multi_subject_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    subjects: Tensor,
    ref_masks: Tensor,
    grid: tuple[int, int],
    *,
    referring: Tensor | None = None,
    reposition: bool = True,
    mode: Mode = "nearest",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax attention of an image with several subjects to itself and to a reference image of
    each subject (isolation and reposition attention).

    A query of subject r sees the background and the tokens of subject r in its own image, and the
    tokens of subject r in reference r, whose box is resampled onto the box of subject r first
    (:func:`reposition_tokens`). A background query sees its own image and no reference.

    Args:
        q: ``[B, N, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256; token i is the cell of row i // width and
            column i % width of the image.
        k, v: ``[B, N, Hk, D]`` and ``[B, N, Hk, Dv]`` of the image; Hk divides H (GQA).
        k_ref, v_ref: ``[B, R, N, Hk, D]`` and ``[B, R, N, Hk, Dv]`` of R references, on a grid of
            the same size.
        subjects: int32 or int64 ``[B | 1, N]``, the subject of each token of the image, 1 to R; 0
            is background.
        ref_masks: bool ``[B | 1, R, N]``, the tokens of subject r in reference r (from 0).
        grid: (height, width) with height * width = N.
        referring: bool ``[B | 1, N]``, the queries that see the references; None = all. The
            released code draws half of them in each layer, for more varied images.
        reposition: False keeps the references at their positions.
        mode: how references are resampled, "nearest" or "bilinear"; masks always by "nearest".
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, N, H, Dv]`` in the dtype of q. Gradients: q, k, v, k_ref, v_ref.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs. On a GPU a subject
            above R sees the background and itself.

    Complexity: :func:`attention` of N queries to (R + 1) N keys, skipping fully masked tiles; a
    copy of all keys and values.

    Paper: Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and
    Reposition Attention (IR-Diffusion, He et al. 2024).

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
        >>> k_ref, v_ref = (torch.randn(1, 2, 64, 2, 16) for _ in range(2))
        >>> subjects = torch.zeros(8, 8, dtype=torch.int32)
        >>> subjects[1:4, :3], subjects[2:8, 5:] = 1, 2
        >>> ref_masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
        >>> ref_masks[:, :, 2:6, 2:6] = True
        >>> tm.multi_subject_attention(
        ...     q, k, v, k_ref, v_ref, subjects.view(1, 64), ref_masks.flatten(2), (8, 8)
        ... ).shape
        torch.Size([1, 64, 2, 16])
    """
    _check(q, k, v, k_ref, v_ref, subjects, ref_masks, referring)
    check_bool(OP, "reposition", reposition)
    batch, count, tokens = k_ref.shape[:3]
    size = check_grid(OP, grid, "q", tokens)
    ids = torch.arange(1, count + 1, dtype=torch.int32, device=q.device)
    found = subjects.int().expand(batch, -1)
    shown = ref_masks.expand(batch, -1, -1)
    own = found[:, None] == ids[:, None]  # [B, R, N], the tokens of each subject
    k_refs, v_refs = (
        t.masked_fill(~shown[..., None, None], 0).flatten(0, 1) for t in (k_ref, v_ref)
    )  # [B R, N, Hk, D]
    placed = shown.flatten(0, 1)
    if reposition:
        source, target = (subject_boxes(m, size).flatten(0, 1) for m in (shown, own))
        k_refs, v_refs = reposition_tokens(
            (k_refs, v_refs), source, target, size, mode=mode, backend=backend
        )
        moved = reposition_tokens(placed[..., None].float(), source, target, size, backend=backend)
        placed = moved[..., 0] > 0
    keys, values = (
        torch.cat((t.unflatten(0, (batch, count)).flatten(1, 2), mine), 1)
        for t, mine in ((k_refs, k), (v_refs, v))
    )
    placed = placed.view(batch, count, tokens)
    ref_ids = torch.where(placed, ids[:, None], -1).flatten(1)  # -1: in no query's segment
    segments = masks.segments(found, torch.cat((ref_ids, found), 1), shared=0)
    refers = found > 0 if referring is None else (found > 0) & referring
    begin = torch.where(refers, 0, count * tokens).int()[:, None, :, None]
    ranges = masks.ranges(begin, torch.full_like(begin, (count + 1) * tokens))
    return attention(q, keys, values, mask=(segments, ranges), scale=scale, backend=backend)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    subjects: Tensor,
    ref_masks: Tensor,
    referring: Tensor | None,
) -> None:
    given = {"q": q, "k": k, "v": v, "k_ref": k_ref, "v_ref": v_ref, "subjects": subjects}
    for name, t in {**given, "ref_masks": ref_masks}.items():
        check_tensor(OP, name, t)
    check_tensor(OP, "referring", referring, optional=True)
    check_qkv(OP, q, k, v, 4, True)
    batch, tokens = q.shape[:2]
    check(k.shape[1] == tokens, OP, "k", f"must have the {tokens} tokens of q", k.shape[1])
    for name, t, like in (("k_ref", k_ref, k), ("v_ref", v_ref, v)):
        check(t.dim() == 5, OP, name, "must have 5 dimensions [B, R, N, H, D]", t.dim())
        check_dtype_of(OP, name, t, "q", q)
        check_device_of_q(OP, name, t, q)
        check_last_contiguous(OP, name, t)
        if t.shape[:1] + t.shape[2:] != like.shape:
            rule = f"must have the shape of {name[0]} but for references in dimension 1"
            fail(OP, name, rule, t.shape)
    count = k_ref.shape[1]
    check(v_ref.shape[1] == count, OP, "v_ref", f"must have {count} references", v_ref.shape[1])
    ok = subjects.dtype in (torch.int32, torch.int64)
    check(ok, OP, "subjects", "must be int32 or int64", subjects.dtype)
    check(ref_masks.dtype == torch.bool, OP, "ref_masks", "must be bool", ref_masks.dtype)
    if not is_any(tuple(ref_masks.shape), (1, count, tokens), (batch, count, tokens)):
        rule = f"must have shape [{batch} or 1, {count}, {tokens}]"
        fail(OP, "ref_masks", rule, ref_masks.shape)
    for name, ids in (("subjects", subjects), ("referring", referring)):
        if ids is not None and not is_any(tuple(ids.shape), (1, tokens), (batch, tokens)):
            fail(OP, name, f"must have shape [{batch} or 1, {tokens}]", ids.shape)
    if referring is not None:
        check(referring.dtype == torch.bool, OP, "referring", "must be bool", referring.dtype)
        check_device_of_q(OP, "referring", referring, q)
    check_device_of_q(OP, "subjects", subjects, q)
    check_device_of_q(OP, "ref_masks", ref_masks, q)
    if reads_values(subjects) and subjects.numel():
        low, high = int(subjects.min()), int(subjects.max())
        check(low >= 0, OP, "subjects", f"must be 0 to {count}", low)
        check(high <= count, OP, "subjects", f"must be 0 to {count}", high)
