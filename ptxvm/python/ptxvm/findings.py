"""Findings of the runs of a kernel or a program: one for each cause, with the lines that showed
it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .vm import Report

# CUDA errors of launches that did not start: no such kernel, no image, no image for the device,
# unsupported PTX.
NOT_LAUNCHED = (98, 200, 209, 218)
STUCK = ("deadlock", "hang")  # rules whose line is one of many
MAX_OF_A_NAME = 72


@dataclass(frozen=True)
class Mode:
    """Order of warps and blocks, and the moment at which asynchronous operations take effect."""

    order: str
    moment: str

    def __str__(self) -> str:
        return f"{self.order}, {self.moment}"

    @property
    def options(self) -> dict[str, str]:
        return {"order": self.order, "async": self.moment}


@dataclass
class Run:
    """Outcome of one run."""

    mode: Mode
    reports: list[Report] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # failed CUDA runtime calls other than kernels
    lost: int = 0  # failed launches among them, which did not run
    launches: list[dict[str, Any]] = field(default_factory=list)
    faults: int = 0  # launches that a fault ended
    status: int = 0  # exit status of a program
    output: str = ""

    @property
    def kernels(self) -> int:
        """Number of launches that began."""
        return sum(launch.get("complete", True) for launch in self.launches) + self.faults

    def ended(self, report: Report) -> None:
        """A fault has ended a launch."""
        self.reports.append(report)
        self.faults += 1


@dataclass
class Finding:
    """One cause. `reports`: the first one of each rule and line, the one that says most first."""

    reports: list[Report]
    modes: list[Mode]
    count: int  # total over all lines and modes

    @property
    def report(self) -> Report:
        return self.reports[0]


def read_log(path: Path, mode: Mode) -> Run:
    """Reads a program's run from the log that the machine wrote (src/ptxvm/log.h)."""
    run = Run(mode)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # truncated line of a killed process
            continue
        if "launch" in event:
            run.launches.append(event["launch"])
        elif "broken" in event:
            run.reports.append(Report.of(event["broken"]))
        elif event["finding"]:
            run.ended(Report.of(event["finding"]))
        else:
            run.refused.append(event["report"])
            run.lost += event["error"] in NOT_LAUNCHED or ": launch: " in event["report"]
    return run


def _links(report: Report) -> Iterator[Hashable]:
    """What the report shares with other reports of its cause.

    A part of the code has neither branches nor anything that orders accesses. So if two parts race,
    one barrier, fence or wait is missing for all of their lines; and a value that is missing where
    an access races is missing because of that race.
    """
    rule, cause = report.rule, report.cause
    if rule in STUCK:
        yield rule
        return
    yield rule, report.line
    if rule.startswith(("race", "copy")):
        yield "value", report.line
        yield "race", report.part
        if cause:
            yield "race", cause.part
    elif cause:
        yield "value", cause.line
        yield rule, "part", cause.part
    elif rule.startswith("depends"):
        yield rule, "part", report.part
    elif rule == "memory" and report.file:  # an unrolled access
        yield rule, report.part, report.file, report.source_line


def _rank(rule: str) -> int:
    """Of rules that one cause may break, the one that says most comes first."""
    starts = ("race with a write", "race", "copy")
    return next((i for i, start in enumerate(starts) if rule.startswith(start)), len(starts))


@dataclass
class _Group:
    """Reports of one cause: the first one of each rule and line, and the modes that had it."""

    links: set[Hashable]
    reports: dict[tuple[str, int], Report] = field(default_factory=dict)
    modes: dict[tuple[str, int], dict[Mode, None]] = field(default_factory=dict)
    count: int = 0

    def take(self, other: _Group) -> None:
        self.links |= other.links
        self.reports |= other.reports
        self.modes |= other.modes
        self.count += other.count

    def add(self, report: Report, mode: Mode) -> None:
        key = (report.rule, report.line)
        self.reports.setdefault(key, report)
        self.modes.setdefault(key, {})[mode] = None
        self.count += report.count

    def finding(self) -> Finding:
        """Its first report is one that most modes had."""
        keys = sorted(self.reports, key=lambda key: (key[1], key[0]))
        first = min(keys, key=lambda key: (-len(self.modes[key]), _rank(key[0])))
        keys.remove(first)
        modes = dict.fromkeys(mode for each in self.modes.values() for mode in each)
        return Finding([self.reports[key] for key in [first, *keys]], list(modes), self.count)


