"""Which heads copy: retrieval heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import as_int, check, check_bool, check_device_of_q, check_tensor, fail, show
from ..select.attention_row_scores import attention_row_scores

NAME = "policies.profile_retrieval_heads"
ROWS = 16  # steps whose scores are in memory together


def profile_retrieval_heads(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    answer: Tensor,
    needle: tuple[int, int],
    *,
    every_step: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The share of a needle that each head of a layer copies while a model repeats it.

    A head copies token j of the needle in a step if j is the key of its largest weight and the
    token that the step generates is that at j. A head's score is the share of the needle's tokens
    that it copies in some step; scores are averaged over needles, lengths and depths. Heads with a
    mean of 0.1 or more retrieve: fewer than 5 % do. A key head of which a query head retrieves is
    one for :class:`RazorAttention` to keep.

    Args:
        q: ``[B, R, H, D]`` float16, bfloat16 or float32 (float64 on the reference): the queries of
            the R steps that generate the answer, as the layer attends with them (rotated).
        k: ``[B, S, Hk, D]``, Hk a divisor of H: the keys of the context and of the steps; the
            query of step r is that of key S - R + r, and sees no later one.
        tokens: int32 or int64 ``[B, S]``, the tokens of the keys.
        answer: int32 or int64 ``[B, R]``, the token that each step generates.
        needle: (begin, end) of the tokens to repeat, 0 <= begin < end <= S.
        every_step: a token counts in each step that copies it, as in the released code, so that a
            score may be above 1; False: once, as in the paper.
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        float32 ``[B, H]``, 0 to 1 (every_step: up to R divided by the tokens of the needle). Not
        differentiable. Of equal weights the first is the largest.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 B H R S D operations, and memory of B H S floats for each of 16 steps at a time.

    Paper: Retrieval Head Mechanistically Explains Long-Context Factuality (Wu et al. 2024), section
    2. The released code counts a token again in each step that copies it.

    Example:
        >>> import torch, tokenmill as tm
        >>> tokens = torch.tensor([[7, 5, 6, 7, 9, 9]])
        >>> k = 9 * torch.eye(6).view(1, 6, 1, 6)
        >>> q = torch.stack([k[:, 1:3, 0], k[:, [1, 4], 0]], 2)  # head 0 looks at keys 1 and 2
        >>> tm.policies.profile_retrieval_heads(q, k, tokens, torch.tensor([[5, 6]]), (1, 3))
        tensor([[1.0000, 0.5000]])
    """
    begin, end = _check(q, k, tokens, answer, needle)
    check_bool(NAME, "every_step", every_step)
    steps, length = q.shape[1], k.shape[1]
    place = torch.arange(begin, end, device=q.device)
    copied = torch.zeros(*q.shape[::2][:2], end - begin, dtype=torch.int32, device=q.device)
    for first in range(0, steps, ROWS):
        rows = q[:, first : first + ROWS]
        seen = length - steps + first + rows.shape[1]
        at = attention_row_scores(
            rows, k[:, :seen], scale=scale, causal=True, reduce="argmax", backend=backend
        )  # [B, H, rows]
        same = tokens[:, None, begin:end] == answer[:, first : first + ROWS, None]
        copied += ((at[..., None] == place) & same[:, None]).sum(2, dtype=torch.int32)
    return (copied if every_step else copied.clamp(max=1)).float().mean(-1)


def _check(
    q: Tensor, k: Tensor, tokens: Tensor, answer: Tensor, needle: tuple[int, int]
) -> tuple[int, int]:
    for name, t in (("q", q), ("k", k)):
        check_tensor(NAME, name, t)
        check(t.dim() == 4, NAME, name, "must have 4 dimensions [B, S, H, D]", t.dim())
    rule = f"must have the keys of the {q.shape[1]} steps, and the batch size of q, {q.shape[0]}"
    fits = k.shape[1] >= q.shape[1] and k.shape[0] == q.shape[0]
    check(fits, NAME, "k", rule, k.shape)
    for name, t, shape in (("tokens", tokens, k.shape[:2]), ("answer", answer, q.shape[:2])):
        check_tensor(NAME, name, t)
        whole = t.dtype in (torch.int32, torch.int64)
        check(whole, NAME, name, "must be int32 or int64", t.dtype)
        if t.shape != shape:
            fail(NAME, name, f"must have shape {show(shape)}", t.shape)
        check_device_of_q(NAME, name, t, q)
    rule = f"must be (begin, end) with 0 <= begin < end <= {k.shape[1]}"
    pair = isinstance(needle, tuple | list) and len(needle) == 2
    check(pair, NAME, "needle", rule, needle)
    begin, end = (as_int(NAME, "needle", x, rule) for x in needle)
    check(0 <= begin < end <= k.shape[1], NAME, "needle", rule, needle)
    return begin, end
