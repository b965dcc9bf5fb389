"""The end of a run: packages that were not installed for comparison, and the seconds of each
operator and backend."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from tokenmill import registry, testing
from tokenmill._call.choose import ALL_BACKENDS

MIN_SECONDS = 1.0  # minimum of a printed row


def share_of(node: str, operators: Collection[str], isas: Collection[str]) -> tuple[str, str]:
    """(operator or file, backend or "") from the name of a test."""
    path, _, rest = node.partition("::")
    file = PurePosixPath(path)
    words = file.stem.removeprefix("test_").split("_")
    of_file = words.pop() if words[-1] in ("triton", "cuda", "cpu") else ""
    found = re.findall(r"[A-Za-z0-9_.]+", rest)
    stem = "_".join(words)
    of_stem = [name for name in operators if f"{stem}_".startswith(f"{name}_")]
    whole = max(of_stem, key=len, default=stem or file.parent.name)
    operator = next((w for w in found if w in operators), whole)
    if any(w in isas for w in found):
        return operator, "cpu"
    return operator, next((w for w in found if w in ALL_BACKENDS), of_file)


def table(seconds: Iterable[tuple[str, float]], operators: Collection[str], isas: Collection[str]):
    """Rows (name, total seconds, seconds per backend), the largest first."""
    shares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node, duration in seconds:
        operator, backend = share_of(node, operators, isas)
        shares[operator][backend] += duration
    rows = [(name, sum(of.values()), dict(of)) for name, of in shares.items()]
    return sorted(rows, key=lambda row: -row[1])


def not_installed(reports: Iterable[object]) -> dict[str, list[str]]:
    """{folder: packages} from the skip reasons "not installed: NAME"."""
    found: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _, told, name = reason.partition("not installed: ")
        if told:
            found[str(PurePosixPath(report.nodeid.partition("::")[0]).parent)].add(name)
    return {folder: sorted(names) for folder, names in sorted(found.items())}


def pytest_terminal_summary(terminalreporter):
    missing = not_installed(terminalreporter.stats.get("skipped", ()))
    if missing:
        terminalreporter.section("packages to compare with that are missing")
    for folder, names in missing.items():
        terminalreporter.write_line(f"{folder}: not installed: {', '.join(names)}")
    reports = [r for of in terminalreporter.stats.values() for r in of if hasattr(r, "duration")]
    # Setup, call and teardown have a report each.
    rows = table(((r.nodeid, r.duration) for r in reports), registry.ops(), testing.cpu_isas())
    total = sum(row[1] for row in rows)
    if total < 60:
        return
    columns = [b for b in (*ALL_BACKENDS, "") if any(b in of for _, _, of in rows)]
    write = terminalreporter.write_line
    terminalreporter.section(f"seconds of the tests: {total:.0f} of one core")
    write(f"{'':32}{'all':>8}" + "".join(f"{b or 'other':>10}" for b in columns))
    for name, seconds, of in rows:
        if seconds < MIN_SECONDS:
            break
        cells = "".join(f"{of[b]:10.1f}" if b in of else f"{'':10}" for b in columns)
        write(f"{name:32}{seconds:8.1f}{cells}")
