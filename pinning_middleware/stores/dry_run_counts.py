"""
The counts of a dry run, which the processes of a site flush to the cache.

Each process has a key for each day, which only it writes, so that no count is lost on a cache that
cannot add atomically. An index for each day lists the processes. If two processes enter it at the
same instant, one of them is missing until it flushes again.

A thread flushes every few seconds and at the exit of the process, so that no read waits for the
cache.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from django.core.cache import caches
from django.core.cache.backends.dummy import DummyCache
from django.core.cache.backends.locmem import LocMemCache
from django.db import connections

from pinning_middleware.conf import conf
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import missed_writes, reads
from pinning_middleware.utils.forks import ForkSafeLock
from pinning_middleware.utils.logging import log_rate_limited

logger = logging.getLogger("pinning_middleware")

# Seconds between two flushes.
FLUSH_INTERVAL: Final = 5.0
# Seconds that the exit of a process waits for the last flush.
EXIT_TIMEOUT: Final = 2.0
# How many days are reported, today included; the keys expire when they no longer are (seconds).
DAYS: Final = 7
KEY_TIMEOUT: Final = DAYS * 86_400

# Counted beside the reasons of the reads.
MISSED_WRITE: Final = "missed_write"

# Set by the app: the context in which the cache is used. The queries of one in a database are not
# those of the site.
cache_context: Callable[[], AbstractContextManager[None]] = nullcontext


class Progress:
    """
    What of the counts of this process is in the cache, by the pool's primary. ``flushed``: all of
    it; ``earlier``: what belongs to the days before ``day``.
    """

    def __init__(self) -> None:
        self.process = secrets.token_hex(8)
        self.day = 0
        self.earlier: dict[str, Counter[str]] = {}
        self.flushed: dict[str, Counter[str]] = {}

    def begin(self, day: int) -> None:
        """Let what is flushed from now on belong to this day."""
        if day != self.day:
            self.day, self.earlier = day, self.flushed

    def of_day(self, primary: str, day: int) -> Counter[str]:
        """Return what this process has counted on a day, today."""
        earlier = self.earlier if day == self.day else self.flushed
        return of_this_process(primary) - earlier.get(primary, Counter())


_progress = Progress()
_lock = ForkSafeLock()
# The thread that flushes, and what ends it.
_thread: tuple[threading.Thread, threading.Event] | None = None
has_thread = False


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
    """Return the same of all processes, of the last days. Raise what the cache raises."""
    today, process = _today(), _progress.process
    with cache_context():
        cache = caches[conf.cache]
        index_keys = {_index_key(day): day for day in range(today - DAYS + 1, today + 1)}
        keys = [
            _key(index_keys[index_key], each)
            for index_key, processes in cache.get_many(index_keys).items()
            for each in processes
            if (index_keys[index_key], each) != (today, process)
        ]
        rows = cache.get_many(keys)
    found = _progress.of_day(primary, today)
    for row in rows.values():
        found.update(row.get(_pool_name(primary), {}))
    return found


def is_cache_shared() -> bool:
    """Return whether the processes of the site share the cache."""
    return not isinstance(caches[conf.cache], (LocMemCache, DummyCache))


def flush() -> None:
    """Write what this process has counted today to the cache, if it has counted anything."""
    today, process = _today(), _progress.process
    total = {primary: of_this_process(primary) for primary in conf.dry_run}
    if total == _progress.flushed or not any(total.values()):
        return
    _progress.begin(today)
    row = {
        _pool_name(primary): dict(counts - _progress.earlier.get(primary, Counter()))
        for primary, counts in total.items()
    }
    with cache_context():
        cache, index_key = caches[conf.cache], _index_key(today)
        processes = cache.get(index_key, [])
        if process not in processes:
            cache.set(index_key, [*processes, process], KEY_TIMEOUT)
        cache.set(_key(today, process), row, KEY_TIMEOUT)
    _progress.flushed = total


def start() -> None:
    """Let a thread flush the counts of this process from now on."""
    global _thread, has_thread
    with _lock:
        if has_thread:
            return
        has_thread = True
        end = threading.Event()
        thread = threading.Thread(
            target=_flush_repeatedly, args=[end], name="pinning-dry-run", daemon=True
        )
        _thread = thread, end
        try:
            thread.start()
        except RuntimeError:
            # No thread can be started now; a later read tries again.
            _thread, has_thread = None, False


def _today() -> int:
    return int(clock.now() // 86_400)


def _index_key(day: int) -> str:
    return f"pinning-dry-run:{day}"


def _key(day: int, process: str) -> str:
    return f"pinning-dry-run:{day}:{process}"


def _pool_name(primary: str) -> str:
    # Counts under another lag are others.
    return f"{primary}:{conf.dry_run.get(primary)}"


def _flush_repeatedly(end: threading.Event) -> None:
    while True:
        is_last = end.wait(FLUSH_INTERVAL)
        try:
            flush()
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
        if is_last:
            return


def _flush_at_exit() -> None:
    if _thread is not None:
        thread, end = _thread
        end.set()
        thread.join(EXIT_TIMEOUT)


def _begin_after_fork() -> None:
    global _progress, _thread, has_thread
    # The counters of the child begin at 0, and the thread does not exist there.
    _progress, _thread, has_thread = Progress(), None, False


atexit.register(_flush_at_exit)
os.register_at_fork(after_in_child=_begin_after_fork)
