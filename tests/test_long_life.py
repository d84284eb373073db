"""The judgement of `tests.long_life`: which series of samples grow."""

from __future__ import annotations

from collections.abc import Callable

from .long_life import BOUNDS, Sample, trends

NAME = "objects"
BOUND = BOUNDS[NAME]


def series(value: Callable[[int], float], until: int = 100) -> list[Sample]:
    return [Sample(at, "worker", NAME, value(at)) for at in range(0, until, 5)]


def grown(samples: list[Sample]) -> list[str]:
    return [each.of for each in trends(samples) if each.is_growth]


def test_series_that_rises_beyond_its_bound_is_growth() -> None:
    assert grown(series(lambda at: BOUND * 2 * at / 95 * 1.01)) == ["worker"]
    assert grown(series(lambda at: BOUND * 2 * at / 95 * 0.99)) == []


def test_noise_and_warming_up_are_no_growth() -> None:
    assert grown(series(lambda at: 50 * BOUND + BOUND * (at % 2))) == []
    assert grown(series(lambda at: 50 * BOUND * min(at, 45) / 45)) == []


def test_series_that_ends_early_is_left_out() -> None:
    short = series(lambda at: 10 * BOUND * at, until=80)
    whole = [each._replace(of="parent") for each in series(lambda at: 1.0)]
    assert [each.of for each in trends([*short, *whole])] == ["parent"]
