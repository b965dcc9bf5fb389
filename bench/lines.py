"""Terminal table of bench: one line per row, printed as it is measured."""

from __future__ import annotations

from typing import Any

from .case import ratios_of
from .report import METHODS, figure, interval

TITLE = 58
COLUMNS = (("ms", 9), ("95 % of the median", 21), ("GFLOP/s", 9), ("% of peak", 12), ("GB/s", 8))
GPU_COLUMNS = tuple((name, len(name) + 2) for name in METHODS.values())
LAST = "ratio to peers (their time / ours), the fastest first"


class Lines:
    """Prints rows; the reason of an absent peer is printed once."""

    def __init__(self, gpu: bool) -> None:
        self.columns = COLUMNS + (GPU_COLUMNS if gpu else ())
        self._said: set[tuple[str, str]] = set()

    def header(self) -> str:
        return self._line("case", [name for name, _ in self.columns], LAST)

    def line(self, row: dict[str, Any]) -> str:
        if "error" in row:
            return self._line(row["case"], [""] * len(self.columns), f"failed: {row['error']}")
        cells = [
            figure(row["seconds"] * 1e3),
            interval(row),
            figure(row["flops"] / 1e9) if row["flops"] else "-",
            f"{row['bound_share']:.0%}" + (" GB/s" if row["bound"] == "memory" else ""),
            figure(row["bytes_per_second"] / 1e9),
        ]
        for method in [*METHODS][: len(self.columns) - len(cells)]:
            timed = row.get(method, {})
            cells.append(figure(timed["seconds"] * 1e3) if "seconds" in timed else "-")
        ratios = sorted(ratios_of(row).items(), key=lambda found: found[1])
        peers = [f"{name} {ratio:.2f}x" for name, ratio in ratios]
        peers += [
            f"{name} absent ({why})"
            for name, why in row["absent"].items()
            if (name, why) not in self._said
        ]
        self._said |= {*row["absent"].items()}
        return self._line(row["case"], cells, ", ".join(peers))

    def _line(self, first: str, cells: list[str], last: str) -> str:
        widths = [width for _, width in self.columns]
        middle = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{first:<{TITLE}}{middle}  {last}".rstrip()
