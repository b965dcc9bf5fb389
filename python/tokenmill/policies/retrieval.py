"""Finding retrieval heads, by two kinds of texts."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_device_of_q,
    check_dtype,
    check_tensor,
    fail,
    show,
)
from ..dense.attention import attention
from ..select.attention_row_scores import attention_row_scores

NAME = "policies.profile_retrieval_heads"
REPEATED = "policies.profile_repeated_tokens"
CHOOSE = "policies.choose_retrieval_heads"
ROWS = 16  # steps whose scores are held in memory together


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
    r"""The fraction of a needle that each head of a layer copies while a model repeats it.

    A head copies token j of the needle in a step if j is the key of its largest weight and the step
    generates the token at j. A head's score is the fraction of the needle's tokens that it copies
    in some step; scores are averaged over needles, lengths and depths. Heads with a mean of at
    least 0.1 are retrieval heads: fewer than 5 %. :class:`RazorAttention` should keep a KV head if
    one of its query heads is a retrieval head.

    Args:
        q: ``[B, R, H, D]`` float16, bfloat16 or float32 (float64 on the reference): the queries of
            the R steps that generate the answer, after the rotary embedding.
        k: ``[B, S, Hk, D]``, Hk a divisor of H: the keys of the context and of the steps; the query
            of step r is at key S - R + r, and sees no later key.
        tokens: int32 or int64 ``[B, S]``, the tokens of the keys.
        answer: int32 or int64 ``[B, R]``, the token that each step generates.
        needle: (begin, end) of the tokens to repeat, 0 <= begin < end <= S.
        every_step: a token counts in each step that copies it, as in the released code, so a score
            may exceed 1; False: once, as in the paper.
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        float32 ``[B, H]``, 0 to 1 (every_step: up to R divided by the tokens of the needle). Not
        differentiable. Ties of weights go to the first key.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 B H R S D operations, and memory of B H S floats for each of 16 concurrent steps.

    Paper: Retrieval Head Mechanistically Explains Long-Context Factuality (Wu et al. 2024), section
    2. The released code averages over the texts whose answer has more than half of the needle's
    words.

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


