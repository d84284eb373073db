"""Rate-limited logging of lasting conditions: one record a minute for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping
from typing import Any, Final

from pinning_middleware.utils.forks import ForkSafeLock

# Seconds between two records of one condition; how many conditions are remembered.
EVERY: Final = 60.0
MOST: Final = 1000

_lock = ForkSafeLock()
# When a condition was last logged (monotonic clock), and how many records were suppressed since.
_last_logged: dict[tuple[str, Hashable], tuple[float, int]] = {}


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
    Log a condition, unless this logger has logged this ``key`` within the last minute.

    Return whether it was logged. The record's ``suppressed`` is the number of records that were
    suppressed since the last one.
    """
    if not logger.isEnabledFor(level):
        return False
    now = time.monotonic()
    known = logger.name, key
    with _lock:
        at, suppressed = _last_logged.get(known, (0.0, 0))
        if at and now - at < EVERY:
            _last_logged[known] = at, suppressed + 1
            return False
        # Insert it at the end, so that the oldest is the first.
        _last_logged.pop(known, None)
        _last_logged[known] = now, 0
        if len(_last_logged) > MOST:
            del _last_logged[next(iter(_last_logged))]
    all_extra = {**(extra or {}), "suppressed": suppressed}
    # Report the caller's line, not this one.
    logger.log(level, message, *args, extra=all_extra, exc_info=exc_info, stacklevel=2)
    return True
