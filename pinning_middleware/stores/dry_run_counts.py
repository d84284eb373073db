"""
The counts of a dry run, which the processes of a site add up in the cache.

A thread adds what its process has counted every few seconds, so that no read waits for the cache.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from typing import Final

from django.core.cache import caches
from django.db import connections

from pinning_middleware.conf import conf
from pinning_middleware.reasons import Reason
from pinning_middleware.utils.counters import missed_writes, reads
from pinning_middleware.utils.forks import ForkSafeLock
from pinning_middleware.utils.logging import log_rate_limited

__all__ = [
    "MISSED_WRITE",
    "is_shared",
    "is_sharing",
    "of_all_processes",
    "of_this_process",
    "share",
    "start",
]

logger = logging.getLogger("pinning_middleware")

# Seconds between two additions to the cache.
SHARE_EVERY: Final = 5.0
# Seconds after which the counts in the cache begin anew.
KEPT_FOR: Final = 7 * 86_400

# Counted beside the reasons of the reads.
MISSED_WRITE: Final = "missed_write"
_NAMES: Final = (*map(str, Reason), MISSED_WRITE)

_lock = ForkSafeLock()
# What of the counts is in the cache, by the pool's primary and the name.
_shared: Counter[tuple[str, str]] = Counter()
# Whether the thread has been started.
is_sharing = False


def of_this_process(primary: str) -> Counter[str]:
    """Return the reads of this process by reason, and the missed writes under MISSED_WRITE."""
    found: Counter[str] = Counter()
    # Copy, because other threads add reads during the iteration.
    for (pool, _, _, reason), number in reads.copy().items():
        if pool == primary:
            found[str(reason)] += number
    found[MISSED_WRITE] = missed_writes[primary]
    return +found


def of_all_processes(primary: str) -> Counter[str]:
    """Return the same of all processes, of at most a week. Raise what the cache raises."""
    keys = {_key(primary, name): name for name in _NAMES}
    found = {keys[key]: number for key, number in caches[conf.cache].get_many(keys).items()}
    return Counter(found) + _unshared(primary)


def is_shared() -> bool:
    """Return whether the processes of the site share the cache."""
    return type(caches[conf.cache]).__name__ not in ("LocMemCache", "DummyCache")


def share() -> None:
    """Add to the cache what this process has counted since it last did."""
    cache = caches[conf.cache]
    for primary in conf.dry_run:
        for name, number in _unshared(primary).items():
            key = _key(primary, name)
            cache.add(key, 0, KEPT_FOR)
            try:
                cache.incr(key, number)
            except ValueError:
                # It has expired meanwhile.
                cache.set(key, number, KEPT_FOR)
            with _lock:
                _shared[primary, name] += number


def start() -> None:
    """Let a thread share the counts of this process from now on."""
    global is_sharing
    with _lock:
        if is_sharing:
            return
        is_sharing = True
    threading.Thread(target=_share_repeatedly, name="pinning-dry-run", daemon=True).start()


def _unshared(primary: str) -> Counter[str]:
    with _lock:
        shared = Counter({name: _shared[primary, name] for name in _NAMES})
    return of_this_process(primary) - shared


def _key(primary: str, name: str) -> str:
    # Counts under another lag are others.
    return f"pinning-dry-run:{primary}:{conf.dry_run.get(primary)}:{name}"


def _share_repeatedly() -> None:
    while True:
        time.sleep(SHARE_EVERY)
        try:
            share()
        except Exception as error:  # a cache's client may raise anything
            log_rate_limited(
                logger,
                logging.WARNING,
                "dry_run",
                "Could not add the counts of the dry run to the cache %r: %s",
                conf.cache,
                error,
                extra={"cache": conf.cache, "error": str(error)},
            )
        finally:
            # A cache in the database.
            connections.close_all()


def _begin_after_fork() -> None:
    global is_sharing
    # The counters of the child begin at 0, and the thread does not exist there.
    is_sharing = False
    _shared.clear()


os.register_at_fork(after_in_child=_begin_after_fork)
