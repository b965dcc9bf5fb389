"""Roofline plot as SVG: rates against operations per byte, below measured peaks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 60, 20, 20, 46
COLOURS = {
    "dense": "#4c78a8", "linear": "#f58518", "sparse": "#54a24b", "select": "#b279a2",
    "tokens": "#9d755d",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    name: str
    title: str
    family: str
    intensity: float  # operations per byte
    rate: float  # operations per second


@dataclass(frozen=True)
class Roof:
    name: str
    peak: float  # operations per second


def roofline(points: list[Point], roofs: list[Roof], bandwidth: float) -> str:
    """The picture with a numbered point per case, and a legend of the numbers."""
    ridge = max(r.peak for r in roofs) / bandwidth
    low, high = _decades([*(p.intensity for p in points), ridge])
    minimum, maximum = _decades([*(p.rate for p in points), *(r.peak for r in roofs)])

    def x(intensity: float) -> float:
        share = (math.log10(intensity) - low) / (high - low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(rate: float) -> float:
        share = (math.log10(rate) - minimum) / (maximum - minimum)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for decade in range(low, high + 1):
        at = x(10.0**decade)
        parts.append(f'<path d="M{at} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 14, f"{10.0**decade:g}", "middle"))
    for decade in range(minimum, maximum + 1):
        at = y(10.0**decade)
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" stroke="#eee"/>')
        parts.append(_text(LEFT - 5, at + 4, f"{10.0 ** (decade - 9):g}", "end"))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, "operations per byte", "middle"))
    parts.append(_text(LEFT, TOP - 7, "GFLOP/s", "middle"))
    start = max(10.0**low, 10.0**minimum / bandwidth)
    top = max(r.peak for r in roofs)
    line = f"M{x(start)} {y(start * bandwidth)}L{x(top / bandwidth)} {y(top)}"
    parts.append(f'<path d="{line}" stroke="#444" fill="none"/>')
    for roof in _apart(roofs):
        at = y(roof.peak)
        begin = x(roof.peak / bandwidth)
        parts.append(f'<path d="M{begin} {at}H{WIDTH - RIGHT}" stroke="#444"/>')
        words = f"{roof.name} {roof.peak / 1e9:.3g}"
        parts.append(_text(WIDTH - RIGHT - 2, at - 4, words, "end"))
    for number, p in enumerate(points, 1):
        colour = COLOURS.get(p.family, "#777")
        title = f"<title>{escape(p.title)}: {p.rate / 1e9:.3g} GFLOP/s</title>"
        centre = f'cx="{x(p.intensity)}" cy="{y(p.rate)}"'
        parts.append(f'<circle {centre} r="4" fill="{colour}">{title}</circle>')
        parts.append(_text(x(p.intensity) + 5, y(p.rate) - 4, str(number)))
    names = ", ".join(f"{n} {escape(p.name)}" for n, p in enumerate(points, 1))
    names = f"Slope: {bandwidth / 1e9:.3g} GB/s of memory. Points: {names}."
    picture = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">\n{picture}\n</svg>\n<p>{names}</p>\n'
    )


def _apart(roofs: list[Roof]) -> list[Roof]:
    """Merges peaks that differ by less than 8 %, which the picture cannot separate."""
    found: list[Roof] = []
    for roof in sorted(roofs, key=lambda r: -r.peak):
        if found and found[-1].peak < 1.08 * roof.peak:
            found[-1] = Roof(f"{found[-1].name}, {roof.name}", found[-1].peak)
        else:
            found.append(roof)
    return found


def _decades(values: list[float]) -> tuple[int, int]:
    """Powers of ten that enclose all values."""
    low = math.floor(math.log10(min(values)))
    return low, max(math.ceil(math.log10(max(values))), low + 1)


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    place = f'x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(words)}</text>"
