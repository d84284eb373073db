"""Blocking calls that run in threads of their own, so that they can be abandoned."""

from __future__ import annotations

import _thread
import contextvars
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from pinning_middleware.utils.forks import ForkSafeLock

T = TypeVar("T")

GIVE_UP_INTERVAL: Final = 0.1


class _Race:
    """Attempts that run at the same time."""

    def __init__(self, discard: Callable[[Any], object]) -> None:
        self.running = 0
        self._discard = discard
        self._lock = ForkSafeLock()
        self._is_over = False
        # The result and the error of each attempt that has ended.
        self._outcomes: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

    def start(self, attempt: Callable[[], Any]) -> None:
        context = contextvars.copy_context()
        try:
            # threading.Thread.start() takes twice as long.
            _thread.start_new_thread(context.run, (self._run, attempt))
        except RuntimeError:
            # No thread can be started. An only attempt runs here, and cannot be abandoned.
            if self.running:
                return
            context.run(self._run, attempt)
        self.running += 1

    def _run(self, attempt: Callable[[], Any]) -> None:
        result, error = None, None
        try:
            result = attempt()
        except Exception as raised:
            error = raised
        with self._lock:
            if not self._is_over:
                self._outcomes.put((result, error))
                return
        if error is None:
            self._discard(result)

    def next_outcome(self, seconds: float) -> tuple[Any, Exception | None] | None:
        """Return the next result or error, or None after ``seconds``."""
        try:
            outcome = self._outcomes.get(timeout=max(seconds, 0.0))
        except Empty:
            return None
        self.running -= 1
        return outcome

    def end(self) -> None:
        with self._lock:
            self._is_over = True
        while (outcome := self.next_outcome(0.0)) is not None:
            if outcome[1] is None:
                self._discard(outcome[0])


def first_result(
    attempts: Iterable[Callable[[], T]],
    *,
    seconds: float,
    interval: float,
    retry: type[Exception] | tuple[type[Exception], ...] = (),
    discard: Callable[[T], object] = lambda result: None,
    give_up: Callable[[], bool] = lambda: False,
) -> T:
    """
    Return the result of the attempt that succeeds first.

    The next attempt is started ``interval`` seconds after the last one, beside those that still
    run, or as soon as one has raised ``retry``. Raise any other error of an attempt; the last
    ``retry`` if no attempt is left, or if after ``seconds`` only one is left that began less than
    ``interval`` ago; else TimeoutError after ``seconds``, or when ``give_up()`` is true, which is
    called every GIVE_UP_INTERVAL seconds. ``discard`` is called with the results of attempts that
    end later.
    """
    waiting, race = iter(attempts), _Race(discard)
    now = next_start = time.monotonic()
    until, error, is_exhausted, is_given_up = now + seconds, None, False, False
    try:
        while now < until:
            if is_given_up := give_up():
                break
            if not is_exhausted and now >= next_start:
                attempt = next(waiting, None)
                if attempt is None:
                    is_exhausted = True
                else:
                    race.start(attempt)
                    next_start = now + interval
            if is_exhausted and not race.running:
                break
            wake_at = min(until if is_exhausted else next_start, until, now + GIVE_UP_INTERVAL)
            outcome = race.next_outcome(wake_at - now)
            now = time.monotonic()
            if outcome is None:
                continue
            result, error = outcome
            if error is None:
                return result  # type: ignore[no-any-return]
            if not isinstance(error, retry):
                raise error
            next_start = now
        # An attempt that has only just begun does not turn the error of the others into a timeout.
        is_overdue = race.running > 1 or (race.running == 1 and now >= next_start)
    finally:
        race.end()
    if error is not None and not is_overdue and not is_given_up:
        raise error
    raise TimeoutError(f"no answer within {seconds:.1f} s")
