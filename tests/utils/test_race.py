"""Attempts that run beside each other: which result counts, and what becomes of the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from pinning_middleware.utils import race
from pinning_middleware.utils.race import first_result


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event that is set when the test has ended, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def fail(error: Exception) -> str:
    raise error


def test_first_attempt_that_answers_ends_the_race(never: threading.Event) -> None:
    started = []

    def attempts() -> Iterator[Callable[[], str]]:
        started.append("first")
        yield lambda: "first"
        started.append("second")
        yield lambda: "second"

    assert first_result(attempts(), seconds=30, interval=30) == "first"
    assert started == ["first"]


def test_attempt_beside_one_without_an_answer_returns_its_result(never: threading.Event) -> None:
    def hang() -> str:
        never.wait()
        return "late"

    assert first_result(iter([hang, lambda: "second"]), seconds=30, interval=0.01) == "second"


def test_error_is_raised_although_another_attempt_is_left() -> None:
    with pytest.raises(ZeroDivisionError):
        first_result([partial(fail, ZeroDivisionError()), lambda: "second"], seconds=30, interval=1)


def test_error_to_be_retried_starts_the_next_attempt_at_once() -> None:
    attempts = [partial(fail, KeyError()), lambda: "second"]
    assert first_result(attempts, seconds=30, interval=30, retry=KeyError) == "second"


def test_last_error_is_raised_if_no_attempt_is_left() -> None:
    attempts = [partial(fail, KeyError(number)) for number in range(3)]
    with pytest.raises(KeyError, match="2"):
        first_result(attempts, seconds=30, interval=30, retry=KeyError)


def test_no_answer_in_time_raises_timeout_error(never: threading.Event) -> None:
    with pytest.raises(TimeoutError):
        first_result([never.wait], seconds=0.05, interval=1)


@pytest.mark.parametrize(("interval", "expected"), [(30, KeyError), (0.01, TimeoutError)])
def test_error_counts_at_the_end_unless_an_attempt_is_overdue(
    never: threading.Event, interval: float, expected: type[Exception]
) -> None:
    attempts = [partial(fail, KeyError()), never.wait]
    with pytest.raises(expected):
        first_result(attempts, seconds=0.1, interval=interval, retry=KeyError)


def test_attempts_that_are_given_up_raise_timeout_error_after_an_error(
    never: threading.Event,
) -> None:
    answers = iter([False, False, True])
    attempts = [partial(fail, KeyError()), never.wait]
    with pytest.raises(TimeoutError):
        first_result(
            attempts, seconds=1000, interval=1000, retry=KeyError, give_up=lambda: next(answers)
        )


def test_attempts_are_given_up_when_there_is_nothing_to_wait_for(never: threading.Event) -> None:
    answers = iter([False, False, True])
    with pytest.raises(TimeoutError):
        first_result([never.wait], seconds=1000, interval=1000, give_up=lambda: next(answers))


def test_only_attempt_runs_in_the_caller_if_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(race._thread, "start_new_thread", refuse)
    assert first_result([lambda: "first", lambda: "second"], seconds=1, interval=0) == "first"
    with pytest.raises(ZeroDivisionError):
        first_result([partial(fail, ZeroDivisionError())], seconds=1, interval=0)


def test_late_result_is_discarded() -> None:
    release, discarded, is_discarded = threading.Event(), [], threading.Event()

    def late() -> str:
        release.wait()
        return "late"

    def discard(result: str) -> None:
        discarded.append(result)
        is_discarded.set()

    attempts: list[Callable[[], str]] = [late, lambda: "second"]
    assert first_result(attempts, seconds=30, interval=0.01, discard=discard) == "second"
    release.set()
    assert is_discarded.wait(20)
    assert discarded == ["late"]
