"""
Background monitoring, so that no request waits for it: retries servers that are out of rotation,
samples replication lag, polls for waiting requests, resolves hidden timelines, and tracks each
write until the replicas have replayed it.

One lazily started daemon thread per alias, with its own connection, so that an unresponsive server
cannot block the others. The thread and its connection end after IDLE_TIMEOUT seconds without work;
no error ends them. If a thread cannot be started, callers wait no longer than their own limit, and
a read of the pool starts it when a retry is overdue.
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
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.liveness import probe_deadline
from pinning_middleware.servers.monitor_tasks import find_sessions, query_replay_waits, retry_hosts
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

T = TypeVar("T")
Work = Literal["resolve", "replay", "sessions", "hosts", "check"]

logger = logging.getLogger("pinning_middleware.servers")

# Seconds between two samples.
SAMPLE_INTERVAL = 1.0
# Maximum seconds between two samples from which a lag is computed.
MAX_SAMPLE_GAP = 5.0
# Seconds without work after which a monitor ends.
IDLE_TIMEOUT = 5.0
# Seconds that a monitor goes on with what it was last requested to sample or to track.
WORK_LASTS = 10.0
# Seconds between two probes while a request waits: the first pause, doubled up to the second.
FIRST_PAUSE, MAX_PAUSE = 0.001, 0.02
# Seconds between two searches for the sessions of slow reads.
SESSION_SEARCH_INTERVAL = 0.25
# Seconds that the connection is kept after a search, because a server may stop accepting
# connections while its sessions run.
AFTER_SLOW_READ = 60.0
# Seconds after a write until its replicas are probed: a healthy one has replayed it by then.
TRACK_AFTER = 0.005
# Seconds until the next probe, doubled up to SAMPLE_INTERVAL.
TRACK_INTERVAL = 0.1
# Seconds for which retries stay as frequent after another replica has returned: failures that began
# together often end together.
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
        # The newest position that was written, and the one for which the replica is probed until it
        # has reached it. Monotonic times of the next probe and of the last one.
        self._written: Position | None = None
        self._tracked: Position | None = None
        self._track_at = self._track_until = 0.0
        self._track_pause = TRACK_INTERVAL
        # The pause between two attempts while no other replica is left.
        self._retry_pause = LAST_REPLICA_RETRY_INTERVAL
        # Last monotonic time at which no replica was in rotation.
        self._none_left_at = -math.inf
        self._last_check = self._last_search = self._last_hosts = 0.0
        self._busy_until = time.monotonic() + IDLE_TIMEOUT
        self._connections: dict[str, BaseDatabaseWrapper] = {}
        # The server that a new connection of the primary's alias has reached lately.
        self._reopened_to: Server | None = None

    @property
    def _endpoint(self) -> Endpoint:
        return registry.endpoint(self.alias, self.primary)

    def start(self) -> None:
        """Start the thread. Raise RuntimeError if the system cannot."""
        # threading.Thread begins with the caller's context on free-threaded builds.
        _thread.start_new_thread(self._run, ())

    # Called from other threads

    def schedule(self, sampling: bool = False, resolving: bool = False) -> bool:
        """
        Wake the monitor: to sample for a while, to resolve a timeline, or for the work that is
        noted on its endpoint. Return False if it is shutting down and did not accept that.
        """
        with self.condition:
            if self.is_stopping:
                return False
            self._stay_for(IDLE_TIMEOUT)
            if sampling:
                self._sampling_until = time.monotonic() + WORK_LASTS
            self._resolving = self._resolving or resolving
            self.condition.notify_all()
        return True

    def track(self, position: Position, is_new: bool) -> bool:
        """
        Probe the replica until it has reached a position, written just now if ``is_new``. Return
        False if the monitor is shutting down.
        """
        with self.condition:
            if self.is_stopping:
                return False
            now = time.monotonic()
            has_expired, self._track_until = now >= self._track_until, now + WORK_LASTS
            self._stay_for(IDLE_TIMEOUT)
            if is_new:
                self._written = position
            if self._tracked is None or has_expired:
                self._tracked, self._track_pause = position, TRACK_INTERVAL
                self._track_at = max(now + TRACK_AFTER, self._last_check + TRACK_INTERVAL)
                self.condition.notify_all()
        return True

    def change_waiters(self, by: int) -> bool:
        """
        Change the number of callers that wait for each probe. Return False if the monitor is
        shutting down.
        """
        with self.condition:
            if self.is_stopping:
                return False
            self._waiters += by
            self._stay_for(IDLE_TIMEOUT)
            self.condition.notify_all()
        return True

    def request_stop(self) -> None:
        """Stop after the work that is under way."""
        with self.condition:
            self.is_stopping = True
            self.condition.notify_all()

    def _stay_for(self, seconds: float) -> None:
        self._busy_until = max(self._busy_until, time.monotonic() + seconds)

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
                self._last_search = time.monotonic()
                find_sessions(self._endpoint, self._attempt)
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
                "Monitoring of %s failed and is resumed: %r",
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
        """Return the next work when it is due, or None if the monitor must stop."""
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
            self._stay_for(AFTER_SLOW_READ)
            work.append((self._last_search + SESSION_SEARCH_INTERVAL, "sessions"))
        if endpoint.unresponsive_hosts:
            self._stay_for(IDLE_TIMEOUT)
            work.append((self._last_hosts + SAMPLE_INTERVAL, "hosts"))
        if (due := self._next_check(now, pause)) is not None:
            work.append((due, "check"))
        return work

    def _next_check(self, now: float, pause: float) -> float | None:
        """Return the monotonic time of the next check, or None if none is needed."""
        times = []
        if self._waiters:
            times.append(self._last_check + pause)
        if now < self._sampling_until:
            times.append(self._last_check + SAMPLE_INTERVAL)
        endpoint = self._endpoint
        if endpoint.out_of_rotation:
            is_urgent = self._is_urgent(endpoint)
            interval = self._retry_pause * endpoint.jitter if is_urgent else SAMPLE_INTERVAL
            times.append(min(endpoint.retry_at, self._last_check + interval))
            self._stay_for(IDLE_TIMEOUT)
        elif self._tracked is not None and now < self._track_until:
            times.append(self._track_at)
        return min(times) if times else None

    def _check(self) -> None:
        """Probe the server, measure its lag, and update its rotation status."""
        endpoint = self._endpoint
        self._track_at = time.monotonic() + self._track_pause
        # A failed endpoint stays out of rotation for its time even if it answers now.
        is_early = endpoint.is_down and endpoint.retry_at > time.monotonic()
        is_trial = is_early and not self._is_urgent(endpoint)
        # A replica that is only tracked may be taken out meanwhile. It must not return before its
        # retry is due.
        is_sampling = time.monotonic() < self._sampling_until
        only_tracks = not (self._waiters or is_sampling or endpoint.out_of_rotation)
        server = self._probe(self.alias, is_trial or only_tracks)
        if server is not None:
            self._check_tracked(server)
        if only_tracks and server is None and not endpoint.out_of_rotation:
            server = self._probe(self.alias)
        elif only_tracks:
            self._last_check = time.monotonic()
            return
        is_reachable = server is not None or self._can_connect(endpoint, is_trial)
        self._last_check = time.monotonic()
        if is_trial:
            endpoint.is_reachable_again = is_reachable
        elif server is not None:
            if is_sampling or endpoint.out_of_rotation:
                measure_lag(server, self.primary)
                if server.lag and not endpoint.out_of_rotation:
                    server = self._measure_again(server)
            if server.replay_waits:
                connection = self._connection_to(self.alias)
                server.replay_waits = query_replay_waits(connection, self._attempt)
            self.update_status(endpoint, server)
        is_out = bool(endpoint.out_of_rotation)
        if is_out and self._is_urgent(endpoint):
            self._retry_pause = min(2 * self._retry_pause, LAST_REPLICA_MAX_INTERVAL)
        else:
            self._retry_pause = LAST_REPLICA_RETRY_INTERVAL
        if is_out and not is_trial and endpoint.retry_at <= self._last_check:
            registry.schedule_retry(endpoint, _retry_interval(endpoint))

    def _is_urgent(self, endpoint: Endpoint) -> bool:
        """Return whether no other replica is left, or none was until a moment ago."""
        now = time.monotonic()
        if _all_replicas_are_out(endpoint):
            self._none_left_at = now
        return now - self._none_left_at < URGENT_FOR

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
            server.replay_waits = query_replay_waits(connection, self._attempt)
            self.update_status(endpoint, server)

    def _check_tracked(self, server: Server) -> None:
        """Record what a replica has reached of what was written lately."""
        dialect = dialect_for(self._connection_to(self.alias))
        if dialect is None:
            return

        def reached(position: Position) -> bool:
            return dialect.reached(position, server.position)

        tracked = self._tracked
        is_hidden = server.timeline_hidden and tracked is not None and not reached(tracked)
        if is_hidden and tracked and server.reported_at_least(tracked.points):
            # Resolved between two reports of the primary: that of the write, and this one.
            self._probe(self.primary)
        server.catch_up.record_probe(None, reached)
        with self.condition:
            now = time.monotonic()
            if tracked is None:
                return
            if reached(tracked):
                is_newest = self._written is None or reached(self._written)
                self._tracked = None if is_newest else self._written
                self._track_pause = TRACK_INTERVAL
            self._track_at = now + self._track_pause
            if self._tracked is tracked:
                self._track_pause = min(2 * self._track_pause, SAMPLE_INTERVAL)

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
        def attempt() -> Server | None:
            result = self._attempt(lambda connection: probe(connection, is_trial), alias)
            return None if result is None else result.server

        server = attempt()
        if server is None or server is self._reopened_to or alias != self.primary:
            return server
        if _may_be_former(server, registry.endpoint(alias)):
            # A new connection resolves to the present primary, whose positions measure lag.
            self._connection_to(alias).close()
            server = self._reopened_to = attempt()
        return server

    def _can_connect(self, endpoint: Endpoint, is_trial: bool) -> bool:
        """
        Return whether an endpoint without positions accepts connections again, and mark it up
        unless ``is_trial``. Return False for one that has positions, or is in rotation.
        """
        has_positions = conf.positions and dialect_for(self._connection_to(self.alias)) is not None
        if has_positions or not endpoint.out_of_rotation:
            return False
        if not self._attempt(_is_usable_after_reconnect):
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
                "A probe of %s failed: %s",
                alias,
                error,
                extra={"alias": alias, "pool": self.primary, "error": str(error)},
            )
            with contextlib.suppress(Exception):
                connection.close()
        except RuntimeError as error:
            # Raised by pytest-django in a test without database access, and by Python if no thread
            # can be started.
            logger.debug("Could not probe %s: %s", alias, error)
        return None

    def _disconnect(self) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(Exception):
                connection.close()


def _may_be_former(server: Server, endpoint: Endpoint) -> bool:
    """Return whether a server behind the alias of a primary may be a former primary."""
    is_replaced = bool(server.is_replica) or server is not endpoint.server
    return is_replaced and not endpoint.has_several_primaries


def measure_lag(server: Server, primary: str) -> None:
    """
    Set a server's lag (seconds): the age of the primary's newest position that it has reached.

    Set it to None if the lag is unknown.
    """
    server.lag_measured = time.monotonic()
    samples = registry.samples(primary)
    if not samples or not server.is_replica:
        server.lag = None if not samples else 0.0
        return
    newest = next_sample = samples[0][0]
    dialect = dialect_for(connections[primary])
    for at, position in samples:
        # For lag, the reported LSN is enough even if the timeline is hidden.
        if server.reported_at_least(position.points) or (
            dialect is not None and dialect.reached(position, server.position)
        ):
            if next_sample - at <= MAX_SAMPLE_GAP:
                server.lag = newest - at
            else:
                # Samples were paused after the position that it has reached, so only how long it
                # has lacked the one after them is known.
                server.lag = newest - next_sample or None
            return
        next_sample = at
    # If the server is behind the oldest sample, one sample is not enough to estimate the lag.
    server.lag = newest - samples[-1][0] if len(samples) > 1 else None


def _is_usable_after_reconnect(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a new connection can be used, within the deadline of a probe."""
    connection.close()
    connection.ensure_connection()
    if dialect_for(connection) is None:
        # SQLite: there is no server to wait for.
        return connection.is_usable()
    with probe_deadline(connection.connection, state_of(connection)):
        return connection.is_usable()


