"""Distribution-free confidence interval of a median."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95
EXACT = 1000  # max sample count for exact binomial sums


class Interval(NamedTuple):
    low: float
    high: float
    coverage: float  # probability that the interval contains the median


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Interval from the k-th smallest to the k-th largest of n independent samples, for the maximum
    k that covers the median with at least this confidence. The median lies outside if fewer than k
    of n fair coins show heads, or fewer than k show tails. Five samples cover it with at most 93.75
    %: then k is 1 and coverage reports it."""
    ordered = sorted(samples)
    k, coverage = _rank(len(ordered), confidence)
    return Interval(ordered[k - 1], ordered[-k], coverage)


def _rank(n: int, confidence: float) -> tuple[int, float]:
    if n > EXACT:  # normal approximation, accurate to three digits
        wide = NormalDist().inv_cdf(0.5 + confidence / 2)
        k = math.floor((n - wide * math.sqrt(n)) / 2)
        return k, math.erf((n + 1 - 2 * k) / math.sqrt(2 * n))
    total = 2**n
    outside, k = 2, 1  # number of `total` coin sequences outside the k-th to n+1-k-th
    while 2 * (k + 1) <= n + 1:
        more = outside + 2 * math.comb(n, k)
        if more > (1 - confidence) * total:
            break
        outside, k = more, k + 1
    return k, 1 - outside / total
