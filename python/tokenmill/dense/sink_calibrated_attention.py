"""sink_calibrated_attention: moves part of the weight of attention sinks to other keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import as_int, as_number, check, check_bool, check_qkv, fail
from ..select.attention_column_scores import attention_column_scores
from .attention import attention
from .reweighted_attention import reweighted_attention

OP = "sink_calibrated_attention"


@Autocast(lower=("q", "k", "v")).applied
def sink_calibrated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: Sequence[int] | None = None,
    beta: float = 0.4,
    threshold: float = 0.1,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax attention that scales down all sinks but the first in chosen heads.

    A key is a sink of a head if its mean weight, over the queries that see it, is above threshold.
    The first sink is unchanged. The weights of the other sinks S are multiplied by beta, and the
    weight removed from a row goes to the keys outside S, in proportion to their weights:

    .. math::
       P'_{ij} = \beta P_{ij} \;(j \in S), \qquad
       P'_{ij} = P_{ij} \Bigl(1 + \frac{(1 - \beta) \sum_{l \in S} P_{il}}
       {\sum_{l \notin S} P_{il}}\Bigr) \;(j \notin S)

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``; Hk divides H (GQA).
        heads: query heads that are calibrated, 0 to H - 1, each once; None = all. The others have
            plain attention.
        beta: fraction of its weight that a sink keeps, 0 to 1.
        threshold: mean weight above which a key is a sink, 0 to 1.
        causal: query i sees keys j <= i + Sk - Sq (bottom-right aligned).
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q. A query with no visible key has out 0. Gradients:
        q, k, v, not through the choice of sinks.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: one pass of :func:`attention`; for the calibrated heads also
    :func:`attention_column_scores` and the three passes of :func:`reweighted_attention`. Memory is
    linear in Sq and Sk.

    Paper: Unveiling and Harnessing Hidden Attention Sinks (ACT, Yu et al. 2024), section 4. The
    released evaluation uses these defaults and calibrates a list of heads in each of the layers 2
    to 30 of 32; its chat evaluation uses threshold 0.15.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 50, 4, 32) for _ in range(3))
        >>> tm.sink_calibrated_attention(q, k, v, heads=[1, 3]).shape
        torch.Size([1, 50, 4, 32])
    """
    chosen, keep, bound = _check(q, k, v, heads, beta, threshold, causal)
    out, lse = attention(q, k, v, scale=scale, causal=causal, return_lse=True, backend=backend)
    if not chosen:
        return out
    own = None
    if len(chosen) < q.shape[2]:
        ratio = q.shape[2] // k.shape[2]
        own = torch.tensor(chosen, device=q.device)
        q, lse = q.index_select(2, own), lse.index_select(1, own)
        k, v = (t.index_select(2, own // ratio) for t in (k, v))
    with torch.no_grad():
        means = attention_column_scores(
            q.detach(), k.detach(), lse.detach(), causal=causal, reduce="visible_mean",
            scale=scale, backend=backend,
        )  # fmt: skip
        sinks = means > bound
        sinks = sinks & (sinks.cumsum(-1) > 1)  # the first sink is unchanged
    wide = torch.promote_types(q.dtype, torch.float32)
    factors = torch.tensor([1.0, keep], dtype=wide, device=q.device)
    changed = reweighted_attention(
        q, k, v, sinks.int(), factors, causal=causal, scale=scale, backend=backend
    )
    return changed if own is None else out.index_copy(2, own, changed)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Sequence[int] | None,
    beta: float,
    threshold: float,
    causal: bool,
) -> tuple[list[int], float, float]:
    check_qkv(OP, q, k, v, 4, True)
    check_bool(OP, "causal", causal)
    count = q.shape[2]
    chosen = list(range(count))
    if heads is not None:
        if not isinstance(heads, list | tuple | range):
            fail(OP, "heads", "must be a sequence of heads or None", heads)
        chosen = [as_int(OP, "heads", h) for h in heads]
        for h in chosen:
            check(0 <= h < count, OP, "heads", f"must be 0 to {count - 1}", h)
        check(len({*chosen}) == len(chosen), OP, "heads", "must name each head once", heads)
    keep, bound = as_number(OP, "beta", beta), as_number(OP, "threshold", threshold)
    for name, value in (("beta", keep), ("threshold", bound)):
        check(0 <= value <= 1, OP, name, "must be 0 to 1", value)
    return chosen, keep, bound
