"""
Who looks at servers that no request should have to wait for: those that are out, how far each
lags, what a waiting scope needs, what a role without rights is not told.

One lazy daemon thread for each alias that needs looking at, with a connection of its own, so that a
silent node holds up nobody else's; it ends, and so does its connection, when nothing has needed it
for a while. Where threads do not run, nobody waits for one longer than they said, and a replica
whose retry is overdue is simply tried.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf, on_change
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.liveness import clear_deadline, start_deadline
from pinning_middleware.servers.probe import probe, state_of
from pinning_middleware.servers.registry import (
    LAST_REPLICA_RETRY_INTERVAL,
    Endpoint,
    Server,
    registry,
)

__all__ = [
    "Judge",
    "measure_lag",
    "resolve_timeline",
    "retry_until_up",
    "sample_lag",
    "stop",
    "wait_for",
]

T = TypeVar("T")

logger = logging.getLogger("pinning_middleware.servers")

# Seconds: between two samples, after which nobody needs a watcher, and for which one is needed.
SAMPLE_EVERY = 1.0
IDLE = 5.0
NEEDED = 10.0
# Pauses between two questions while somebody waits.
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.02
# Seconds at most that a dating takes until a replica has what its primary had.
DATING = 0.05

# Decides what an answer means for a pool: called with the endpoint and who answered.
Judge = Callable[[Endpoint, Server], None]


class Monitor:
    """Looks at what one alias leads to, as long as there is a reason."""

    def __init__(self, alias: str, primary: str, judge: Judge) -> None:
        self.alias, self.primary, self.judge = alias, primary, judge
        self.changed = threading.Condition()
        self.looks = 0
        self._waiting = 0
        self._sampling_until = 0.0
        self._looked = 0.0
        self._dating = False
        self._busy_until = time.monotonic() + IDLE
        self._connections: dict[str, BaseDatabaseWrapper] = {}
        self.is_over = False
        self.has_ended = threading.Event()

    def start(self) -> None:
        # Not by `Thread.start`, which waits until the thread runs: under uWSGI it may never do.
        _thread.start_new_thread(self._run, ())

    # What others ask of it, from their threads; false: it is leaving, and will not do it

    def schedule(self, sampling: bool = False, dating: bool = False) -> bool:
        with self.changed:
            if self.is_over:
                return False
            now = time.monotonic()
            self._busy_until = now + IDLE
            if sampling:
                self._sampling_until = now + NEEDED
            self._dating = self._dating or dating
            self.changed.notify_all()
        return True

    def add_waiter(self, by: int) -> bool:
        with self.changed:
            if self.is_over:
                return False
            self._waiting += by
            self._busy_until = time.monotonic() + IDLE
            self.changed.notify_all()
        return True

    def end(self) -> None:
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    # Its own thread

    def _run(self) -> None:
        threading.current_thread().name = f"pinning-watcher-{self.alias}"
        pause = FIRST_PAUSE
        try:
            while (due := self._wait_until_due(pause)) is not None:
                if due == "date":
                    self._date()
                else:
                    self._look()
                pause = min(pause * 2, LONGEST_PAUSE) if self._waiting else FIRST_PAUSE
        except Exception:
            logger.exception(
                "Nobody looks at %s any more.",
                self.alias,
                extra={"alias": self.alias, "pool": self.primary},
            )
        finally:
            self.end()
            self._disconnect()
            self.has_ended.set()

    def _wait_until_due(self, pause: float) -> str | None:
        """Return what to do next, when it is time; ``None``: nothing any more."""
        with self.changed:
            while not self.is_over:
                now = time.monotonic()
                if self._dating:
                    self._dating = False
                    return "date"
                at = self._next(now, pause)
                if at is None:
                    if now >= self._busy_until:
                        # Under the lock, so that nobody gives work to one that is leaving.
                        self.is_over = True
                        return None
                    at = self._busy_until
                elif at <= now:
                    return "look"
                self.changed.wait(at - now)
        return None

    def _next(self, now: float, pause: float) -> float | None:
        times = []
        if self._waiting:
            times.append(self._looked + pause)
        if now < self._sampling_until:
            times.append(self._looked + SAMPLE_EVERY)
        endpoint = registry.endpoint(self.alias, self.primary)
        if endpoint.out_of_rotation:
            pause = LAST_REPLICA_RETRY_INTERVAL if _nobody_else_serves(endpoint) else SAMPLE_EVERY
            times.append(min(endpoint.retry_at, self._looked + pause))
            self._busy_until = now + IDLE
        return min(times) if times else None

    def _look(self) -> None:
        endpoint = registry.endpoint(self.alias, self.primary)
        is_trial = _is_early(endpoint)
        server = self._ask(self.alias, is_trial)
        answers = server is not None or self._reaches(endpoint, is_trial)
        self._looked = time.monotonic()
        if is_trial:
            endpoint.is_reachable_again = answers
        elif server is not None:
            measure_lag(server, self.primary)
            if server.lag and not endpoint.out_of_rotation:
                server = self._once_more(server)
            self.judge(endpoint, server)
        if not is_trial and endpoint.out_of_rotation and endpoint.retry_at <= self._looked:
            registry.schedule_retry(endpoint, _pause_of(endpoint))
        with self.changed:
            self.looks += 1
            self.changed.notify_all()

    def _once_more(self, server: Server) -> Server:
        """
        Query one that seems to be behind again, a moment later: samples are a second apart, so one
        that is milliseconds late for the newest would be taken to lag by all of that second.
        """
        with self.changed:
            self.changed.wait(LAST_REPLICA_RETRY_INTERVAL)
        again = self._ask(self.alias)
        if again is None:
            return server
        measure_lag(again, self.primary)
        return again

    def _date(self) -> None:
        """Query the primary, the replica until it has what the primary had, and the primary."""
        before = self._ask(self.primary)
        if before is not None:
            until = time.monotonic() + DATING
            wanted = dict(before.position)
            while (server := self._ask(self.alias)) is not None and server.timeline_hidden:
                if server.reported_at_least(wanted) or time.monotonic() >= until:
                    self._ask(self.primary)
                    break
                time.sleep(FIRST_PAUSE)
        with self.changed:
            self.looks += 1
            self.changed.notify_all()

    def _ask(self, alias: str, is_trial: bool = False) -> Server | None:
        seen = self._try(alias, lambda connection: probe(connection, is_trial))
        return None if seen is None else seen.server

    def _reaches(self, endpoint: Endpoint, is_trial: bool) -> bool:
        """Return whether one that is out, and that nobody may ask how far it is, is there again."""
        tells = conf.positions and dialect_for(self._connection(self.alias)) is not None
        if tells or not endpoint.out_of_rotation or not self._try(self.alias, _answers):
            return False
        if not is_trial:
            registry.mark_up(endpoint)
        return True

    def _connection(self, alias: str) -> BaseDatabaseWrapper:
        connection = self._connections.get(alias)
        if connection is None:
            connection = self._connections[alias] = dedicated_connection(alias)
        return connection

    def _try(self, alias: str, ask: Callable[[BaseDatabaseWrapper], T]) -> T | None:
        connection = self._connection(alias)
        try:
            return ask(connection)
        except (DatabaseError, InterfaceError) as error:
            logger.debug(
                "%s did not answer its watcher: %s",
                alias,
                error,
                extra={"alias": alias, "pool": self.primary, "error": str(error)},
            )
            with contextlib.suppress(Exception):
                connection.close()
        except RuntimeError as error:
            # A test that forbids queries.
            logger.debug("%s may not be asked: %s", alias, error)
        return None

    def _disconnect(self) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(Exception):
                connection.close()


def measure_lag(server: Server, primary: str) -> None:
    """Note for how long a replica has been behind: the age of what it has reached."""
    server.lag_measured = time.monotonic()
    samples = registry.samples(server.system)
    if not samples or not server.is_replica:
        server.lag = None if not samples else 0.0
        return
    newest = samples[0][0]
    dialect = dialect_for(connections[primary])
    for at, position in samples:
        # Of one that hides its timeline, its word will do for this.
        if server.reported_at_least(position) or (
            dialect is not None and dialect.reached(position, server.position)
        ):
            server.lag = newest - at
            return
    # Of one that has not even reached the oldest, a single sample says nothing.
    server.lag = newest - samples[-1][0] if len(samples) > 1 else None


def _answers(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a new connection to a database can be used; the deadline is a question's."""
    connection.close()
    connection.ensure_connection()
    raw = connection.connection
    link = state_of(connection)
    guard = start_deadline(raw, link)
    try:
        return connection.is_usable()
    finally:
        clear_deadline(link, guard)


