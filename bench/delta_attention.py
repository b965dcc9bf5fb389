"""Cases of delta_attention, next to the fallback that transformers runs on CPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import tokenmill as tm

from .case import Case, Run, place

HEADS, HEAD_DIM = 8, 128
CHUNK = 64  # chunk length that defines the useful work


def useful_work(length: int, dim: int) -> float:
    """Operations of four products of pairs, half of each, and three with the state."""
    return 2.0 * HEADS * length * dim * (2 * CHUNK + 3 * dim)


def transformers_fallback(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next as model

    out: Tensor = model.torch_chunk_gated_delta_rule(
        q, k, v, g=log_decay, beta=beta, use_qk_l2norm_in_kernel=True
    )[0]
    return out


def _case(
    length: int, *, dim: int = HEAD_DIM, dtype: torch.dtype = torch.float32,
    per_channel: bool = False, backward: bool = False,
) -> Case:  # fmt: skip
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, length, HEADS, dim, generator=generator) for _ in range(3))
        shape = (1, length, HEADS, dim) if per_channel else (1, length, HEADS)
        gates = logsigmoid(torch.randn(shape, generator=generator) + 3)
        beta = torch.rand(1, length, HEADS, generator=generator)
        tensors = [*(place(t.to(dtype)) for t in (q, k, v)), place(beta), place(gates)]

        def own(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
            return tm.delta_attention(q, k, v, beta, log_decay=log_decay, qk_l2norm=True)

        def call(function: Callable[..., Tensor]) -> Run:
            if not backward:
                return lambda: function(*tensors)
            leaves = [t.detach().requires_grad_() for t in tensors]
            cotangent = torch.randn_like(tensors[2])
            return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)

        peers: dict[str, Any] = {}
        if not per_channel and importlib.util.find_spec("transformers"):
            peers["transformers"] = lambda: call(transformers_fallback)
        return call(own), peers

    size = torch.empty((), dtype=dtype).element_size()
    kind = "per channel" if per_channel else "per head"
    decays = HEADS * length * 4 * (dim if per_channel else 1)
    return Case(
        "delta_attention",
        f"S={length} D={dim} decay {kind}",
        dtype,
        useful_work(length, dim) * (3.0 if backward else 1.0),
        float(HEADS * length * (4 * dim * size + 4) + decays) * (2.5 if backward else 1.0),
        prepare,
        "forward+backward" if backward else "forward",
        length=length,
    )


def cases() -> Iterator[Case]:
    yield _case(8192)
    yield _case(8192, per_channel=True)
    yield _case(8192, backward=True)
    yield _case(8192, per_channel=True, backward=True)
    yield _case(2048)
    yield _case(32768)
    yield _case(8192, dim=64)
    yield _case(8192, dtype=torch.bfloat16)
