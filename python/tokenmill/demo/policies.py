"""SmolLM2 reads a long text with hidden facts under policies, and is asked for each fact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import policies
from ..evaluation import evaluate
from ..evaluation.table import Row
from ..samples import models

LENGTH, BUDGET = 2048, 512  # tokens of the text; keys that a step attends to
NEEDLES = 16
FULL = "FullAttention"
POLICIES = (policies.TokenSelect, policies.Quest, policies.StreamingLLM)


def judge(
    *,
    device: str = "cpu",
    backend: str | None = None,
    length: int = LENGTH,
    needles: int = NEEDLES,
    loaded: tuple[Any, Any] | None = None,
    after: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """A row for full attention and for each policy; loaded: a model and its tokenizer."""
    model, tokenizer = loaded or models.smollm2()
    layers, budget = model.config.num_hidden_layers, length * BUDGET // LENGTH
    chosen: dict[str, policies.Policy] = {FULL: policies.FullAttention(backend=backend)}
    for policy in POLICIES:
        fitted = policies.at_budget(policy, budget, length=length, layers=layers)
        chosen[policy.__name__] = dataclasses.replace(fitted, backend=backend)
    return evaluate(
        model.to(device),
        tokenizer,
        chosen,
        lengths=[length],
        needles=needles,
        asked=0,
        continuation=32,
        depths=(0.25, 0.75),
        after=after,
    )
