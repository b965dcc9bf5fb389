"""Where the results of a run go while it runs."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tokenmill import _cli

END = b"\n]}\n"


class Results:
    """The rows of a run, and the JSON of `{head..., "rows": [...]}` with a line for each row.

    A file is a whole document after every row, so that a run which is cut off keeps what it has
    measured. A stream ("-" is stdout), which cannot be written again, gets its end when the run
    ends.
    """

    def __init__(self, path: str | None, stdout: TextIO) -> None:
        """Opens the file, if one is named, and leaves what it holds until begin."""
        self.head: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.path = path
        self._out: BinaryIO | None = None
        self._whole = False
        if path == "-":
            self._out = stdout.buffer
        elif path:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            except OSError as error:
                raise _cli.UsageError(_cli.unwritable("--json", path, error)) from None
            self._out = os.fdopen(descriptor, "wb")
            self._whole = stat.S_ISREG(os.fstat(descriptor).st_mode)

    @property
    def document(self) -> dict[str, Any]:
        return self.head | {"rows": self.rows}

    def begin(self, head: dict[str, Any]) -> None:
        self.head = head
        if self._whole and self._out:
            self._out.truncate(0)
        text = json.dumps(self.document, indent=1).removesuffix("]\n}")
        self._write(text.encode())

    def add(self, row: dict[str, Any]) -> None:
        self._write((",\n" if self.rows else "\n").encode() + json.dumps(row).encode())
        self.rows.append(row)

    def end(self) -> None:
        if self._out and not self._whole:
            self._out.write(END)
            self._out.flush()
        if self._out and self.path != "-":
            self._out.close()
            print(f"wrote {self.path}")

    def _write(self, data: bytes) -> None:
        """At the end of the rows. A file gets its end in the same call of the system."""
        if not self._out:
            return
        try:
            self._out.write(data + END if self._whole else data)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _cli.UsageError(_cli.unwritable("--json", self.path, error)) from None
        if self._whole:
            self._out.seek(-len(END), os.SEEK_CUR)