def profile_repeated_tokens(
    q: Tensor,
    k: Tensor,
    period: int,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attention of each head of a layer to earlier occurrences of its token (echo), and to the
    tokens after these (induction), while a model reads repeated random tokens.

    .. math::
        echo = mean_i \sum_{m \ge 1} P_{i, i - m p}, \qquad
        induction = mean_i \sum_{m \ge 1} P_{i, i - m p + 1}

    with the causal softmax weights P and the period p, over the queries i of all repetitions but
    the first, and m back to the first repetition. A head that looks up earlier occurrences has a
    large score; the meaning of tokens plays no part.

    Args:
        q: ``[B, S, H, D]`` float16, bfloat16 or float32 (float64 on the reference), after the
            rotary embedding. The text ends with at least two repetitions of period random tokens;
            the S % period tokens before them, such as a begin token, are visible but do not count.
        k: ``[B, S, Hk, D]``, Hk a divisor of H.
        period: number of different random tokens, 1 to S // 2.
        scale: factor of q.k; None = 1/sqrt(D).
        softcap, sink: as in :func:`tokenmill.attention`.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        echo and induction, float32 ``[B, H]``, 0 to 1. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: causal attention once, for the normalisation; 2 S H relevant weights per earlier
    occurrence. Memory linear in S.

    Paper: RazorAttention (Tang et al. 2024), section 3.2. The release (golden-stick) divides by S^2
    instead of taking the mean, which does not change the order of heads.

    Example:
        >>> import torch, tokenmill as tm
        >>> k = 9 * torch.eye(5).repeat(3, 1).view(1, 15, 1, 5)  # five tokens, three times
        >>> after = k.roll(-1, 1)
        >>> echo, induction = tm.policies.profile_repeated_tokens(torch.cat([k, after], 2), k, 5)
        >>> torch.cat([echo, induction]).round(decimals=2)
        tensor([[0.5800, 0.0000],
                [0.0000, 0.9200]])
    """
    period = _check_repeated(q, k, period)
    q, k = q.detach(), k.detach()
    capped = as_number(REPEATED, "softcap", softcap)
    factor = q.shape[3] ** -0.5 if scale is None else as_number(REPEATED, "scale", scale)
    _, lse = attention(
        q, k, k, causal=True, scale=factor, softcap=capped, sink=sink, return_lse=True,
        backend=backend,
    )  # fmt: skip
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    counted = length - length % period - period  # queries with an earlier occurrence
    found = []
    for after in (0, 1):
        total = torch.zeros(q.shape[0], q.shape[2], dtype=lse.dtype, device=q.device)
        for back in range(period, length - length % period, period):
            queries = q[:, length % period + back :].to(lse.dtype)
            keys = k[:, length % period + after : length - back + after].to(lse.dtype)
            z = (queries.unflatten(2, (-1, group)) * keys[:, :, :, None]).sum(-1) * factor
            if capped > 0:
                z = capped * torch.tanh(z / capped)
            z = z.flatten(2).transpose(1, 2)  # [B, H, queries]
            total += (z - lse[..., length % period + back :]).exp().sum(-1)
        found.append((total / counted).float())
    return found[0], found[1]


def choose_retrieval_heads(
    echo: Tensor, induction: Tensor, *, echo_part: float = 0.01, induction_part: float = 0.14
) -> tuple[tuple[int, ...], ...]:
    r"""The KV heads of a model that should keep a full cache: the best by either score.

    Args:
        echo, induction: float ``[layers, Hk]``, the scores of each KV head: the largest over its
            query heads (see :func:`profile_repeated_tokens`).
        echo_part, induction_part: fraction of all heads of all layers taken for each score, 0 to 1,
            rounded to the nearest number; at least one if the fraction is not 0. Ties go to the
            first layer, then the first head. NaN is never chosen.

    Returns:
        The heads of each layer, ascending: the `retrieval` of :class:`RazorAttention`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: RazorAttention (Tang et al. 2024), section 3.2 and table 2. The release (golden-stick)
    takes all heads tied with the last one chosen, and none for a fraction below half a head.

    Example:
        >>> import torch, tokenmill as tm
        >>> echo = torch.tensor([[0.1, 0.7], [0.2, 0.3]])
        >>> tm.policies.choose_retrieval_heads(echo, 1 - echo, induction_part=0.5)
        ((0, 1), (0,))
    """
    for name, t in (("echo", echo), ("induction", induction)):
        check_tensor(CHOOSE, name, t)
        check_dtype(CHOOSE, name, t, float64=True)
        check(t.dim() == 2, CHOOSE, name, "must have 2 dimensions [layers, Hk]", t.dim())
    if induction.shape != echo.shape:
        rule = f"must have the shape of echo, {show(echo.shape)}"
        fail(CHOOSE, "induction", rule, induction.shape)
    check_device_of_q(CHOOSE, "induction", induction, echo)
    heads = echo.shape[1]
    chosen: set[int] = set()
    parts = (("echo_part", echo_part, echo), ("induction_part", induction_part, induction))
    for name, part, scores in parts:
        part = as_number(CHOOSE, name, part)
        check(0 <= part <= 1, CHOOSE, name, "must be 0 to 1", part)
        wanted = max(round(scores.numel() * part), 1) if part > 0 else 0
        flat = scores.flatten().nan_to_num(nan=-torch.inf)
        order = flat.sort(descending=True, stable=True).indices[:wanted]
        chosen |= {int(i) for i in order if flat[i] > -torch.inf}
    return tuple(
        tuple(h for h in range(heads) if layer * heads + h in chosen)
        for layer in range(echo.shape[0])
    )


def _check_repeated(q: Tensor, k: Tensor, period: int) -> int:
    for name, t in (("q", q), ("k", k)):
        check_tensor(REPEATED, name, t)
        check(t.dim() == 4, REPEATED, name, "must have 4 dimensions [B, S, H, D]", t.dim())
    rule = f"must have the tokens of q, {q.shape[1]}"
    check(k.shape[1] == q.shape[1], REPEATED, "k", rule, k.shape)
    rule = f"must be 1 to half of the tokens, {q.shape[1] // 2}"
    period = as_int(REPEATED, "period", period)
    check(1 <= period <= q.shape[1] // 2, REPEATED, "period", rule, period)
    return period


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
