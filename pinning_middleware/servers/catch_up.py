"""
When a server that is behind may be probed again: by one caller for all, after doubling pauses. No
I/O.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pinning_middleware.pins import Position
from pinning_middleware.utils.forks import ForkSafeLock

# Seconds until a server that is behind is probed again; doubled with each probe in vain. A healthy
# replica catches up within the first one.
FIRST_PAUSE: Final = 0.001
MAX_PAUSE: Final = 0.1

_lock = ForkSafeLock()


class CatchUp:
    """
    The first position that a server was probed for in vain, and when it may be probed again.

    A server that is not known to be behind may be probed by any number of callers. The pauses begin
    anew when it has reached that position; progress alone does not end them, since a server that
    replays the log of the last hour makes progress all the time.
    """

    __slots__ = ("_due", "_pause", "awaited")

    def __init__(self) -> None:
        # None: the server is not known to be behind.
        self.awaited: Position | None = None
        # Monotonic time of the next probe, and the pause after it.
        self._due = 0.0
        self._pause = FIRST_PAUSE

    def claim_probe(self) -> bool:
        """Return whether the caller may probe the server now; others then may not."""
        if self.awaited is None:
            return True
        with _lock:
            now = time.monotonic()
            is_due = now >= self._due
            if is_due:
                self._begin_pause(now)
        return is_due

    def _begin_pause(self, now: float) -> None:
        self._due, self._pause = now + self._pause, min(2 * self._pause, MAX_PAUSE)

    def record_probe(self, wanted: Position | None, reached: Callable[[Position], bool]) -> None:
        """
        Record the result of a probe, which was made for the position ``wanted``, if any.

        ``reached`` returns whether the server has reported a position.
        """
        awaited = self.awaited
        if awaited is not None and not reached(awaited):
            return
        if wanted is None or reached(wanted):
            self.awaited = None
            return
        with _lock:
            self.awaited, self._pause = wanted, FIRST_PAUSE
            self._begin_pause(time.monotonic())
