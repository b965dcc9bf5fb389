"""Findings: one for each cause, with names that people read, on the command line and as SARIF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import hopper
import numpy as np
import pytest
from machine import Report, machine
from ptxvm.__main__ import main
from ptxvm.findings import Mode, Run, in_lines, short_name, summarise

import ptxvm

LINES = 12
# Each thread stores and reads a word in LINES places; nothing orders the two parts.
KERNEL = """
.visible .entry _Z5tilesPfi(.param .u64 x, .param .u32 n) {
.shared .align 16 .b8 _ZZ5tilesPfiE4tile[8192];
.reg .b64 %d<4>; .reg .b32 %r<8>; .reg .f32 %f<40>; .reg .pred %p<4>;
ld.param.u64 %d0, [x];
mov.u32 %r0, %tid.x;
mul.wide.u32 %d1, %r0, 4;
add.u64 %d0, %d0, %d1;
shl.b32 %r1, %r0, 2;
mov.u32 %r2, _ZZ5tilesPfiE4tile;
add.u32 %r3, %r2, %r1;
xor.b32 %r4, %r1, 128;
add.u32 %r4, %r4, %r2;
mov.f32 %f0, 0f00000000;
WRITES
BARRIER
READS
st.global.f32 [%d0], %f0;
ret; }
"""
WRITES = "\n".join(f"st.shared.f32 [%r3+{256 * i}], %f0;" for i in range(LINES))
READS = "\n".join(
    f"ld.shared.f32 %f1, [%r4+{256 * i}];\nadd.f32 %f0, %f0, %f1;" for i in range(LINES)
)
FIRST_READ = 15 + LINES + 1
LAUNCH = ["--block", "64", "--arg", "f32[64]=zeros", "--arg", "3"]


def text(barrier: str = "", **parts: str) -> str:
    parts = {"WRITES": WRITES, "READS": READS, "BARRIER": barrier or "// none"} | parts
    made = KERNEL
    for name, part in parts.items():
        made = made.replace(name, part)
    return made


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes PTX text into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(ptx: str) -> str:
        Path("kernel.ptx").write_text(ptx)
        return "kernel.ptx"

    return write


def findings(capfd: Any, *words: str) -> list[dict[str, Any]]:
    status = main(["check", *words, *LAUNCH, "--json"])
    found: list[dict[str, Any]] = json.loads(capfd.readouterr().out)["findings"]
    assert status == (1 if found else 0)
    return found


def test_one_cause_is_one_finding_with_its_lines(write, capfd):
    assert findings(capfd, write(text("bar.sync 0;"))) == []
    (finding,) = findings(capfd, write(text()))
    assert finding["rule"] == "race with a write" and finding["line"] == FIRST_READ
    assert finding["kernel"] == "_Z5tilesPfi" and finding["name"] == "tiles(float*, int)"
    assert finding["cause"]["line"] == 15 and len(finding["modes"]) == 6
    reads = [x["line"] for x in finding["lines"] if x["rule"] == "race with a write"]
    assert reads == [FIRST_READ + 2 * i for i in range(LINES)]
    assert main(["check", write(text()), *LAUNCH]) == 1
    out = capfd.readouterr().out
    assert out.startswith(
        f"race with a write: tiles(float*, int), line {FIRST_READ} [all 6 modes]\n"
        f"    tiles(float*, int), line {FIRST_READ}: ld.shared.f32 %f1, [%r4+0]: race: read of "
        "shared address 0x"
    )
    assert "written by warp 0 at line 15: st.shared.f32; no barrier" in out
    assert "; the address is tile (block (0, 0, 0), thread 32, warp 1, lane 0)" in out
    wrapped = " ".join(out.split())
    assert f"and race with a write, lines {FIRST_READ + 2}, {FIRST_READ + 4}, " in wrapped
    assert f"and race with a read, lines 15-{14 + LINES} and" in wrapped
    assert (
        "and other result 0: 64 of 64 elements of argument 0 are not those of [forward" in wrapped
    )
    assert ": 1 finding; 6 runs" in out


def test_two_causes_are_two_findings(write, capfd):
    """Between the parts of one race and those of the other lies a barrier."""
    again = f"{READS}\nbar.sync 0;\n{WRITES}\n// none\n{READS}"
    (one, other, result) = findings(capfd, write(text(READS=again)))
    assert one["line"] == FIRST_READ and other["line"] == FIRST_READ + 3 * LINES + 2
    assert one["rule"] == other["rule"] == "race with a write"
    assert result["rule"] == "other result 0"  # of either cause


def test_a_value_that_a_race_leaves_unset_belongs_to_the_race():
    def report(rule: str, line: int, part: int, cause: tuple[int, int] | None = None) -> Report:
        at = cause and ptxvm.Position(*cause)
        return Report("k", line, rule, "", part=part, cause=at)

    race = report("race with a write", 20, 18, (9, 5))
    unset = report("depends on an uninitialised value", 40, 38, (20, 18))
    elsewhere = report("depends on an uninitialised value", 50, 48, (60, 58))
    runs = [Run(Mode("forward", "latest"), [unset, elsewhere]), Run(Mode("reverse", "l"), [race])]
    first, second = summarise(runs)
    assert first.reports == [race, unset] and [m.order for m in first.modes] == [
        "forward",
        "reverse",
    ]
    assert second.reports == [elsewhere]
    # Other rules: a line is a cause.
    twice = [report("memory", 7, 5), report("memory", 7, 5), report("memory", 8, 5)]
    found = summarise([Run(Mode("forward", "latest"), twice)])
    assert [(f.report.line, f.count) for f in found] == [(7, 2), (8, 1)]


def test_a_report_names_few_registers():
    accumulators = [f"%f{i}" for i in range(64)]
    body = "".join(f"mov.f32 {name}, 0f00000000;\n" for name in accumulators) + (
        f"wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {{{', '.join(accumulators)}}}, "
        "%d1, %d1, 1, 1, 1, 0, 0;\nwgmma.commit_group.sync.aligned;\n"
        "wgmma.wait_group.sync.aligned 0;\nret; }"
    )
    kernel = ".entry k(.param .u64 x) {\n.reg .b64 %d<2>; .reg .f32 %f<64>;\nmov.b64 %d1, 0;\n"
    machine.reports()
    with hopper.sm90(check=1), machine.reporting() as reports:
        machine.run(kernel + body, "k", np.zeros(1), block=128, shared=4096)
    assert {r.rule for r in reports} == {"wgmma.fence"}
    assert all("{%f0, ..., %f63}" in r.report for r in reports)
    assert max(len(r.report) for r in reports) < 500


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("k(float*)", "k(float*)"),
        ("void f<A<B<int> >, 3>(A<B<int> >, " + "int, " * 20 + "int)", "void f<...>(...)"),
        ("(anonymous namespace)::" + "a" * 80, "{anonymous}::" + "a" * 59 + "..."),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


@pytest.mark.parametrize(
    ("name", "demangled"),
    [
        ("_Z1kPf", "k(float*)"),
        ("_Z1kILi3EEvPf", "void k<3>(float*)"),
        ("_ZN3lib6kernelINS_bad", "lib::kernel<...>"),  # what libstdc++ cannot read
        ("_Z9", "_Z9"),
        ("_Z99999999999999999999k", "_Z99999999999999999999k"),
        ("k$1", "k$1"),
    ],
)
def test_demangled_names(name, demangled):
    assert machine.demangled(name) == demangled


def test_lines_by_those_of_the_source():
    lines = [
        (60, "x/a.cu", 3),
        (61, "x/a.cu", 3),
        (64, "x/a.cu", 3),
        (71, "x/a.cu", 4),
        (80, "", 0),
    ]
    reports = [Report("k", n, "copy", "", file=f, source_line=s) for n, f, s in lines]
    assert list(in_lines(reports)) == ["copy, lines 60-61, 64 (a.cu:3), 71 (a.cu:4), 80"]
    assert list(in_lines([])) == []


def test_count_goes_on_after_a_fault_and_says_so(write, capfd):
    outside = "ld.global.f32 %f1, [%d0+65536];\nst.global.f32 [%d0], %f0;\n"
    path = write(text(READS=outside))
    assert main(["count", path, *LAUNCH]) == 1
    out = capfd.readouterr().out
    assert out.startswith("memory: tiles(float*, int), line 28\n") and "ended by" not in out
    assert "went on after broken rules" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["store", "4", "512", "16", "16"] in rows  # both stores that follow it
    path = write(text(READS="trap;"))
    assert main(["count", path, *LAUNCH]) == 1
    out = capfd.readouterr().out
    assert "  ended by a fault, and counted up to it: 1 of 1\n" in out and "went on" not in out
    assert ["store", str(LINES), f"{LINES * 128:,}", str(LINES), str(LINES)] in [
        line.split() for line in out.splitlines()
    ]
    assert main(["count", path, *LAUNCH, "--json"]) == 1
    (run,) = json.loads(capfd.readouterr().out)["runs"]
    assert run["kernels"] == 1 and run["launches"][0]["complete"] is False


# Of the objects of SARIF 2.1.0 that we write (sections 3.13 to 3.58): required properties, others.
SARIF: dict[str, tuple[set[str], set[str]]] = {
    "log": ({"version", "runs"}, {"$schema"}),
    "run": ({"tool"}, {"invocations", "originalUriBaseIds", "results"}),
    "tool": ({"driver"}, set()),
    "driver": ({"name"}, {"version", "rules"}),
    "rule": ({"id"}, {"shortDescription", "defaultConfiguration"}),
    "invocation": ({"executionSuccessful"}, {"exitCode", "toolExecutionNotifications"}),
    "notification": ({"message"}, {"level"}),
    "result": ({"message"}, {"ruleId", "ruleIndex", "level", "locations", "relatedLocations"}),
    "location": (set(), {"id", "physicalLocation", "logicalLocations", "message"}),
    "physical": ({"artifactLocation"}, {"region"}),
    "artifact": ({"uri"}, {"uriBaseId"}),
}


def follow(kind: str, entry: dict[str, Any]) -> None:
    required, others = SARIF[kind]
    assert required <= entry.keys() <= required | others, (kind, entry.keys())


def check_sarif(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Checks the structure; returns the results."""
    document = json.loads(path.read_text())
    follow("log", document)
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    follow("run", run)
    follow("tool", run["tool"])
    follow("driver", run["tool"]["driver"])
    rules = run["tool"]["driver"]["rules"]
    for rule in rules:
        follow("rule", rule)
        assert rule["shortDescription"]["text"].endswith(".")
    assert len({rule["id"] for rule in rules}) == len(rules)
    (invocation,) = run["invocations"]
    follow("invocation", invocation)
    for notification in invocation.get("toolExecutionNotifications", []):
        follow("notification", notification)
    (base,) = run["originalUriBaseIds"].values()
    assert base["uri"] == folder.as_uri() + "/"
    for result in run["results"]:
        follow("result", result)
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] and result["message"]["text"]
        assert len(result["locations"]) == 1
        related = result.get("relatedLocations", [])
        assert [each["id"] for each in related] == list(range(len(related)))
        for location in [*result["locations"], *related]:
            follow("location", location)
            physical = location["physicalLocation"]
            follow("physical", physical)
            follow("artifact", physical["artifactLocation"])
            assert physical.get("region", {"startLine": 1})["startLine"] >= 1
            if "uriBaseId" in physical["artifactLocation"]:
                assert physical["artifactLocation"]["uriBaseId"] in run["originalUriBaseIds"]
                assert (folder / unquote(physical["artifactLocation"]["uri"])).is_file()
    results: list[dict[str, Any]] = run["results"]
    return results


