"""Cases of sparse_decode_attention, bound by bandwidth of the listed keys and values: a plain copy
of those rows is the peer to reach, dense decode over the whole cache the peer to beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm
from tokenmill.sparse.sparse_decode_attention_cases import rotations

from .case import Case, Run, place

H, HK, D = 32, 8, 128
TOKENS, KEYS = 65536, 2048


def _lists(heads: int, block: int, g: torch.Generator) -> Tensor:
    rows = [torch.randperm(TOKENS // block, generator=g)[: KEYS // block] for _ in range(heads)]
    return torch.stack(rows).sort(1).values.int()[None]


def _case(
    name: str, dtype: torch.dtype, heads: int = HK, block: int = 1, turned: bool = False,
    mass: bool = False,
) -> Case:  # fmt: skip
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(1, 1, H, D, generator=generator).to(dtype))
        k, v = (
            place(torch.randn(1, TOKENS, HK, D, generator=generator).to(dtype)) for _ in range(2)
        )
        indices = place(_lists(heads, block, generator))
        counts = place(torch.full((1, heads), KEYS // block, dtype=torch.int32))
        length = place(torch.tensor([TOKENS], dtype=torch.int32))
        rope = tuple(map(place, rotations(TOKENS, D // 2))) if turned else None

        positions = indices[0, :, :, None] * block + torch.arange(block, device=indices.device)
        positions = positions.flatten(1).long()
        rows = positions.expand(HK, KEYS) * HK + torch.arange(HK, device=q.device)[:, None]
        if heads == 1:  # the heads of a token are contiguous
            rows, flat = positions[0], [t.view(TOKENS, HK * D) for t in (k, v)]
        else:
            rows, flat = rows.flatten(), [t.view(TOKENS * HK, D) for t in (k, v)]

        def gathered() -> list[Tensor]:
            return [t.index_select(0, rows) for t in flat]

        def sdpa() -> Tensor:
            parts = gathered()
            if heads == 1:
                keys, values = (t.view(1, KEYS, HK, D).transpose(1, 2) for t in parts)
            else:
                keys, values = (t.view(1, HK, KEYS, D) for t in parts)
            return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)

        return (
            lambda: tm.sparse_decode_attention(  # type: ignore[call-overload]
                q, k, v, indices, counts, block_k=block, seqlens_k=length, rope=rope,
                return_mass=mass,
            ),
            {
                "dense decode": lambda: lambda: tm.attention_decode(q, k, v, seqlens_k=length),
                "copy of the rows": lambda: gathered,
                "gather + SDPA": lambda: sdpa,
            },
        )  # fmt: skip

    return Case(
        "sparse_decode_attention",
        f"B=1 H={H}/{HK} D={D} {KEYS} of {TOKENS} {name}",
        dtype,
        4.0 * H * D * KEYS,
        2.0 * KEYS * HK * D * dtype.itemsize,
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        yield _case("random keys", dtype)
        yield _case("random blocks of 16", dtype, block=16)
        yield _case("random keys, shared", dtype, heads=1)
        yield _case("random keys, shared, rope", dtype, heads=1, turned=True)
    yield _case("random keys, rope", torch.bfloat16, turned=True)
    yield _case("random keys, mass", torch.bfloat16, mass=True)
