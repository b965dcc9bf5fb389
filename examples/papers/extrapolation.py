"""Length extrapolation of TokenSelect (Wu et al. 2024): needles beyond the trained length.

Trains a small model with rotary embedding to recall the token after a name, on texts of 256 tokens,
and asks it in longer ones: with full attention and positions in the text, with a sliding window
whose positions are places in the cache (StreamingLLM), and with TokenSelect, which rotates keys by
their place in its list, so that no position exceeds the trained ones. Half a minute on two
cores.

    python examples/papers/extrapolation.py
    python examples/papers/extrapolation.py --lengths 256 4096 --texts 4
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tokenmill as tm
from tokenmill import policies

TRAINED = 256  # tokens
FILLER, NAMES, ANSWERS = 48, 64, 32  # numbers of token kinds
FACTS = 6  # per text: a name and its answer
WIDTH, HEADS, KEY_HEADS, DIM, LAYERS = 64, 4, 2, 32, 2
FASTEST, SLOWEST = 1 / 16, 1 / 320  # rotation of column pairs, in radians per token
SCALE = 1.0  # for queries and keys of norm sqrt(32): equal tokens outweigh all others
# (q [B, S, H, D], k and v [B, S, Hk, D], all without rotation) -> [B, S, H, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def tables(positions: int) -> tuple[Tensor, Tensor]:
    share = torch.arange(0, DIM, 2) / (DIM - 2)
    angle = torch.arange(positions)[:, None] * FASTEST * (SLOWEST / FASTEST) ** share
    return angle.cos(), angle.sin()


def rotate(x: Tensor, at: Tensor) -> Tensor:
    """Rotary embedding of x [B, S, H, D] at positions [S]."""
    cos, sin = (t[at, None] for t in tables(int(at.max()) + 1))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """Attention whose keys also encode the previous token, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.norm_q, self.norm_k = (nn.RMSNorm(DIM) for _ in range(2))
        self.q = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k = nn.Linear(2 * WIDTH, KEY_HEADS * DIM, bias=False)
        self.v = nn.Linear(WIDTH, KEY_HEADS * DIM, bias=False)
        # Equal tokens match from the first step on.
        self.k.weight.data[:, :WIDTH] *= 0.1
        own = self.k.weight.data[:, WIDTH:].unflatten(0, (KEY_HEADS, DIM))
        self.q.weight.data = own.repeat_interleave(HEADS // KEY_HEADS, 0).flatten(0, 1).clone()
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, attend: Attend, last: Tensor) -> tuple[Tensor, Tensor]:
        """last: the normed input before x, [B, 1, width]."""
        now = self.norms[0](x)
        before = torch.cat([last, now[:, :-1]], 1)
        q = self.norm_q(self.q(now).unflatten(-1, (HEADS, DIM)))
        k = self.norm_k(self.k(torch.cat([now, before], -1)).unflatten(-1, (KEY_HEADS, DIM)))
        v = self.v(now).unflatten(-1, (KEY_HEADS, DIM))
        x = x + self.out(attend(q, k, v).flatten(2))
        return x + self.mlp(self.norms[1](x)), now[:, -1:]


class Model(nn.Module):
    """From tokens [B, S] to logits of answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(FILLER + NAMES + ANSWERS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, ANSWERS)

    def forward(
        self, tokens: Tensor, attends: list[Attend], last: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        x, after = self.embedding(tokens), []
        last = last or [x.new_zeros(len(x), 1, WIDTH)] * LAYERS
        for block, attend, before in zip(self.blocks, attends, last, strict=True):
            x, now = block(x, attend, before)
            after.append(now)
        return self.head(self.norm(x)), after


def texts(count: int, length: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [count, length] with a fact in each of FACTS parts, ending with all names in any
    order, each followed by its answer; and the answers [count, FACTS]."""
    tokens = torch.randint(FILLER, (count, length), generator=g)
    names = torch.rand(count, NAMES, generator=g).argsort(1)[:, :FACTS] + FILLER
    answers = torch.randint(ANSWERS, (count, FACTS), generator=g)
    part = (length - 2 * FACTS) // FACTS
    at = torch.randint(part - 1, (count, FACTS), generator=g) + torch.arange(FACTS) * part
    rows = torch.arange(count)[:, None]
    tokens[rows, at], tokens[rows, at + 1] = names, answers + FILLER + NAMES
    order = torch.rand(count, FACTS, generator=g).argsort(1)
    names, answers = names.gather(1, order), answers.gather(1, order)
    tokens[:, -2 * FACTS :: 2], tokens[:, 1 - 2 * FACTS :: 2] = names, answers + FILLER + NAMES
    return tokens, answers