def _pause_of(endpoint: Endpoint) -> float:
    """Return for how many seconds an endpoint that is out is left alone."""
    if (
        endpoint.out_of_rotation in (Fault.STALE_RESTART, Fault.LAG)
        or endpoint.alias == endpoint.pool
    ):
        return SAMPLE_EVERY
    return max(conf.retry_after, LAST_REPLICA_RETRY_INTERVAL)


def _is_early(endpoint: Endpoint) -> bool:
    """Return whether one that failed is to stay out for now, whatever it answers."""
    return (
        endpoint.out_of_rotation in (Fault.UNREACHABLE, Fault.UNRESPONSIVE)
        and endpoint.retry_at > time.monotonic()
        and not _nobody_else_serves(endpoint)
    )


def _nobody_else_serves(endpoint: Endpoint) -> bool:
    """Return whether every replica of a pool is out, so that the primary has the reads of all."""
    weights = conf.replicas.get(endpoint.pool, {})
    return all(
        mate.out_of_rotation
        for mate in registry.replicas_of(endpoint.pool)
        if weights.get(mate.alias, 1)
    )


_lock = threading.Lock()
_watchers: dict[str, Monitor] = {}
# What a fork left behind: to close it would close the parent's.
_inherited: list[Any] = []


def _watcher(alias: str, primary: str, judge: Judge, accepts: Callable[[Monitor], bool]) -> Monitor:
    """Return the watcher of an alias that has accepted some work."""
    while not accepts(watcher := _running(alias, primary, judge)):
        pass
    return watcher


