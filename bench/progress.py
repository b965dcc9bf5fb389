"""Progress on a terminal: a bar where rich is installed, else a line for each case. A pipe or file
gets neither: the rows that are printed as they are measured say how far a run is."""

from __future__ import annotations

import sys
from typing import Any


class progress:
    """Counts what is done: `with progress(n) as advance`, then advance(start="title") where one
    begins, advance() as often as you like, and advance(done=True) where it ends."""

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
            # rich would send what is printed meanwhile to the bar's console, out of a file or pipe.
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
