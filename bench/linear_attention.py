"""Cases of linear_attention. Peers get their preferred memory layout: PyTorch [B, H, S, D],
tokenmill [B, S, H, D]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm

from . import case
from .attention import sdpa
from .case import Case, Run, place
from .packages import builders

HEADS, HEAD_DIM = 8, 64
CHUNK = 64  # chunk length that defines the useful work
CHUNKS = (64, 128, 256)  # chunk lengths of the eager peers
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def eager_chunked(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, chunk: int) -> Tensor:
    """Chunked form for q, k, v [B, H, S, D] with S a multiple of the chunk; slopes [H]."""
    b, h, s = q.shape[:3]
    position = torch.arange(chunk, dtype=torch.float32, device=q.device)
    difference = position[:, None] - position[None, :]
    pairs = torch.exp(-slopes[:, None, None] * difference.clamp(min=0)).tril().to(q.dtype)
    from_start = torch.exp(-slopes[:, None] * (position + 1)).to(q.dtype)[:, None, :, None]
    to_end = torch.exp(-slopes[:, None] * (chunk - 1 - position)).to(q.dtype)[:, None, :, None]
    total = torch.exp(-slopes * chunk)[:, None, None]
    q, k, v = (t.view(b, h, s // chunk, chunk, -1) for t in (q, k, v))
    own = ((k * to_end).transpose(-2, -1) @ v).float()
    state, states = torch.zeros_like(own[:, :, 0]), []
    for n in range(s // chunk):
        states.append(state)
        state = state * total + own[:, :, n]
    before = torch.stack(states, 2).to(q.dtype)
    inner = ((q @ k.transpose(-2, -1)) * pairs[:, None]) @ v
    return (inner + (q * from_start) @ before).view(b, h, s, -1)


def useful_work(length: int, heads: int, d: int, dv: int) -> float:
    """Operations: pairs inside a chunk, queries with the state, and keys with values."""
    return float(heads * length * ((CHUNK + 1) * (d + dv) + 4 * d * dv))


def _case(
    length: int,
    dtype: torch.dtype = F32,
    *,
    with_sdpa: bool = False,
    with_eager: bool = True,
    backward: bool = False,
    head_dim: int = HEAD_DIM,
    per_channel: bool = False,
    options: dict[str, Any] | None = None,
    name: str = "constant decay",
) -> Case:
    slopes = tm.lightning_slopes(HEADS)
    work = useful_work(length, HEADS, head_dim, head_dim)
    size = torch.empty((), dtype=dtype).element_size()

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        shape = (1, HEADS, length, head_dim)
        theirs = [place(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)]
        ours = [t.transpose(1, 2).contiguous() for t in theirs]
        if not with_sdpa and not with_eager:
            theirs = []
        on_device = place(slopes)
        log_decay = -on_device
        if per_channel:
            gates = torch.randn(1, length, HEADS, head_dim, generator=generator) + 3
            log_decay = place(torch.nn.functional.logsigmoid(gates))

        def forward(q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
            return tm.linear_attention(q, k, v, log_decay=log_decay, **(options or {}), **extra)

        peers: dict[str, Callable[..., Tensor]] = {}
        if with_eager:
            for chunk in CHUNKS:
                peers[f"eager C={chunk}"] = functools.partial(
                    eager_chunked, slopes=on_device, chunk=chunk
                )
        if with_sdpa:
            peers["sdpa causal"] = functools.partial(sdpa, causal=True)

        def call(function: Callable[..., Tensor], tensors: list[Tensor]) -> Run:
            if not backward:
                return lambda: function(*tensors)
            leaves = [t.detach().requires_grad_() for t in tensors]
            cotangent = torch.randn_like(tensors[2])
            return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)

        own = forward
        if not backward:
            own = functools.partial(forward, out=torch.empty_like(ours[2]))
        others: dict[str, Callable[[], Run]]
        others = {name: functools.partial(call, f, theirs) for name, f in peers.items()}
        if not options and not per_channel:
            others |= builders(
                "linear_attention", ours, lambda: forward(*ours), call, slopes=on_device
            )
        return call(own, ours), others

    return Case(
        "linear_attention",
        f"{name} S={length} D={head_dim}",
        dtype,
        work * (4.0 if backward else 1.0),
        float((10 if backward else 4) * HEADS * length * head_dim * size),
        prepare,
        "forward+backward" if backward else "forward",
        length=length,
    )


def cases() -> Iterator[Case]:
    for length in (1024, 2048, 8192, 32768):
        yield _case(length, with_sdpa=True)
    for length in (1024, 4096, 16384, 65536, 262144):  # no peers: they evict caches
        yield _case(length, with_eager=False, name="constant decay, no peers,")
    for dtype in (BF16, F16):
        yield _case(8192, dtype, with_sdpa=dtype == BF16, with_eager=dtype == BF16)
    yield _case(8192, backward=True)
    yield _case(8192, head_dim=128)
    if case.device.type == "cuda":
        yield _case(8192, BF16, head_dim=128)
    for backward in (False, True):
        yield _case(
            8192,
            with_eager=False,
            backward=backward,
            head_dim=128,
            per_channel=True,
            name="decay per channel, no peers,",
        )
    yield _case(
        8192,
        with_eager=False,
        options={"feature_map": "elu1", "normalize": True},
        name="elu1, normalised,",
    )
