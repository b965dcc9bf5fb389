"""A progress bar on a terminal where rich is installed; else nothing."""

from __future__ import annotations

import sys
from typing import Any


class progress:
    """Counts what is done: `with progress(n) as advance`, then advance(done=True) for each."""

    def __init__(self, total: int, what: str = "benchmarking") -> None:
        self.bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty():
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

    def advance(self, done: bool = False) -> None:
        if self.bar:
            self.bar.update(self.task, advance=1 if done else 0)

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
