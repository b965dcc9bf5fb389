"""Runs and prints `python -m tokenmill demo`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import _cli, _explain, _info
from ..evaluation.table import Row, mean, share
from ..samples import text
from . import encoder, language_model, page, policies, vision
from .encoder import Agreement
from .language_model import KINDS, Run, Setup
from .policies import FULL

SECONDS = 1.0  # measuring time per batch
MAX_LOSS_RATIO = 1.03  # sigmoid to softmax
MAX_READ = 0.8  # fraction of the bytes of a step with full attention
MIN_FOUND = 0.75  # needles that full attention finds
MIN_KEPT = 0.5  # of those, fraction that TokenSelect finds
MIN_SAME = 0.98  # cosine of class features, and correlation of saliency maps, after merging
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One line of the summary."""

    name: str
    value: str
    limit: str
    ok: bool


def run(backends: list[str] | None, *, out: Path, setup: Setup) -> int:
    """Prints and draws everything; exit status as in :func:`tokenmill.demo.run`."""
    begin = time.perf_counter()
    backends = list(dict.fromkeys(backends or default_backends()))
    for backend in backends:
        if error := refusal(backend):
            raise _cli.UsageError(f"--{error.removeprefix('tokenmill.attention: ')}")
    path = _cli.writable_folder("--out", out) / "index.html"
    try:
        path.unlink(missing_ok=True)  # an interrupted run must not leave another run's page
    except OSError as error:
        raise _cli.UsageError(_cli.unwritable("--out", path, error)) from None
    console = Console()
    machine = _info.machine()
    facts = (
        f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}, "
        f"{torch.get_num_threads()} thread(s), backends: {', '.join(backends)}"
    )
    console.print(facts, highlight=False)
    failures: list[Check] = []

    def part(name: str, make: Callable[[], T]) -> T | None:
        """The result of a part; a part that fails leaves only a failed check."""
        try:
            return make()
        except Exception as error:
            check = Check(f"{name}: {_cli.one_line(error)}", "failed", "runs", False)
            console.print(check.name, markup=False, highlight=False)
            failures.append(check)
            return None

    first, device = backends[0], device_of(backends[0])
    agreements = part("pretrained encoder", lambda: show_encoder(console, backends)) or []
    answers = part("retrieval", lambda: encoder.search(first, device)) or []
    runs = part("training", lambda: show_training(console, setup, first)) or []
    maps = part("attention maps", lambda: page.maps(runs)) or ""
    rows = part("policies", lambda: show_policies(console, first)) or []
    merged = part("vision transformer", lambda: show_vision(console, first))
    checks = [
        *encoder_checks(agreements),
        *training_checks(runs),
        *policy_checks(rows),
        *vision_checks(merged),
        *failures,
    ]
    console.print(summary(checks))
    good = sum(check.ok for check in checks)
    found = page.Found(
        machine=machine,
        facts=facts,
        backend=first,
        agreements=agreements,
        answers=answers,
        runs=runs,
        maps=maps,
        rows=rows,
        merged=merged,
        checks=checks,
        seconds=time.perf_counter() - begin,
    )
    console.print(f"{good} of {len(checks)} checks hold; {found.seconds:.0f} s", highlight=False)
    _cli.write_text("--out", path, page.page(found))
    return 0 if good == len(checks) else 1


def default_backends() -> list[str]:
    """Default backends: a GPU's if there is one, otherwise the CPU kernels and the reference."""
    if torch.cuda.is_available():
        found = [backend for backend in ("cuda", "triton") if not refusal(backend)]
        if found:
            return found
    return ["cpu", "reference"]


def device_of(backend: str) -> str:
    gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return "cuda" if gpu else "cpu"


def refusal(backend: str) -> str | None:
    """The reason why attention cannot run on this backend here; None if it can."""
    q = torch.empty(1, 1, 1, 32, device=device_of(backend))
    return _explain.explain("attention", q, q, q, backend=backend).error


def show_encoder(console: Console, backends: list[str]) -> list[Agreement]:
    total = len(backends) * len(text.BATCHES)
    agreements = []
    with progress(console) as bar:
        task = bar.add_task("pretrained encoder", total=total)
        for backend in backends:
            for found in encoder.compare(backend, device_of(backend), seconds=SECONDS):
                agreements.append(found)
                bar.advance(task)
    console.print(
        "\nall-MiniLM-L6-v2 in float32 with every attention layer on tokenmill (ratio:\n"
        f"time of transformers' {encoder.STOCK} / ours, of the whole model and of its attention)\n",
        highlight=False,
    )
    table = new_table(
        ["backend", "batch"],
        ["tokens", "padding", "least\ncosine", "model\nms", "\nratio", "attention\nms", "\nratio"],
    )
    for a in agreements:
        table.add_row(
            a.backend,
            a.batch,
            f"{a.shape[0]} x {a.shape[1]}",
            f"{a.padding:.0%}",
            f"{a.cosine:.7f}",
            f"{a.model * 1e3:.0f}",
            f"{a.stock_model / a.model:.2f}x",
            f"{a.attention * 1e3:.1f}",
            f"{a.stock_attention / a.attention:.2f}x",
        )
    console.print(table)
    return agreements