def _retry_interval(endpoint: Endpoint) -> float:
    """Return the seconds until the next attempt on an endpoint that is out of rotation."""
    if (
        endpoint.out_of_rotation in (Fault.STALE_RESTART, Fault.LAG, Fault.REPLAY_WAITS)
        or endpoint.alias == endpoint.pool
    ):
        return SAMPLE_INTERVAL
    return max(conf.retry_after, LAST_REPLICA_MAX_INTERVAL)


def _all_replicas_are_out(endpoint: Endpoint) -> bool:
    """Return whether every replica of the pool with a weight is out of rotation."""
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


class Monitors:
    """
    The monitors of a pool, one for each alias, which the first work for it starts.

    ``primary`` is the alias of the pool's primary.
    """

    def __init__(self, primary: str, update_status: UpdateStatus) -> None:
        self.primary, self.update_status = primary, update_status

    def wake(self, alias: str) -> None:
        """Wake the monitor of an alias, whose endpoint has work."""
        self._assign(alias, lambda monitor: monitor.schedule())

    def retry_until_up(self, alias: str) -> None:
        """Retry an alias that is out of rotation until it is back."""
        self.wake(alias)
        # A replica whose retry is far off may now be the last one.
        for other in tuple(_monitors.values()):
            if other.primary == self.primary and other.alias != alias:
                with other.condition:
                    other.condition.notify_all()

    def sample_lag(self, aliases: tuple[str, ...]) -> None:
        """Measure the lag of these replicas every second for the next WORK_LASTS seconds."""
        for alias in (self.primary, *aliases):
            self._assign(alias, lambda monitor: monitor.schedule(sampling=True))

    def track(self, position: Position, aliases: tuple[str, ...], *, is_new: bool) -> None:
        """
        Probe these replicas until they have reached a position, so that a later read need not, also
        if the primary has failed. ``is_new``: it was just written.
        """
        for alias in aliases:
            self._assign(alias, lambda monitor: monitor.track(position, is_new))

    def resolve_timeline(self, alias: str) -> None:
        """Resolve the hidden timeline of a replica's position."""
        self._assign(alias, lambda monitor: monitor.schedule(resolving=True))

    def wait_for(self, aliases: tuple[str, ...], seconds: float, condition: Callable[[], T]) -> T:
        """
        Probe replicas repeatedly until ``condition()`` is true, for at most ``seconds``.

        Return its last result. However many callers wait, each replica is probed once for all.
        """
        until = clock.unfrozen() + seconds
        monitors = [
            self._assign(alias, lambda monitor: monitor.change_waiters(1)) for alias in aliases
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
                monitor.change_waiters(-1)

    def _assign(self, alias: str, accepts: Callable[[Monitor], bool]) -> Monitor:
        """Return a monitor that has accepted the work; it does not run if no thread could start."""
        while not accepts(monitor := self._get(alias)):
            pass
        return monitor

    def _get(self, alias: str) -> Monitor:
        monitor = _monitors.get(alias)
        if monitor is not None and not monitor.is_stopping:
            return monitor
        try:
            with _lock:
                monitor = _monitors.get(alias)
                if monitor is None or monitor.is_stopping:
                    monitor = Monitor(alias, self.primary, self.update_status)
                    monitor.start()
                    _monitors[alias] = monitor
        except RuntimeError as error:
            # No thread can be started now. The next request for work tries again. Logged without
            # the lock: a handler may read a database.
            log_rate_limited(
                logger,
                logging.ERROR,
                ("start", alias),
                "Could not start a thread to monitor %s: %s",
                alias,
                error,
                extra={"alias": alias, "pool": self.primary, "error": str(error)},
            )
        assert monitor is not None
        return monitor


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
