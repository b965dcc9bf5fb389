"""PNG plots of benchmark results: rates next to peers, and the binding ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .ceilings import row_bound

COLOURS = ("#c8553d", "#2d5d7b", "#8f9f8b", "#d9a441")
RATES = {
    "compute": ("flops", "GFLOP/s of useful work"),
    "memory": ("bytes_per_second", "GB/s that must move at least"),
}


def label(machine: dict[str, str], device: str, threads: int | None) -> str:
    """Label of the measured machine; threads=None omits the number of threads."""
    if device == "cuda":
        return f"{machine['gpu']}, torch {machine['torch']}"
    count = "" if threads is None else f" {threads} thread(s),"
    return f"{machine['cpu']}, {machine['isa']},{count} torch {machine['torch']}"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws one picture per operator, of the measured rows. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    results = results | {"rows": [row for row in results["rows"] if "error" not in row]}
    ops = dict.fromkeys(row["op"] for row in results["rows"])
    lengths = {row["op"] for row in results["rows"] if "length" in row}
    return [
        (_draw_lengths if op in lengths else _draw_op)(results, op, folder / f"{op}.png")
        for op in ops
    ]


def _draw_lengths(results: dict[str, Any], op: str, path: Path) -> Path:
    """Time per token against the number of tokens: rows that differ from the first only in length,
    with their peers, and any other kind with three lengths or more."""
    from matplotlib import pyplot as plt

    def kind(row: dict[str, Any]) -> str:
        return str(row["case"]).replace(f"S={row['length']} ", "")

    every = [row for row in results["rows"] if row["op"] == op]
    rows = [row for row in every if kind(row) == kind(every[0])]
    lines = {"tokenmill": [(row["length"], row["seconds"]) for row in rows]}
    for other in dict.fromkeys(kind(row) for row in every if row not in rows):
        alike = [(row["length"], row["seconds"]) for row in every if kind(row) == other]
        if len(alike) >= 3:
            lines[f"tokenmill: {other}"] = alike
    for name in dict.fromkeys(n for row in rows for n in row["peers"]):
        lines[name] = [
            (row["length"], row["peers"][name]["seconds"]) for row in rows if name in row["peers"]
        ]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for k, (name, points) in enumerate(lines.items()):
        axes.plot(
            [n for n, _ in points],
            [seconds / n * 1e6 for n, seconds in points],
            marker="o",
            label=name,
            color=COLOURS[k % len(COLOURS)],
            linestyle="-" if k < len(COLOURS) else "--",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    measured = label(results["machine"], results.get("device", "cpu"), results["threads"])
    axes.set_title(f"{op}, {kind(rows[0])}\n{measured}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_op(results: dict[str, Any], op: str, path: Path) -> Path:
    """Compute-bound rows in GFLOP/s and memory-bound rows in GB/s, in separate panels with the
    ceiling of each row."""
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if row["op"] == op][::-1]
    names = ["tokenmill", *dict.fromkeys(name for row in rows for name in row["peers"])]
    kinds = {
        kind: [row for row in rows if row_bound(row, results).of == kind]
        for kind in ("compute", "memory")
    }
    kinds = {kind: of_kind for kind, of_kind in kinds.items() if of_kind}
    figure, panels = plt.subplots(
        len(kinds), 1, figsize=(10, 1.2 + 0.5 * len(kinds) + 0.42 * len(rows)),
        height_ratios=[len(of_kind) + 0.4 for of_kind in kinds.values()], squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (axes,), (kind, of_kind) in zip(panels, kinds.items(), strict=True):
        _draw_bars(axes, kind, of_kind, names, results)
    lines, words = panels[0][0].get_legend_handles_labels()
    figure.legend(
        lines, words, loc="outside lower center", ncols=len(names) + 1, fontsize=8, frameon=False
    )
    # Results from before --device have none: they are CPU results.
    measured = label(results["machine"], results.get("device", "cpu"), results["threads"])
    panels[0][0].set_title(f"{op}: {measured}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_bars(
    axes: Any, kind: str, rows: list[dict[str, Any]], names: list[str], results: dict[str, Any]
) -> None:
    field, unit = RATES[kind]
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        present = [
            (i, row[field] / (1.0 if name == "tokenmill" else row["peers"][name]["ratio"]) / 1e9)
            for i, row in enumerate(rows)
            if name == "tokenmill" or name in row["peers"]
        ]
        axes.barh(
            [i + 0.4 - height * (k + 0.5) for i, _ in present],
            [rate for _, rate in present],
            height,
            label=name,
            color=COLOURS[k % len(COLOURS)],
        )
    for i, row in enumerate(rows):
        peak = row[field] / row_bound(row, results).share / 1e9
        axes.plot([peak, peak], [i - 0.42, i + 0.42], color="black", linewidth=1)
    axes.plot([], [], color="black", linewidth=1, label="measured ceiling")
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.set_xlabel(unit)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