def show_training(console: Console, setup: Setup, backend: str) -> list[Run]:
    runs = []
    with progress(console) as bar:
        for kind in KINDS:
            task = bar.add_task(f"training with {kind}", total=setup.steps)
            runs.append(
                language_model.train(
                    kind,
                    setup,
                    backend=backend,
                    device=device_of(backend),
                    after_step=functools.partial(bar.advance, task),
                )
            )
    console.print(
        f"\ncharacter model, {setup.steps} steps on backend {backend}, both attentions with\n"
        "norms on queries, keys and the output of each head; sigmoid with a bias of -log n\n",
        highlight=False,
    )
    table = new_table(
        ["attention"],
        ["parameters", "validation loss", "seconds", "ms per step"],
    )
    for r in runs:
        table.add_row(
            r.kind,
            f"{sum(p.numel() for p in r.model.parameters()):,}",
            f"{r.loss:.4f}",
            f"{r.seconds:.1f}",
            f"{r.seconds / setup.steps * 1e3:.0f}",
        )
    console.print(table)
    return runs


def show_policies(console: Console, backend: str) -> list[Row]:
    with progress(console) as bar:
        task = bar.add_task("SmolLM2 under policies", total=1 + len(policies.POLICIES))
        rows = policies.judge(
            device=device_of(backend), backend=backend, after=lambda row: bar.advance(task)
        )
    console.print(
        f"\nSmolLM2-135M reads {policies.LENGTH} tokens with {policies.NEEDLES} hidden facts on "
        f"backend {backend};\npolicies attend to {policies.BUDGET} keys a step\n",
        highlight=False,
    )
    table = new_table(
        ["policy"], ["facts\nfound", "loss of\na repetition", "tokens/s", "MB read\na step"]
    )
    for row in rows:
        found, copy = share(row.found)[0], mean(row.losses["copy"])[0]
        rate, read = f"{1 / row.step:.1f}", f"{row.bytes_read / 1e6:.1f}"
        table.add_row(row.name, f"{found:.0%}", f"{copy:.2f}", rate, read)
    console.print(table)
    return rows


def show_vision(console: Console, backend: str) -> vision.Merged:
    found = vision.merge(device=device_of(backend), backend=backend)
    row = found.row
    console.print(
        f"\nDINOv2 ViT-S at {row.pixels} pixels, ToMe merging {vision.MERGE} tokens a layer: "
        f"{row.tokens} -> {row.kept} tokens,\n{row.rate:.1f} images/s, {row.speed:.2f}x; "
        f"cosine of class features {min(row.class_cosine):.4f}, "
        f"correlation of saliency {row.saliency:.4f}\n",
        highlight=False,
    )
    return found


def policy_checks(rows: list[Row]) -> Iterator[Check]:
    named = {row.name: row for row in rows}
    if (full := named.get(FULL)) is None:
        return
    found = share(full.found)[0]
    name = f"{FULL}: facts found"
    yield Check(name, f"{found:.2f}", f">= {MIN_FOUND}", found >= MIN_FOUND)
    for row in rows:
        if row.name != FULL:
            read = row.bytes_read / full.bytes_read
            name = f"{row.name}: bytes read a step / all"
            yield Check(name, f"{read:.2f}", f"< {MAX_READ}", read < MAX_READ)
    if (selects := named.get("TokenSelect")) is not None:
        kept = sum(selects.found) / max(sum(full.found), 1)
        name = f"TokenSelect: facts found / by {FULL}"
        yield Check(name, f"{kept:.2f}", f">= {MIN_KEPT}", kept >= MIN_KEPT)


def vision_checks(merged: vision.Merged | None) -> Iterator[Check]:
    if merged is None:
        return
    figures = {
        "class features: least cosine": min(merged.row.class_cosine),
        "saliency: correlation": merged.row.saliency,
    }
    for name, value in figures.items():
        limit = f">= {MIN_SAME}"
        yield Check(f"DINOv2 merged, {name}", f"{value:.4f}", limit, value >= MIN_SAME)


def encoder_checks(agreements: list[Agreement]) -> Iterator[Check]:
    for backend in dict.fromkeys(a.backend for a in agreements):
        cosines = [a.cosine for a in agreements if a.backend == backend]
        minimum = min(cosines, key=lambda c: (c == c, c))  # NaN counts as less than all
        limit = encoder.MIN_COSINE
        name = f"embeddings on {backend}: least cosine with {encoder.STOCK}"
        yield Check(name, f"{minimum:.7f}", f">= {limit}", minimum >= limit)


def training_checks(runs: list[Run]) -> Iterator[Check]:
    if not runs:
        return
    pairs = text.pair_loss()
    for r in runs:
        name = f"{r.kind}: validation loss below character pairs"
        yield Check(name, f"{r.loss:.4f}", f"< {pairs:.4f}", r.loss < pairs)
    losses = {r.kind: r.loss for r in runs}
    ratio = losses["sigmoid"] / losses["softmax"]
    yield Check(
        "sigmoid: validation loss / that of softmax",
        f"{ratio:.4f}",
        f"<= {MAX_LOSS_RATIO}",
        ratio <= MAX_LOSS_RATIO,
    )


def summary(checks: list[Check]) -> Table:
    table = new_table(["check"], ["value", "limit", ""])
    for check in checks:
        verdict = "[green]ok[/green]" if check.ok else "[bold red]FAILED[/bold red]"
        table.add_row(escape(check.name), check.value, check.limit, verdict)
    return table


def new_table(words: list[str], numbers: list[str]) -> Table:
    """A table with headings for text columns (left) and number columns (right)."""
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
