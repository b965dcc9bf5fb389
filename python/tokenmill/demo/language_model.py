"""A small causal character-level language model, trained with softmax or sigmoid attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..dense.attention import attention
from ..dense.terms import Kind
from ..samples import text

KINDS: tuple[Kind, ...] = ("softmax", "sigmoid")
EVALUATIONS = 6  # per training


@dataclass(frozen=True)
class Setup:
    """A model and its training."""

    width: int = 128
    heads: int = 4
    layers: int = 3
    context: int = 128
    batch: int = 16
    steps: int = 150
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass
class Run:
    """One training: the loss of every step, and (steps done, loss) on validation text."""

    kind: Kind
    setup: Setup
    model: LanguageModel
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        return self.validation[-1][1]


class Attention(nn.Module):
    """Causal self-attention with ALiBi; queries, keys and the output of each head are normalised.

    The output norm matters for sigmoid: with a score bias of -log n the weights of a head that
    attends to few characters sum to about their fraction of the context, so its output would be
    drowned by heads that attend to all characters.
    """

    slopes: Tensor

    def __init__(self, setup: Setup, kind: Kind, backend: str | None) -> None:
        super().__init__()
        self.kind, self.backend, self.heads = kind, backend, setup.heads
        head_dim = setup.width // setup.heads
        self.qkv = nn.Linear(setup.width, 3 * setup.width, bias=False)
        self.out = nn.Linear(setup.width, setup.width, bias=False)
        self.norm_q, self.norm_k, self.norm_head = (nn.RMSNorm(head_dim) for _ in range(3))
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / setup.heads) for h in range(setup.heads)])
        self.register_buffer("slopes", slopes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.out(self.norm_head(self.attend(q, k, v, self.backend)).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """The weights [B, H, S, S], as attention to one-hot values on the reference backend."""
        q, k, _ = self.project(x)
        length = x.shape[1]
        one_hot = torch.eye(length, device=x.device).expand(len(x), length, length)
        values = one_hot[:, :, None].expand(-1, -1, self.heads, -1)
        return self.attend(q, k, values, "reference").transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.norm_q(q), self.norm_k(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> Tensor:
        return attention(
            q,
            k,
            v,
            kind=self.kind,
            score_bias="neg_log_n" if self.kind == "sigmoid" else None,
            alibi_slopes=self.slopes,
            causal=True,
            backend=backend,
        )


class Block(nn.Module):
    def __init__(self, setup: Setup, kind: Kind, backend: str | None) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = (nn.RMSNorm(setup.width) for _ in range(2))
        self.attention = Attention(setup, kind, backend)
        self.mlp = nn.Sequential(
            nn.Linear(setup.width, 4 * setup.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * setup.width, setup.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    """Codes [B, S] to logits [B, S, VOCABULARY]."""

    def __init__(self, setup: Setup, kind: Kind, backend: str | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(text.VOCABULARY, setup.width)
        self.blocks = nn.ModuleList(Block(setup, kind, backend) for _ in range(setup.layers))
        self.norm = nn.RMSNorm(setup.width)
        self.head = nn.Linear(setup.width, text.VOCABULARY, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.inference_mode()
    def weights(self, codes: Tensor) -> Tensor:
        """The attention weights [layers, B, H, S, S] of codes [B, S]."""
        x, found = self.embedding(codes), []
        for block in self.blocks:
            assert isinstance(block, Block)
            found.append(block.attention.weights(block.norm_attention(x)))
            x = block(x)
        return torch.stack(found)


def train(
    kind: Kind,
    setup: Setup,
    *,
    backend: str | None = None,
    device: str = "cpu",
    after_step: Callable[[], None] = lambda: None,
) -> Run:
    """Trains one model. The seed determines initial parameters and batches, equal for both kinds;
    `seconds` is the time of the steps without evaluations.
    """
    train_text, validation_text = (codes.to(device) for codes in text.characters())
    torch.manual_seed(setup.seed)
    run = Run(kind, setup, LanguageModel(setup, kind, backend).to(device))
    optimiser = torch.optim.AdamW(run.model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    begins = torch.randint(len(train_text) - setup.context, (setup.steps, setup.batch))
    offsets = torch.arange(setup.context + 1)
    every = max(1, setup.steps // EVALUATIONS)
    run.validation.append((0, evaluate(run.model, validation_text, setup)))
    for step, begin in enumerate(begins[:, :, None] + offsets):
        start = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, setup)
        optimiser.zero_grad()
        loss = next_character_loss(run.model, train_text[begin.to(device)])
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimiser.step()
        run.losses.append(loss.item())
        run.seconds += time.perf_counter() - start
        after_step()
        done = step + 1
        if done % every == 0 or done == setup.steps:
            run.validation.append((done, evaluate(run.model, validation_text, setup)))
    return run


def learning_rate(step: int, setup: Setup) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine decay to 0."""
    warm_up = (step + 1) / max(1, setup.steps // 10)
    return setup.learning_rate * min(warm_up, (1 + math.cos(math.pi * step / setup.steps)) / 2)


@torch.inference_mode()
def evaluate(model: LanguageModel, codes: Tensor, setup: Setup) -> float:
    """Mean loss over all complete windows of codes."""
    windows = codes.unfold(0, setup.context + 1, setup.context)
    losses = [
        next_character_loss(model, piece) * len(piece) for piece in windows.split(2 * setup.batch)
    ]
    return (torch.stack(losses).sum() / len(windows)).item()


def next_character_loss(model: LanguageModel, windows: Tensor) -> Tensor:
    """Cross-entropy of windows [B, S + 1], in nats per character."""
    logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
