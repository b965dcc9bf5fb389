"""Cases of landmark_attention: our dense causal attention, with the same operations, is the peer to
reach; the other peer is the grouped softmax composed of one attention call per query block, joined
by merge_attention_states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .attention import with_backward
from .case import Case, Run, place

H, D = 4, 64


def composition(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Grouped softmax for whole blocks. Memory for gradients: S^2 H D / (2 block)."""
    scale = D**-0.5
    outs = []
    for first in range(0, q.shape[1], block):
        rows, own = q[:, first : first + block], slice(first, first + block - 1)
        out, lse = tm.attention(rows[:, :-1], k[:, own], v[:, own], causal=True, return_lse=True)
        last = tm.attention(rows[:, -1:], k[:, own], v[:, own], return_lse=True)
        out, lse = torch.cat([out, last[0]], 1), torch.cat([lse, last[1]], 2)
        if first:
            count = first // block
            keys, values = (
                t[:, :first].unflatten(1, (count, block))[:, :, :-1].flatten(0, 1) for t in (k, v)
            )
            queries = rows[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
            earlier = tm.attention(queries, keys, values).unflatten(0, (-1, count)).transpose(0, 1)
            landmarks = k[:, block - 1 : first : block].float()
            logits = scale * torch.einsum("bihd,bnhd->nbhi", rows.float(), landmarks)
            parts = torch.cat([out[None], earlier]), torch.cat([lse[None], logits])
            out, _ = tm.merge_attention_states(*parts)
        outs.append(out)
    return torch.cat(outs, 1)


def _case(dtype: torch.dtype, tokens: int, block: int, backward: bool) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        qkv = [place(torch.randn(1, tokens, H, D, generator=g).to(dtype)) for _ in range(3)]

        def call(function: Callable[..., Tensor]) -> Run:
            return with_backward(function, qkv) if backward else lambda: function(*qkv)

        ours = functools.partial(tm.landmark_attention, block=block)
        peers = {"causal attention": lambda: call(functools.partial(tm.attention, causal=True))}
        if tokens % block == 0:
            peers["composition"] = lambda: call(functools.partial(composition, block=block))
        return call(ours), peers

    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        "landmark_attention",
        f"S={tokens} D={D} block {block}",
        dtype,
        2.0 * H * tokens * (tokens + 1) * D * (3.5 if backward else 1.0),
        float((10 if backward else 4) * H * tokens * D * size),
        prepare,
        "forward+backward" if backward else "forward",
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, block in ((4096, 64), (4096, 51), (4096, 16), (4096, 512)):
            yield _case(dtype, tokens, block, False)
            yield _case(dtype, tokens, block, True)
