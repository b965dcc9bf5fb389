"""Forward and backward of attention at the sizes at which GPU kernels are usually compared: 16384
tokens, or one sequence, and 2048 channels in heads of 64 or 128."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm

from . import case
from .case import Absent, Case, Run
from .packages import builders

LENGTHS, TINY = (512, 2048, 8192, 32768), (128,)
TOKENS, CHANNELS = 16384, 2048
KINDS: dict[str, dict[str, Any]] = {"softmax": {}, "sigmoid": {"score_bias": -6.0}}
PEERS = ("flash-attn 3", "sdpa cudnn", "sdpa flash")  # peers of softmax


def _gradients(forward: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
    """Backward only; the forward has run before."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = forward(*leaves)
    cotangent = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)


def _forward(forward: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
    return lambda: forward(*tensors)


def _case(kind: str, length: int, head_dim: int, causal: bool, backward: bool, gpu: bool) -> Case:
    batch, heads = (max(TOKENS // length, 1), CHANNELS // head_dim) if gpu else (1, 1)
    shape = (batch, length, heads, head_dim)
    # Usual convention: a causal mask counts half of the pairs, the backward 2.5 times the
    # operations.
    work = 4.0 * batch * heads * length**2 * head_dim * (0.5 if causal else 1.0)
    elements = batch * length * heads * head_dim

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator(case.device).manual_seed(0)
        tensors = [
            torch.randn(shape, generator=generator, device=case.device, dtype=torch.bfloat16)
            for _ in range(3)
        ]
        call = functools.partial(tm.attention, kind=kind, causal=causal, **KINDS[kind])
        wrap = _gradients if backward else _forward

        def triton() -> Run:
            if not gpu:
                raise Absent("needs --device cuda")
            run = wrap(functools.partial(call, backend="triton"), tensors)
            run()
            return run

        peers: dict[str, Callable[[], Run]] = {"triton": triton}
        if kind == "softmax":
            found = builders(
                "attention", tensors, lambda: call(*tensors), wrap, causal=causal, left=-1
            )
            peers |= {name: build for name, build in found.items() if name in PEERS}
        return wrap(call, tensors), peers

    return Case(
        "attention_rates",
        f"{kind} {'causal' if causal else 'full'} S={length} D={head_dim}",
        torch.bfloat16,
        work * (2.5 if backward else 1.0),
        2.0 * elements * (8 if backward else 4),
        prepare,
        "backward" if backward else "forward",
    )


def cases() -> Iterator[Case]:
    """On a CPU only a few tokens, which are not representative."""
    gpu = case.device.type == "cuda"
    for backward in (False, True):
        for kind in KINDS:
            for head_dim in (64, 128):
                for causal in (False, True):
                    for length in LENGTHS if gpu else TINY:
                        yield _case(kind, length, head_dim, causal, backward, gpu)
