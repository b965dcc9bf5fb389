"""Charts of the page: lines and bars as SVG, images as PNG, without libraries."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 36
GOOD = "#2c8a4b"
# Colour map from 0 to 1: dark, purple, orange, pale.
RAMP = ((0.0, 0.0, 0.02), (0.45, 0.07, 0.42), (0.93, 0.41, 0.15), (0.99, 0.95, 0.75))


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    pale: bool = False
    dotted: bool = False


def lines(curves: Sequence[Line], x_name: str, y_name: str) -> str:
    """Curves over linear axes, with a legend below. Points that are not finite are skipped, and the
    axes too if no point remains.
    """
    finite = [[p for p in c.points if all(map(math.isfinite, p))] for c in curves]
    legend = "".join(
        f'<span><i style="background:{c.colour}"></i>{escape(c.name)}</span>'
        for c in curves
        if not c.pale
    )
    head, tail = f'<p class="axis">{escape(y_name)}</p>', f'<p class="legend">{legend}</p>'
    xs = [x for points in finite for x, _ in points]
    ys = [y for points in finite for _, y in points]
    if not xs:
        return head + tail
    x_ticks, y_ticks = _ticks(0.0, max(xs)), _ticks(min(ys), max(ys))
    low, high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value / (max(xs) or 1.0), 1)

    def y(value: float) -> float:
        share = (value - low) / ((high - low) or 1.0)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, x_name, "end"))
    for curve, points in zip(curves, finite, strict=True):
        if not points:
            continue
        path = " ".join(f"{x(a)} {y(b)}" for a, b in points)
        style = 'opacity=".4" stroke-width="1"' if curve.pale else 'stroke-width="2.2"'
        style += ' stroke-dasharray="2 5"' if curve.dotted else ""
        title = f"<title>{escape(curve.name)}</title>"
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{curve.colour}" {style}>{title}</path>'
        )
    return f"{head}{_svg(WIDTH, HEIGHT, parts)}{tail}"


def bars(rows: Sequence[tuple[str, float, str]], colours: Sequence[str]) -> str:
    """One bar per (name, value, label), none for a value that is not finite. Bars scale with the
    page.
    """
    values = [value if math.isfinite(value) else 0.0 for _, value, _ in rows]
    maximum = max(values, default=0.0) or 1.0
    body = "".join(
        f'<span>{escape(name)}</span><span class="track">'
        f'<i style="width:{100 * value / maximum:.1f}%;'
        f'background:{colour}"></i></span><b>{escape(shown)}</b>'
        for (name, _, shown), value, colour in zip(rows, values, colours, strict=True)
    )
    return f'<div class="bars">{body}</div>'


def cells(colours: Tensor, groups: Tensor, size: int = 16) -> str:
    """A square map of patches [n, n, 3], with lines between patches of different groups [n, n]."""
    n = len(groups)
    parts, edges = [], []
    for i in range(n):
        for j in range(n):
            red, green, blue = (int(255 * c) for c in colours[i, j].tolist())
            place = f'x="{j * size}" y="{i * size}" width="{size + 0.5}" height="{size + 0.5}"'
            parts.append(f'<rect {place} fill="#{red:02x}{green:02x}{blue:02x}"/>')
            if j and groups[i, j] != groups[i, j - 1]:
                edges.append(f"M{j * size} {i * size}v{size}")
            if i and groups[i, j] != groups[i - 1, j]:
                edges.append(f"M{j * size} {i * size}h{size}")
    parts.append(f'<path d="{"".join(edges)}" stroke="#fff" stroke-opacity=".75" fill="none"/>')
    return _svg(n * size, n * size, parts)


def strip(found: Sequence[bool], names: Sequence[str], size: int = 11) -> str:
    """A row of squares, filled where found."""
    parts = [
        f'<rect x="{i * size}" y="0" width="{size - 2}" height="{size - 2}" rx="1" fill="'
        f'{GOOD if there else "none"}" stroke="{GOOD}"><title>{escape(name)}</title></rect>'
        for i, (there, name) in enumerate(zip(found, names, strict=True))
    ]
    return _svg(len(found) * size, size - 2, parts)


def heat(values: Tensor) -> str:
    """Weights [rows, columns] from 0 to 1 as an image, on a square root scale; NaN is 0."""
    ramp = torch.tensor(RAMP)
    place = values.nan_to_num(0).clamp(0, 1).sqrt() * (len(ramp) - 1)
    low = place.floor().long().clamp(max=len(ramp) - 2)
    share = (place - low)[..., None]
    return image((ramp[low] * (1 - share) + ramp[low + 1] * share).permute(2, 0, 1))


def image(picture: Tensor) -> str:
    """Data URL of a PNG of [3, height, width], 0 to 1."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    png += chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from low to high."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= min((k for k in (1, 2, 5, 10) if span / (k * step) <= 6), default=10)
    first = int(-(-low // step))
    return [round(n * step, 10) for n in range(first, int(high // step) + 1)] or [low]


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">\n{body}\n</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
