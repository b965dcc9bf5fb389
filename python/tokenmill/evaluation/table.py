"""Rows of an evaluation, as a table and as a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..policies import FullAttention

Z = 1.96  # 95 % of a normal distribution
Key = tuple[str, str, str, int, int, str]  # the first fields of a row
Estimate = tuple[float, float]  # a mean, and half the width of its interval of 95 %


@dataclass(frozen=True)
class Row:
    """One policy on one text.

    Attributes:
        model: its name, and the dtype of its weights.
        name, policy: the policy's name, and its fields.
        length, text, digest: tokens of the text, its number, and a hash of it and its questions.
        losses: nats of each scored token, by task: continuation and copy.
        found, depths: whether each needle's answer was the likeliest, and where its fact stood.
        asked: the same of those for which the end of the prompt asked.
        prefill, step: seconds of reading the text, and median seconds of a token after it.
        bytes_read: bytes of caches, and of what stands for keys, that a step reads, on average.
        keys: the same in keys with their values, per layer and KV head.
        bytes_held: bytes of the caches after the text.
        peak: bytes of memory at most; None: not known.
    """

    model: str
    name: str
    policy: str
    length: int
    text: int
    digest: str
    losses: dict[str, list[float]]
    found: list[bool]
    depths: list[float]
    asked: list[bool]
    prefill: float
    step: float
    bytes_read: float
    keys: float
    bytes_held: int
    peak: int | None

    @property
    def key(self) -> Key:
        return self.model, self.name, self.policy, self.length, self.text, self.digest


def read_rows(path: Path) -> list[Row]:
    """Rows that a run kept in a file. ValueError or TypeError if it holds anything else."""
    return [Row(**row) for row in json.loads(path.read_text())]


def mean(values: Sequence[float]) -> Estimate:
    if not values:
        return math.nan, math.nan
    wide = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.mean(values), Z * wide


def share(found: Sequence[bool]) -> Estimate:
    """A share of successes, and half the width of its Wilson interval."""
    n = len(found)
    if n == 0:
        return math.nan, math.nan
    p = sum(found) / n
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return p, half


@dataclass(frozen=True)
class Summary:
    """All texts of one policy and length. excess: losses minus those under full attention, averaged
    over tokens."""

    name: str
    length: int
    continuation: Estimate
    copy: Estimate
    excess: dict[str, Estimate]
    needles: Estimate
    hidden: int  # how many
    asked: Estimate
    questions: int  # how many
    prefill: float
    rate: float  # tokens per second
    keys: float
    bytes_read: float
    bytes_held: float
    peak: int | None


def summaries(rows: Iterable[Row]) -> list[Summary]:
    rows = list(rows)
    full = {(r.length, r.text): r for r in rows if r.policy == str(FullAttention())}
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, row.length), []).append(row)
    return [summary(name, length, group, full) for (name, length), group in groups.items()]


def summary(
    name: str, length: int, rows: Sequence[Row], full: Mapping[tuple[int, int], Row]
) -> Summary:
    def average(of: Callable[[Row], float]) -> float:
        return statistics.mean(map(of, rows))

    losses, excess = {}, {}
    for task in ("continuation", "copy"):
        losses[task] = mean([x for row in rows for x in row.losses[task]])
        excess[task] = mean(
            [
                x - y
                for row in rows
                if (best := full.get((row.length, row.text))) is not None
                for x, y in zip(row.losses[task], best.losses[task], strict=True)
            ]
        )
    found = [x for row in rows for x in row.found]
    asked = [x for row in rows for x in row.asked]
    return Summary(
        name=name,
        length=length,
        excess=excess,
        needles=share(found),
        hidden=len(found),
        asked=share(asked),
        questions=len(asked),
        prefill=average(lambda row: row.prefill),
        rate=1 / average(lambda row: row.step),
        keys=average(lambda row: row.keys),
        bytes_read=average(lambda row: row.bytes_read),
        bytes_held=average(lambda row: row.bytes_held),
        peak=max((row.peak for row in rows if row.peak is not None), default=None),
        **losses,
    )


HEADER = (
    "policy", "tokens", "continuation, nats", "copy, nats", "needles", "asked in the prompt",
    "tokens/s", "keys a step", "MB a step", "MB held", "prompt, s", "peak, MB",
)  # fmt: skip


def show_loss(loss: Estimate, excess: Estimate) -> str:
    found, more, half = loss[0], *excess
    if math.isnan(more) or more == half == 0:  # full attention itself
        return f"{found:.3f}"
    return f"{found:.3f} ({more:+.3f} ± {half:.3f})"


def show_share(found: Estimate, of: int) -> str:
    return f"{found[0]:.2f} ± {found[1]:.2f} of {of}" if of else ""


def cells(found: Summary) -> tuple[str, ...]:
    return (
        found.name,
        str(found.length),
        show_loss(found.continuation, found.excess["continuation"]),
        show_loss(found.copy, found.excess["copy"]),
        show_share(found.needles, found.hidden),
        show_share(found.asked, found.questions),
        f"{found.rate:.1f}",
        f"{found.keys:.0f}",
        f"{found.bytes_read / 1e6:.1f}",
        f"{found.bytes_held / 1e6:.1f}",
        f"{found.prefill:.2f}",
        "" if found.peak is None else f"{found.peak / 1e6:.0f}",
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(rows: Iterable[Row]) -> str:
    """A table with a line for each policy and length. In parentheses: the excess of a loss over
    full attention, if that was measured, with an interval of 95 %."""
    return table(HEADER, map(cells, summaries(rows)))


def picture(rows: Iterable[Row], target: str | Path | BinaryIO) -> None:
    """A PNG of quality against speed, one panel a task, one colour a length. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = summaries(rows)
    panels: list[tuple[str, Callable[[Summary], Estimate]]] = [
        ("loss of continuation, nats", lambda s: s.continuation),
        ("loss of copies, nats", lambda s: s.copy),
        ("needles found", lambda s: s.needles),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    lengths = sorted({s.length for s in found})
    for axis, (title, value) in zip(axes, panels, strict=True):
        for number, length in enumerate(lengths):
            draw_points(axis, [s for s in found if s.length == length], value, f"C{number}")
        axis.set(title=title, xlabel="tokens per second")
        axis.grid(alpha=0.3)
    for number, length in enumerate(lengths):
        axes[0].plot([], [], "o", color=f"C{number}", label=f"{length} tokens")
    axes[0].legend(fontsize=8)
    if isinstance(target, str | Path):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def draw_points(
    axis: Any, found: Sequence[Summary], value: Callable[[Summary], Estimate], color: str
) -> None:
    for point in found:
        height, half = value(point)
        axis.errorbar(point.rate, height, yerr=half, fmt="o", color=color, elinewidth=0.8)
        axis.annotate(
            point.name, (point.rate, height), (4, 3), textcoords="offset points", fontsize=7
        )
