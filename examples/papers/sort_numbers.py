"""A pointer network that learns to sort.

Reads numbers in any order and points to them from the smallest to the largest (Vinyals et al. 2015,
Pointer Networks). Prints how the loss falls, and how many rows of each length are sorted without an
error: one network for all lengths, since pointers need no output layer of fixed size.

    python examples/papers/sort_numbers.py                 # a minute
    python examples/papers/sort_numbers.py --numbers 8 --steps 2000
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenmill as tm

WIDTH = 64


class PointerNetwork(nn.Module):
    """Numbers [B, N] to scores [B, T, N] of the inputs that T outputs point to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.encoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.decoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.key, self.query = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.v_weight = nn.Parameter(torch.randn(WIDTH) / WIDTH**0.5)
        self.begin = nn.Parameter(torch.zeros(WIDTH))

    def encode(self, numbers: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The inputs of the decoder, the keys, and the state after all numbers."""
        x = self.embed(numbers[..., None])
        encoded, state = self.encoder(x)
        return x, self.key(encoded), state

    def forward(self, numbers: Tensor, order: Tensor) -> Tensor:
        """Teacher forcing: each output sees the numbers that earlier outputs should have pointed
        to."""
        x, keys, state = self.encode(numbers)
        before = x.gather(1, order[:, :-1, None].expand(-1, -1, WIDTH))
        first = self.begin.expand(len(x), 1, -1)
        decoded, _ = self.decoder(torch.cat([first, before], 1), state)
        return tm.additive_attention(self.query(decoded), keys, self.v_weight)

    @torch.no_grad()
    def sort(self, numbers: Tensor) -> Tensor:
        """The pointers [B, N], one after the other, without repetition."""
        x, keys, state = self.encode(numbers)
        given, left = self.begin.expand(len(x), 1, -1), torch.ones_like(numbers, dtype=torch.bool)
        pointers = []
        for _ in range(numbers.shape[1]):
            decoded, state = self.decoder(given, state)
            at = tm.pointer_argmax(self.query(decoded), keys, self.v_weight, mask=left)
            pointers.append(at)
            left = left.scatter(1, at, False)
            given = x.gather(1, at[..., None].expand(-1, -1, WIDTH))
        return torch.cat(pointers, 1)


def sorted_whole(network: PointerNetwork, numbers: int, rows: int = 500) -> float:
    """The share of rows that are sorted without an error."""
    x = torch.rand(rows, numbers, generator=torch.Generator().manual_seed(1))
    found = x.gather(1, network.sort(x))
    return float((found == x.sort(1)[0]).all(1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", type=int, default=5, help="in the longest rows")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()

    torch.manual_seed(0)
    network = PointerNetwork()
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    print(f"before: {sorted_whole(network, args.numbers):.1%} of rows sorted")
    for step in range(args.steps):
        length = int(torch.randint(2, args.numbers + 1, ()))
        numbers = torch.rand(128, length)
        order = numbers.argsort(1)
        loss = F.cross_entropy(network(numbers, order).transpose(1, 2), order)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        if step % max(args.steps // 6, 1) == 0:
            print(f"step {step:5}: loss {loss.item():.3f}")
    for length in range(2, args.numbers + 1):
        print(f"{length} numbers: {sorted_whole(network, length):.1%} of rows sorted")


if __name__ == "__main__":
    main()
