"""
Background monitoring, so that no request waits for it: retries servers that are out of rotation,
samples replication lag, polls for waiting requests, resolves hidden timelines, and follows writes
until the replicas have them.

One lazily started daemon thread per alias, with its own connection, so that an unresponsive server
cannot block the others. The thread and its connection end after IDLE seconds without work; no error
ends them. If a thread cannot be started, callers wait no longer than their own limit, and a read of
the pool starts it when a retry is overdue.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf, on_change
from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.attention import look_for_sessions, replay_waits, retry_hosts
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.liveness import clear_deadline, start_deadline
from pinning_middleware.servers.probe import probe, state_of
from pinning_middleware.servers.registry import (
    LAST_REPLICA_MAX_INTERVAL,
    LAST_REPLICA_RETRY_INTERVAL,
    Endpoint,
    Server,
    registry,
)
from pinning_middleware.utils import clock
from pinning_middleware.utils.forks import ForkSafeLock
from pinning_middleware.utils.logging import log_rate_limited

__all__ = [
    "UpdateStatus",
    "attend",
    "follow",
    "measure_lag",
    "resolve_timeline",
    "retry_until_up",
    "sample_lag",
    "stop",
    "wait_for",
]

T = TypeVar("T")
Work = Literal["resolve", "replay", "sessions", "hosts", "check"]

logger = logging.getLogger("pinning_middleware.servers")

# Seconds between two samples; without work until a monitor ends; for which a request for samples
# keeps it sampling.
SAMPLE_EVERY = 1.0
IDLE = 5.0
NEEDED = 10.0
# Seconds between two probes while a request waits: the first pause, doubled up to the second.
FIRST_PAUSE, MAX_PAUSE = 0.001, 0.02
# Seconds between two searches for the sessions of slow reads, and for which the connection is kept
# after one, since a server may stop to accept connections while its sessions run.
LOOK_EVERY, AFTER_SLOW_READ = 0.25, 60.0
# Seconds after a write until the replicas are probed for it, which a healthy one has by then;
# until they are probed again, doubled up to SAMPLE_EVERY while they do not have it.
FOLLOW_AFTER, FOLLOW_EVERY = 0.005, 0.1
# Seconds after the return of another replica for which one is retried as if none was left: failures
# that began together often end together.
URGENT_FOR = 2.0
# Seconds that a monitor pauses after an error that is not the database's.
PAUSE_AFTER_ERROR = 0.2
# Maximum seconds to wait for a replica to reach the primary's position while resolving its
# timeline.
RESOLVE_TIMEOUT = 0.05

# Called with an endpoint and the server found there, after each probe. Updates the rotation status.
UpdateStatus = Callable[[Endpoint, Server], None]


class Monitor:
    """Probes the server of one alias in a thread of its own, as long as there is work."""

    def __init__(self, alias: str, primary: str, update_status: UpdateStatus) -> None:
        self.alias, self.primary, self.update_status = alias, primary, update_status
        # Notified when work arrives and after each probe.
        self.condition = threading.Condition()
        self.is_stopping = False
        self.stopped = threading.Event()
        self._waiters = 0
        self._sampling_until = 0.0
        self._resolving = False
        # The newest position that was written, and the one that the replica is probed for until it
        # has reached it; when it is probed next, and until when.
        self._written: Position | None = None
        self._followed: Position | None = None
        self._follow_at = self._follow_until = 0.0
        self._follow_pause = FOLLOW_EVERY
        # The pause between two attempts while no other replica is left.
        self._retry_pause = LAST_REPLICA_RETRY_INTERVAL
        # Monotonic time at which none was left.
        self._none_left_at = -math.inf
        self._last_check = self._last_look = self._last_hosts = 0.0
        self._busy_until = time.monotonic() + IDLE
        self._connections: dict[str, BaseDatabaseWrapper] = {}

    @property
    def _endpoint(self) -> Endpoint:
        return registry.endpoint(self.alias, self.primary)

    def start(self) -> None:
        # threading.Thread begins with the caller's context on free-threaded builds.
        _thread.start_new_thread(self._run, ())

    # Called from other threads. Return False if the monitor is shutting down and did not accept
    # the work.

    def schedule(self, sampling: bool = False, resolving: bool = False) -> bool:
        with self.condition:
            if self.is_stopping:
                return False
            now = time.monotonic()
            self._busy_until = now + IDLE
            if sampling:
                self._sampling_until = now + NEEDED
            self._resolving = self._resolving or resolving
            self.condition.notify_all()
        return True

    def follow(self, position: Position, is_new: bool) -> bool:
        with self.condition:
            if self.is_stopping:
                return False
            now = time.monotonic()
            self._busy_until, self._follow_until = now + IDLE, now + NEEDED
            if is_new:
                self._written = position
            if self._followed is None:
                self._followed, self._follow_pause = position, FOLLOW_EVERY
                self._follow_at = max(now + FOLLOW_AFTER, self._last_check + FOLLOW_EVERY)
                self.condition.notify_all()
        return True

    def add_waiter(self, number: int) -> bool:
        with self.condition:
            if self.is_stopping:
                return False
            self._waiters += number
            self._busy_until = time.monotonic() + IDLE
            self.condition.notify_all()
        return True

    def request_stop(self) -> None:
        with self.condition:
            self.is_stopping = True
            self.condition.notify_all()

    # The monitor's own thread

    def _run(self) -> None:
        threading.current_thread().name = f"pinning-monitor-{self.alias}"
        try:
            while not self.is_stopping:
                try:
                    self._work()
                except Exception as error:
                    # Whatever it is, too many open files for example: without this thread, nothing
                    # retries the server.
                    self._recover(error)
        finally:
            self.request_stop()
            self._disconnect()
            self.stopped.set()

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while (work := self._wait_for_work(pause)) is not None:
            if work == "resolve":
                self._resolve_timeline()
            elif work == "replay":
                self._check_replay()
            elif work == "sessions":
                self._last_look = time.monotonic()
                look_for_sessions(self._endpoint, self._attempt)
            elif work == "hosts":
                retry_hosts(self._endpoint)
                self._last_hosts = time.monotonic()
            else:
                self._check()
            with self.condition:
                self.condition.notify_all()
            pause = min(pause * 2, MAX_PAUSE) if self._waiters else FIRST_PAUSE

    def _recover(self, error: Exception) -> None:
        """Log an error that is not the database's, and pause."""
        with contextlib.suppress(Exception):
            log_rate_limited(
                logger,
                logging.ERROR,
                ("monitor", self.alias),
                "Monitoring of %s failed and goes on: %r",
                self.alias,
                error,
                extra={"alias": self.alias, "pool": self.primary, "error": str(error)},
                exc_info=error,
            )
        self._disconnect()
        until = time.monotonic() + PAUSE_AFTER_ERROR
        with self.condition:
            while not self.is_stopping and (left := until - time.monotonic()) > 0:
                self.condition.wait(left)

    def _wait_for_work(self, pause: float) -> Work | None:
        """Return the next work when it is due, or None if the monitor is to end."""
        with self.condition:
            while not self.is_stopping:
                now = time.monotonic()
                work = self._scheduled(now, pause)
                if not work and now >= self._busy_until:
                    # Set under the lock so that no work is queued on a monitor that is
                    # shutting down.
                    self.is_stopping = True
                    return None
                due, next_work = min(work, default=(self._busy_until, None))
                if next_work is not None and due <= now:
                    return next_work
                self.condition.wait(due - now)
        return None

    def _scheduled(self, now: float, pause: float) -> list[tuple[float, Work]]:
        """Return what there is to do, and the monotonic time when each is due."""
        endpoint, work = self._endpoint, list[tuple[float, Work]]()
        if self._resolving:
            work.append((-math.inf, "resolve"))
        if endpoint.replay_suspected:
            work.append((now, "replay"))
        if endpoint.slow_sessions:
            self._busy_until = now + AFTER_SLOW_READ
            work.append((self._last_look + LOOK_EVERY, "sessions"))
        if endpoint.unresponsive_hosts:
            self._busy_until = now + IDLE
            work.append((self._last_hosts + SAMPLE_EVERY, "hosts"))
        if (due := self._next_check(now, pause)) is not None:
            work.append((due, "check"))
        return work

    def _next_check(self, now: float, pause: float) -> float | None:
        """Return the monotonic time of the next check, or None if none is needed."""
        times = []
        if self._waiters:
            times.append(self._last_check + pause)
        if now < self._sampling_until:
            times.append(self._last_check + SAMPLE_EVERY)
        endpoint = self._endpoint
        if endpoint.out_of_rotation:
            is_urgent = self._is_urgent(endpoint)
            interval = self._retry_pause * endpoint.jitter if is_urgent else SAMPLE_EVERY
            times.append(min(endpoint.retry_at, self._last_check + interval))
            self._busy_until = now + IDLE
        elif self._followed is not None and now < self._follow_until:
            times.append(self._follow_at)
        return min(times) if times else None

    def _check(self) -> None:
        """Probe the server, measure its lag, and update its rotation status."""
        endpoint = registry.endpoint(self.alias, self.primary)
        self._follow_at = time.monotonic() + self._follow_pause
        # A failed endpoint stays out of rotation for its time even if it answers now.
        is_early = endpoint.is_down and endpoint.retry_at > time.monotonic()
        is_trial = is_early and not self._is_urgent(endpoint)
        # If a replica that is only followed is taken out meanwhile, it is not to return before its
        # retry is due.
        only_follows = not (self._waiters or self._is_sampling() or endpoint.out_of_rotation)
        server = self._probe(self.alias, is_trial or only_follows)
        if server is not None:
            self._check_followed(server)
        if only_follows and server is None and not endpoint.out_of_rotation:
            server = self._probe(self.alias)
        elif only_follows:
            self._last_check = time.monotonic()
            return
        is_reachable = server is not None or self._can_connect(endpoint, is_trial)
        self._last_check = time.monotonic()
        if is_trial:
            endpoint.is_reachable_again = is_reachable
        elif server is not None:
            if self._is_sampling() or endpoint.out_of_rotation:
                measure_lag(server, self.primary)
                if server.lag and not endpoint.out_of_rotation:
                    server = self._measure_again(server)
            if server.replay_waits:
                connection = self._connection_to(self.alias)
                server.replay_waits = replay_waits(connection, self._attempt)
            self.update_status(endpoint, server)
        if not endpoint.out_of_rotation:
            self._retry_pause = LAST_REPLICA_RETRY_INTERVAL
            return
        if self._is_urgent(endpoint):
            self._retry_pause = min(2 * self._retry_pause, LAST_REPLICA_MAX_INTERVAL)
        else:
            self._retry_pause = LAST_REPLICA_RETRY_INTERVAL
        if not is_trial and endpoint.retry_at <= self._last_check:
            registry.schedule_retry(endpoint, _retry_interval(endpoint))

    def _is_urgent(self, endpoint: Endpoint) -> bool:
        """Return whether no other replica is left, or none was until a moment ago."""
        now = time.monotonic()
        if _all_replicas_are_out(endpoint):
            self._none_left_at = now
        return now - self._none_left_at < URGENT_FOR

    def _is_sampling(self) -> bool:
        return time.monotonic() < self._sampling_until

    def _measure_again(self, server: Server) -> Server:
        """
        Probe a replica that seems to lag once more, a moment later. Samples are a second apart, so
        a replica that misses the newest by milliseconds would appear to lag by that second.
        """
        with self.condition:
            self.condition.wait(LAST_REPLICA_RETRY_INTERVAL)
        again = self._probe(self.alias)
        if again is None:
            return server
        measure_lag(again, self.primary)
        return again

    def _check_replay(self) -> None:
        """Find out whether the replay of the server waits for a lock."""
        endpoint = self._endpoint
        endpoint.replay_suspected = False
        if (server := self._probe(self.alias)) is not None:
            connection = self._connection_to(self.alias)
            server.replay_waits = replay_waits(connection, self._attempt)
            self.update_status(endpoint, server)

    def _check_followed(self, server: Server) -> None:
        """Record what a replica has reached of what was written lately."""
        dialect = dialect_for(self._connection_to(self.alias))
        if dialect is None:
            return

        def reached(position: Position) -> bool:
            return dialect.reached(position, server.position)

        followed = self._followed
        is_hidden = server.timeline_hidden and followed is not None and not reached(followed)
        if is_hidden and followed and server.reported_at_least(followed.points):
            # Resolved between two reports of the primary: that of the write, and this one.
            self._probe(self.primary)
        server.catch_up.record_probe(None, reached)
        with self.condition:
            now = time.monotonic()
            if followed is None:
                return
            if reached(followed):
                is_newest = self._written is None or reached(self._written)
                self._followed = None if is_newest else self._written
                self._follow_pause = FOLLOW_EVERY
            self._follow_at = now + self._follow_pause
            if self._followed is followed:
                self._follow_pause = min(2 * self._follow_pause, SAMPLE_EVERY)

    def _resolve_timeline(self) -> None:
        """Probe the primary, the replica until it has caught up, and the primary again."""
        self._resolving = False
        before = self._probe(self.primary)
        if before is None:
            return
        until = time.monotonic() + RESOLVE_TIMEOUT
        wanted = before.position
        while (server := self._probe(self.alias)) is not None and server.timeline_hidden:
            if server.reported_at_least(wanted) or time.monotonic() >= until:
                self._probe(self.primary)
                break
            time.sleep(FIRST_PAUSE)

    def _probe(self, alias: str, is_trial: bool = False) -> Server | None:
        result = self._attempt(lambda connection: probe(connection, is_trial), alias)
        return None if result is None else result.server

    def _can_connect(self, endpoint: Endpoint, is_trial: bool) -> bool:
        """Check an endpoint that is out of rotation and has no positions to probe."""
        has_positions = conf.positions and dialect_for(self._connection_to(self.alias)) is not None
        if has_positions or not endpoint.out_of_rotation:
            return False
        if not self._attempt(_is_usable_anew):
            return False
        if not is_trial:
            registry.mark_up(endpoint)
        return True

    def _connection_to(self, alias: str) -> BaseDatabaseWrapper:
        connection = self._connections.get(alias)
        if connection is None:
            connection = self._connections[alias] = dedicated_connection(alias)
        return connection

    def _attempt(self, operation: Callable[[BaseDatabaseWrapper], T], alias: str = "") -> T | None:
        """
        Return what an operation returns on the monitor's connection to an alias (its own by
        default), or None if the server cannot be reached.
        """
        alias = alias or self.alias
        connection = self._connection_to(alias)
        try:
            return operation(connection)
        except (DatabaseError, InterfaceError) as error:
            logger.debug(
                "%s did not answer a probe: %s",
                alias,
                error,
                extra={"alias": alias, "pool": self.primary, "error": str(error)},
            )
            with contextlib.suppress(Exception):
                connection.close()
        except RuntimeError as error:
            # Raised in tests that forbid queries.
            logger.debug("Probes of %s are forbidden: %s", alias, error)
        return None

    def _disconnect(self) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(Exception):
                connection.close()


