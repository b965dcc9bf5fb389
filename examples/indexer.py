"""Which keys does an indexer choose once it is trained?

Trains a small model on text with attention to all keys, then an indexer for each of its layers:
first on the weights of the full attention (warm-up), then together with the model, whose attention
now reads only the keys in the indexer's lists (DeepSeek Sparse Attention). For several lengths of
the lists it prints how much of the attention the listed keys hold, and the loss of the model that
reads only these, next to lists of an untrained indexer and lists of the keys with the most weight.
A few minutes on two cores.

    python examples/indexer.py
    python examples/indexer.py --topk 32 64 --length 1024
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import needle
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tokenmill as tm
from tokenmill.samples import text

HEADS, DIM = 4, 32  # heads and head_dim of an indexer


@dataclass(frozen=True)
class Setup:
    model: needle.Setup
    context: int = 512
    batch: int = 4
    warm_up: int = 120  # steps
    steps: int = 60  # sparse training steps
    topk: int = 64  # list length in sparse training


QUICK = Setup(needle.QUICK, context=128, batch=2, warm_up=15, steps=4, topk=32)


class Indexer(nn.Module):
    """A few small heads with one shared key, computed from the queries and keys of a layer."""

    def __init__(self, setup: needle.Setup) -> None:
        super().__init__()
        dim = 32 * setup.heads
        self.q = nn.Linear(dim, HEADS * DIM, bias=False)
        self.k = nn.Linear(32 * setup.kv_heads, DIM, bias=False)
        self.weights = nn.Linear(dim, HEADS)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, heads, D] and k [B, S, 1, D] of the layer, which get no gradient."""
        q, k = q.detach().flatten(2), k.detach().flatten(2)
        return self.q(q).unflatten(-1, (HEADS, DIM)), self.k(k), self.weights(q) * DIM**-0.5


Lists = tuple[Tensor, Tensor]  # indices [B, S, K] and counts [B, S]
Choose = Callable[[Indexer, Tensor, Tensor], Lists]


