"""Continuous batching over a cache in pages, and what it is worth.

Trains a small character model on the language reference of Python and serves requests with it as an
engine does (serve_engine.py): they come and go between steps, prompts are read in chunks together
with tokens of other requests, and texts with equal beginnings share pages. Then the same model
serves one request at a time, from pages and from contiguous caches with PyTorch's attention. Tokens
must be the same. A minute or two on two cores.

    python examples/serve.py --requests 64 --pages 200     # needs tokenmill[demo]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serve_engine import Engine, Request, greedy
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenmill.demo import language_model
from tokenmill.demo.language_model import LanguageModel, Setup
from tokenmill.samples import text

QUICK = Setup(width=32, heads=2, layers=2, context=64, batch=8, steps=24)


class Contiguous:
    """Contiguous cache of one request, [H, S, D] keys and values per layer, with PyTorch's
    attention."""

    def __init__(self, model: LanguageModel, length: int):
        self.model = model
        layers = [block.attention for block in model.blocks]
        self.slopes = layers[0].slopes[:, None, None]
        head_dim = layers[0].norm_head.normalized_shape[0]
        self.caches = torch.empty(len(layers), 2, layers[0].heads, length, head_dim)

    def forward(self, codes: list[int], begin: int) -> Iterator[tuple[int, float]]:
        """Next token after codes, whose first `begin` tokens are in the cache."""
        end = len(codes)
        distance = torch.arange(end) - torch.arange(begin, end)[:, None]
        bias = (self.slopes * distance).masked_fill(distance > 0, float("-inf"))  # [H, new, end]

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.caches[number, :, None, :, :end]  # [1, H, end, D]
            keys[0, :, begin:], values[0, :, begin:] = k.transpose(0, 1), v.transpose(0, 1)
            out = scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, bias[None])
            return out[0].transpose(0, 1)

        return greedy(self.model, codes[begin:], [end - begin - 1], attend)


def serve_alone(model: LanguageModel, request: Request) -> None:
    cache, begin = Contiguous(model, request.last), 0
    while len(request.codes) < request.last:
        ((code, log),) = cache.forward(request.codes, begin)
        begin = len(request.codes)
        request.codes.append(code)
        request.logs.append(log)


def serve(engine: Engine, requests: list[Request], ended: Callable[[], None]) -> None:
    coming = deque(sorted(requests, key=lambda request: request.arrival))
    for now in itertools.count():
        while coming and coming[0].arrival <= now:
            engine.submit(coming.popleft())
        if engine.waiting or engine.running:
            for _ in engine.step():
                ended()
        elif not coming:
            return


def workload(count: int, length: int, new: int, seed: int) -> list[Request]:
    """Passages of the language reference, every other one after the same preamble. The first five
    arrive at once and are hard cases for engines: one token, a prompt twice, a prefix of it, and a
    prompt that leaves room for one token."""
    g = torch.Generator().manual_seed(seed)
    preamble = text.passages(1, length)[0][: length // 4] + "\n\n"
    sizes = torch.randint(2, length // 2 + 2, (count,), generator=g).tolist()
    passages = [p[:n] for p, n in zip(text.passages(count, length), sizes, strict=True)]
    prompts = [preamble * (i % 2) + passage for i, passage in enumerate(passages)]
    twice = preamble + passages[-1]
    longest = text.passages(3, length)[1]
    odd = [twice[:1], twice, twice, twice[: len(preamble) + 3], longest][:count]
    prompts[: len(odd)] = odd
    answers = torch.randint(1, new + 1, (count,), generator=g).tolist()
    gaps = torch.empty(count).exponential_(0.5, generator=g)
    gaps[: len(odd)] = 0
    requests = []
    for prompt, answer, arrival in zip(prompts, answers, gaps.cumsum(0).tolist(), strict=True):
        codes = list(prompt[: length - 1].encode())
        requests.append(Request(codes, min(len(codes) + answer, length), int(arrival)))
    return requests


@dataclass
class Run:
    """Results of serving all requests in one way."""

    way: str
    requests: list[Request]
    seconds: float
    counts: Counter[str]


def compare(model: LanguageModel, requests: list[Request], repeats: int, **sizes: int) -> list[Run]:
    """The fastest of several interleaved runs of each way."""
    ways = {f"pages, {sizes['seats']} at once": sizes["seats"], "pages, 1 at a time": 1}
    ways["PyTorch, 1 at a time"] = 0
    best: dict[str, Run] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("serving", total=repeats * len(ways) * len(requests))
        ended = functools.partial(progress.advance, task)
        for way, seats in list(ways.items()) * repeats:
            served = [Request(list(r.codes), r.last, r.arrival) for r in requests]
            engine = Engine(model, **sizes | {"seats": max(seats, 1)})
            start = time.perf_counter()
            if seats:
                serve(engine, served, ended)
            else:
                for request in served:
                    serve_alone(model, request)
                    ended()
            run = Run(way, served, time.perf_counter() - start, engine.counts)
            best[way] = min(run, best.get(way, run), key=lambda run: run.seconds)
    return list(best.values())


def show(runs: list[Run], requests: list[Request]) -> bool:
    """Prints the comparison; returns True if every way generated the same tokens as the last
    one."""
    prompts = sum(len(request.codes) for request in requests)
    answers = sum(request.last for request in requests) - prompts
    console = Console(width=100, highlight=False)
    table = Table(title=f"{len(requests)} requests: {prompts} tokens read, {answers} generated")
    table.add_column("way")
    for title in ("seconds", "generated/s", "steps", "tokens/step", "same tokens", "log p apart"):
        table.add_column(title, justify="right")
    peer = runs[-1].requests
    all_same = True
    for run in runs:
        steps = run.counts["steps"] or answers
        each = (run.counts["tokens"] or prompts + answers - len(requests)) / steps
        same = sum(a.codes == b.codes for a, b in zip(run.requests, peer, strict=True))
        apart = max(
            abs(x - y)
            for a, b in zip(run.requests, peer, strict=True)
            for x, y in zip(a.logs, b.logs, strict=True)
        )
        all_same &= same == len(peer)
        table.add_row(run.way, f"{run.seconds:.2f}", f"{answers / run.seconds:.0f}", str(steps),
                      f"{each:.1f}", f"{same} of {len(peer)}", f"{apart:.0e}")  # fmt: skip
    console.print(table)
    counts = runs[0].counts
    console.print(
        f"{runs[0].way}: {counts['shared']} tokens read in pages of other texts; "
        f"{counts['evictions']} evictions,\n{counts['found again']} of their tokens found again"
    )
    for request, served in list(zip(requests, peer, strict=True))[-2:]:
        prompt, answer = request.codes[-80:], served.codes[len(request.codes) :]
        console.print(f"\n{bytes(prompt).decode()}", f"[{bytes(answer).decode()}]", markup=False)
    return all_same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default, what in (
        ("requests", 48, "to serve"),
        ("length", 768, "tokens of a text at most"),
        ("new", 96, "tokens of an answer at most"),
        ("pages", 160, "of the cache of each layer"),
        ("page-size", 16, "tokens of a page, a power of two"),
        ("seats", 16, "requests in a step at most"),
        ("budget", 256, "tokens in a step at most"),
        ("repeats", 3, "runs of each way, of which the fastest counts"),
        ("seed", 0, "of prompts, answers and arrivals"),
    ):
        words = f"{what} (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=words)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a test")
    options = parser.parse_args()
    size, budget = options.page_size, options.budget
    room = options.pages * size
    for name, rule, holds in (
        ("requests", "must be at least 1", options.requests >= 1),
        ("new", "must be at least 1", options.new >= 1),
        ("repeats", "must be at least 1", options.repeats >= 1),
        ("page-size", "must be a power of two", size > 0 and size & (size - 1) == 0),
        ("length", f"must be 2 to {room + 1}: pages hold {room}", 2 <= options.length <= room + 1),
        ("seats", f"must be 1 to {budget}, the budget", 1 <= options.seats <= budget),
    ):
        if not holds:
            parser.error(f"--{name}: {rule}; got {getattr(options, name.replace('-', '_'))}")
    setup = QUICK if options.quick else Setup()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=setup.steps)
        trained = language_model.train("softmax", setup, after_step=lambda: progress.advance(task))
    first, last = trained.validation[0][1], trained.loss
    print(f"{setup.steps} steps of training: loss {first:.2f} to {last:.2f}")
    requests = workload(options.requests, options.length, options.new, options.seed)
    sizes = {"pages": options.pages, "page_size": size, "seats": options.seats, "budget": budget}
    runs = compare(trained.model, requests, options.repeats, **sizes)
    return 0 if show(runs, requests) else 1


if __name__ == "__main__":
    sys.exit(main())
