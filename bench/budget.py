"""Time budget of the cases."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Either `each` seconds of repetitions per case, or `total` seconds for all remaining cases:
    time that one case leaves is shared by the others."""

    def __init__(
        self,
        each: float,
        total: float | None,
        cases: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.each, self._clock, self._left = each, clock, cases
        self._end = None if total is None else clock() + total

    @property
    def limited(self) -> bool:
        return self._end is not None

    def next(self) -> float | None:
        """Seconds for the next case, including its preparation if the budget is limited; None if no
        time is left."""
        if self._end is None:
            return self.each
        share = (self._end - self._clock()) / max(self._left, 1)
        self._left -= 1
        return share if share > 0 else None
