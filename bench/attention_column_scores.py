"""Cases of attention_column_scores: prefill scores of H2O, the window of SnapKV, Keyformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import tokenmill as tm

from .case import Case, Run, causal_pairs, place

HEADS, DIM = 8, 64


def cases() -> Iterator[Case]:
    for length in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(f"S={length} causal, lse given", length, length, dtype, True)
    yield _case("S=4096 causal", 4096, 4096, torch.float32, False)
    yield _case("S=4096 causal, noise", 4096, 4096, torch.float32, False, gumbel_tau=1.0, seed=1)
    yield _case("last 32 of 8192", 32, 8192, torch.float32, False, kv_heads=2)


def _case(
    name: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    with_lse: bool,
    kv_heads: int = HEADS,
    **options: Any,
) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(1, rows, HEADS, DIM, generator=generator).to(dtype))
        k = place(torch.randn(1, columns, kv_heads, DIM, generator=generator).to(dtype))
        lse = None
        if with_lse:
            _, lse = tm.attention(q, k, k, causal=True, return_lse=True)
        hidden = ~torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)

        def eager() -> Run:
            heads_first = q.transpose(1, 2).contiguous()
            keys = k.transpose(1, 2).repeat_interleave(HEADS // kv_heads, 1).mT.contiguous()

            def run() -> torch.Tensor:
                z = (heads_first @ keys).mul_(DIM**-0.5).masked_fill_(hidden, -torch.inf)
                if options:
                    z = z.sub_(torch.empty_like(z).exponential_().log_())
                return z.softmax(-1).sum(-2)

            return run

        return lambda: tm.attention_column_scores(q, k, lse, causal=True, **options), {
            "eager softmax, sum": eager,
        }

    pairs = causal_pairs(rows, columns)
    return Case(
        "attention_column_scores",
        name,
        dtype,
        2.0 * HEADS * pairs * DIM * (1 if with_lse else 2),
        float((rows * HEADS + columns * kv_heads) * DIM * dtype.itemsize + 4 * HEADS * columns),
        prepare,
    )
