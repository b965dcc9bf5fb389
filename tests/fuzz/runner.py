"""Calls of the fuzzer in processes that a crash may kill, and their verdicts."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fuzz import environment
from fuzz.mutate import EXPANDED

PROGRAM = "python tests/fuzz"
BACKENDS = ("cpu", "emulated", "reference")
BATCH = 5000  # calls per process
SECONDS = 20.0  # processor time per call
LONG = 2.0  # seconds for a call with an expanded tensor, which is not a defect
WAIT = 10.0  # factor on these limits after which an idle call is late
START = 600.0  # seconds until a process is ready
COMMAND = (sys.executable, "-m", "fuzz.worker")


@dataclass(frozen=True)
class Finding:
    """A defective call."""

    seed: int
    number: int
    backend: str
    call: str
    why: str

    @property
    def command(self) -> str:
        return f"{PROGRAM} 1 --seed {self.seed} --first {self.number} --backend {self.backend}"

    def __str__(self) -> str:
        return f"{self.call}\n    {self.why}\n    {self.command}"


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # count of each verdict


def fuzz(
    calls: int,
    *,
    backend: str = "cpu",
    seed: int = 0,
    first: int = 0,
    found: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Runs calls number first to first + calls - 1 and returns the defects.

    Args:
        calls: number of calls.
        backend: "cpu", "emulated" or "reference".
        seed: seed of all calls.
        first: number of the first call.
        found: called with each defect as it is found.
    """
    report = Report()
    number, end = first, first + calls
    while number < end:
        count = min(BATCH, end - number)
        for verdict, call, why in _batch(seed, number, count, backend):
            report.counts[verdict] += 1
            if verdict == "wrong":
                finding = Finding(seed, number, backend, call, why)
                report.findings.append(finding)
                found(finding)
            number += 1
    return report


def _batch(seed: int, first: int, count: int, backend: str) -> Iterator[tuple[str, str, str]]:
    """Verdict, call and reason of each call until all have run or the process has died."""
    receive, send = os.pipe()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*COMMAND, str(seed), backend, str(send)],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            pass_fds=[send],
            env=environment(**_VARIABLES),
        )
        os.close(send)
        assert process.stdin is not None
        try:
            messages = _Messages(receive)
            if (ready := messages.next(START)) != ["ready"]:
                raise RuntimeError(f"fuzz: no process: {_tail(process, errors)} {ready}")
            process.stdin.write(f"{first} {count}\n".encode())
            process.stdin.flush()
            for _ in range(count):
                call, message = "", None
                begin, spent = time.monotonic(), _processor_time(process.pid)
                while message is None or message[0] != "end":
                    message = messages.next(1.0)
                    if message is None and (messages.closed or process.poll() is not None):
                        yield "wrong", call, _tail(process, errors)
                        return
                    endless = EXPANDED in call
                    maximum = LONG if endless else SECONDS
                    late = time.monotonic() - begin > WAIT * maximum
                    if message is None and (late or _processor_time(process.pid) - spent > maximum):
                        yield "long" if endless else "wrong", call, f"takes more than {maximum:g} s"
                        return
                    if message is not None and message[0] == "words":
                        call = message[1]
                yield message[1], call, message[2]
                if "INTERNAL ASSERT" in message[2]:
                    return  # the call may have corrupted memory
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            os.close(receive)


# Freed memory is overwritten (glibc), so that stale data does not pass for a result.
_VARIABLES = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=165",
    "OMP_WAIT_POLICY": "passive",
}


class _Messages:
    """Lines of JSON from a pipe."""

    def __init__(self, fd: int):
        self.fd, self.rest, self.closed = fd, b"", False

    def next(self, seconds: float) -> list | None:
        """The next message; None if the time is over or the other end is closed."""
        end = time.monotonic() + seconds
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.fd], [], [], max(end - time.monotonic(), 0))
            more = os.read(self.fd, 1 << 16) if ready else b""
            if not more:
                self.closed = bool(ready)
                return None
            self.rest += more
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)


def _processor_time(pid: int) -> float:
    """Processor time in seconds; wall time says little on a shared machine."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _tail(process: subprocess.Popen, errors: object) -> str:
    """How a process ended, and its last output."""
    try:
        status = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        status = 0
    errors.seek(0)  # type: ignore[attr-defined]
    text = errors.read().decode(errors="replace")  # type: ignore[attr-defined]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "File " not in line][:3]
    return f"the process ended with status {status}: {' | '.join(told)}"
