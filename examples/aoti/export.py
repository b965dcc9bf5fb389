"""Compiles a module that holds tokenmill operators ahead of time, for main.cpp.

python export.py model.pt2
"""

from __future__ import annotations

import sys

import torch

import tokenmill as tm


class Block(torch.nn.Module):
    """Causal self-attention over x [B, S, 4 * 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(128, 3 * 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 32)).unbind(2)
        return x + tm.attention(q, k, v, causal=True).flatten(2)


def main(path: str) -> None:
    torch.manual_seed(0)
    block = Block().eval()
    x = torch.linspace(-1, 1, 2 * 10 * 128).view(2, 10, 128)
    with torch.no_grad():
        exported = torch.export.export(block, (x,))
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
        print(f"{block(x).sum().item():.6f}")


if __name__ == "__main__":
    main(sys.argv[1])
