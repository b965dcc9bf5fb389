"""Calls that other engines have, too: sizes at which a user would choose between them and us."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

from . import attention, attention_decode, topk_select
from .case import Case, Run, place

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BATCH, TOKENS, HEADS, HEAD_DIM = 16, 24, 12, 32  # a batch of sentences in all-MiniLM-L6-v2


def _dense(dtype: torch.dtype, length: int, **options: Any) -> Case:
    function = functools.partial(attention.sdpa, causal=options.get("causal", False))
    return attention.build_case("softmax", dtype, length, {"sdpa": function}, **options)


def _sentences() -> Case:
    """A batch of ragged sentences, packed: peers compute the padding, too."""
    lengths = [TOKENS - b % 12 for b in range(BATCH)]

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH, TOKENS, HEADS, HEAD_DIM)
        q, k, v = (place(torch.randn(shape, generator=generator)) for _ in range(3))
        there = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
        mask = place(there[:, None, None])
        packed = [t[place(there)] for t in (q, k, v)]
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens = place(ends)

        def sdpa() -> Run:
            a, b, c = (t.transpose(1, 2).contiguous() for t in (q, k, v))
            return lambda: F.scaled_dot_product_attention(a, b, c, attn_mask=mask)

        def ours() -> Tensor:
            return tm.attention(
                *packed, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=TOKENS,
                max_seqlen_k=TOKENS,
            )  # fmt: skip

        return ours, {"sdpa": sdpa}

    pairs = sum(n * n for n in lengths)
    size = float(BATCH * TOKENS * HEADS * HEAD_DIM * 4)
    work = 4.0 * HEADS * HEAD_DIM * pairs
    name = f"{BATCH} sentences of {min(lengths)} to {TOKENS} tokens, H={HEADS} D={HEAD_DIM}"
    return Case("attention", name, F32, work, 4 * size, prepare)


def _calls() -> Iterator[Case]:
    for length in (16, 64, 128):
        yield _dense(F32, length)
    yield _sentences()
    for length in (16, 64):
        yield _dense(F32, length, backward=True)
    for causal in (False, True):
        for dtype in (F32, BF16, F16):
            for length in (512, 2048, 8192) if dtype != F16 else (512, 2048):
                yield _dense(dtype, length, causal=causal)
    for dtype in (F32, BF16):
        yield _dense(dtype, 2048, head_dim=128)
    for dtype in (F32, BF16, F16):
        for lengths in ((4096,), (32768,), (4096,) * 8):
            yield attention_decode.build_case(f"S={lengths[0]}", dtype, lengths)
    for columns in (8192, 65536):
        yield topk_select.build_case("normal", topk_select.ROWS[columns], columns, 512, F32)


def cases() -> Iterator[Case]:
    for case in _calls():
        yield dataclasses.replace(case, op="peers", name=f"{case.op}: {case.name}")
