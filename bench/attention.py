"""Cases of attention. Peers get their preferred memory layout: PyTorch [B, H, S, D], tokenmill [B,
S, H, D]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

from . import case
from .case import Case, Run, causal_pairs, place
from .packages import builders, compiled_flex, windowed_flex

SHORT, MIDDLE, LONG, WINDOWED = 512, 2048, 4096, 8192
# Lengths of the documents packed into one sequence.
EQUAL, RAGGED = (512,) * 8, (1100, 97, 700, 33, 411, 900, 250, 605)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BIAS = -6.0


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def eager_sigmoid(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    p = torch.sigmoid(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + BIAS)
    return (p.tril() if causal else p) @ v


@functools.cache
def document_ids(lengths: tuple[int, ...]) -> Tensor:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return place(ids.to(torch.int32)[None])


@functools.cache
def _document_matrix(lengths: tuple[int, ...]) -> Tensor:
    ids = document_ids(lengths)[0]
    return ids[:, None] == ids


def sdpa_documents(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_document_matrix(lengths))


@functools.cache
def _documents_flex(lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    ids = document_ids(lengths)[0]
    return compiled_flex(len(ids), lambda b, h, i, j: ids[i] == ids[j])


def flex_window(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    return windowed_flex(q.shape[2], left)(q, k, v)


def flex_documents(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return _documents_flex(lengths)(q, k, v)


def with_backward(forward: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
    leaves = [t.detach().requires_grad_() for t in tensors]
    cotangent = torch.randn_like(forward(*leaves))
    return lambda: torch.autograd.grad(forward(*leaves), leaves, cotangent)


def build_case(
    kind: str,
    dtype: torch.dtype,
    length: int,
    peers: Mapping[str, Callable[..., Tensor]],
    *,
    causal: bool = False,
    left: int = -1,
    documents: tuple[int, ...] = (),
    head_dim: int = 64,
    backward: bool = False,
    heads: int = 8,
    queries: int = 0,
) -> Case:
    """queries: 0 = as many as keys."""
    rows = queries or length
    pairs = causal_pairs(rows, length, left) if causal else float(rows) * length
    if documents:
        pairs = float(sum(n * n for n in documents))
    size = torch.empty((), dtype=dtype).element_size()
    tensors = 10 if backward else 4

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        theirs = [
            place(torch.randn(1, heads, n, head_dim, generator=generator).to(dtype))
            for n in (rows, length, length)
        ]
        ours = [t.transpose(1, 2).contiguous() for t in theirs]
        options: dict[str, Any] = {"kind": kind, "causal": causal, "window": (left, -1)}
        if kind == "sigmoid":
            options["score_bias"] = BIAS
        if documents:
            options["mask"] = tm.masks.segments(document_ids(documents))
        forward = functools.partial(tm.attention, **options)

        def call(function: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
            if backward:
                return with_backward(function, tensors)
            return lambda: function(*tensors)

        def peer(function: Callable[..., Tensor]) -> Run:
            run = call(function, theirs)
            run()  # compiles, or shows that the peer cannot
            return run

        others: dict[str, Callable[[], Run]]
        others = {name: functools.partial(peer, function) for name, function in peers.items()}
        if kind == "softmax" and not documents:
            others |= builders(
                "attention", ours, lambda: forward(*ours), call, backward=backward, causal=causal,
                left=left,
            )  # fmt: skip
        return call(forward, ours), others

    mask = f"window {left + 1}" if left >= 0 else "causal" if causal else "dense"
    if documents:
        mask = f"{len(documents)} {'equal' if len(set(documents)) == 1 else 'ragged'} documents"
    return Case(
        "attention",
        f"{kind} {mask} S={length} D={head_dim}{f' Sq={queries}' if queries else ''}",
        dtype,
        2.0 * heads * pairs * 2 * head_dim * (3.5 if backward else 1.0),
        float(tensors // 2 * heads * (rows + length) * head_dim * size),
        prepare,
        "forward+backward" if backward else "forward",
    )


def _gpu_cases() -> Iterator[Case]:
    """Sizes at which published attention kernels are compared."""
    for dtype in (F16, BF16):
        for length in (4096, 16384):
            shape: dict[str, Any] = {"causal": True, "head_dim": 128, "heads": 16}
            yield build_case("softmax", dtype, length, {}, **shape)
            yield build_case("softmax", dtype, length, {}, **shape, backward=True)


def cases() -> Iterator[Case]:
    if case.device.type == "cuda":
        yield from _gpu_cases()
    dense = {"sdpa": functools.partial(sdpa, causal=False)}
    triangle = {"sdpa": functools.partial(sdpa, causal=True)}
    eager = {"eager": functools.partial(eager_sigmoid, causal=False)}
    for length in (SHORT, MIDDLE, LONG):
        extra = eager if length < LONG else {}
        yield build_case("sigmoid", F32, length, dense | extra)
        yield build_case("sigmoid", F32, length, triangle, causal=True)
    for dtype in (BF16, F16):
        yield build_case("sigmoid", dtype, SHORT, dense)
        yield build_case("sigmoid", dtype, MIDDLE, dense)
        yield build_case("sigmoid", dtype, MIDDLE, triangle, causal=True)
    for dtype in (F32, BF16):
        yield build_case("sigmoid", dtype, MIDDLE, dense, backward=True)
        yield build_case("sigmoid", dtype, MIDDLE, triangle, causal=True, backward=True)
    for dtype in (F32, BF16):
        yield build_case("softmax", dtype, MIDDLE, dense)
        flex = {"flex (compiled)": functools.partial(flex_window, left=255)}
        yield build_case("softmax", dtype, WINDOWED, flex, causal=True, left=255)
    for dtype in (F32, BF16):
        yield build_case("softmax", dtype, WINDOWED, dense, queries=1)
    for documents in (EQUAL, RAGGED):
        others = {"sdpa": sdpa_documents, "flex (compiled)": flex_documents}
        bound = {name: functools.partial(f, lengths=documents) for name, f in others.items()}
        for dtype in (F32, BF16):
            yield build_case("softmax", dtype, LONG, bound, documents=documents)
        del bound["flex (compiled)"]  # has no backward on CPUs
        yield build_case("softmax", F32, LONG, bound, documents=documents, backward=True)
    for kind in ("relu", "elu1"):
        for dtype in (F32, BF16):
            yield build_case(kind, dtype, MIDDLE, dense)
            yield build_case(kind, dtype, MIDDLE, dense, backward=True)
    for head_dim in (32, 96, 128):
        yield build_case("sigmoid", F32, MIDDLE, dense, head_dim=head_dim)
        yield build_case("sigmoid", BF16, MIDDLE, dense, head_dim=head_dim)
