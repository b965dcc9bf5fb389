"""A small character-level Llama, trained here, and `generate()` under several policies."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import policies
from . import text
from .encoder import now
from .language_model import Setup, learning_rate

LLAMA = Setup(width=128, heads=4, layers=4, context=256, batch=4, steps=400)
KEY_HEADS = 2
PROMPT, NEW = 160, 96  # characters, within the training context
TEMPERATURE, SEED = 0.5, 0  # greedy decoding repeats itself
BUDGET = 64  # keys that a policy may read per step
POLICIES: dict[str, Any] = {
    "FullAttention": policies.FullAttention(),
    "Quest": policies.Quest(budget=BUDGET, dense_layers=1),
    "StreamingLLM": policies.StreamingLLM(num_sink=4, num_recent=BUDGET - 4),
    "SnapKV": policies.SnapKV(budget=BUDGET, window=32),
}
FULL = "FullAttention"
ROUNDS = 3  # timing rounds, interleaved over all policies


@dataclass(frozen=True)
class Generated:
    """Output of one policy for the prompt."""

    policy: str
    words: str
    rate: float  # tokens per second after the prompt; NaN if the steps take no time
    read: float  # bytes of the cache read by the last step, over all layers
    agreement: float  # fraction of characters before the first difference from full attention


@dataclass
class Llama:
    """The trained model and its training record."""

    model: Any
    setup: Setup
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def train(
    setup: Setup,
    *,
    backend: str | None = None,
    device: str = "cpu",
    after_step: Callable[[], None] = lambda: None,
) -> Llama:
    """Trains a LlamaForCausalLM on tokenmill's attention; the seed determines parameters and
    batches.
    """
    import transformers

    from ..integrations.transformers import register

    torch.manual_seed(setup.seed)
    config: Any = transformers.LlamaConfig(
        vocab_size=text.VOCABULARY,
        hidden_size=setup.width,
        intermediate_size=3 * setup.width,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=min(KEY_HEADS, setup.heads),
        max_position_embeddings=setup.context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(device)
    model.set_attn_implementation(register(f"tokenmill-{backend}", backend=backend))
    codes = text.sentences()[0].to(device)
    run = Llama(model, setup)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    begins = torch.randint(len(codes) - setup.context, (setup.steps, setup.batch))
    start = time.perf_counter()
    for step, begin in enumerate(begins[:, :, None] + torch.arange(setup.context)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, setup)
        windows = codes[begin.to(device)]
        optimiser.zero_grad()
        loss = model(windows, labels=windows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        run.losses.append(loss.item())
        after_step()
    run.seconds = time.perf_counter() - start
    model.eval()
    return run


def prompt(length: int = PROMPT) -> Tensor:
    """The first characters of the validation text, from the beginning of a sentence."""
    validation = text.sentences()[1]
    ends = (validation[:-1] == ord(".")) & (validation[1:] == ord(" "))
    start = int(ends.nonzero()[0]) + 2
    return validation[start : start + length]


def generate(
    run: Llama,
    *,
    backend: str | None = None,
    length: int = PROMPT,
    new: int = NEW,
    after: Callable[[], None] = lambda: None,
) -> list[Generated]:
    """Output of each policy after one prompt with the same random draws, FullAttention first.
    `after` is called after each of the 1 + ROUNDS turns of a policy; the first, untimed turn warms
    up.
    """
    ids = prompt(length)[None].to(run.model.device)
    chosen = {name: dataclasses.replace(p, backend=backend) for name, p in POLICIES.items()}
    results, reads = {}, {}
    for name, policy in chosen.items():
        results[name], _, reads[name] = _generate(run.model, ids, new, policy)
        after()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(ROUNDS):
        for name, policy in chosen.items():
            of_prompt, whole = (_generate(run.model, ids, n, policy)[1] for n in (1, new))
            times[name].append((of_prompt, whole))
            after()
    found = []
    for name, result in results.items():
        of_prompt, whole = map(min, zip(*times[name], strict=True))
        rate = (new - 1) / (whole - of_prompt) if whole > of_prompt else math.nan
        same = (result == results[FULL]).cumprod(0).double().mean().item()
        found.append(Generated(name, printable(result), rate, reads[name], same))
    return found


def printable(codes: Tensor) -> str:
    """Codes [n] as characters: line breaks are kept, other control characters are replaced."""
    found = map(chr, codes.tolist())
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in found)


@torch.inference_mode()
def _generate(model: Any, ids: Tensor, new: int, policy: Any) -> tuple[Tensor, float, float]:
    """New characters, the time of the call in seconds, and the bytes read by the last step."""
    from ..integrations.transformers import apply_policy

    with apply_policy(model, policy) as applied:
        torch.manual_seed(SEED)
        start = now(ids.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            temperature=TEMPERATURE,
            pad_token_id=0,
            use_cache=True,
        )
        seconds = now(ids.device) - start
        cache: Any = applied.cache
        read = float(sum(p.bytes_read for p in cache.policies))
    return out[0, ids.shape[1] :].cpu(), seconds, read
