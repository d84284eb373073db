"""
A circuit breaker: stops using a cache that failed or is slow, for PINNING_RETRY_AFTER seconds.

After an outage (a refused connection, a server that accepts no writes) neither loads nor saves are
tried. After slowness or a timeout only loads are skipped: a save is still tried, because a pin that
was not saved is a stale read, while a load that was skipped only costs the pins of other devices.

A cache is slow if two calls in succession took longer than TIMEOUT. Calls that overlap count as
one, because a single pause of the process delays every call that is in progress.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from django.db import InterfaceError, OperationalError

from pinning_middleware.conf import conf
from pinning_middleware.utils.logging import log_rate_limited

logger = logging.getLogger("pinning_middleware.pins")

# Maximum duration of a call on Redis and Valkey (seconds). A call of another cache that takes
# longer is slow.
TIMEOUT = 0.5

# Base classes of the errors that clients raise if a server is unreachable, times out,
# or no longer accepts writes.
_TIMEOUTS = {"redis.exceptions": ("TimeoutError",), "valkey.exceptions": ("TimeoutError",)}
_OUTAGES = {
    "redis.exceptions": ("ConnectionError", "ReadOnlyError"),
    "valkey.exceptions": ("ConnectionError", "ReadOnlyError"),
    # If all servers are down, pymemcache raises the base class itself.
    "pymemcache.exceptions": ("MemcacheError",),
    "pylibmc": ("Error",),
    "django_redis.exceptions": ("ConnectionInterrupted",),
}


def _is_one_of(error: Exception, names_by_module: Mapping[str, tuple[str, ...]]) -> bool:
    return any(
        isinstance(error, getattr(module, name, ()))
        for path, names in names_by_module.items()
        if (module := sys.modules.get(path)) is not None
        for name in names
    )


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or _is_one_of(error, _TIMEOUTS)


def _is_outage(error: Exception) -> bool:
    return isinstance(error, (OSError, OperationalError, InterfaceError)) or _is_one_of(
        error, _OUTAGES
    )


class CircuitBreaker:
    """Guards the calls of the cache PINNING_CACHE."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._open_until = 0.0
        self._is_outage = False
        self._slow_until: float | None = None  # when the last slow call ended

    @property
    def allows_loads(self) -> bool:
        return time.monotonic() >= self._open_until

    @property
    def allows_saves(self) -> bool:
        return not self._is_outage or time.monotonic() >= self._open_until

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Measure a call, and log its error instead of raising it."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            self._record_error(error)
        else:
            self._record_success(started, time.monotonic())

    def _record_success(self, started: float, ended: float) -> None:
        if ended - started <= TIMEOUT:
            # Only for a call that began after the last slow one is the cache fast again.
            if self._slow_until is not None and started >= self._slow_until:
                self._slow_until = None
            return
        if self._slow_until is None:
            self._slow_until = ended
        elif started >= self._slow_until:
            self._slow_until = ended
            self._open_for_loads(f"two calls took longer than {TIMEOUT} s")

    def _record_error(self, error: Exception) -> None:
        if _is_timeout(error):
            self._open_for_loads(error)
        elif _is_outage(error):
            self._open(error)
        else:
            # A bug, or a value of another application: no reason to stop using the cache.
            log_rate_limited(
                logger,
                logging.ERROR,
                ("lost", conf.cache),
                "Could not read or write pins in cache %r.",
                conf.cache,
                extra={"cache": conf.cache, "error": str(error)},
                exc_info=error,
            )

    def _open(self, error: Exception) -> None:
        self._open_until = time.monotonic() + conf.retry_after
        self._is_outage = True
        log_rate_limited(
            logger,
            logging.ERROR,
            ("outage", conf.cache),
            "Cache %r is unavailable and will not be used for %s seconds: %s",
            conf.cache,
            conf.retry_after,
            error,
            extra={"cache": conf.cache, "seconds": conf.retry_after, "error": str(error)},
        )

    def _open_for_loads(self, cause: object) -> None:
        self._open_until = time.monotonic() + conf.retry_after
        self._is_outage = False
        log_rate_limited(
            logger,
            logging.ERROR,
            ("slow", conf.cache),
            "Cache %r is slow; pins will not be loaded from it for %s seconds: %s",
            conf.cache,
            conf.retry_after,
            cause,
            extra={"cache": conf.cache, "seconds": conf.retry_after, "error": str(cause)},
        )
