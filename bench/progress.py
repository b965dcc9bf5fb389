"""A progress bar on a terminal where rich is installed; else nothing."""

from __future__ import annotations

import sys
from typing import Any


class progress:
    """Counts finished cases: `with progress(n) as advance`, then advance(done=True) for each."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress
            except ImportError:
                return
            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("benchmarking", total=total)

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
