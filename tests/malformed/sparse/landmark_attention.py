"""Malformed calls of landmark_attention."""

from __future__ import annotations

from malformed import Malformed, set_argument, set_options
from torch import Tensor

# Edits of the first sample: q [2, 70, 4, 32], k and v [2, 70, 2, 32].
CALLS = (
    Malformed("small block", "block: must be 2 to 2^31 - 1; got 1", set_options(block=1)),
    Malformed(
        "large block", "block: must be 2 to 2^31 - 1; got 2147483648", set_options(block=2**31)
    ),
    Malformed(
        "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "dtypes", "k: must have the dtype of q, float32; got float16", set_argument(1, Tensor.half)
    ),
    Malformed(
        "lengths", "k: must have the length of q, 69; got 70", set_argument(0, lambda q: q[:, 1:])
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got inf", set_options(scale=float("inf"))
    ),
)
