"""Do policies and the presses of kvpress keep the same keys of a text?

Reads a text with SmolLM2-135M under presses of kvpress and under policies of the same names, at the
same budget, and compares the losses of what is decoded after it, token by token. kvpress and
apply_policy need different releases of transformers, so each half runs in an environment of its own
and adds its losses to the file; the half that finds the other's prints the table.

    python examples/kvpress_agreement.py presses losses.json     # with kvpress
    python examples/kvpress_agreement.py policies losses.json    # with tokenmill[transformers]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tokenmill import policies
from tokenmill.evaluation import Text, make_text
from tokenmill.evaluation.table import mean, table
from tokenmill.samples import models

LENGTH, BUDGET = 2048, 512
Losses = dict[str, list[float]]  # nats of each scored token; needles: 1.0 where found

# press: the policy that it is compared with
PAIRS: dict[str, str | None] = {
    "full": "FullAttention",
    "SnapKV, window 64, kernel 5": "SnapKV.paper",
    "SnapKV, window 32, kernel 13": "SnapKV",
    "StreamingLLM": "StreamingLLM",
    "StreamingLLM, also while decoding": "StreamingLLM, num_recent 509",
    "the same, keys in order": "StreamingLLM, num_recent 509",
    "ObservedAttention": "H2O",
    "TOVA": None,
    "ExpectedAttention": None,
}


def presses() -> dict[str, Any]:
    import kvpress

    from tokenmill.integrations.kvpress import StreamingLLMPress as InOrder

    ratio = 1 - BUDGET / LENGTH

    def streaming(press: type) -> Any:
        """A press that evicts after the prompt and after each token."""
        each = kvpress.DecodingPress(press(), compression_interval=1, target_size=BUDGET)
        return kvpress.PrefillDecodingPress(press(ratio), each)

    made = (
        None,
        kvpress.SnapKVPress(ratio),
        kvpress.SnapKVPress(ratio, window_size=32, kernel_size=13),
        kvpress.StreamingLLMPress(ratio),
        streaming(kvpress.StreamingLLMPress),
        streaming(InOrder),
        kvpress.ObservedAttentionPress(ratio),
        kvpress.TOVAPress(ratio),
        kvpress.ExpectedAttentionPress(ratio),
    )
    return dict(zip(PAIRS, made, strict=True))


def chosen() -> dict[str, policies.Policy]:
    return {
        "FullAttention": policies.FullAttention(),
        "SnapKV.paper": policies.SnapKV.paper(budget=BUDGET),
        "SnapKV": policies.SnapKV(budget=BUDGET),
        "StreamingLLM": policies.StreamingLLM(num_recent=BUDGET - 4),
        "StreamingLLM, num_recent 509": policies.StreamingLLM(num_recent=BUDGET - 3),
        "H2O": policies.H2O(heavy=BUDGET // 2, recent=BUDGET // 2),
    }


def score(text: Text, decode: Callable[[list[int]], torch.Tensor]) -> Losses:
    """Losses of continuation and copies, and needles found. decode: from tokens after the prompt to
    the logits [n, vocabulary] of each."""
    losses: Losses = {"continuation": [], "copy": [], "needle": []}
    for question in text.questions:
        if question.task == "asked":
            continue
        tokens = [*question.given, *question.scored]
        logits = decode(tokens)[len(question.given) :].float()
        scored = torch.tensor(question.scored)
        if question.task == "needle":
            losses["needle"].append(float((logits.argmax(-1) == scored).all()))
        else:
            losses[question.task] += cross_entropy(logits, scored, reduction="none").tolist()
    return losses


@torch.inference_mode()
def under_press(model: Any, text: Text, press: Any) -> Losses:
    from kvpress import ObservedAttentionPress, PrefillDecodingPress
    from transformers import DynamicCache

    observed = isinstance(press, ObservedAttentionPress)
    model.set_attn_implementation("eager" if observed else "sdpa")
    evicts = isinstance(press, PrefillDecodingPress)  # a key in each step
    pressed = contextlib.nullcontext if press is None else lambda: press(model)
    cache = DynamicCache()
    with pressed():
        last = model(torch.tensor([text.prompt]), past_key_values=cache, logits_to_keep=1).logits[0]

    def decode(tokens: list[int]) -> torch.Tensor:
        own, found = copy.deepcopy(cache), [last]
        count = len(tokens) - 1
        with pressed() if evicts else contextlib.nullcontext():
            for begin in range(0, count, 1 if evicts else max(count, 1)):
                given = tokens[begin : begin + 1] if evicts else tokens[:count]
                # Positions are those of the text: the cache is shorter.
                at = LENGTH + begin + torch.arange(len(given))
                ids = torch.tensor([given])
                found.append(model(ids, position_ids=at[None], past_key_values=own).logits[0])
        return torch.cat(found)

    return score(text, decode)


@torch.inference_mode()
def under_policy(model: Any, text: Text, policy: policies.Policy) -> Losses:
    from tokenmill.integrations.transformers import apply_policy

    with apply_policy(model, policy) as applied, applied.decoding():
        last = model(torch.tensor([text.prompt]), logits_to_keep=1).logits[0]
        cache = applied.cache
        assert cache is not None

        def decode(tokens: list[int]) -> torch.Tensor:
            if len(tokens) == 1:
                return last
            own = {applied.cache_name: cache.copy()}
            return torch.cat([last, model(torch.tensor([tokens[:-1]]), **own).logits[0]])

        return score(text, decode)


def compared(found: dict[str, Losses]) -> str:
    def show(losses: Losses | None, task: str) -> str:
        return "" if losses is None else f"{mean(losses[task])[0]:.3f}"

    lines = []
    for press, policy in PAIRS.items():
        theirs, ours = found.get(f"press {press}"), found.get(f"policy {policy}")
        line = [press, policy or "none"]
        for task in ("continuation", "copy"):
            line += [show(theirs, task), show(ours, task)]
        line += [show(theirs, "needle"), show(ours, "needle")]
        difference = ""
        if theirs and ours:
            tasks = ("continuation", "copy")
            pairs = [zip(ours[task], theirs[task], strict=True) for task in tasks]
            difference = f"{max(abs(x - y) for pair in pairs for x, y in pair):.1e}"
        lines.append([*line, difference])
    header = ["press", "policy"]
    header += [f"{task}, {of}" for task in ("continuation", "copy", "needles") for of in PARTS]
    return table([*header, "largest difference of a token"], lines)


PARTS = ("kvpress", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("half", choices=("presses", "policies"))
    parser.add_argument("losses", type=Path, metavar="JSON", help="losses are kept here")
    options = parser.parse_args()
    model, tokenizer = models.smollm2()
    text = make_text(tokenizer, LENGTH)
    found: dict[str, Losses] = {}
    if options.losses.exists():
        found = json.loads(options.losses.read_text())
    made = presses() if options.half == "presses" else chosen()
    for name, each in made.items():
        kind = "press" if options.half == "presses" else "policy"
        if (key := f"{kind} {name}") not in found:
            under = under_press if kind == "press" else under_policy
            found[key] = under(model, text, each)
            options.losses.write_text(json.dumps(found) + "\n")
            print(key, flush=True)
    print(compared(found))


if __name__ == "__main__":
    main()
