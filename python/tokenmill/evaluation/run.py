"""Reads texts under policies, and scores what follows."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._check import check, fail
from ..policies import Policy
from ..policies.policy import Keeping
from .table import Key, Row, read_rows
from .tasks import DEPTHS, NAME, Question, Text, make_text

STEPS = 16  # steps of one token that are timed


def evaluate(
    model: Any,
    tokenizer: Any,
    policies: Mapping[str, Policy] | Sequence[Policy],
    *,
    lengths: Sequence[int] = (2048,),
    texts: int = 1,
    source: str | None = None,
    continuation: int = 256,
    needles: int = 50,
    asked: int = 10,
    depths: Sequence[float] = DEPTHS,
    results: str | Path | None = None,
    after: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Judges policies on long texts: quality, speed and memory.

    Each text is read once under each policy, and every question is decoded from a copy of that
    cache, so that policies that evict have made their choice before they know the question. A few
    questions are then asked at the end of the prompt, which such policies read before they choose.

    Args:
        model: a causal model of transformers that :func:`apply_policy` takes.
        tokenizer: its tokenizer.
        policies: policies without a cache, by name; or a sequence, named by their classes and the
            classes of their readers. Quality is easiest to read beside FullAttention's.
        lengths: tokens of the texts.
        texts: texts of each length, with other passages and other facts.
        source: the text that they are cut from; None: the language reference of Python.
        continuation: tokens after a text that are scored.
        needles: facts hidden in a text, each asked for once, at most 67.
        asked: how many of them the end of the prompt asks for, too; more than needles: each.
        depths: positions of the passages that are repeated, as fractions of a text.
        results: a JSON file. Rows that it has are not measured again, and each new row is written
            at once, so that an interrupted run goes on where it stopped.
        after: called with each row, also with those that the file had.

    Returns:
        A row for each policy, length and text.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> import tokenmill as tm
        >>> from tokenmill import policies
        >>> from tokenmill.samples import models
        >>> model, tokenizer = models.smollm2()
        >>> rows = tm.evaluate(
        ...     model, tokenizer, [policies.FullAttention(), policies.StreamingLLM(num_recent=60)],
        ...     lengths=[256], needles=4, asked=0, continuation=8)
        >>> [(row.name, row.keys) for row in rows]
        [('FullAttention', 265.5), ('StreamingLLM', 64.0)]
    """
    named = name_policies(policies)
    check(not model.training, NAME, "model", "must be in evaluation mode", "training")
    stored = Stored(None if results is None else Path(results))
    rows: list[Row] = []
    for length in lengths:
        for number in range(texts):
            text = make_text(
                tokenizer,
                length,
                number=number,
                source=source,
                continuation=continuation,
                needles=needles,
                asked=asked,
                depths=depths,
            )
            for name, policy in named.items():
                key = key_of(model, text, number, name, policy)
                row = stored.find(key)
                if row is None:
                    row = judge(model, text, policy, key)
                    stored.add(row)
                rows.append(row)
                after(row)
    return rows


def key_of(model: Any, text: Text, number: int, name: str, policy: Policy) -> Key:
    """What a row was measured for."""
    digest = hashlib.sha256(repr(text).encode()).hexdigest()[:16]
    dtype = str(model.dtype).removeprefix("torch.")
    named = f"{model.config.name_or_path or type(model).__name__}, {dtype}"
    return named, name, str(policy), len(text.prompt), number, digest


def name_policies(policies: Mapping[str, Policy] | Sequence[Policy]) -> dict[str, Policy]:
    if not isinstance(policies, Mapping):
        names = [name_of(p) for p in policies]
        numbered = [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names, 1)]
        policies = dict(zip(numbered, policies, strict=True))
    for policy in policies.values():
        rule = "must be policies without a cache"
        known = isinstance(policy, Policy) and policy.cache is None
        check(known, NAME, "policies", rule, type(policy).__name__)
    if not policies:
        fail(NAME, "policies", "must be at least one", "none")
    return dict(policies)


def name_of(policy: Any) -> str:
    name, reader = type(policy).__name__, getattr(policy, "reader", None)
    return name if reader is None else f"{name}, prefill {type(reader).__name__}"