def test_accesses_of_long_kernels_are_named(write, capfd):
    """Kernels of more than 2^18 instructions."""
    skipped = "bra BEHIND;\n" + "bar.warp.sync -1;\n" * 2**18 + "BEHIND:\n"
    path = write(text(WRITES=skipped + WRITES.splitlines()[0], READS=READS.splitlines()[0]))
    (finding,) = findings(capfd, path, "--order", "forward", "--async", "latest")
    written = 15 + 2**18 + 2
    assert f"written by warp 0 at line {written}: st.shared.f32;" in finding["report"]


def test_sarif_locates_findings_in_the_text(write, tmp_path, capfd):
    path, out = write(text()), tmp_path / "findings.sarif"
    assert main(["check", path, *LAUNCH, "--sarif", str(out)]) == 1
    (result,) = check_sarif(out, tmp_path)
    assert "64 of 64 elements of argument 0" in result["message"]["text"]
    physical = result["locations"][0]["physicalLocation"]
    assert physical["artifactLocation"]["uri"] == "kernel.ptx"
    assert physical["region"]["startLine"] == FIRST_READ
    assert result["ruleId"] == "race-with-a-write" and result["level"] == "error"
    (logical,) = result["locations"][0]["logicalLocations"]
    assert logical["name"] == "tiles(float*, int)"
    assert logical["fullyQualifiedName"] == "_Z5tilesPfi"
    lines = {x["physicalLocation"]["region"]["startLine"] for x in result["relatedLocations"]}
    assert lines > {FIRST_READ + 2, 15}
    assert main(["check", write(text("bar.sync 0;")), *LAUNCH, "--sarif", str(out)]) == 0
    assert check_sarif(out, tmp_path) == []
    assert main(["check", path, *LAUNCH, "--sarif", "no/such.sarif"]) == 2
    assert "--sarif: must be writable; got 'no/such.sarif'" in capfd.readouterr().err