def measure_lag(server: Server, primary: str) -> None:
    """
    Set a server's lag (seconds): the age of the primary's newest position that it has reached.

    Set it to None if the lag is unknown.
    """
    server.lag_measured = time.monotonic()
    samples = registry.samples(server.system)
    if not samples or not server.is_replica:
        server.lag = None if not samples else 0.0
        return
    newest = samples[0][0]
    dialect = dialect_for(connections[primary])
    for at, position in samples:
        # For lag, the reported LSN is enough even if the timeline is hidden.
        if server.reported_at_least(position.points) or (
            dialect is not None and dialect.reached(position, server.position)
        ):
            server.lag = newest - at
            return
    # If the server is behind the oldest sample, one sample is not enough to estimate the lag.
    server.lag = newest - samples[-1][0] if len(samples) > 1 else None


def _is_usable_anew(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a new connection can be used, within the deadline of a probe."""
    connection.close()
    connection.ensure_connection()
    if dialect_for(connection) is None:
        # SQLite: there is no server to wait for.
        return connection.is_usable()
    state = state_of(connection)
    guard = start_deadline(connection.connection, state)
    try:
        return connection.is_usable()
    finally:
        clear_deadline(state, guard)


def _retry_interval(endpoint: Endpoint) -> float:
    """Return the seconds until the next attempt on an endpoint that is out of rotation."""
    if (
        endpoint.out_of_rotation in (Fault.STALE_RESTART, Fault.LAG, Fault.REPLAY_WAITS)
        or endpoint.alias == endpoint.pool
    ):
        return SAMPLE_EVERY
    return max(conf.retry_after, LAST_REPLICA_MAX_INTERVAL)


def _all_replicas_are_out(endpoint: Endpoint) -> bool:
    """Return whether no replica of the pool is left, so that all reads go to the primary."""
    weights = conf.replicas.get(endpoint.pool, {})
    return all(
        other.out_of_rotation
        for other in registry.replicas_of(endpoint.pool)
        if weights.get(other.alias, 1)
    )


_lock = ForkSafeLock()
_monitors: dict[str, Monitor] = {}
# A forked process keeps its parent's monitors: if they were freed, their connections would be
# closed, which would end the parent's sessions.
_inherited: list[Any] = []


def _assign(
    alias: str, primary: str, update_status: UpdateStatus, accepts: Callable[[Monitor], bool]
) -> Monitor:
    """Return a running monitor of an alias that has accepted the work."""
    while not accepts(monitor := _running_monitor(alias, primary, update_status)):
        pass
    return monitor


def _running_monitor(alias: str, primary: str, update_status: UpdateStatus) -> Monitor:
    monitor = _monitors.get(alias)
    if monitor is None or monitor.is_stopping:
        with _lock:
            monitor = _monitors.get(alias)
            if monitor is None or monitor.is_stopping:
                monitor = Monitor(alias, primary, update_status)
                try:
                    monitor.start()
                except RuntimeError as error:
                    # No thread can be started now. The next request for work tries again.
                    log_rate_limited(
                        logger,
                        logging.ERROR,
                        ("start", alias),
                        "Could not start a thread to monitor %s: %s",
                        alias,
                        error,
                        extra={"alias": alias, "pool": primary, "error": str(error)},
                    )
                else:
                    _monitors[alias] = monitor
    return monitor


def attend(alias: str, primary: str, update_status: UpdateStatus) -> None:
    """Do the work that has been noted on the endpoint of an alias."""
    _assign(alias, primary, update_status, lambda monitor: monitor.schedule())


def retry_until_up(alias: str, primary: str, update_status: UpdateStatus) -> None:
    """Retry an alias that is out of rotation until it is back."""
    _assign(alias, primary, update_status, lambda monitor: monitor.schedule())
    # Wake the pool's other monitors: a replica whose retry is far off may now be the last one.
    for other in tuple(_monitors.values()):
        if other.primary == primary and other.alias != alias:
            with other.condition:
                other.condition.notify_all()


def sample_lag(primary: str, aliases: tuple[str, ...], update_status: UpdateStatus) -> None:
    """Measure the lag of these replicas every second for the next NEEDED seconds."""
    for alias in (primary, *aliases):
        _assign(alias, primary, update_status, lambda monitor: monitor.schedule(sampling=True))


def follow(
    position: Position,
    primary: str,
    aliases: tuple[str, ...],
    update_status: UpdateStatus,
    *,
    is_new: bool,
) -> None:
    """
    Probe these replicas until they have reached a position, so that it is known when a read needs
    it, also if the primary fails. ``is_new``: it was just written. Does no I/O.
    """
    for alias in aliases:
        _assign(alias, primary, update_status, lambda monitor: monitor.follow(position, is_new))


def resolve_timeline(alias: str, primary: str, update_status: UpdateStatus) -> None:
    """Find out to which timeline the position of a replica belongs that hides it."""
    _assign(alias, primary, update_status, lambda monitor: monitor.schedule(resolving=True))


def wait_for(
    aliases: tuple[str, ...],
    primary: str,
    update_status: UpdateStatus,
    seconds: float,
    condition: Callable[[], Any],
) -> Any:
    """
    Probe replicas repeatedly until ``condition()`` is true, for at most ``seconds``.

    Return its last result. However many callers wait, each replica is probed once for all.
    """
    until = clock.unfrozen() + seconds
    monitors = [
        _assign(alias, primary, update_status, lambda monitor: monitor.add_waiter(1))
        for alias in aliases
    ]
    if not monitors:
        return condition()
    try:
        first = monitors[0]
        while not (result := condition()) and (left := until - clock.unfrozen()) > 0:
            with first.condition:
                # The first monitor does not notify of the others' probes.
                first.condition.wait(left if len(monitors) == 1 else min(left, MAX_PAUSE))
        return result
    finally:
        for monitor in monitors:
            monitor.add_waiter(-1)


def stop() -> None:
    """Stop all monitors, and wait at most 2 seconds for each to close its connections."""
    for monitor in _request_stop_of_all():
        monitor.stopped.wait(2)


def _request_stop_of_all() -> list[Monitor]:
    with _lock:
        monitors = list(_monitors.values())
        _monitors.clear()
    for monitor in monitors:
        monitor.request_stop()
    return monitors


@on_change
def _stop_on_changed_settings() -> None:
    _request_stop_of_all()


def _abandon_after_fork() -> None:
    _inherited.extend(_monitors.values())
    _monitors.clear()


os.register_at_fork(after_in_child=_abandon_after_fork)
