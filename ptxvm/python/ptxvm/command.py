"""Arguments and output of `ptxvm run | check | count`."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _cli

if TYPE_CHECKING:
    from .findings import Finding, Mode, Run
    from .vm import Machine

CLEAN, FOUND, USAGE, FAILED = range(4)  # exit statuses
DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
ORDERS = ("forward", "reverse", "seeded", "weak", "sleepy")
FLAGS = ("check", "count", "on_fault", "device", "fuel", "mma", "async", "order")  # not in --set

GUIDE = """\
Runs CUDA kernels on a CPU: no GPU, no driver, no CUDA toolkit.

FILE is the PTX text of a kernel, or a program that was linked with the shared CUDA runtime:

  nvcc -ptx -arch=compute_80 -lineinfo kernel.cu
  ptxvm check kernel.ptx --grid 8 --block 128 \\
      --arg "f32[1024]=arange" --arg "f32[1024]=nan" --arg 1024

  nvcc -cudart shared -gencode arch=compute_80,code=compute_80 -lineinfo app.cu -o app
  ptxvm check ./app -- --size 512

A shared object runs by one of its functions, --entry NAME, which takes nothing and returns an int.
FILE may also be another command, such as python, whose libraries launch kernels.

Exit status: 0 nothing was found; 1 a rule was broken or results differ; 2 a wrong command line;
3 nothing was found, but a launch was refused, the program's own status is not 0, or it could not
run.
"""
RUN = """\
Runs the kernel or program and prints what the kernel wrote. The rules that always hold (bounds,
alignment, barriers, deadlock) are checked; ptxvm check looks for races and the rest.

  ptxvm run kernel.ptx --grid 8 --block 128 \\
      --arg "f32[1024]=arange" --arg "f32[1024]=nan" --arg 1024 --save 1=out.npy
  ptxvm run kernel.ptx --launch launch.json

launch.json: {"kernel": "scale", "grid": [8], "block": [128], "shared": 0,
              "args": ["f32[1024]=arange", "f32[1024]=nan", "1024"]}
"""
CHECK = """\
Runs the kernel or program with check=1 in each order of warps and at each moment for what is
asynchronous, and prints every rule that was broken, once for each cause, with the lines that showed
it. Results of a kernel that differ between the runs are reported too.

  ptxvm check kernel.ptx --block 64 --arg "f32[64]=zeros" --json
  ptxvm check --device sm_90a --async latest,seed:1,seed:2 ./gemm
  ptxvm check --sarif findings.sarif ./app
"""
COUNT = """\
Runs the kernel or program and prints its counters: instructions by class, tensor-core products,
requests to memory, waves and sectors, exact and the same in every run (docs/guide.md). It goes on
after an access that breaks a rule, where that is possible; a launch that a fault ends is counted up
to it.

  ptxvm count kernel.ptx --grid 8 --block 128 --arg "f32[1024]=zeros" --json
  ptxvm count ./app
"""
ARGUMENTS = """\
arguments of a kernel, --arg, once for each of its parameters:
  3, 0.5                   a scalar of the parameter's type; f32=0.5 names the type
  f32[1024]=arange         an array, given as a pointer: zeros, ones, nan, arange, random[:SEED],
                           a number, FILE.npy
  "const f32[64]=x.npy"    one that the kernel may not write
  bytes:00ff...            a struct that goes by value
