"""Findings of the runs of a kernel or a program, one for each rule and line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .vm import Report

# CUDA errors of launches that did not start: no such kernel, no image, no image for the device,
# unsupported PTX.
NOT_LAUNCHED = (98, 200, 209, 218)
FAULTS = (719, 710)  # CUDA errors: a kernel broke a rule, an assertion failed


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
    status: int = 0  # exit status of a program
    output: str = ""

    @property
    def kernels(self) -> int:
        """Number of launches that began."""
        return len(self.launches) + sum(r.rule in ("fault", "deadlock") for r in self.reports)


@dataclass
class Finding:
    report: Report  # first report
    modes: list[Mode]
    count: int = 0  # total over all modes


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
            run.reports.append(Report(**event["broken"]))
        elif event["error"] in FAULTS:
            run.reports.append(Report.of_fault(event["report"]))
        else:
            run.refused.append(event["report"])
            run.lost += event["error"] in NOT_LAUNCHED or ": launch: " in event["report"]
    return run


def summarise(runs: Iterable[Run]) -> list[Finding]:
    """Merges reports to one finding for each rule and line, with the modes that showed it, ordered
    by kernel and line."""
    found: dict[tuple[str, int, str], Finding] = {}
    for run in runs:
        for report in run.reports:
            finding = found.setdefault(
                (report.kernel, report.line, report.rule), Finding(report, [])
            )
            finding.count += report.count
            if run.mode not in finding.modes:
                finding.modes.append(run.mode)
    return [found[key] for key in sorted(found)]


def modes_in_words(modes: Sequence[Mode], all_modes: Sequence[Mode]) -> str:
    if len(modes) == len(all_modes):
        return f"all {len(modes)} modes" if len(modes) > 1 else ""
    return "; ".join(map(str, modes))


def as_json(findings: Sequence[Finding], counted: bool) -> list[dict[str, Any]]:
    """Findings as JSON objects. Program logs record only the first report at a line, so they carry
    no counts."""
    documents = []
    for finding in findings:
        document = dataclasses.asdict(finding.report) | {"count": finding.count}
        document["rule"] = finding.report.rule.partition(":")[0]
        if not counted:
            del document["count"]
        documents.append(document | {"modes": [m.options for m in finding.modes]})
    return documents


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
