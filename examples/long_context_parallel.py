"""One sequence over several processes: the losses and the tokens of one process.

Trains small character models on whole sequences of real text that are sharded over the ranks, one
with lightning attention on 65,536 characters and one with softmax attention on 8,192, by plain SGD,
and continues the text from a cache that is sharded, too. Rank 0 repeats everything in one process
and prints both side by side. About four minutes on two cores.

    torchrun --nproc-per-node 4 examples/long_context_parallel.py
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from long_context_lm import LanguageModel, Mix
from long_context_lm import Setup as ModelSetup
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tokenmill as tm
import tokenmill.distributed as tmd
from tokenmill.samples import text


@dataclass(frozen=True)
class Setup(ModelSetup):
    width: int = 64
    heads: int = 2
    layers: int = 2
    lightning: int = 65536  # characters per sequence
    softmax: int = 8192
    steps: int = 50
    continued: int = 40


QUICK = Setup(width=32, layers=1, lightning=1024, softmax=256, steps=10, continued=8)


class Alone:
    """One process has the whole sequence."""

    ranks = 1

    def shard(self, x: Tensor) -> Tensor:
        return x

    def add_up(self, tensors: list[Tensor]) -> None:
        pass

    def attend(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        return tm.attention(q, k, v, causal=True)

    def recur(self, q: Tensor, k: Tensor, v: Tensor, length: int, slopes: Tensor) -> Tensor:
        return tm.lightning_attention(q, k, v, slopes)

    def decode(self, q: Tensor, cache: Cache) -> Tensor:
        return tm.attention_decode(q, cache.keys, cache.values, seqlens_k=cache.length)


class Together(Alone):
    """Each rank has a shard."""

    def __init__(self) -> None:
        self.ranks = dist.get_world_size()

    def shard(self, x: Tensor) -> Tensor:
        return tmd.shard_sequence(x)

    def add_up(self, tensors: list[Tensor]) -> None:
        for t in tensors:
            dist.all_reduce(t)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        return tmd.attention(q, k, v, causal=True, length=length)

    def recur(self, q: Tensor, k: Tensor, v: Tensor, length: int, slopes: Tensor) -> Tensor:
        return tmd.lightning_attention(q, k, v, slopes, length=length)

    def decode(self, q: Tensor, cache: Cache) -> Tensor:
        return tmd.attention_decode(
            q, cache.keys, cache.values, seqlens_k=cache.length, sizes=cache.sizes
        )


class Cache:
    """Keys and values of a layer for this rank's part of the text; the last rank has room for the
    tokens appended after it."""

    def __init__(self, where: Alone, length: int, room: int):
        last = where.ranks == 1 or dist.get_rank() == where.ranks - 1
        own = where.shard(torch.empty(1, length)).shape[1]
        self.sizes = [len(x) for x in torch.empty(length).tensor_split(where.ranks)]
        self.sizes[-1] += room
        self.length = torch.tensor([length], dtype=torch.int32)
        self.next = own if last else None
        self.room = room if last else 0
        self.keys = self.values = torch.empty(0)

    def fill(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, 0, 0, self.room)) for x in (k, v))

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.next is not None:
            self.keys[:, self.next], self.values[:, self.next] = k[:, 0], v[:, 0]
            self.next += 1
        self.length += 1


def mixes(setup: Setup, where: Alone, length: int, lightning: bool) -> list[Mix]:
    """The mixer of each layer over tokens."""
    if not lightning:
        return [functools.partial(where.attend, length=length)] * setup.layers
    slopes = [tm.lightning_slopes(setup.heads, n, setup.layers) for n in range(setup.layers)]
    return [functools.partial(where.recur, length=length, slopes=s) for s in slopes]


def train(model: LanguageModel, setup: Setup, where: Alone, lightning: bool) -> list[float]:
    """The loss of each step."""
    codes = text.characters()[0]
    length = setup.lightning if lightning else setup.softmax
    mix = mixes(setup, where, length, lightning)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(setup.steps):
        begin = step * 7919 % (len(codes) - length)
        inputs, labels = (where.shard(codes[None, begin + n : begin + n + length]) for n in (0, 1))
        logits = model(inputs, mix)
        loss = cross_entropy(logits[0], labels[0], reduction="sum") / length
        optimiser.zero_grad()
        loss.backward()
        value = loss.detach()
        where.add_up([value, *(p.grad for p in model.parameters() if p.grad is not None)])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(value.item())
    return losses


@torch.inference_mode()
def continue_text(model: LanguageModel, setup: Setup, where: Alone) -> str:
    """The most likely characters after the validation text, from a cache sharded over all ranks."""
    codes = text.characters()[1][: setup.softmax]
    caches = [Cache(where, len(codes), setup.continued) for _ in range(setup.layers)]

    def read(q: Tensor, k: Tensor, v: Tensor, cache: Cache, mix: Mix) -> Tensor:
        cache.fill(k, v)
        return mix(q, k, v)

    def step(q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
        cache.append(k, v)
        return where.decode(q, cache)

    pairs = [*zip(caches, mixes(setup, where, len(codes), False), strict=True)]
    logits = model(where.shard(codes[None]), [lambda *x, p=p: read(*x, *p) for p in pairs])
    last = logits[:, -1:].contiguous()
    if where.ranks > 1:  # the last rank has read the last character
        dist.broadcast(last, where.ranks - 1)
    found = []
    for _ in range(setup.continued):
        code = last.argmax(-1)
        found.append(chr(int(code)))
        last = model(code, [lambda *x, c=c: step(*x, c) for c in caches])
    return "".join(found)


def run(setup: Setup, where: Alone) -> tuple[dict[str, list[float]], str, float]:
    """Losses of both models, the text that softmax attention writes, and seconds."""
    start = time.perf_counter()
    losses = {}
    for name in ("lightning", "softmax"):
        torch.manual_seed(0)
        model = LanguageModel(setup)
        losses[name] = train(model, setup, where, name == "lightning")
    return losses, continue_text(model, setup, where), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, for a test")
    setup = QUICK if parser.parse_args().quick else Setup()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))
    dist.init_process_group("gloo")
    losses, written, seconds = run(setup, Together())
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        alone, text_alone, seconds_alone = run(setup, Alone())
        for name, values in losses.items():
            length = getattr(setup, name)
            print(
                f"{name}, {length} characters, {length // ranks} of them on each of {ranks} ranks"
            )
            print(f"{'step':>6}{'loss':>12}{'alone':>12}{'difference':>13}")
            for step in sorted({0, min(9, setup.steps - 1), setup.steps - 1}):
                mine, other = values[step], alone[name][step]
                print(f"{step + 1:6d}{mine:12.6f}{other:12.6f}{abs(mine - other) / other:13.1e}")
        print(f"text: {written!r}\nthe same alone: {written == text_alone}")
        print(f"{seconds:.0f} s on {ranks} ranks, {seconds_alone:.0f} s alone")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
