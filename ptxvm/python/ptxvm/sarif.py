"""Findings as SARIF 2.1.0 (OASIS standard), which code hosts show next to the lines of the source.

A result is located in the source of -lineinfo or, without it, in the PTX text or in the program,
whose PTX has lines but no file: the message names them.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .findings import Finding
from .vm import Position, Report

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
ROOT = "%SRCROOT%"  # base of relative addresses: the folder in which the command ran
DESCRIPTIONS = {  # rules by the begin of their names
    "race with a write": "Two accesses to a byte, the earlier one a write, that nothing orders.",
    "race with a read": "A write to a byte that an earlier access read, and nothing orders them.",
    "race of lanes": "Accesses of two lanes of a warp, one a write, that nothing orders.",
    "read-only": "ld.global.nc reads what the same launch writes.",
    "copy": "An access to bytes that an asynchronous copy has not delivered yet.",
    "uninitialised": "A read of memory that holds no value.",
    "depends on an uninitialised": "A use of a value that nobody set.",
    "memory": "An access outside of all allocations, misaligned, or a write to an input.",
    "fault": "A rule of PTX that the kernel broke, and that ended the launch.",
    "assertion": "An assertion of the kernel that failed.",
    "deadlock": "All threads of a block or cluster wait, and nothing can end their waits.",
    "hang": "No block finished within the instructions of the watchdog.",
    "note: equal values": "Stores of the same value to a byte that nothing orders.",
    "other result": "A result that depends on the order of warps or of asynchronous operations.",
}


@dataclass(frozen=True)
class Checked:
    """What was checked: PTX text, or a program."""

    path: Path
    is_text: bool


def log(
    findings: Sequence[Finding], refused: Sequence[str], status: int, checked: Checked
) -> dict[str, Any]:
    """A SARIF log of one run."""
    rules: dict[str, dict[str, Any]] = {}
    results = [_result(finding, rules, checked) for finding in findings]
    notes = [{"level": "error", "message": {"text": text}} for text in refused]
    invocation: dict[str, Any] = {"executionSuccessful": status in (0, 1), "exitCode": status}
    if notes:
        invocation["toolExecutionNotifications"] = notes
    driver = {
        "name": "ptxvm",
        "version": importlib.metadata.version("ptxvm"),
        "rules": list(rules.values()),
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "originalUriBaseIds": {ROOT: {"uri": Path.cwd().as_uri() + "/"}},
        "results": results,
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(finding: Finding, rules: dict[str, dict[str, Any]], checked: Checked) -> dict[str, Any]:
    report = finding.report
    name = re.sub(r" \d+$", "", report.rule)  # "other result 0"
    identifier = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    level = "note" if report.is_note else "error"
    told = (text for start, text in DESCRIPTIONS.items() if name.startswith(start))
    rules.setdefault(
        identifier,
        {
            "id": identifier,
            "shortDescription": {"text": next(told, f"A broken rule: {name}.")},
            "defaultConfiguration": {"level": level},
        },
    )
    unlocated = [f"{other.rule}: {other.report}" for other in finding.reports[1:] if not other.line]
    said = [report.report.rstrip(), *unlocated, f"Shown in: {'; '.join(map(str, finding.modes))}"]
    result = {
        "ruleId": identifier,
        "ruleIndex": list(rules).index(identifier),
        "level": level,
        "message": {"text": "\n".join(said)},
        "locations": [_location(report, report, checked)],
    }
    related = [
        _location(other, report, checked, other.rule) for other in finding.reports[1:] if other.line
    ]
    related += [
        _location(cause, report, checked, "the cause")
        for cause in dict.fromkeys(r.cause for r in finding.reports if r.cause)
    ]
    if related:
        result["relatedLocations"] = [{"id": i, **each} for i, each in enumerate(related)]
    return result


def _location(
    at: Report | Position, report: Report, checked: Checked, message: str = ""
) -> dict[str, Any]:
    name = report.name or report.kernel
    location: dict[str, Any] = {
        "logicalLocations": [
            {"name": name, "fullyQualifiedName": report.kernel, "kind": "function"}
        ]
    }
    path, line = checked.path, at.line if checked.is_text else 0
    if at.file:
        path, line = Path(at.file), at.source_line
    location["physicalLocation"] = {"artifactLocation": _artifact(path)}
    if line:
        location["physicalLocation"]["region"] = {"startLine": line}
    if message:
        location["message"] = {"text": message}
    return location


def _artifact(path: Path) -> dict[str, str]:
    """The address of a file, relative to the current folder if it lies below."""
    absolute = path.absolute()
    if absolute.is_relative_to(Path.cwd()):
        relative = absolute.relative_to(Path.cwd()).as_posix()
        return {"uri": quote(relative), "uriBaseId": ROOT}
    return {"uri": absolute.as_uri()}
