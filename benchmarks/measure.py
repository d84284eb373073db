"""Interleaved rounds: on a noisy machine only ratios within a round are meaningful."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Sequence

ROUNDS = 60
PARTS = 5


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], times: int, rounds: int = ROUNDS
) -> str:
    """Return both times and the median of their ratios, over alternating rounds."""
    return ratio([(fastest(ours, times), fastest(theirs, times)) for _ in range(rounds)])


def fastest(run: Callable[[], object], times: int) -> float:
    """Return the time of the fastest run (seconds)."""
    number = max(times // PARTS, 1)
    return min(timeit.repeat(run, number=number, repeat=PARTS)) / number


def ratio(pairs: Sequence[tuple[float, float]]) -> str:
    """Return the medians and the median ratio of pairs of times (seconds), one for each round."""
    mine, other = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    middle = statistics.median(one / two for one, two in pairs)
    return f"{_format(mine)} compared with {_format(other)}: ratio {middle:.2f}"


def _format(seconds: float) -> str:
    return f"{seconds * 1e6:8.1f} µs" if seconds > 1e-5 else f"{seconds * 1e9:8.0f} ns"
