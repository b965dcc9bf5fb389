"""Which keys does HiP find in real text?

Takes queries and keys of two models that read a long text: the layers of a pretrained sentence
encoder (all-MiniLM-L6-v2, consecutive pieces of 512 tokens) and a small causal model trained here.
For several budgets it prints how much of the attention of each query the chosen keys hold, and the
error of the output, for HiP, for its exact mode, for a sliding window and for random blocks, all
with the same number of keys; then the time of HiP attention against the length. A few minutes on
two cores.

    python examples/hip_text.py --plot hip.png     # needs tokenmill[bench], tokenmill[demo]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needle
import torch
from torch import Tensor

import tokenmill as tm
from tokenmill.demo import encoder
from tokenmill.samples import text

BLOCK_Q, BLOCK_K, NUM_SINK, NUM_RECENT = 32, 2, 4, 60


@dataclass(frozen=True)
class Heads:
    """Attention inputs of one layer: q, k and v [1, S, heads, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@dataclass(frozen=True)
class Found:
    """Result of one method at one budget, mean over layers and queries: the share of the attention
    weight that its keys hold, and the relative error of the output."""

    model: str
    method: str
    budget: int
    recall: float
    error: float


@torch.inference_mode()
def encoder_layers(length: int) -> list[Heads]:
    from transformers import AttentionInterface, AttentionMaskInterface

    model = encoder.Encoder("cpu", "cpu")
    layers: list[tuple[Tensor, ...]] = []
    stock = AttentionInterface()[encoder.STOCK]

    def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any):
        layers.append((query, key, value))
        return stock(module, query, key, value, *args, **options)

    AttentionInterface.register("capture", capture)
    AttentionMaskInterface.register("capture", AttentionMaskInterface()[encoder.STOCK])
    model.model.set_attn_implementation("capture")
    piece = model.model.config.max_position_embeddings
    words = " ".join(text.prose())
    tokens = model.tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][0]
    tokens = tokens.repeat(-(-length // len(tokens)))[:length]
    model.model(input_ids=tokens[: length // piece * piece].view(-1, piece))
    # [pieces, heads, 512, 32] to [1, pieces * 512, heads, 32]
    return [
        Heads(*(t.transpose(1, 2).flatten(0, 1)[None] for t in layer), layer[0].shape[-1] ** -0.5)
        for layer in layers
    ]


def trained_layers(length: int, setup: needle.Setup, folder: Path | None) -> list[Heads]:
    model = needle.trained(setup, folder)
    codes = text.characters()[1]
    codes = codes.repeat(-(-length // len(codes)))[:length]
    return [Heads(q, k, v, needle.SCALE) for q, k, v, _ in needle.read(model, codes)[0]]


def random_blocks(heads: Heads, budget: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random blocks between the first and the last keys of each row."""
    length, count = heads.q.shape[1:3]
    rows, blocks = -(-length // BLOCK_Q), -(-length // BLOCK_K)
    scores = torch.rand(count, rows, blocks, generator=g)
    last = (torch.arange(rows)[:, None] + 1) * BLOCK_Q - 1 - NUM_RECENT
    begin = torch.arange(blocks) * BLOCK_K
    scores[:, (begin > last) | (begin < NUM_SINK)] = -math.inf
    indices, counts = tm.topk_select(scores.flatten(0, 1), budget // BLOCK_K)
    return indices.view(1, count, rows, -1), counts.view(1, count, rows)


def attend(heads: Heads, method: str, budget: int) -> tuple[Tensor, Tensor]:
    """out and lse with num_sink + budget + num_recent keys per query."""
    sizes = {"block_q": BLOCK_Q, "block_k": BLOCK_K, "num_sink": NUM_SINK, "causal": True}
    recent = NUM_RECENT
    if method in ("HiP", "HiP, exact"):
        lists = tm.hip_block_select(
            heads.q, heads.k, budget=budget, num_recent=recent, **sizes,
            bound="sample" if method == "HiP" else "minmax",
        )  # fmt: skip
    else:
        lists = random_blocks(heads, budget, torch.Generator().manual_seed(0))
        if method == "window":
            lists, recent = (lists[0][..., :0], lists[1] * 0), recent + budget
    return tm.block_sparse_attention(
        heads.q, heads.k, heads.v, *lists, num_recent=recent, scale=heads.scale, return_lse=True,
        **sizes,
    )  # fmt: skip


METHODS = ("HiP", "HiP, exact", "window", "random")


@torch.inference_mode()
def compare(model: str, layers: list[Heads], budgets: list[int]) -> Iterator[Found]:
    dense = [
        tm.attention(h.q, h.k, h.v, scale=h.scale, causal=True, return_lse=True) for h in layers
    ]
    for budget in budgets:
        # Queries that see more keys than any method selects.
        late = slice(NUM_SINK + budget + NUM_RECENT + BLOCK_Q, None)
        for method in METHODS:
            recall, error = 0.0, 0.0
            for heads, (out, lse) in zip(layers, dense, strict=True):
                own, own_lse = attend(heads, method, budget)
                recall += (own_lse - lse)[..., late].exp().mean().item()
                off = (own - out)[:, late].norm(dim=-1) / out[:, late].norm(dim=-1)
                error += off.mean().item()
            yield Found(model, method, budget, recall / len(layers), error / len(layers))


@dataclass(frozen=True)
class Timing:
    length: int
    hip: float  # seconds on one thread
    dense: float


@torch.inference_mode()
def timings(lengths: list[int], budget: int) -> Iterator[Timing]:
    """Processor time of 4 heads of 64, with arbitrary contents."""
    torch.set_num_threads(1)
    for length in lengths:
        q, k, v = (torch.randn(1, length, 4, 64) for _ in range(3))
        seconds = []
        for run in (
            lambda: tm.hip_attention(q, k, v, budget=budget),  # noqa: B023
            lambda: tm.attention(q, k, v, causal=True),  # noqa: B023
        ):
            best, spent = math.inf, 0.0
            while spent < 1:
                start = time.thread_time()
                run()
                best = min(best, time.thread_time() - start)
                spent += time.thread_time() - start
            seconds.append(best)
        yield Timing(length, *seconds)


def exponent(points: list[tuple[int, float]]) -> float:
    """Exponent of time in length, fitted to the upper half of the lengths."""
    upper = points[len(points) // 2 - 1 :]
    x, y = torch.tensor(upper, dtype=torch.float64).log().unbind(1)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def show(found: list[Found]) -> None:
    from rich.console import Console
    from rich.table import Table

    budgets = sorted({f.budget for f in found})
    table = Table(title="attention weight found / error of the output, by budget")
    table.add_column("model")
    table.add_column("method")
    for budget in budgets:
        table.add_column(str(budget), justify="right")
    rows: dict[tuple[str, str], dict[int, Found]] = {}
    for f in found:
        rows.setdefault((f.model, f.method), {})[f.budget] = f
    for (model, method), row in rows.items():
        cells = [f"{row[b].recall:.3f} / {row[b].error:.3f}" for b in budgets]
        table.add_row(model, method, *cells)
    Console(width=110).print(table)


def plot(found: list[Found], times: list[Timing], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(f.model for f in found))
    budgets = sorted({f.budget for f in found})
    figure, axes = plt.subplots(1, len(models) + 1, figsize=(11, 3.6), layout="constrained")
    colours = dict(zip(METHODS, ("#c8553d", "#588157", "#2d5d7b", "#999999"), strict=True))
    for axis, model in zip(axes, models, strict=False):
        for method, colour in colours.items():
            line = [(f.budget, f.recall) for f in found if (f.model, f.method) == (model, method)]
            axis.plot(*zip(*line, strict=True), "o-", color=colour, label=method)
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, map(str, budgets))
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("budget, keys")
        axis.set_ylabel("share of the attention weight")
        axis.set_title(model, fontsize=10)
    axes[0].legend(frameon=False)
    for name, colour in (("hip", "#c8553d"), ("dense", "#2d5d7b")):
        points = [(t.length, getattr(t, name)) for t in times]
        label = f"{'HiP' if name == 'hip' else 'causal'}, time ~ S^{exponent(points):.2f}"
        axes[-1].loglog(*zip(*points, strict=True), "o-", color=colour, label=label)
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks([t.length for t in times], [f"{t.length / 1024:g}k" for t in times])
    axes[-1].set_xlabel("length S")
    axes[-1].set_ylabel("seconds, one thread")
    axes[-1].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens that a model reads")
    parser.add_argument("--quick", action="store_true", help="a tiny model and text, for a test")
    parser.add_argument("--checkpoint", type=Path, help="folder that keeps the trained model")
    parser.add_argument("--no-encoder", action="store_true", help="only the trained model")
    parser.add_argument("--plot", type=Path, help="also draw recall and time into this PNG")
    options = parser.parse_args()
    length = 1024 if options.quick else options.length
    budgets = [32, 128] if options.quick else [64, 128, 256, 512, 1024]
    lengths = [256, 512, 1024, 2048] if options.quick else [2**n for n in range(11, 17)]
    setup = needle.QUICK if options.quick else needle.Setup()
    models = {"trained model": lambda: trained_layers(length, setup, options.checkpoint)}
    if not options.no_encoder:
        models["MiniLM"] = lambda: encoder_layers(length)
    found = [f for name, layers in models.items() for f in compare(name, layers(), budgets)]
    show(found)
    times = []
    for t in timings(lengths, 64 if options.quick else 512):
        times.append(t)
        print(f"{t.length:7d} keys  HiP {t.hip:8.3f} s  causal {t.dense:8.3f} s", flush=True)
    for name in ("hip", "dense"):
        print(f"{name}: time ~ S^{exponent([(t.length, getattr(t, name)) for t in times]):.2f}")
    if options.plot:
        plot(found, times, options.plot)


if __name__ == "__main__":
    main()
