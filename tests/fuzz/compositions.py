"""Valid calls of functions composed of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz import reweighting
from fuzz.targets import Arguments, Target, with_backend
from tokenmill import linear, masks, nn, policies, select, sparse, tokens
from tokenmill.dense import (
    additive_attention,
    pattention,
    pointer_argmax,
    reweighted_attention,
    sigmoid_attention,
    soft_causal_attention,
)
from tokenmill.registry import Sample


class Draw:
    """Draws the tensors of a call, from its dtype and generator."""

    def __init__(self, dtype: torch.dtype, g: torch.Generator):
        self.dtype, self.g = dtype, g

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g).to(self.dtype)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.g, dtype=torch.int32)

    def bools(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g) < 0.5

    def qkv(self, s: int, h: int = 4, hk: int = 2, d: int = 16, b: int = 2) -> Arguments:
        return {"q": self(b, s, h, d), "k": self(b, s, hk, d), "v": self(b, s, hk, d)}

    def gates(self, *shape: int) -> Arguments:
        return {name: self(*shape).float().sigmoid() / 8 for name in ("alpha", "eta", "theta")}

    def cache(self, s: int, hk: int = 2, d: int = 16, b: int = 2) -> Arguments:
        return {"k_cache": self(b, s, hk, d), "v_cache": self(b, s, hk, d)}


Make = Callable[[Draw], Arguments]


def samples_of(makes: tuple[Make, ...]) -> tuple[Sample, ...]:
    return tuple(
        Sample(str(i), lambda dtype, g, make=make: ((), make(Draw(dtype, g))))  # type: ignore[misc]
        for i, make in enumerate(makes)
    )


def given_by(sample: Sample, dtype: torch.dtype, g: torch.Generator) -> Arguments:
    return sample.make(dtype, g)[1]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE = [[0, 2, 4, 6], [1, 3, 5, 7]]  # pages of two requests

COMPOSITIONS: dict[Callable[..., Any], tuple[Make, ...]] = {
    masks.prefix: (lambda r: {"lengths": int32(3, 0)},),
    masks.segments: (
        lambda r: {"q_ids": r.ints(3, 2, 9), "k_ids": r.ints(3, 1, 9), "rule": "not_after"},
        lambda r: {"q_ids": r.ints(3, 9), "shared": 1},
    ),
    masks.ranges: (lambda r: {"begin": r.ints(9, 1, 1, 9, 2), "end": r.ints(9, 1, 1, 9, 2)},),
    masks.grid: (lambda r: {"width": 4, "distance": "manhattan", "window": 2},),
    masks.decay2d: (lambda r: {"gamma": r(4).abs(), "width": 4, "window": 2},),
    sigmoid_attention: (
        lambda r: {**r.qkv(19), "causal": True, "window": (5, 0)},
        lambda r: {
            **r.qkv(9), "bias": r(1, 4, 9, 9), "alibi_slopes": r(4), "softcap": 3.0,
            "normalize": "sum",
        },
        lambda r: {
            "q": r(11, 4, 16), "k": r(11, 2, 16), "v": r(11, 2, 16), "max_seqlen_q": 7,
            "cu_seqlens_q": int32(0, 4, 4, 11), "score_bias": 0.5,
        },
    ),
    additive_attention: (
        lambda r: {"q": r(2, 3, 4), "k": r(2, 5, 4), "v_weight": r(4), "values": r(2, 5, 6)},
        lambda r: {
            "q": r(2, 3, 4), "k": r(2, 5, 4), "v_weight": r(4), "values": r(2, 5, 6),
            "mask": r.bools(2, 5),
        },
    ),
    pointer_argmax: (
        lambda r: {"q": r(2, 3, 4), "k": r(2, 5, 4), "v_weight": r(4), "mask": r.bools(2, 3, 5)},
    ),
    pattention: (
        lambda r: {"x": r(2, 5, 8), "key_tokens": r(6, 8), "value_tokens": r(6, 4)},
        lambda r: {
            "x": r(7, 8), "key_tokens": r(3, 8), "value_tokens": r(3, 16),
            "activation": "gelu_l2_norm", "norm_scale": 2.0, "scale": 0.5,
        },
    ),
    soft_causal_attention: (
        lambda r: {**r.qkv(19), "alpha": 0.25},
        lambda r: {**r.qkv(9), "alpha": torch.tensor(0.5), "scale": 0.3},
    ),
    reweighted_attention: (
        lambda r: {
            **r.qkv(19), "groups": r.ints(3, 2, 1, 19), "factors": torch.tensor([1.0, 0.5, 0.0]),
        },
        lambda r: {
            **r.qkv(9), "groups": r.ints(2, 1, 4, 9), "factors": r(4, 2).abs(), "causal": True,
            "renormalize": "none",
        },
    ),
    linear.lightning_attention: (
        lambda r: {**r.qkv(21), "slopes": r(4).float().abs()},
        lambda r: {
            "q": r(9, 4, 16), "k": r(9, 4, 16), "v": r(9, 4, 8), "slopes": r(4).float().abs(),
            "cu_seqlens": int32(0, 4, 9), "return_final_state": True,
        },
    ),
    linear.lightning_slopes: (
        lambda r: {"num_heads": 6},
        lambda r: {"num_heads": 4, "layer": 1, "num_layers": 3, "convention": "paper"},
    ),
    linear.titans_memory_decode: (
        lambda r: {
            **r.qkv(2, hk=4), **r.gates(2, 2, 4), "start": r(3, 4, 16, 16).float(),
            "memory": r(3, 4, 16, 16).float(), "momentum": r(3, 4, 16, 16).float(),
            "filled": int32(0, 5, 1), "chunk_size": 6, "state_indices": int32(2, 1),
        },
        lambda r: {
            **r.qkv(1, hk=4), **r.gates(2, 1, 4), "start": r(2, 4, 16, 16).float(),
            "memory": r(2, 4, 16, 16).float(), "momentum": r(2, 4, 16, 16).float(),
            "filled": int32(0, 63),
        },
    ),
    sparse.landmark_decode: (
        lambda r: {
            "q": r(2, 1, 4, 16), **r.cache(24), "seqlens_k": int32(24, 11), "block": 5, "topk": 2,
        },
        lambda r: {
            "q": r(2, 1, 4, 16), **r.cache(8, b=8), "seqlens_k": int32(32, 9),
            "block_table": torch.tensor(TABLE, dtype=torch.int32), "block": 5, "topk": 2,
            "return_lse": True,
        },
        lambda r: {
            "q": r(2, 3, 4, 16), **r.cache(24), "seqlens_k": int32(24, 11), "block": 5, "topk": 2,
            "share": "queries", "rope": (r(22, 8).cos(), r(22, 8).sin()), "interleaved": True,
            "scale": 0.3,
        },
    ),
    sparse.core_context_attention: (
        lambda r: {**r.qkv(37), "group": 4, "window": 8, "return_lse": True},
        lambda r: {**r.qkv(37), "cores": "kv", "group": 4, "window": 6, "scale": 0.3},
    ),
    sparse.moba_attention: (
        lambda r: {
            **r.qkv(37), "block": 4, "topk": 3, "seqlens_k": int32(37, 9), "return_lse": True,
        },
    ),
    sparse.native_sparse_attention: (
        lambda r: {
            **r.qkv(37), "gates": r(2, 37, 4, 3).sigmoid(), "block": 8, "stride": 4,
            "select_block": 8, "topk": 3, "window": 6, "scale": 0.3,
        },
        lambda r: {
            **r.qkv(37), "gates": r(2, 37, 4, 3).float(), "block": 4, "stride": 4,
            "select_block": 8, "topk": 4, "window": 9, "k_compressed": r(2, 9, 2, 16),
            "v_compressed": r(2, 9, 2, 16), "k_window": r(2, 37, 2, 16),
            "v_window": r(2, 37, 2, 16),
        },
    ),
    sparse.hip_attention: (
        lambda r: {
            **r.qkv(40), "budget": 8, "block_q": 8, "block_k": 4, "num_sink": 4, "num_recent": 8,
            "seqlens_k": int32(40, 21),
        },
        lambda r: {
            "q": r(2, 1, 4, 16), "k": r(8, 8, 2, 16), "v": r(8, 8, 2, 16), "budget": 8,
            "block_q": 8, "num_recent": 8, "seqlens_k": int32(32, 9),
            "block_table": torch.tensor(TABLE, dtype=torch.int32), "lists": sparse.HipLists(),
            "refresh_interval": 3,
        },
        lambda r: {
            **r.qkv(40), "budget": 8, "block_q": 8, "num_recent": 8, "seqlens_q": int32(40, 3),
            "seqlens_k": int32(40, 21), "return_lse": True,
        },
        lambda r: {
            "q": r(20, 4, 16), "k": r(8, 8, 2, 16), "v": r(8, 8, 2, 16), "budget": 8,
            "block_q": 8, "num_recent": 8, "seqlens_k": int32(32, 9),
            "cu_seqlens_q": int32(0, 19, 20), "max_seqlen_q": 19,
            "block_table": torch.tensor(TABLE, dtype=torch.int32), "num_splits": 2,
        },
        lambda r: {
            "q": r(20, 4, 16), "k": r(33, 2, 16), "v": r(33, 2, 16), "budget": 8, "block_q": 8,
            "num_recent": 8, "cu_seqlens_q": int32(0, 19, 20), "cu_seqlens_k": int32(0, 30, 33),
            "max_seqlen_k": 30,
        },
    ),
    select.token_select: (
        lambda r: {
            "q": r(2, 3, 4, 16), "k_cache": r(2, 40, 2, 16), "k": 5, "num_sink": 2,
            "num_recent": 4, "seqlens_k": int32(40, 9), "kernel_size": 3,
        },
        lambda r: {
            "q": r(2, 1, 4, 16), "k_cache": r(8, 8, 2, 16), "k": 5, "num_sink": 2,
            "num_recent": 4, "seqlens_k": int32(32, 9),
            "block_table": torch.tensor(TABLE, dtype=torch.int32),
        },
    ),
    select.visual_select: (
        lambda r: {
            "x": r(2, 17, 8), "keep": 4, "q": r(2, 1, 4, 16), "k": r(2, 17, 2, 16),
            "image": (1, 17), "merge": 5, "scale": 0.3,
        },
        lambda r: {"x": r(2, 17, 8), "keep": 4, "q": r(2, 17, 4, 16), "k": r(2, 17, 2, 16),
                   "causal": True, "image": [3, 12]},
        lambda r: {"x": r(2, 9, 8), "keep": 3, "scores": r(2, 9), "merge": 2,
                   "metric": r(2, 9, 4)},
    ),
    select.indexer_kl_loss: (
        lambda r: {
            "q": r(2, 3, 4, 16), "k": r(2, 9, 16), "weights": r(2, 3, 4),
            "indices": int32(0, 4, 8, -1).repeat(2, 3, 1), "counts": r.ints(4, 2, 3),
            "target": r(2, 3, 4).abs(),
        },
    ),
    tokens.merge_tokens: (
        lambda r: {
            "x": r(2, 9, 8), "assign": r.ints(4, 2, 9) - 1, "num_out": 3, "reduce": "sum",
            "weight": r(2, 9).float().abs(),
        },
        lambda r: {"x": r(9, 8), "assign": r.ints(3, 9).long(), "num_out": 3, "reduce": "amax"},
    ),
    tokens.unmerge_tokens: (lambda r: {"y": r(2, 4, 8), "assign": r.ints(5, 2, 9) - 1},),
    tokens.bipartite_match: (
        lambda r: {"metric": r(2, 13, 8), "r": 4, "protect_first": 1},
        lambda r: {"metric": r(2, 13, 8), "r": 4, "partition": "grid", "grid": (3, 4),
                   "cell": (2, 2), "protect_first": 1},
        lambda r: {"metric": r(2, 13, 8), "r": 4, "partition": "index",
                   "destinations": torch.tensor([2, 5, 7]), "threshold": 0.1},
        lambda r: {"metric": r(2, 13, 8), "r": 4, "partition": "kth", "group": 3},
        lambda r: {"metric": r(2, 13, 8), "r": 4, "partition": "random"},
    ),
    tokens.video_prune: (
        lambda r: {"frames": r(2, 4, 6, 8), "keep_rate": 0.5},
        lambda r: {"frames": r(1, 3, 4, 8), "keep_rate": 0.8, "scores": r(1, 3, 4)},
    ),
    policies.profile_retrieval_heads: (
        lambda r: {
            "q": r(2, 3, 4, 16), "k": r(2, 11, 2, 16), "tokens": r.ints(9, 2, 11),
            "answer": r.ints(9, 2, 3), "needle": (2, 6), "scale": 0.3,
        },
        lambda r: {
            "q": r(2, 3, 4, 16), "k": r(2, 11, 2, 16), "tokens": r.ints(9, 2, 11),
            "answer": r.ints(9, 2, 3), "needle": (2, 6), "every_step": True,
        },
    ),
    policies.profile_repeated_tokens: (
        lambda r: {"q": r(2, 11, 4, 16), "k": r(2, 11, 2, 16), "period": 5, "scale": 0.3},
        lambda r: {"q": r(1, 9, 4, 16), "k": r(1, 9, 2, 16), "period": 3, "softcap": 2.0,
                   "sink": r(4).float()},
    ),
    policies.choose_retrieval_heads: (
        lambda r: {"echo": r(3, 4), "induction": r(3, 4), "echo_part": 0.1,
                   "induction_part": 0.25},
    ),
    nn.keep_rate_schedule: (
        lambda r: {"step": 30, "steps_per_epoch": 5, "base_rate": 0.6, "start": 2, "epochs": 9},
    ),
    nn.segments_of: (lambda r: {"boundaries": r.bools(2, 9), "mask": r.bools(2, 9)},),
    **reweighting.COMPOSITIONS,
}  # fmt: skip


# Functions whose products are computed by PyTorch.
PLAIN: tuple[Any, ...] = (
    additive_attention, pattention, pointer_argmax, linear.titans_memory_decode,
    select.indexer_kl_loss, *reweighting.PLAIN,
)  # fmt: skip


# Arguments that a call writes.
WRITTEN: dict[Any, tuple[str, ...]] = {
    linear.titans_memory_decode: ("start", "memory", "momentum", "filled"),
}


def compositions() -> list[Target]:
    found = []
    for function, makes in COMPOSITIONS.items():
        run, known = with_backend(function)
        products = function in PLAIN
        written = WRITTEN.get(function, ())
        target = Target(
            function.__name__, run, samples_of(makes), given_by, known, written, products=products
        )
        found.append(target)
    return found