def summarise(runs: Sequence[Run]) -> list[Finding]:
    """Merges reports to one finding for each cause, with the modes that showed it, ordered by
    kernel and line."""
    groups: dict[Hashable, _Group] = {}  # by link
    for run in runs:
        for report in run.reports:
            group = _Group({(report.kernel, link) for link in _links(report)})
            for other in {id(g): g for link in group.links if (g := groups.get(link))}.values():
                group.take(other)
            group.add(report, run.mode)
            groups.update(dict.fromkeys(group.links, group))
    order = [run.mode for run in runs]
    findings = [group.finding() for group in {id(g): g for g in groups.values()}.values()]
    for finding in findings:
        finding.modes.sort(key=order.index)
    findings.sort(key=_order)
    for finding in [f for f in findings if f.report.rule.startswith("other")]:
        kernel = finding.report.kernel
        others = [
            f
            for f in findings
            if f is not finding and f.report.kernel == kernel and not f.report.is_note
        ]
        if len(others) == 1:  # which the results follow from
            others[0].reports += finding.reports
            others[0].count += finding.count
            findings.remove(finding)
    return findings


def _order(finding: Finding) -> tuple[str, bool, int, str]:
    """By kernel and line; results that differ come last."""
    report = finding.report
    return report.kernel, report.rule.startswith("other"), report.line, report.rule


def in_lines(reports: Sequence[Report]) -> Iterator[str]:
    """For each rule, "copy, lines 60, 64 (gemm.cu:33), 71 (gemm.cu:40)": lines of the PTX, by those
    of the source."""
    rules: dict[str, dict[tuple[str, int], list[int]]] = {}
    for report in reports:
        if report.line:
            sources = rules.setdefault(report.rule, {})
            sources.setdefault((report.file, report.source_line), []).append(report.line)
    for rule, sources in rules.items():
        parts = [
            _ranges(lines) + (f" ({Path(file).name}:{line})" if file else "")
            for (file, line), lines in sources.items()
        ]
        yield f"{rule}, line{'s' if sum(map(len, sources.values())) > 1 else ''} {', '.join(parts)}"
    for report in reports:
        if not report.line:
            yield f"{report.rule}: {report.report}"


def _ranges(lines: Sequence[int]) -> str:
    """Ascending numbers: "3, 5-9"."""
    text, begin = "", lines[0]
    for line, after in zip(lines, [*lines[1:], 0], strict=True):
        if after != line + 1:
            text += f", {begin}-{line}" if line > begin else f", {line}"
            begin = after
    return text[2:]


def short_name(name: str) -> str:
    """A demangled name; of a long one, without the arguments of its templates and its own."""
    for opening, closing in ("<>", "()"):
        if len(name) > MAX_OF_A_NAME:
            name = _without(name, opening, closing)
    return name if len(name) <= MAX_OF_A_NAME else name[:MAX_OF_A_NAME] + "..."


def _without(name: str, opening: str, closing: str) -> str:
    shown, depth = "", 0
    for char in name.replace("(anonymous namespace)", "{anonymous}"):
        depth -= char == closing
        if not depth:
            shown += f"...{closing}" if char == closing else char
        depth += char == opening
    return shown


def modes_in_words(modes: Sequence[Mode], all_modes: Sequence[Mode]) -> str:
    if len(modes) == len(all_modes):
        return f"all {len(modes)} modes" if len(modes) > 1 else ""
    return "; ".join(map(str, modes))


def as_json(findings: Sequence[Finding], counted: bool) -> list[dict[str, Any]]:
    """Findings as JSON objects. Program logs record only the first report at a line, so they carry
    no counts."""
    documents = []
    for finding in findings:
        document = asdict(finding.report) | {"count": finding.count}
        if not counted:
            del document["count"]
        documents.append(
            document
            | {"modes": [m.options for m in finding.modes]}
            | {"lines": [_line(asdict(report)) for report in finding.reports]}
        )
    return documents


def _line(report: Mapping[str, Any]) -> dict[str, Any]:
    names = ("rule", "line", "file", "source_line", "cause", "report")
    return {name: report[name] for name in names}


def around(ptx: str, line: int, margin: int = 2) -> list[str]:
    """A line of the text and its neighbours, numbered."""
    lines = ptx.splitlines()
    if not 1 <= line <= len(lines):
        return []
    first, last = max(line - margin, 1), min(line + margin, len(lines))
    return [
        f"{'>' if i == line else ' '} {i:5} | {lines[i - 1].expandtabs(4)[:100]}"
        for i in range(first, last + 1)
    ]
