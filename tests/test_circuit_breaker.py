from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from django.test import override_settings

from pinning_middleware.stores import circuit_breaker
from pinning_middleware.stores.circuit_breaker import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(circuit_breaker, "TIMEOUT", 0.5)
    return clock


@pytest.fixture
def breaker() -> Iterator[CircuitBreaker]:
    with override_settings(PINNING_RETRY_AFTER=10):
        yield CircuitBreaker()


def call(breaker: CircuitBreaker, clock: Clock, seconds: float) -> None:
    with breaker.guard():
        clock.now += seconds


def fail(breaker: CircuitBreaker, error: Exception) -> None:
    with breaker.guard():
        raise error


def test_one_slow_call_does_not_open(breaker: CircuitBreaker, clock: Clock) -> None:
    call(breaker, clock, 0.7)
    assert breaker.allows_loads


def test_two_slow_calls_in_succession_skip_loads_but_not_saves(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    call(breaker, clock, 0.7)
    call(breaker, clock, 0.7)
    assert not breaker.allows_loads
    assert breaker.allows_saves
    clock.now += 10
    assert breaker.allows_loads


def test_slow_calls_with_a_fast_one_in_between_do_not_open(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    for seconds in (0.7, 0.1, 0.7):
        call(breaker, clock, seconds)
    assert breaker.allows_loads


def test_one_pause_with_several_calls_does_not_open(breaker: CircuitBreaker, clock: Clock) -> None:
    with breaker.guard():
        clock.now += 0.1
        with breaker.guard(), breaker.guard():
            clock.now += 0.7
    assert breaker.allows_loads


def test_slow_calls_that_always_overlap_open(breaker: CircuitBreaker, clock: Clock) -> None:
    """Under constant load every call of a slow cache overlaps another one."""
    started = [breaker.guard() for _ in range(3)]
    for guard in started:
        guard.__enter__()
        clock.now += 0.4
    for guard in started:
        guard.__exit__(None, None, None)
        clock.now += 0.4
    assert breaker.allows_loads
    call(breaker, clock, 0.7)
    assert not breaker.allows_loads


@pytest.mark.parametrize("error", [ConnectionRefusedError(), OSError()])
def test_outage_skips_loads_and_saves(
    breaker: CircuitBreaker, clock: Clock, error: Exception
) -> None:
    fail(breaker, error)
    assert not breaker.allows_loads
    assert not breaker.allows_saves
    clock.now += 10
    assert breaker.allows_loads
    assert breaker.allows_saves


def test_timeout_skips_loads_but_not_saves(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, TimeoutError())
    assert not breaker.allows_loads
    assert breaker.allows_saves


def test_error_without_an_outage_does_not_open(breaker: CircuitBreaker) -> None:
    fail(breaker, ValueError())
    assert breaker.allows_loads
    assert breaker.allows_saves
