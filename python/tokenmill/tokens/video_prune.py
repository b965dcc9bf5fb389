"""video_prune: drops the patches of a video that resemble the frame before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._check import (
    as_number,
    check,
    check_device_of,
    check_dtype,
    check_last_contiguous,
    check_tensor,
    fail,
)
from .gather_tokens import gather_tokens
from .topk_partition import topk_partition

OP = "video_prune"
EPS = 1e-8  # minimum norm, as in torch.nn.functional.cosine_similarity
AT_ONCE = 2**22  # products in memory: 16 MiB stay in caches, and below malloc's limit of 32 MiB


def video_prune(
    frames: Tensor,
    keep_rate: float,
    *,
    scores: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Keeps the first frame of a video and the patches that differ most from the same place in the
    frame before:

    .. math::
       d_{tn} = 1 - \cos(x_{tn}, x_{t-1,n}), \qquad t \geq 1

    The K largest over the whole video are kept, in their order, with
    :math:`K = \max(N, \lfloor keep\_rate \; T N \rfloor)`: frames that change have more tokens.

    Args:
        frames: ``[B, T, N, C]`` float16, bfloat16 or float32 (float64 on the reference), any
            strides with a contiguous last dimension: T frames of N patches, after the projector.
            All videos have the same size.
        keep_rate: share of the tokens to keep, above 0 and at most 1: 1 - q of the paper. The
            number is computed as ``int(T * N * keep_rate)``.
        scores: ``[B, T, N]`` float16, bfloat16 or float32 (float64 on the reference), d of another
            kind, such as the difference of pixels; those of the first frame are not read.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (tokens ``[B, K, C]``, indices int32 ``[B, K]``, counts int32 ``[B, T]``): the kept tokens,
        their places t N + n, ascending, and the number of tokens of each frame. Position ids,
        M-RoPE's too, are gathered by indices, so that tokens keep their positions. Differentiable
        in frames, but not in the choice.

        d is computed in float32, also for 16-bit features, and is 0 for a patch that does not
        change, but 1 for one of zeros. Ties go to the lower index. NaN counts as -inf: after the
        first frame, a patch that is not finite and its successor are the first to leave.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads frames once, for a few frames at a time, and writes the kept tokens; no
    synchronisation with the host.

    Paper: Efficient Video Sampling (EVS, Bagrov et al. 2025), as released in vLLM: cosines of
    embeddings, a number of tokens that is fixed by the rate. The text compares pixels instead.

    Example:
        >>> import torch, tokenmill as tm
        >>> frames = torch.randn(1, 1, 6, 8).repeat(1, 4, 1, 1)  # four equal frames of 6 patches
        >>> frames[0, 2:, 4] = -frames[0, 0, 4]  # from the third on, patch 4 is another
        >>> tokens, indices, counts = tm.video_prune(frames, 0.3)
        >>> indices.tolist(), counts.tolist()
        ([[0, 1, 2, 3, 4, 5, 16]], [[6, 0, 1, 0]])
    """
    rate = _check(frames, keep_rate, scores)
    batch, count, patches, _ = frames.shape
    changes = _changes(frames.detach()) if scores is None else scores.detach()
    kept = max(patches, int(count * patches * rate))
    indices, _ = topk_partition(
        changes.flatten(1), kept, order="index", protect_first=patches, backend=backend
    )
    tokens = gather_tokens(frames.flatten(1, 2), indices, backend=backend)
    frame = (indices // max(patches, 1)).long()
    counts = indices.new_zeros(batch, count).scatter_add(1, frame, torch.ones_like(indices))
    return tokens, indices, counts


def _changes(frames: Tensor) -> Tensor:
    """float32 [B, T, N]: 1 - cosine of each patch and of the same patch in the frame before; 0 in
    the first frame.
    """
    batch, count, patches, channels = frames.shape
    step = max(AT_ONCE // max(batch * patches * channels, 1), 1)
    starts: Sequence[int] = range(0, count - 1, step)
    if torch.compiler.is_compiling():  # fuses products and sums
        starts, step = [0], count
    wide = torch.promote_types(frames.dtype, torch.float32)
    parts = [frames.new_zeros(batch, 1, patches, dtype=wide)]
    for start in starts:
        x = frames[:, start : start + step + 1].to(wide)
        new, old = x[:, 1:], x[:, :-1]
        # Sums of one shape have one order, and sqrt(s * s) is s: the cosine of equal patches is 1.
        norms = [t.square().sum(-1).clamp(min=EPS * EPS) for t in (new, old)]
        parts.append(1 - (new * old).sum(-1) / (norms[0] * norms[1]).sqrt())
    return torch.cat(parts, 1)


def _check(frames: Tensor, keep_rate: float, scores: Tensor | None) -> float:
    check_tensor(OP, "frames", frames)
    check(frames.dim() == 4, OP, "frames", "must have 4 dimensions [B, T, N, C]", frames.dim())
    check_dtype(OP, "frames", frames, float64=True)
    check_last_contiguous(OP, "frames", frames)
    check(frames.shape[1] >= 1, OP, "frames", "must have at least 1 frame", frames.shape[1])
    rate = as_number(OP, "keep_rate", keep_rate)
    check(0 < rate <= 1, OP, "keep_rate", "must be above 0 and at most 1", rate)
    check_tensor(OP, "scores", scores, optional=True)
    if scores is not None:
        if scores.shape != frames.shape[:3]:
            wanted = list(frames.shape[:3])
            fail(OP, "scores", f"must have shape {wanted}, the tokens of frames", scores.shape)
        check_dtype(OP, "scores", scores, float64=True)
        check_device_of(OP, "scores", scores, "frames", frames)
    return rate
