"""
The clock of windows. What measures how long a server takes has the machine's own; what says when
a pin is over has this one, so that a test can move windows on, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["monotonic", "now", "set_ahead"]

# Seconds since the epoch, and of the monotonic clock. The functions themselves, so that they cost
# nothing and that those who freeze time find them.
now: Callable[[], float] = time.time
monotonic: Callable[[], float] = time.monotonic


def set_ahead(seconds: float) -> None:
    """Let windows be over so many seconds sooner than they would; 0.0: as the machine has it."""
    global now, monotonic
    if not seconds:
        now, monotonic = time.time, time.monotonic
        return
    now = lambda: time.time() + seconds  # noqa: E731
    monotonic = lambda: time.monotonic() + seconds  # noqa: E731
