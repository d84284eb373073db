"""
The clock for the windows of pins, which tests can advance. Time limits for servers use the system's
clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds since the epoch, and of the monotonic clock. The functions of ``time`` themselves: they
# cost no extra call, and freezegun and time-machine replace them.
now: Callable[[], float] = time.time
monotonic: Callable[[], float] = time.monotonic

# freezegun replaces the functions of ``time`` that are attributes of a module.
_SYSTEM = (time.monotonic,)


def unfrozen() -> float:
    """Return the system's monotonic clock (seconds), also while freezegun stops it: for waits."""
    return _SYSTEM[0]()


def set_ahead(seconds: float) -> None:
    """Advance this clock by this many seconds; 0.0 restores the system's."""
    global now, monotonic
    if not seconds:
        now, monotonic = time.time, time.monotonic
        return
    now = lambda: time.time() + seconds  # noqa: E731
    monotonic = lambda: time.monotonic() + seconds  # noqa: E731
