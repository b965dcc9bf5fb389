"""Writing the results of a run while it runs, and reading them in a later run.

The document is `{head..., "rows": [...]}`. In schema 2 the head describes the measurement
(`schema`, `build`, `machine`, `device`, `threads`, `options`, ceilings), and a row of times has the
median with its interval and the binding ceiling. Files without `schema` are of schema 1.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tokenmill import _cli

SCHEMA = 2
END = "\n]}\n"
# Fields that two runs must share for their rows to be comparable.
KEPT = ("op", "case", "dtype", "seconds", "flops", "bytes_per_second")  # minimum fields of a row
SAME = ("schema", "build", "machine", "device", "threads", "options")


class Results:
    """Rows of a run, and their JSON with one line per row.

    The file is replaced as a whole after every row, so that a run that is interrupted at any moment
    leaves a complete document of everything measured. A stream ("-" is stdout), which cannot be
    rewritten, is completed when the run ends.
    """

    def __init__(self, path: str | None, stdout: TextIO, argument: str = "--json") -> None:
        """Checks that the named file, if any, can be written. Its contents stay until begin."""
        self.head: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.path = path
        self._argument = argument
        self._lines: list[str] = []
        self._out: BinaryIO | None = None
        self._file: Path | None = None
        if path == "-":
            self._out = stdout.buffer
        elif path:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.close(descriptor)
                    self._file = Path(os.path.realpath(path))
                    self._part.touch()
                    self._part.unlink()
                else:
                    # A buffer would keep what the device refused, and refuse it again when closed.
                    self._out = os.fdopen(descriptor, "wb", buffering=0)
            except OSError as error:
                raise self._unwritable(error) from None

    @property
    def document(self) -> dict[str, Any]:
        return self.head | {"rows": self.rows}

    @property
    def _part(self) -> Path:
        assert self._file is not None
        return self._file.with_name(f".{self._file.name}.{os.getpid()}.part")

    def begin(self, head: dict[str, Any], rows: Iterable[dict[str, Any]] = ()) -> None:
        """Writes the head together with rows that exist before the first measurement, so that the
        document always contains them."""
        self.head = head
        self._lines = [json.dumps(self.document, indent=1).removesuffix("]\n}")]
        for row in rows:
            self._append(row)
        self._write("".join(self._lines))

    def add(self, row: dict[str, Any]) -> None:
        self._append(row)
        self._write(self._lines[-1])

    def _append(self, row: dict[str, Any]) -> None:
        self._lines.append((",\n" if self.rows else "\n") + json.dumps(row))
        self.rows.append(row)

    def end(self) -> None:
        if self._out:
            self._stream(END)
            if self.path != "-":
                self._out.close()
        if self.path and self.path != "-":
            print(f"wrote {self.path}")

    def _stream(self, text: str) -> None:
        assert self._out
        rest = memoryview(text.encode())
        while rest:
            rest = rest[self._out.write(rest) :]
        self._out.flush()

    def _write(self, text: str) -> None:
        """Appends to the rows of a stream, or writes a new file that replaces the old one."""
        try:
            if self._out:
                self._stream(text)
            elif self._file:
                with self._part.open("w") as part:
                    part.write("".join([*self._lines, END]))
                    part.flush()
                    os.fsync(part.fileno())
                with contextlib.suppress(OSError):
                    os.chmod(self._part, stat.S_IMODE(self._file.stat().st_mode))
                os.replace(self._part, self._file)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> _cli.UsageError:
        return _cli.UsageError(_cli.unwritable(self._argument, self.path, error))


@functools.cache
def build_digest() -> str:
    """Digest of the native library and the Python files of the package: runs with the same digest
    measured the same code."""
    folder = Path(_cli.__file__).parent
    digest = hashlib.sha256()
    files = [*folder.glob("*.so"), *folder.rglob("*.py")]
    for name in ("bench", "triton_kernels"):  # symlinks, which rglob does not follow
        files += (folder / name).rglob("*.py")
    for path in sorted(set(files)):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def earlier(path: str, head: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The document that a run resumes, and its measured rows. UsageError if they were measured
    under other settings. A missing or empty file has no rows."""
    text = _text(path, "--resume") if os.path.exists(path) else ""
    if not text.strip():
        return {}, []
    document = _parse(text, "--resume", path)
    # Compared after a JSON round trip: tuples become lists.
    wanted = json.loads(json.dumps({key: head.get(key) for key in SAME}))
    other = [key for key in SAME if document.get(key) != wanted[key]]
    if other:
        rule = "must hold results of the same build, device and options (--json starts anew)"
        what = ", ".join(_difference(key, document.get(key), wanted[key]) for key in other)
        raise _cli.UsageError(f"--resume: {rule}; got '{path}' ({what})")
    rows = [row for row in document["rows"] if "error" not in row]
    if not {"ceilings", "copy_bandwidth"} <= {*document} or not all({*KEPT} <= {*r} for r in rows):
        raise _not_ours("--resume", path, ValueError("ceilings, or figures of a row, are missing"))
    return document, rows


def _difference(key: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        parts = [k for k in here.keys() | there.keys() if there.get(k) != here.get(k)]
        return ", ".join(f"{k} {there.get(k)}, now {here.get(k)}" for k in sorted(parts))
    return f"{key} {there}, now {here}"


def load(path: str, argument: str) -> dict[str, Any]:
    """Loads a document with a machine and rows, or raises UsageError."""
    return _parse(_text(path, argument), argument, path)


def _text(path: str, argument: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise _cli.UsageError(f"{argument}: must be readable; got '{path}' ({why})") from None


def _parse(text: str, argument: str, path: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        if "machine" not in document or not all(isinstance(r, dict) for r in document["rows"]):
            raise ValueError("no machine, or a row that is no object")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _not_ours(argument, path, error) from None
    return document


def _not_ours(argument: str, path: str, error: Exception) -> _cli.UsageError:
    rule = "must be results that bench --json wrote"
    return _cli.UsageError(f"{argument}: {rule}; got '{path}' ({_cli.one_line(error)})")
