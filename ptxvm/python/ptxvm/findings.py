"""What runs of a kernel or a program showed, once for each rule and line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .vm import Report

# No such kernel, no image of it, none for the device, PTX that the machine does not run.
NOT_LAUNCHED = (98, 200, 209, 218)
FAULTS = (719, 710)  # CUDA errors of a kernel that broke a rule and of a failed assertion


@dataclass(frozen=True)
class Mode:
    """The order of warps and blocks, and the moment at which what is asynchronous takes effect."""

    order: str
    moment: str

    def __str__(self) -> str:
        return f"{self.order}, {self.moment}"

    @property
    def options(self) -> dict[str, str]:
        return {"order": self.order, "async": self.moment}


@dataclass
class Run:
    """What one run did."""

    mode: Mode
    reports: list[Report] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # calls of the CUDA runtime, not kernels
    lost: int = 0  # launches among them, which did not run
    launches: list[dict[str, Any]] = field(default_factory=list)
    status: int = 0  # of a program
    output: str = ""

    @property
    def kernels(self) -> int:
        """Launches that began."""
        return len(self.launches) + sum(r.rule in ("fault", "deadlock") for r in self.reports)


@dataclass
class Finding:
    report: Report  # the first
    modes: list[Mode]
    count: int = 0  # in all modes together


def read_log(path: Path, mode: Mode) -> Run:
    """A run of a program, from the log that the machine wrote (src/ptxvm/log.h)."""
    run = Run(mode)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # of a process that was killed
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
    """Each rule at each line once, with the modes that showed it, in the order of kernels and
    lines."""
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
    """Logs of programs have the first time at a line alone, so no counts."""
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