@torch.no_grad()
def mass(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention weights [B, S, S], summed over heads, over all pairs: texts are short
    here."""
    z = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    later = torch.ones(z.shape[2:], dtype=torch.bool).triu(1)
    return (z * needle.SCALE).masked_fill_(later, -torch.inf).softmax(-1).sum(1)


def listed(weights: Tensor, lists: Lists) -> Tensor:
    """Weights [B, S, S] of the list entries, 0 for padding."""
    return weights.gather(2, lists[0].long().clamp(min=0)).masked_fill(lists[0] < 0, 0.0)


def every_key(length: int, batch: int) -> Lists:
    """Lists of all keys up to each query."""
    places = torch.arange(length, dtype=torch.int32)
    counts = (places + 1).expand(batch, -1)
    indices = places.expand(batch, length, -1)
    return indices.masked_fill(indices >= counts[..., None], -1), counts


def indexed(topk: int) -> Choose:
    @torch.no_grad()
    def choose(indexer: Indexer, q: Tensor, k: Tensor) -> Lists:
        indices, counts = tm.indexer_topk_select(*indexer(q, k), topk)
        return indices, counts

    return choose


def oracle(topk: int) -> Choose:
    """Lists of the keys with the most weight."""

    def choose(indexer: Indexer, q: Tensor, k: Tensor) -> Lists:
        weights = mass(q, k)
        lengths = torch.arange(1, q.shape[1] + 1, dtype=torch.int32).repeat(len(q))
        indices, counts = tm.topk_select(weights.flatten(0, 1), topk, lengths=lengths)
        return indices.unflatten(0, q.shape[:2]), counts.unflatten(0, q.shape[:2])

    return choose


def sparse(q: Tensor, k: Tensor, v: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
    """Attention to the listed keys, and their attention mass over all heads, [B, S, K]. Each query
    has its own list, shared by all heads."""
    out, mass = tm.block_sparse_attention(
        q, k, v, lists[0][:, None], lists[1][:, None], block_q=1, block_k=1, causal=True,
        scale=needle.SCALE, return_mass=True,
    )  # fmt: skip
    return out, mass[:, 0]


def windows(setup: Setup, steps: int) -> Iterator[Tensor]:
    codes, g = text.characters()[0], torch.Generator().manual_seed(1)
    offsets = torch.arange(setup.context + 1)
    for _ in range(steps):
        begins = torch.randint(len(codes) - setup.context, (setup.batch, 1), generator=g)
        yield codes[begins + offsets]


def report(kind: str, step: int, steps: int, losses: str, begin: float) -> None:
    if step in (0, steps - 1) or (step + 1) % max(steps // 5, 1) == 0:
        seconds = time.perf_counter() - begin
        print(f"{kind} {step + 1:4d}  {losses}  {seconds:.0f} s", flush=True)


def warm_up(model: needle.Model, indexers: nn.ModuleList, setup: Setup) -> None:
    """The model is frozen; the indexers learn the weights of its attention to all keys."""
    optimiser = torch.optim.AdamW(indexers.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, setup.warm_up, pct_start=0.1)
    lists, begin = every_key(setup.context, setup.batch), time.perf_counter()
    for step, codes in enumerate(windows(setup, setup.warm_up)):
        captured: list[tuple[Tensor, Tensor]] = []

        def mix(q: Tensor, k: Tensor, v: Tensor, captured: list = captured) -> Tensor:
            captured.append((q, k))
            return needle.full(q, k, v)

        with torch.no_grad():
            model(codes[:, :-1], [mix] * len(indexers))
        loss = torch.zeros(())
        for indexer, (q, k) in zip(indexers, captured, strict=True):
            loss = loss + tm.indexer_kl_loss(*indexer(q, k), *lists, mass(q, k))
        loss = loss / (len(indexers) * setup.batch * setup.context)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        report("warm-up", step, setup.warm_up, f"divergence {loss.item():.3f}", begin)


def train(model: needle.Model, indexers: nn.ModuleList, setup: Setup) -> None:
    """The model learns from the text, reading the listed keys; the indexers learn from its
    attention to the keys that they list."""
    optimiser = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 3e-4}, {"params": indexers.parameters(), "lr": 1e-3}],
        weight_decay=0.0,
    )
    choose, begin = indexed(setup.topk), time.perf_counter()
    for step, codes in enumerate(windows(setup, setup.steps)):
        divergences: list[Tensor] = []

        def mix(indexer: Indexer, divergences: list = divergences) -> needle.Mix:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                lists = choose(indexer, q, k)
                out, target = sparse(q, k, v, lists)
                divergences.append(tm.indexer_kl_loss(*indexer(q, k), *lists, target))
                return out

            return attend

        logits, _ = model(codes[:, :-1], [mix(indexer) for indexer in indexers])
        loss = cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())
        divergence = torch.stack(divergences).sum() / (len(indexers) * codes[:, 1:].numel())
        optimiser.zero_grad()
        (loss + divergence).backward()
        optimiser.step()
        losses = f"divergence {divergence.item():.3f}  loss {loss.item():.3f}"
        report("sparse ", step, setup.steps, losses, begin)


@torch.inference_mode()
def evaluate(
    model: needle.Model, indexers: nn.ModuleList, codes: Tensor, choose: Choose | None
) -> tuple[float, float]:
    """Evaluates the second half of a text, whose queries see more keys than a list has: the share
    of the attention that the listed keys hold, and the loss. None: attention to all keys."""
    half = len(codes) // 2
    recalls = []

    def mix(indexer: Indexer) -> needle.Mix:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if choose is None:
                return needle.full(q, k, v)
            lists = choose(indexer, q, k)
            held = listed(mass(q, k), lists).sum(-1) / q.shape[2]
            recalls.append(held[:, half:].mean().item())
            return sparse(q, k, v, lists)[0]

        return attend

    logits, _ = model(codes[None, :-1], [mix(indexer) for indexer in indexers])
    loss = cross_entropy(logits[0, half:], codes[1 + half :]).item()
    return sum(recalls) / len(recalls) if recalls else 1.0, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="characters of the evaluation")
    parser.add_argument(
        "--topk", type=int, nargs="+", default=[64, 128, 256, 512], help="entries of a list"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and text, for a test")
    options = parser.parse_args()
    setup = QUICK if options.quick else Setup(needle.Setup())
    length, lengths_of_lists = options.length, options.topk
    if options.quick:
        length, lengths_of_lists = 256, [16, 64]

    model = needle.trained(setup.model, None)
    untrained, indexers = (
        nn.ModuleList(Indexer(setup.model) for _ in model.blocks) for _ in range(2)
    )
    codes = text.characters()[1][: length + 1]
    before = evaluate(model, indexers, codes, None)[1]
    warm_up(model, indexers, setup)
    train(model, indexers, setup)
    after = evaluate(model, indexers, codes, None)[1]
    print(f"attention to all keys: loss {before:.3f}, after the sparse training {after:.3f}")
    print("attention that the listed keys hold / loss, by entries of a list")
    print(f"{'lists of':18}" + "".join(f"{topk:>15}" for topk in lengths_of_lists))
    for name, chooser, of in (
        ("trained indexer", indexed, indexers), ("untrained indexer", indexed, untrained),
        ("largest weights", oracle, indexers),
    ):  # fmt: skip
        found = [evaluate(model, of, codes, chooser(topk)) for topk in lengths_of_lists]
        cells = (f"{recall:.3f} / {loss:.3f}" for recall, loss in found)
        print(f"{name:18}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
