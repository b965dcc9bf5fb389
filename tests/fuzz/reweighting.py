"""Valid calls of attention with modified logits or weights, and of functions that select tokens for
it.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenmill import nn, select, tokens
from tokenmill.dense import (
    amplified_attention,
    multi_subject_attention,
    redistributed_attention,
    sink_calibrated_attention,
)

COMPOSITIONS: dict[Any, tuple[Any, ...]] = {
    amplified_attention: (
        lambda r: {**r.qkv(19), "gains": r(2, 1, 19), "causal": True},
        lambda r: {**r.qkv(9), "gains": r(1, 4, 9), "rows": 3, "scale": 0.3},
    ),
    sink_calibrated_attention: (
        lambda r: {**r.qkv(19), "heads": [0, 3], "threshold": 0.06},
        lambda r: {**r.qkv(9), "beta": 0.0, "threshold": 0.0, "causal": False, "scale": 0.3},
    ),
    redistributed_attention: (
        lambda r: {
            **r.qkv(19), "image": (2, 9), "hidden": 4 * r(2, 19, 8), "sink_dims": (0, 3),
            "tau": 1.5, "rho": 0.75,
        },
        lambda r: {**r.qkv(9), "image": [0, 5], "sinks": r.bools(1, 9), "p": 0.0, "scale": 0.3},
    ),
    multi_subject_attention: (
        lambda r: {
            **r.qkv(12), "k_ref": r(2, 2, 12, 2, 16), "v_ref": r(2, 2, 12, 2, 16),
            "subjects": r.ints(3, 2, 12), "ref_masks": r.bools(1, 2, 12), "grid": (3, 4),
        },
        lambda r: {
            **r.qkv(6), "k_ref": r(2, 1, 6, 2, 16), "v_ref": r(2, 1, 6, 2, 16),
            "subjects": r.ints(2, 1, 6), "ref_masks": r.bools(2, 1, 6), "grid": (2, 3),
            "referring": r.bools(2, 6), "mode": "bilinear",
        },
    ),
    select.paint_tokens: (
        lambda r: {"first_scores": r(2, 20), "late_scores": r(2, 20)},
        lambda r: {
            "first_scores": r(1, 9), "late_scores": r(1, 9), "local_share": 0.5, "whisker": 0.0,
        },
    ),
    select.massive_activations: (
        lambda r: {"hidden": r(2, 7, 8), "dims": (0, -1), "threshold": 1.0},
    ),
    tokens.subject_boxes: (
        lambda r: {"mask": r.bools(2, 12), "grid": (3, 4)},
        lambda r: {"mask": r.bools(6), "grid": (6, 1)},
    ),
    tokens.reposition_tokens: (
        lambda r: {
            "xs": r(2, 12, 8), "source": torch.tensor([[0, 1, 2, 4]]),
            "target": torch.tensor([[1, 0, 3, 2], [0, 0, 3, 4]]), "grid": (3, 4),
        },
        lambda r: {
            "xs": [r(1, 12, 2, 8), r(1, 12, 3)], "source": torch.tensor([[0, 1, 2, 4]]).int(),
            "target": torch.tensor([[0, 0, 3, 4]]).int(), "grid": (3, 4), "mode": "bilinear",
        },
    ),
}  # fmt: skip

MODULES: tuple[tuple[type[torch.nn.Module], str, tuple[Any, ...]], ...] = (
    (nn.PromptTokenPool, "forward", (
        lambda r: {"dim": 8, "num_prompts": 5, "match": "nearest", "x": r(2, 7, 8)},
        lambda r: {"dim": 8, "num_prompts": 5, "match": "nearest", "share": 0.5, "x": r(1, 4, 8),
                   "chosen": r.bools(1, 4)},
    )),
)  # fmt: skip

# Functions that use PyTorch's matrix products.
PLAIN: tuple[Any, ...] = (amplified_attention, nn.PromptTokenPool)
