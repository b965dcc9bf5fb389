"""Cases of local_pool: the mixer of PoolFormer and the local pooling of PoNet. torch pools channels
first; on the CPU it is fastest on channels-last tensors, the layout of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as nn

import tokenmill as tm

from .case import Case, Run, place

POOLFORMER, PONET = (64, 56, 56, 64), (8, 1, 4096, 768)


def _ours(x: Tensor, mode: str) -> Tensor:
    kernel = 3 if mode == "avg" else (1, 3)
    return tm.local_pool(x, kernel, mode=mode, subtract_input=mode == "avg")


def _torch(x: Tensor, mode: str) -> Tensor:
    if mode == "avg":
        return nn.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x
    return nn.max_pool2d(x, (1, 3), 1, (0, 1))


def _case(mode: str, dtype: torch.dtype, pass_name: str) -> Case:
    shape = POOLFORMER if mode == "avg" else PONET
    elements = torch.Size(shape).numel()
    name = "PoolFormer, mean of 3 x 3 minus input" if mode == "avg" else "PoNet, maximum of 3"

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        x = place(torch.randn(shape, generator=generator).to(dtype))
        last = x.permute(0, 3, 1, 2)
        first = last.contiguous()

        def run(function: Callable[[Tensor, str], Tensor], t: Tensor) -> Run:
            if pass_name == "forward":
                return lambda: function(t, mode)
            leaf = t.detach().requires_grad_()
            out = function(leaf, mode)
            dout = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, leaf, dout, retain_graph=True)

        return run(_ours, x), {
            "torch, channels last": lambda: run(_torch, last),
            "torch, channels first": lambda: run(_torch, first),
        }

    # The backward of a maximum reads x and dout.
    reads = 2 if mode == "max" and pass_name == "backward" else 1
    moved = (reads + 1) * elements * dtype.itemsize
    work = float(elements * (5 if mode == "avg" else 2))
    return Case("local_pool", name, dtype, work, float(moved), prepare, pass_name)


def cases() -> Iterator[Case]:
    for mode in ("avg", "max"):
        yield _case(mode, torch.float32, "forward")
        yield _case(mode, torch.bfloat16, "forward")
        yield _case(mode, torch.float32, "backward")
