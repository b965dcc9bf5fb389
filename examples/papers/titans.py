"""A small language model with the memory of Titans, beside the same model without it.

Trains a character model twice on the language reference of Python: attention to a window of 16
characters, and the same with a neural memory in each layer, through which a character sees all
earlier ones. Prints how the loss falls, and the loss on unseen text, near the beginning of a
context and far from it. Under a minute on two cores.

    python examples/papers/titans.py
    python examples/papers/titans.py --depth 2 --steps 40     # a memory of two layers: slow
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tokenmill as tm
from tokenmill.samples import text

WIDTH, HEADS, LAYERS, WINDOW, CONTEXT, BATCH = 64, 2, 2, 16, 256, 16
SLOPES = torch.tensor([0.5, 0.0625])  # ALiBi slope of each head


class Block(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.memory = tm.nn.TitansMemory(WIDTH, HEADS, depth=depth) if depth else None
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.memory is not None:
            x = x + self.memory(self.norms[0](x))
        q, k, v = self.qkv(self.norms[1](x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        near = tm.attention(q, k, v, window=(WINDOW - 1, 0), alibi_slopes=SLOPES)
        x = x + self.out(near.flatten(2))
        return x + self.mlp(self.norms[2](x))


class LanguageModel(nn.Module):
    """Codes [B, S] to logits. depth: layers of each memory, 0 for none."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(text.VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block(depth) for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, text.VOCABULARY, bias=False)

    def losses(self, windows: Tensor) -> Tensor:
        """Cross-entropy [B, S] of each character of [B, S + 1] except the first."""
        logits = self.head(self.norm(self.blocks(self.embedding(windows[:, :-1]))))
        return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


def train(model: LanguageModel, codes: Tensor, steps: int) -> list[float]:
    """The loss of each step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        begins = torch.randint(len(codes) - CONTEXT, (BATCH, 1))
        loss = model.losses(codes[begins + torch.arange(CONTEXT + 1)]).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--depth", type=int, default=1, help="layers of a memory")
    args = parser.parse_args()
    codes, unseen = text.characters()
    unseen = unseen[: len(unseen) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:64]
    print(f"{'':8} {'loss':>14} {'unseen, first 64':>17} {'last 64':>8} {'seconds':>8}")
    for name, depth in (("window", 0), ("memory", args.depth)):
        torch.manual_seed(0)
        model = LanguageModel(depth)
        begin = time.perf_counter()
        losses = train(model, codes, args.steps)
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            found = model.losses(unseen).mean(0)
        first, last = found[:64].mean(), found[-64:].mean()
        end = sum(losses[-10:]) / len(losses[-10:])
        print(f"{name:8} {losses[0]:5.2f} -> {end:5.3f} {first:17.3f} {last:8.3f} {seconds:8.0f}")


if __name__ == "__main__":
    main()
