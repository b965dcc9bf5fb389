"""Attention of several papers in one small vision transformer.

Trains the same network once for each attention on the handwritten digits that scikit-learn ships,
one token per pixel, and prints how the loss falls and the accuracy on unseen digits, next to the
same network with softmax.

    python examples/papers/digits.py                       # a minute; needs tokenmill[demo]
    python examples/papers/digits.py sigmoid soft_causal --epochs 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenmill as tm

SIDE, DIM, HEADS, DEPTH, BATCH = 8, 32, 2, 2, 64
# (q, k, v [B, S, H, D], completed share of the training) -> [B, S, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def softmax(q: Tensor, k: Tensor, v: Tensor, done: float) -> Tensor:
    return tm.attention(q, k, v)


def sigmoid(q: Tensor, k: Tensor, v: Tensor, done: float) -> Tensor:
    """Sigmoid attention (Ramapuram et al. 2024), bias -log n."""
    return tm.sigmoid_attention(q, k, v)


def soft_causal(q: Tensor, k: Tensor, v: Tensor, done: float) -> Tensor:
    """iLLaMA (Wang et al. 2024): the causal mask fades in over the first half of the training. The
    class token comes last and sees all tokens."""
    return tm.soft_causal_attention(q, k, v, max(0.0, 1 - 2 * done))


def decay(q: Tensor, k: Tensor, v: Tensor, done: float) -> Tensor:
    """CACE (Zhou et al. 2024): normalized weights decay with the distance of the pixels. The class
    token is one more cell, below the first column."""
    gamma = 1 - 2.0 ** -(5 + torch.arange(HEADS))
    return tm.attention(q, k, v, post_decay=tm.masks.decay2d(gamma, SIDE))


class Agents(nn.Module):
    """Agent attention (Han et al. 2024) with 3 x 3 agents: means of the queries of an area."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, done: float) -> Tensor:
        grid = q[:, :-1].flatten(2).transpose(1, 2).unflatten(2, (SIDE, SIDE))  # no class token
        agents = F.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2).unflatten(2, (HEADS, -1))
        return tm.attention(q, agents, tm.attention(agents, k, v))


ATTENTIONS: dict[str, tuple[str, Attend]] = {
    "softmax": ("", softmax),
    "sigmoid": ("Sigmoid attention", sigmoid),
    "soft_causal": ("iLLaMA", soft_causal),
    "decay": ("CACE", decay),
    "agent": ("Agent attention", Agents()),
    "tokenformer": ("TokenFormer", softmax),
}


class Block(nn.Module):
    def __init__(self, attend: Attend, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.attend = attend
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv, self.proj = linear(DIM, 3 * DIM), linear(DIM, DIM)
        self.mlp = nn.Sequential(linear(DIM, 4 * DIM), nn.GELU(), linear(4 * DIM, DIM))

    def forward(self, x: Tensor, done: float) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).unbind(2)
        x = x + self.proj(self.attend(q, k, v, done).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Network(nn.Module):
    """Digits [B, 8, 8] to logits [B, 10]."""

    def __init__(self, attend: Attend, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(1, DIM)
        self.place = nn.Parameter(0.5 * torch.randn(SIDE * SIDE, DIM))
        self.label = nn.Parameter(torch.zeros(DIM))  # the class token
        self.blocks = nn.ModuleList(Block(attend, linear) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor, done: float = 1.0) -> Tensor:
        x = self.embed(images.flatten(1)[..., None]) + self.place
        x = torch.cat([x, self.label.expand(len(x), 1, -1)], 1)
        for block in self.blocks:
            x = block(x, done)
        return self.head(self.norm(x[:, -1]))


def pattention(width: int, out: int) -> nn.Module:
    return tm.nn.Pattention(width, out, num_tokens=2 * width)


def train(network: Network, images: Tensor, labels: Tensor, epochs: int) -> list[float]:
    """The loss of each step."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    steps, losses = epochs * (len(images) // BATCH), []
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images))
        batch, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(network(images[batch], step / steps), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(ATTENTIONS)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {names} (default: all)")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    if unknown := set(args.names) - set(ATTENTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))} (there are {names})")

    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)
    labels, test = torch.tensor(data.target), 360
    print(f"{'attention':12} {'loss':>14} {'accuracy':>9} {'seconds':>8}")
    for name in args.names or ATTENTIONS:
        torch.manual_seed(0)
        paper, attend = ATTENTIONS[name]
        network = Network(attend, pattention if name == "tokenformer" else nn.Linear)
        begin = time.perf_counter()
        losses = train(network, images[test:], labels[test:], args.epochs)
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            right = (network(images[:test]).argmax(1) == labels[:test]).float().mean()
        last = sum(losses[-10:]) / len(losses[-10:])
        print(f"{name:12} {losses[0]:5.2f} -> {last:5.3f} {right:9.1%} {seconds:8.0f}  {paper}")


if __name__ == "__main__":
    main()