class Stored:
    """Rows in a JSON file, which is replaced as a whole with each new one."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, list[Row]()
        if path is not None and path.exists():
            try:
                self.rows = read_rows(path)
            except (ValueError, TypeError):
                fail(NAME, "results", "must be a file of rows of evaluate()", str(path))

    def find(self, key: Key) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps([vars(r) for r in self.rows], indent=1) + "\n")
        new.replace(self.path)


def judge(model: Any, text: Text, policy: Policy, key: Key) -> Row:
    """One policy on one text."""
    from ..integrations.transformers import apply_policy

    device = model.device
    with (
        apply_policy(model, policy) as applied,
        applied.decoding(),
        torch.inference_mode(),
        PeakMemory(device) as peak,
    ):
        prompt = torch.tensor([text.prompt], device=device)
        start = now(device)
        read = model(prompt, logits_to_keep=1)
        prefill = now(device) - start
        cache, last = applied.cache, read.logits[0, -1]
        assert cache is not None
        losses: dict[str, list[float]] = {"continuation": [], "copy": []}
        found: list[bool] = []
        depths = []
        for question in text.questions:
            if question.task == "asked":
                continue
            logits = decode(applied, cache.copy(), last, [*question.given, *question.scored])
            logits = logits[len(question.given) :].float()
            scored = torch.tensor(question.scored, device=device)
            if question.task == "needle":
                found.append(bool((logits.argmax(-1) == scored).all()))
                depths.append(question.depth)
            else:
                loss = torch.nn.functional.cross_entropy(logits, scored, reduction="none")
                losses[question.task] += loss.tolist()
        times, reads = time_steps(applied, cache.copy(), last)
        held = sum(p.bytes_held for p in cache.policies)
        whole = sum(token_bytes(model, p) for p in cache.policies)
        asked = ask(applied, cache, prompt, [q for q in text.questions if q.task == "asked"])
    return Row(
        *key,
        losses=losses,
        found=found,
        depths=depths,
        asked=asked,
        prefill=prefill,
        step=statistics.median(times),
        bytes_read=reads,
        keys=reads / whole,
        bytes_held=held,
        peak=peak.bytes,
    )


def ask(applied: Any, cache: Any, prompt: Tensor, questions: Sequence[Question]) -> list[bool]:
    """Whether the answer to each question is the likeliest, if the question ends the prompt."""
    if not questions:
        return []
    tokens = prompt.shape[1]
    if not all(isinstance(policy, Keeping) for policy in cache.policies):  # it has chosen its keys
        with applied.reading(tokens + max(len(q.given) for q in questions)):
            applied.model(prompt, logits_to_keep=1)
        cache = applied.cache
    found = []
    for question in questions:
        own = cache.copy()
        with applied.reading(tokens + len(question.given)):
            last = call(applied, prompt.new_tensor([question.given]), own)[0, -1]
        answer = decode(applied, own, last, [*question.scored]).argmax(-1)
        found.append(answer.tolist() == [*question.scored])
    return found


def decode(applied: Any, cache: Any, last: Tensor, tokens: list[int]) -> Tensor:
    """Logits [n, vocabulary] of n tokens, each decoded after those before it."""
    if len(tokens) == 1:
        return last[None]
    steps = torch.tensor([tokens[:-1]], device=last.device)
    return torch.cat([last[None], call(applied, steps, cache)[0]])


def call(applied: Any, tokens: Tensor, cache: Any) -> Tensor:
    logits: Tensor = applied.model(tokens, **{applied.cache_name: cache}).logits
    return logits


def time_steps(applied: Any, cache: Any, last: Tensor) -> tuple[list[float], float]:
    """Seconds of steps that generate greedily, and the bytes that one reads on average."""
    times, reads = [], []
    token = last.argmax()[None, None]
    for _ in range(STEPS + 1):  # the first one warms up
        start = now(token.device)
        logits = call(applied, token, cache)
        token = logits[:, -1].argmax(-1)[None]
        times.append(now(token.device) - start)
        reads.append(sum(p.bytes_read for p in cache.policies))
    return times[1:], statistics.mean(reads[1:])


def token_bytes(model: Any, policy: Policy) -> int:
    """Bytes of a token's keys and values in all KV heads of a layer."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    k, v = policy.cache.k, policy.cache.v
    return heads * (k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size())


def now(device: torch.device) -> float:
    """Seconds of a clock, after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """A context manager; afterwards `bytes` is the most memory that was in use, of the device or,
    on a CPU under Linux, of the process. None elsewhere.
    """

    CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    RESET = "5"  # the peak of resident memory (man 5 proc)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self.known = True
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        try:
            self.CLEAR.write_text(self.RESET)
        except OSError:
            self.known = False
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.known:
            lines = self.STATUS.read_text().splitlines()
            peak = next(line for line in lines if line.startswith("VmHWM:"))
            self.bytes = int(peak.split()[1]) * 1024
