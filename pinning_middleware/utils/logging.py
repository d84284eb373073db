"""Log lines for states that go on: once a minute, however many requests meet them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Hashable, Mapping
from typing import Any, Final

__all__ = ["EVERY", "log_rate_limited"]

# Seconds between two lines of one state; how many states are remembered.
EVERY: Final = 60.0
MOST: Final = 1000

_lock = threading.Lock()
# When a state was last said (monotonic clock), and how often it was met and not said since.
_said: dict[tuple[str, Hashable], tuple[float, int]] = {}


def log_rate_limited(
    logger: logging.Logger,
    level: int,
    key: Hashable,
    message: str,
    *args: object,
    extra: Mapping[str, Any] | None = None,
    exc_info: BaseException | None = None,
) -> bool:
    """
    Log a state unless this logger has said one of this ``key`` within the last minute; return
    whether it was said. The record's ``unsaid`` is how often it was met since the last line.
    """
    if not logger.isEnabledFor(level):
        return False
    now = time.monotonic()
    known = logger.name, key
    with _lock:
        at, unsaid = _said.get(known, (0.0, 0))
        if at and now - at < EVERY:
            _said[known] = at, unsaid + 1
            return False
        # Again at the end, so that the oldest is the first.
        _said.pop(known, None)
        _said[known] = now, 0
        if len(_said) > MOST:
            del _said[next(iter(_said))]
    known_too = {**(extra or {}), "unsaid": unsaid}
    # The line is of whoever called us.
    logger.log(level, message, *args, extra=known_too, exc_info=exc_info, stacklevel=2)
    return True


def _begin_anew_after_fork() -> None:
    global _lock
    # Another thread may have held it.
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew_after_fork)
