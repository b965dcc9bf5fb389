"""A language model of gated DeltaNet layers, trained on the CPU in about 20 seconds.

Characters of the language reference that Python ships are the text. Each layer keeps a state of
constant size for each of the texts that are generated together, in slots.

    python examples/delta_net_lm.py --prompt "The following "
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tokenmill as tm
from tokenmill.samples import text


@dataclass(frozen=True)
class Setup:
    width: int = 128
    heads: int = 2
    layers: int = 2
    context: int = 128
    batch: int = 16
    steps: int = 200
    new: int = 200  # characters of each generated text


QUICK = Setup(width=32, layers=1, context=64, batch=4, steps=18, new=20)


class Block(nn.Module):
    """A gated DeltaNet and an MLP, each after a norm."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(setup.width) for _ in range(2))
        head_dim = setup.width // (2 * setup.heads)
        self.mix = tm.nn.GatedDeltaNet(setup.width, setup.heads, head_dim=head_dim)
        self.mlp = nn.Sequential(
            nn.Linear(setup.width, 4 * setup.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * setup.width, setup.width, bias=False),
        )


class LanguageModel(nn.Module):
    """From codes [B, T] to logits. With states, the tokens go on from them: one token by decode,
    several by prefill."""

    def __init__(self, setup: Setup):
        super().__init__()
        self.embedding = nn.Embedding(text.VOCABULARY, setup.width)
        self.blocks = nn.ModuleList(Block(setup) for _ in range(setup.layers))
        self.norm = nn.RMSNorm(setup.width)
        self.head = nn.Linear(setup.width, text.VOCABULARY, bias=False)

    def forward(self, codes: Tensor, states: list[tm.nn.RecurrentState] | None = None) -> Tensor:
        x = self.embedding(codes)
        for i, block in enumerate(self.blocks):
            y, mix = block.norms[0](x), block.mix
            if states is None:
                x = x + mix(y)
            else:
                call = mix.decode if codes.shape[1] == 1 else mix.prefill
                x = x + call(y, states[i])
            x = x + block.mlp(block.norms[1](x))
        return self.head(self.norm(x))


def train(model: LanguageModel, setup: Setup) -> None:
    codes = text.characters()[0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, setup.steps, pct_start=0.1)
    offsets = torch.arange(setup.context + 1)
    start = time.perf_counter()
    for step in range(setup.steps):
        begins = torch.randint(len(codes) - setup.context, (setup.batch, 1))
        windows = codes[begins + offsets]
        logits = model(windows[:, :-1])
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
def validate(model: LanguageModel, count: int = 16384) -> float:
    """Mean loss of the first characters of the validation text, in nats."""
    codes = text.characters()[1][: count + 1]
    return cross_entropy(model(codes[None, :-1])[0], codes[1:]).item()


@torch.inference_mode()
def continue_text(model: LanguageModel, prompt: str, texts: int, count: int) -> list[str]:
    """Several texts after a prompt, sampled together at temperature 0.7."""
    states = [block.mix.new_state(texts) for block in model.blocks]
    codes = torch.tensor([[ord(c) for c in prompt]]).expand(texts, -1)
    found = []
    for _ in range(count):
        logits = model(codes, states)[:, -1]
        codes = torch.multinomial(torch.softmax(logits / 0.7, -1), 1)
        found.append(codes)
    return [prompt + "".join(map(chr, row)) for row in torch.cat(found, 1).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--prompt", default="The following ")
    parser.add_argument("--texts", type=int, default=2, help="texts that are generated together")
    options = parser.parse_args()
    setup = QUICK if options.quick else Setup()
    torch.manual_seed(0)
    model = LanguageModel(setup)
    train(model, setup)
    print(f"\nvalidation: loss {validate(model):.3f}, of character pairs {text.pair_loss():.3f}")
    start = time.perf_counter()
    texts = continue_text(model, options.prompt, options.texts, setup.new)
    speed = options.texts * setup.new / (time.perf_counter() - start)
    size = sum(s.conv.nbytes + s.recurrent.nbytes for s in states_of(model)) / 2**10
    print(f"{speed:.0f} characters per second, a state of {size:.0f} KiB per text\n")
    print(f"\n{'-' * 40}\n".join(texts))


def states_of(model: LanguageModel) -> list[tm.nn.RecurrentState]:
    return [block.mix.new_state(1) for block in model.blocks]


if __name__ == "__main__":
    main()