def as_trained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[1])
    return tm.attention(rotate(q, at), rotate(k, at), v, causal=True, scale=SCALE)


def train(model: Model, steps: int) -> None:
    g = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, steps, pct_start=0.1)
    begin = time.perf_counter()
    for step in range(steps):
        tokens, answers = texts(16, TRAINED, g)
        logits, _ = model(tokens, [as_trained] * LAYERS)
        loss = cross_entropy(logits[:, -2 * FACTS :: 2].flatten(0, 1), answers.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(steps // 5, 1) == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step + 1:4d}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def full(caches: list[policies.KVCache]) -> list[Attend]:
    """Full attention with positions in the text, as in training."""

    def attend(layer: policies.FullAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = layer.cache.longest
        at = first + torch.arange(q.shape[1])
        call = layer.step if first else layer.prefill
        return call(rotate(q, at), rotate(k, at), v)

    layers = policies.stack(policies.FullAttention, caches, scale=SCALE)
    return [lambda q, k, v, layer=layer: attend(layer, q, k, v) for layer in layers]


def by_place(
    method: type[policies.Policy], caches: list[policies.KVCache], **options: object
) -> list[Attend]:
    """A policy that receives queries and keys without rotation."""
    layers = policies.stack(method, caches, scale=SCALE, **options)

    def attend(layer: policies.Policy, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer.step(q, k, v) if layer.cache.longest else layer.prefill(q, k, v)

    return [lambda q, k, v, layer=layer: attend(layer, q, k, v) for layer in layers]


@torch.inference_mode()
def share_right(model: Model, length: int, name: str, count: int = 16) -> float:
    tokens, answers = texts(count, length, torch.Generator().manual_seed(1))
    like = torch.zeros(count, 1, KEY_HEADS, DIM)
    caches = [policies.KVCache.like(like, like, length) for _ in range(LAYERS)]
    if name == "full":
        attends = full(caches)
    elif name == "StreamingLLM":
        attends = by_place(
            policies.StreamingLLM, caches, num_recent=TRAINED - 4, rope=tables(length)
        )
    else:  # a list and a chunk have 4 + 156 + 96 = 256 places
        attends = by_place(
            policies.TokenSelect, caches, k=156, num_sink=4, num_recent=96, chunk=96,
            rope=tables(TRAINED),
        )  # fmt: skip
    _, last = model(tokens[:, : -2 * FACTS], attends)
    right = 0
    for i in range(-2 * FACTS, 0):
        logits, last = model(tokens[:, i:][:, :1], attends, last)
        if i % 2 == 0:
            right += int((logits[:, 0].argmax(1) == answers[:, i // 2]).sum())
    return right / answers.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--steps", type=int, default=120, help="of the training (default 120)")
    parser.add_argument("--texts", type=int, default=16, help="of each length (default 16)")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Model()
    train(model, args.steps)
    names = ("full", "StreamingLLM", "TokenSelect")
    print(f"{'tokens':>7}" + "".join(f"{name:>14}" for name in names) + "   answers right")
    for length in args.lengths:
        shares = [share_right(model, length, name, args.texts) for name in names]
        print(f"{length:7d}" + "".join(f"{share:14.0%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
