"""A language model whose cost per token does not depend on how much it has read.

Trains a small character model with lightning attention, reads a long text piece by piece, continues
it, and prints tokens per second at several context lengths, next to the same model with softmax
attention over a KV cache. About three minutes on two cores.

    python examples/long_context_lm.py --plot long_context.png     # needs tokenmill[bench]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

import tokenmill as tm
from tokenmill.samples import text

Mix = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # queries, keys, values [B, S, H, D] -> [B, S, H, D]
PIECE = 4096  # characters per call


@dataclass(frozen=True)
class Setup:
    width: int = 128
    heads: int = 4
    layers: int = 3
    context: int = 256
    batch: int = 16
    steps: int = 300
    contexts: tuple[int, ...] = (1024, 16384, 131072)
    seconds: float = 2.0  # seconds per timing


QUICK = Setup(
    width=32, heads=2, layers=2, context=64, batch=4, steps=18, contexts=(256, 1024), seconds=0.1
)


class Block(nn.Module):
    """Projections with SiLU, a mixer over time, a norm per head and a gate, as in MiniMax-01; then
    an MLP."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.heads = setup.heads
        self.norms = nn.ModuleList(nn.RMSNorm(setup.width) for _ in range(2))
        self.qkvg = nn.Linear(setup.width, 4 * setup.width, bias=False)
        self.norm_head = nn.RMSNorm(setup.width // setup.heads)
        self.out = nn.Linear(setup.width, setup.width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(setup.width, 4 * setup.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * setup.width, setup.width, bias=False),
        )

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        q, k, v, gate = self.qkvg(self.norms[0](x)).unflatten(-1, (4, self.heads, -1)).unbind(2)
        mixed = self.norm_head(mix(silu(q), silu(k), silu(v))) * torch.sigmoid(gate)
        x = x + self.out(mixed.flatten(2))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """From codes [B, S] to logits. The mixer of each layer over time is an argument."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.embedding = nn.Embedding(text.VOCABULARY, setup.width)
        self.blocks = nn.ModuleList(Block(setup) for _ in range(setup.layers))
        self.norm = nn.RMSNorm(setup.width)
        self.head = nn.Linear(setup.width, text.VOCABULARY, bias=False)

    def forward(self, codes: Tensor, mixes: list[Mix]) -> Tensor:
        x = self.embedding(codes)
        for block, mix in zip(self.blocks, mixes, strict=True):
            x = block(x, mix)
        return self.head(self.norm(x))


class Lightning:
    """State of one layer [1, H, D, D], of constant size."""

    def __init__(self, setup: Setup, layer: int):
        head_dim = setup.width // setup.heads
        self.slopes = tm.lightning_slopes(setup.heads, layer, setup.layers)
        self.state = torch.zeros(1, setup.heads, head_dim, head_dim)

    def train(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tm.lightning_attention(q, k, v, self.slopes)

    def read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, self.state = tm.lightning_attention(
            q, k, v, self.slopes, initial_state=self.state, return_final_state=True
        )
        return out

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tm.linear_attention_decode(q, k, v, self.state, log_decay=-self.slopes, scale=1.0)

    def bytes(self) -> int:
        return self.state.nbytes


class SoftmaxCache:
    """KV cache of one layer for softmax attention over everything read. Its contents are random,
    since the time does not depend on them."""

    def __init__(self, setup: Setup, context: int):
        shape = (2, 1, context, setup.heads, setup.width // setup.heads)
        self.keys, self.values = torch.randn(shape)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[:, -1:], self.values[:, -1:] = k, v
        return tm.attention(q, self.keys, self.values)

    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def train(model: LanguageModel, setup: Setup) -> None:
    codes = text.characters()[0]
    mixes = [Lightning(setup, layer).train for layer in range(setup.layers)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, setup.steps, pct_start=0.1)
    offsets = torch.arange(setup.context + 1)
    start = time.perf_counter()
    for step in range(setup.steps):
        begins = torch.randint(len(codes) - setup.context, (setup.batch, 1))
        windows = codes[begins + offsets]
        logits = model(windows[:, :-1], mixes)
        loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(setup.steps // 6, 1) == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1:4d}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


@torch.inference_mode()
def read(model: LanguageModel, memory: list[Lightning], codes: Tensor) -> float:
    """Reads codes in pieces; returns the mean loss of predicting each from all previous codes, in
    nats."""
    total = 0.0
    for begin in range(0, len(codes) - 1, PIECE):
        piece = codes[begin : begin + PIECE + 1]
        logits = model(piece[None, :-1], [layer.read for layer in memory])
        total += cross_entropy(logits[0], piece[1:], reduction="sum").item()
    return total / (len(codes) - 1)


@torch.inference_mode()
def continue_text(model: LanguageModel, memory: list[Lightning], last: int, count: int) -> str:
    """The next `count` characters, sampled at temperature 0.7."""
    code, found = torch.tensor([[last]]), []
    for _ in range(count):
        logits = model(code, [layer.step for layer in memory])[0, -1]
        code = torch.multinomial(torch.softmax(logits / 0.7, -1), 1)[None]
        found.append(chr(int(code)))
    return "".join(found)


@torch.inference_mode()
def tokens_per_second(model: LanguageModel, mixes: list[Mix], seconds: float) -> float:
    code = torch.zeros(1, 1, dtype=torch.long)
    model(code, mixes)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or count < 3:
        model(code, mixes)
        count += 1
    return count / (time.perf_counter() - start)


def plot(rows: list[tuple[int, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    contexts, ours, softmax = zip(*rows, strict=True)
    axes.loglog(contexts, ours, "o-", color="#c8553d", label="lightning attention, a state")
    axes.loglog(contexts, softmax, "o-", color="#2d5d7b", label="softmax attention, a cache")
    axes.set_xlabel("characters of context")
    axes.set_ylabel("tokens per second")
    axes.set_xticks(contexts, [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--plot", type=Path, help="also draw the speeds into this PNG")
    options = parser.parse_args()
    setup = QUICK if options.quick else Setup()
    torch.manual_seed(0)
    model = LanguageModel(setup)
    train(model, setup)

    codes = text.characters()[1]
    codes = codes.repeat(-(-max(setup.contexts) // len(codes)))
    print(f"\nfrequencies of character pairs: loss {text.pair_loss():.3f}")
    print(f"{'context':>9}{'loss':>8}{'lightning':>13}{'softmax':>13}  state / cache")
    rows = []
    for context in setup.contexts:
        memory = [Lightning(setup, layer) for layer in range(setup.layers)]
        loss = read(model, memory, codes[:context])
        cache = [SoftmaxCache(setup, context) for _ in range(setup.layers)]
        sizes = (sum(layer.bytes() for layer in each) / 2**10 for each in (memory, cache))
        ours, softmax = (
            tokens_per_second(model, [layer.step for layer in each], setup.seconds)
            for each in (memory, cache)
        )
        rows.append((context, ours, softmax))
        print(
            f"{context:9d}{loss:8.3f}{ours:9.0f}/s{softmax:11.0f}/s  "
            + " / ".join(f"{size:.0f} KiB" for size in sizes),
            flush=True,
        )

    memory = [Lightning(setup, layer) for layer in range(setup.layers)]
    prompt = "The following "
    prompt_codes = torch.tensor([ord(c) for c in prompt])
    read(model, memory, prompt_codes)
    print(f"\n{prompt}{continue_text(model, memory, ord(prompt[-1]), 200)}")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