types: i8 to i64, u8 to u64, f16, bf16, f32, f64
"""
ACTIONS = {
    "run": (RUN, "run it, and print what the kernel wrote"),
    "check": (CHECK, "look for races, deadlocks and values that nobody set"),
    "count": (COUNT, "count instructions and requests to memory"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = GUIDE
    commands = parser.add_subparsers(dest="action", required=True, metavar="action")
    for name, (guide, summary) in ACTIONS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=guide,
            epilog=ARGUMENTS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_options(sub, name)


def _add_options(sub: argparse.ArgumentParser, action: str) -> None:
    sub.add_argument("file", metavar="FILE", help="a program, or PTX text")
    sub.add_argument(
        "args", metavar="ARGS", nargs="*", default=[], help="of the program, behind --"
    )
    machine = sub.add_argument_group("machine (docs/guide.md has all options)")
    machine.add_argument("--device", choices=DEVICES, help="whose limits apply (default sm_80)")
    several = action == "check"
    machine.add_argument(
        "--order",
        type=_orders(several),
        default=["forward", "reverse"] if several else ["forward"],
        help="of warps and blocks: forward, reverse, seeded, weak, sleepy"
        + (", or several (default forward,reverse)" if several else ""),
    )
    machine.add_argument(
        "--async",
        dest="moments",
        type=_moments(several),
        default=["latest", "earliest", "seed:1"] if several else ["latest"],
        help="when what is asynchronous takes effect: latest, earliest, seed:N"
        + (", or several (default latest,earliest,seed:1)" if several else ""),
    )
    machine.add_argument("--fuel", type=_cli.integer(1, 1 << 31), help="instructions in a turn")
    if several:
        machine.add_argument(
            "--on-fault",
            choices=["stop", "report"],
            default="report",
            help="what follows a broken rule of check mode (default report)",
        )
    machine.add_argument(
        "--mma", choices=["exact", "hardware"], help="sums of tensor cores (default exact)"
    )
    machine.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="another option of the machine, such as watchdog=20",
    )
    launch = sub.add_argument_group("launch of PTX text")
    launch.add_argument("--launch", metavar="JSON", type=Path, help="a file with all of it")
    launch.add_argument("--kernel", help="its name or a part of it (default: the only one)")
    launch.add_argument("--grid", type=_extents, help="blocks: X, X,Y or X,Y,Z (default 1)")
    launch.add_argument("--block", type=_extents, help="threads of a block (default 32)")
    launch.add_argument(
        "--shared", type=_cli.integer(0, (1 << 32) - 1), help="dynamic shared memory in bytes"
    )
    launch.add_argument("--arg", dest="arg", action="append", help="see below")
    if action == "run":
        launch.add_argument(
            "--print", dest="shown", metavar="N", type=_cli.integer(0), action="append",
            default=[], help="print argument N as a whole",
        )  # fmt: skip
        launch.add_argument(
            "--save", metavar="N=FILE.npy", type=_save, action="append", default=[],
            help="write argument N to a file",
        )  # fmt: skip
    program = sub.add_argument_group("programs")
    program.add_argument("--entry", metavar="NAME", help="the function of a shared object to call")
    sub.add_argument("--json", action="store_true", help="print one JSON document")
    if several:
        sub.add_argument(
            "--sarif", metavar="FILE", type=Path, help="write the findings as SARIF 2.1.0 to FILE"
        )


def _list_of(rule: str, fits: Callable[[str], bool], several: bool) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        parts = text.split(",")
        if not all(map(fits, parts)) or (len(parts) > 1 and not several):
            raise argparse.ArgumentTypeError(
                f"must be {rule}{', or several of them' if several else ''}; got '{text}'"
            )
        return list(dict.fromkeys(parts))

    return parse


def _orders(several: bool) -> Callable[[str], list[str]]:
    return _list_of("forward, reverse, seeded, weak or sleepy", lambda x: x in ORDERS, several)


def _moments(several: bool) -> Callable[[str], list[str]]:
    def fits(text: str) -> bool:
        name, _, seed = text.partition(":")
        return text in ("latest", "earliest") or (name == "seed" and seed.isdecimal())

    return _list_of("latest, earliest or seed:N", fits, several)


def _extents(text: str) -> list[int]:
    parts = text.split(",")
    if not 1 <= len(parts) <= 3 or not all(p.isdecimal() and int(p) < 1 << 31 for p in parts):
        raise argparse.ArgumentTypeError(f"must be X, X,Y or X,Y,Z; got '{text}'")
    return [int(p) for p in parts]


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value) or "," in value:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE; got '{text}'")
    return name, value


def _save(text: str) -> tuple[int, Path]:
    number, equals, name = text.partition("=")
    if not (number.isdecimal() and equals and name.endswith(".npy")):
        raise argparse.ArgumentTypeError(f"must be N=FILE.npy; got '{text}'")
    return int(number), Path(name)


def run(options: argparse.Namespace) -> int:
    from . import kernel, machine, program
    from .findings import Mode, summarise

    try:
        vm = machine()
    except RuntimeError as error:
        raise _cli.UsageError(str(error).removeprefix("ptxvm: ")) from None
    _check_settings(options, vm)
    modes = [Mode(order, moment) for order in options.order for moment in options.moments]
    ptx = kernel.text_of(options.file)
    if ptx is None:
        runs = program.runs(options, modes, vm.path)
    else:
        if options.args or options.entry:
            raise _cli.UsageError("ARGS and --entry: are for programs; FILE is PTX text")
        runs = kernel.runs(options, modes, ptx)
    findings = summarise(runs)
    failed = any(r.status or r.lost for r in runs)
    broken = any(not finding.report.is_note for finding in findings)
    status = FOUND if broken else FAILED if failed else CLEAN
    if getattr(options, "sarif", None):
        _write_sarif(options, runs, findings, status, ptx)
    if options.json:
        print(json.dumps(_document(options, runs, findings, status, ptx), indent=1))
    else:
        _print(options, runs, modes, findings, ptx)
    return status


def _write_sarif(
    options: argparse.Namespace,
    runs: Sequence[Run],
    findings: Sequence[Finding],
    status: int,
    ptx: str | None,
) -> None:
    from . import sarif

    refused = dict.fromkeys(refusal for r in runs for refusal in r.refused)
    checked = sarif.Checked(Path(options.file), ptx is not None)
    document = sarif.log(findings, list(refused), status, checked)
    try:
        options.sarif.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise _cli.UsageError(_cli.unwritable("--sarif", options.sarif, error)) from None


def _check_settings(options: argparse.Namespace, vm: Machine) -> None:
    """Validates the machine's options before a program runs with them."""
    from .vm import MachineError

    names = [name for name in vm.settings if name not in FLAGS]
    for name, _ in options.settings:
        if name not in names:
            raise _cli.UsageError(f"--set: must be one of {', '.join(names)}; got '{name}'")
    try:
        with vm.options(**_cli.machine_options(options)):
            pass
    except MachineError as error:
        raise _cli.UsageError(f"--set: {str(error).removeprefix('ptxvm_configure: ')}") from None


