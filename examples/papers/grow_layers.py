"""A TokenFormer that grows while it learns.

Trains a small network of Pattention layers on the handwritten digits that scikit-learn ships,
appends parameter tokens to each layer, and continues training (TokenFormer, Wang et al. 2024,
section 3.3). norm_scale is kept, so the network computes the same function right after growing. A
network of the final size is trained from scratch for comparison.

    python examples/papers/grow_layers.py                  # half a minute; needs tokenmill[demo]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenmill as tm

BATCH, WIDTH = 64, 64


def network(tokens: int) -> nn.Sequential:
    """Digits [B, 64] to logits [B, 10]."""
    return nn.Sequential(
        tm.nn.Pattention(64, WIDTH, tokens),
        nn.LayerNorm(WIDTH),
        tm.nn.Pattention(WIDTH, WIDTH, tokens),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """The mean loss of the last epoch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        losses = []
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def grow(model: nn.Sequential, tokens: int, images: Tensor) -> float:
    """Appends `tokens` tokens to each layer; returns the largest change of a logit."""
    before = model(images)
    for layer in model:
        if isinstance(layer, tm.nn.Pattention):
            layer.append(tokens)
    return float((model(images) - before).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16, help="of a layer, at first")
    parser.add_argument("--epochs", type=int, default=8, help="before and after each growth")
    parser.add_argument("--growths", type=int, default=2, help="times that the tokens double")
    args = parser.parse_args()

    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32).flatten(1)
    labels, test = torch.tensor(data.target), 360

    torch.manual_seed(0)
    model, tokens = network(args.tokens), args.tokens
    print(f"{'tokens':>6} {'loss':>6} {'accuracy':>9} {'change by growing':>18}")
    for growth in range(args.growths + 1):
        change = 0.0
        if growth:
            change, tokens = grow(model, tokens, images[:test]), 2 * tokens
        loss = train(model, images[test:], labels[test:], args.epochs)
        right = accuracy(model, images[:test], labels[:test])
        print(f"{tokens:6} {loss:6.3f} {right:9.1%} {change:18.1e}")
    torch.manual_seed(0)
    scratch = network(tokens)
    loss = train(scratch, images[test:], labels[test:], args.epochs)
    right = accuracy(scratch, images[:test], labels[:test])
    print(f"{tokens:6} {loss:6.3f} {right:9.1%}   from scratch, {args.epochs} epochs")


if __name__ == "__main__":
    main()