def _running(alias: str, primary: str, judge: Judge) -> Monitor:
    watcher = _watchers.get(alias)
    if watcher is None or watcher.is_over:
        with _lock:
            watcher = _watchers.get(alias)
            if watcher is None or watcher.is_over:
                watcher = _watchers[alias] = Monitor(alias, primary, judge)
                watcher.start()
    return watcher


def retry_until_up(alias: str, primary: str, judge: Judge) -> None:
    """Look at an alias that is out until it serves again."""
    _watcher(alias, primary, judge, lambda watcher: watcher.schedule())
    # Who waits for a retry far away may be the only one left by now.
    for other in tuple(_watchers.values()):
        if other.primary == primary and other.alias != alias:
            with other.changed:
                other.changed.notify_all()


def sample_lag(primary: str, aliases: tuple[str, ...], judge: Judge) -> None:
    """Measure how far these replicas lag, for the next while."""
    for alias in (primary, *aliases):
        _watcher(alias, primary, judge, lambda watcher: watcher.schedule(sampling=True))


def resolve_timeline(alias: str, primary: str, judge: Judge) -> None:
    """Find out of which timeline a replica's position is that its role may not see."""
    _watcher(alias, primary, judge, lambda watcher: watcher.schedule(dating=True))


def wait_for(
    aliases: tuple[str, ...], primary: str, judge: Judge, seconds: float, over: Callable[[], Any]
) -> Any:
    """
    Have replicas asked again and again until ``over()`` is true, or for so many seconds; return
    what it returned last. However many wait, each replica is asked once for all.
    """
    until = time.monotonic() + seconds
    watchers = [
        _watcher(alias, primary, judge, lambda watcher: watcher.add_waiter(1)) for alias in aliases
    ]
    if not watchers:
        return over()
    try:
        first = watchers[0]
        while not (found := over()) and (left := until - time.monotonic()) > 0:
            with first.changed:
                # With others beside it, one is no more than a pause late.
                first.changed.wait(left if len(watchers) == 1 else min(left, LONGEST_PAUSE))
        return found
    finally:
        for watcher in watchers:
            watcher.add_waiter(-1)


def stop() -> None:
    """End all watchers, and wait a little until their connections are closed."""
    with _lock:
        ended = list(_watchers.values())
        _watchers.clear()
    for watcher in ended:
        watcher.end()
    for watcher in ended:
        watcher.has_ended.wait(2)


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _inherited.extend(_watchers.values())
    _watchers.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


@on_change
def _end() -> None:
    with _lock:
        ended = list(_watchers.values())
        _watchers.clear()
    for watcher in ended:
        watcher.end()