def _document(
    options: argparse.Namespace,
    runs: Sequence[Run],
    findings: Sequence[Finding],
    status: int,
    ptx: str | None,
) -> dict[str, Any]:
    from .findings import as_json

    return {
        "file": options.file,
        "action": options.action,
        "options": _cli.machine_options(options),
        "status": status,
        "findings": as_json(findings, counted=ptx is not None),
        "runs": [
            r.mode.options
            | {"kernels": r.kernels, "status": r.status, "refused": r.refused}
            | ({"output": r.output} if r.status else {})
            | ({"launches": r.launches} if options.action == "count" else {})
            for r in runs
        ],
    }


def _print(
    options: argparse.Namespace,
    runs: Sequence[Run],
    modes: Sequence[Mode],
    findings: Sequence[Finding],
    ptx: str | None,
) -> None:
    from . import counters

    _print_findings(findings, modes, ptx)
    for line in dict.fromkeys(refusal for r in runs for refusal in r.refused):
        print(f"refused: {line}")
    for r in runs:
        if r.status and not r.reports:
            print(f"exit status {r.status} of {options.file} [{r.mode}]")
            print(textwrap.indent("\n".join(r.output.splitlines()[-10:]), "    "))
    if options.action == "count":
        for line in counters.table(runs[0].launches):
            print(line)
        if sum(not report.is_note for report in runs[0].reports) > runs[0].faults:
            print("went on after broken rules (above): the numbers include what followed them")
    if options.action == "check":
        times = f"{runs[0].kernels} launch{'es' if runs[0].kernels != 1 else ''}"
        notes = sum(finding.report.is_note for finding in findings)
        broken = len(findings) - notes
        what = f"{broken} finding{'s' if broken != 1 else ''}"
        if notes:
            what += f", {notes} note{'s' if notes != 1 else ''}"
        each = f"{len(modes)} runs" if len(modes) > 1 else "1 run"
        lost = max(r.lost for r in runs)
        refused = f"; {lost} launch{'es' if lost != 1 else ''} refused" if lost else ""
        print(f"{options.file}: {what}; {each} of {times}{refused}")


def _print_findings(findings: Sequence[Finding], modes: Sequence[Mode], ptx: str | None) -> None:
    from .findings import around, in_lines, modes_in_words, short_name

    for finding in findings:
        report = finding.report
        shown_in = modes_in_words(finding.modes, modes)
        line = f", line {report.line}" if report.line else ""
        name = report.name or report.kernel
        print(f"{report.rule}: {short_name(name)}{line}" + (f" [{shown_in}]" if shown_in else ""))
        said = report.report.rstrip().replace(name, short_name(name))
        print(textwrap.indent(said, "    "))
        for more in in_lines(finding.reports[1:]):
            print(
                textwrap.fill(f"and {more}", 100, initial_indent="    ", subsequent_indent="    ")
            )
        for row in around(ptx, report.line) if ptx else []:
            print(f"  {row}")
        print()
    if any(f.report.line for f in findings) and not any(f.report.file for f in findings):
        print("hint: nvcc -lineinfo adds the lines of the source to reports\n")
