"""Interleaved rounds: on a noisy machine only ratios of neighbours say something."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable

ROUNDS = 60


def compare(ours: Callable[[], object], theirs: Callable[[], object], times: int) -> str:
    """Return both times and the median of their ratios, over rounds that take turns."""
    pairs = [
        (timeit.timeit(ours, number=times) / times, timeit.timeit(theirs, number=times) / times)
        for _ in range(ROUNDS)
    ]
    mine, other = (statistics.median(times) * 1e9 for times in zip(*pairs, strict=True))
    ratio = statistics.median(one / two for one, two in pairs)
    return f"{mine:8.0f} ns  beside {other:8.0f} ns: {ratio:.2f} times"
