"""How long each case may take."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """`each` seconds of repetitions a case, or `total` seconds for everything that follows, spread
    over the cases: what one leaves, the others get."""

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
        """Seconds of the next case, its preparation included if the budget is limited; None if no
        time is left."""
        if self._end is None:
            return self.each
        share = (self._end - self._clock()) / max(self._left, 1)
        self._left -= 1
        return share if share > 0 else None
