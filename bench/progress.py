"""Progress on a terminal: a bar if rich is installed, else one line per case. A pipe or file gets
neither: rows are printed as they are measured."""

from __future__ import annotations

import sys
from typing import Any


class progress:
    """Counts finished work: `with progress(n) as advance`, then advance(start="title") at the start
    of a case, advance() at any time, and advance(done=True) at its end."""

    def __init__(self, total: int, what: str = "benchmarking") -> None:
        self.bar: Any = None
        self.what, self.total, self.begun = what, total, 0
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        if self.terminal:
            try:
                from rich.console import Console
                from rich.progress import Progress
            except ImportError:
                return
            # rich would redirect concurrent prints to the bar's console, out of a file or pipe.
            redirect = sys.stdout is not None and sys.stdout.isatty()
            console = Console(stderr=True)
            self.bar = Progress(console=console, transient=True, redirect_stdout=redirect)
            self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Any:
        if self.bar:
            self.bar.start()
        return self.advance

    def advance(self, done: bool = False, start: str | None = None) -> None:
        if start is not None:
            self.begun += 1
        if self.bar:
            self.bar.update(self.task, advance=1 if done else 0, description=self._words(start))
        elif self.terminal and start is not None:
            print(f"[{self.begun}/{self.total}] {start}", file=sys.stderr, flush=True)

    def _words(self, start: str | None) -> str | None:
        from rich.markup import escape

        return None if start is None else escape(f"{self.what}: {start}")

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
