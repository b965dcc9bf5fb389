"""sigmoid_attention: sigmoid attention with the score bias of its paper."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from .attention import attention
from .attention_options import SigmoidOptions
from .terms import ScoreBias


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_bias: ScoreBias = "neg_log_n",
    **options: Unpack[SigmoidOptions],
) -> Tensor:
    r"""Sigmoid attention: :func:`attention` with kind="sigmoid" and a score bias of -log n.

    The default bias keeps the sum of a row of weights near 1 at initialisation, whatever the number
    of keys: :math:`n\,\sigma(-\log n) = n / (n + 1)`.

    Args:
        q, k, v: as in :func:`attention`; a fused tensor ``[B, S, 3, H, D]``, as in the published
            code, is passed as ``*qkv.unbind(2)``, which copies nothing.
        score_bias: as in :func:`attention`; default "neg_log_n".
        options: every other keyword of :func:`attention` except sink, post_decay and return_lse.
            With normalize="sum" a row of weights sums to 1 for any number of keys.

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: as :func:`attention`; without normalize the backward needs neither out nor row
    statistics.

    Paper: Theory, Analysis, and Best Practices for Sigmoid Self-Attention (Ramapuram et al. 2024),
    sections 2 and 5.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 64, 4, 32)
        >>> tm.sigmoid_attention(x, x, torch.ones_like(x), scale=0.0)[0, 0, 0, 0]
        tensor(0.9846)
    """
    return attention(q, k, v, kind="sigmoid", score_bias=score_bias, **options)
