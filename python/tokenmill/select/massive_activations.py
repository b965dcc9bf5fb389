"""massive_activations: tokens whose hidden state is massive in known dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._check import as_int, as_number, check, check_dtype, check_tensor, fail

OP = "massive_activations"


def massive_activations(
    hidden: Tensor, dims: Sequence[int], *, threshold: float = 20.0, eps: float = 1e-6
) -> Tensor:
    r"""The tokens whose hidden state is massive in one of a few dimensions: attention sinks.

    .. math::
       \max_{d \in dims} \frac{|x_d|}{\sqrt{\operatorname{mean}_c x_c^2 + eps}} > threshold

    Args:
        hidden: ``[B, S, C]`` float16, bfloat16 or float32 (float64 stays float64): the input of a
            decoder layer, before its norm.
        dims: the dimensions in which a language model has massive activations, -C to C - 1, at
            least one: (2533, 1415) for LLaMA-2 7B and (2100, 4743) for LLaMA-2 13B.
        threshold: tau of the paper, nonnegative.
        eps: added to the mean of squares.

    Returns:
        bool ``[B, S]``. Norms are float32. A NaN is not massive. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads hidden once.

    Paper: See What You Are Told (VAR, Kang et al. 2025), section 3; Massive Activations in Large
    Language Models (Sun et al. 2024).

    Example:
        >>> import torch, tokenmill as tm
        >>> hidden = torch.randn(1, 6, 4096).clamp(-3, 3)
        >>> hidden[0, [0, 3], 1415] = 200.0
        >>> tm.massive_activations(hidden, (2533, 1415)).nonzero()[:, 1].tolist()
        [0, 3]
    """
    check_tensor(OP, "hidden", hidden)
    check(hidden.dim() == 3, OP, "hidden", "must have 3 dimensions [B, S, C]", hidden.dim())
    check_dtype(OP, "hidden", hidden, float64=True)
    rule = "must be a sequence of at least one dimension"
    if not isinstance(dims, list | tuple) or not dims:
        fail(OP, "dims", rule, dims)
    channels = hidden.shape[2]
    places = [as_int(OP, "dims", d) for d in dims]
    for d in places:
        check(-channels <= d < channels, OP, "dims", f"must be below {channels}, in size", d)
    bound = as_number(OP, "threshold", threshold)
    check(0 <= bound < torch.inf, OP, "threshold", "must be finite and not negative", bound)
    floor = as_number(OP, "eps", eps)
    check(0 <= floor < torch.inf, OP, "eps", "must be finite and not negative", floor)
    x = hidden.detach()
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.to(wide).square().mean(-1)
    chosen = torch.stack([x[..., d] for d in places], -1).to(wide).abs().amax(-1)
    return chosen * torch.rsqrt(mean + floor) > bound