def test_a_note_is_no_finding(write, tmp_path, capfd):
    """Unless the results differ between the runs."""
    same = "mov.u32 %r5, 7;\nst.shared.u32 [%r2], %r5;"
    path, out = write(text("bar.sync 0;", WRITES=same, READS="")), tmp_path / "notes.sarif"
    assert main(["check", path, *LAUNCH, "--sarif", str(out)]) == 0
    assert "kernel.ptx: 0 findings, 1 note; 6 runs of 1 launch" in capfd.readouterr().out
    (result,) = check_sarif(out, tmp_path)
    assert result["ruleId"] == "note-equal-values" and result["level"] == "note"
    last = "atom.global.exch.b32 %r6, [%d0], %r0;"
    other = text("bar.sync 0;", WRITES=same, READS=f"sub.u64 %d0, %d0, %d1;\n{last}")
    other = other.replace("st.global.f32 [%d0], %f0;\n", "")
    assert main(["check", write(other), *LAUNCH, "--sarif", str(out)]) == 1
    assert [x["level"] for x in check_sarif(out, tmp_path)] == ["note", "error"]


def test_sarif_locates_findings_in_the_source(write, tmp_path):
    lines = text().splitlines()
    lines.insert(FIRST_READ - 1, ".loc 1 77 3")
    (tmp_path / "a b.cu").touch()
    lines.append(f'.file 1 "{tmp_path}/a b.cu"')
    out = tmp_path / "findings.sarif"
    assert main(["check", write("\n".join(lines)), *LAUNCH, "--sarif", str(out)]) == 1
    (result,) = check_sarif(out, tmp_path)
    physical = result["locations"][0]["physicalLocation"]
    assert physical["artifactLocation"]["uri"] == "a%20b.cu"
    assert physical["region"]["startLine"] == 77
