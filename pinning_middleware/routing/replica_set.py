"""The replicas of a pool: which one is next, and which have caught up."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial
from typing import ClassVar, Final

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import Position
from pinning_middleware.pool_specs import PoolSpec
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.compatibility import is_interchangeable, is_test_mirror
from pinning_middleware.routing.groups import Rotations
from pinning_middleware.routing.health import Health
from pinning_middleware.routing.rotation import Rotation
from pinning_middleware.servers import monitor
from pinning_middleware.servers.probe import CONNECTION_ERRORS, probing_allowed, state_of
from pinning_middleware.servers.psycopg_pool import close_for_good, fail_waiting_reads
from pinning_middleware.servers.registry import Endpoint, Server, registry
from pinning_middleware.signals import replica_wait_finished
from pinning_middleware.utils import clock
from pinning_middleware.utils.forks import ForkSafeLock
from pinning_middleware.utils.transactions import is_transaction_open

# Seconds that the first read under a `max_lag` waits until a lag has been measured.
FIRST_LAG_TIMEOUT: Final = 0.25
# Seconds for which a measured lag counts.
LAG_VALID_FOR: Final = 3 * monitor.SAMPLE_INTERVAL
# Seconds past ``retry_at`` after which a read starts the monitor of a replica again: its thread may
# have failed to start.
MONITOR_OVERDUE: Final = 5.0
# Maximum number of reconnects to reach another server behind an alias.
MAX_RECONNECTS: Final = 6


class ReplicaSet:
    """
    The replicas of one primary.

    ``rotations`` has one for each group, ``rotation`` is that of the replicas without groups, which
    serve all other reads. ``health`` judges the servers that the aliases resolve to.
    """

    # Set by the test utilities: replicas that lack every recent write, and that are unreachable.
    behind_in_tests: ClassVar[frozenset[str]] = frozenset()
    unreachable_in_tests: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, spec: PoolSpec, health: Health) -> None:
        self.rotations = Rotations(spec)
        self.rotation = self.rotations.default
        self.primary, self.endpoints, self.health = health.primary, health.endpoints, health
        self.monitors = health.monitors
        # The aliases out of rotation; replaced as a whole.
        self.out_of_rotation: frozenset[str] = frozenset()
        self._max_lag = conf.max_lag
        # Begin and end of the period in which reads need lags (monotonic clock).
        self._lag_needed = (0.0, 0.0)
        # Serialises refreshes, so that the most recent status wins.
        self._refreshing = ForkSafeLock()
        self._substitute: tuple[float, str | None] = (0.0, None)
        # The position and the seconds of the last wait that timed out.
        self._last_timeout: tuple[Position, float] | None = None
        registry.listeners.append(self._on_status_change)
        registry.work_listeners.append(self._wake_monitor)
        if self.behind_in_tests or self.unreachable_in_tests:
            self.refresh()

    # Rotation

    def next(
        self, after: str | None = None, key: str | None = None, group: str | None = None
    ) -> str | None:
        """
        Return the next replica, after the one that the caller had, or that of a user's ``key``;
        None if none is usable.
        """
        if self._max_lag is not None:
            self.health.sample_lag()
        rotation = self.rotations.of(group)
        alias = rotation.next(after, key)
        return self._next_of_degraded(rotation, alias) if self.out_of_rotation else alias

    def _next_of_degraded(self, rotation: Rotation, alias: str | None) -> str | None:
        now = time.monotonic()
        for name in self.out_of_rotation:
            endpoint = self.endpoints[name]
            if endpoint.is_down and endpoint.retry_at + MONITOR_OVERDUE < now:
                self.monitors.retry_until_up(name)
        if alias is None and rotation is self.rotation:
            # If all replicas lag, the least lagging one serves unpinned reads: they may be stale,
            # and the primary may not have the capacity for all of them.
            endpoints = [self.endpoints[name] for name in rotation.weights]
            lagging = [e for e in endpoints if e.out_of_rotation is Fault.LAG]
            alias = min(lagging, key=_lag_of).alias if lagging else None
        return alias

    def refresh(self) -> None:
        """Recompute which aliases are out of rotation."""
        with self._refreshing:
            out = {e.alias for e in self.endpoints.values() if e.out_of_rotation}
            out |= self.unreachable_in_tests
            if self._max_lag is not None:
                out |= self.behind_in_tests
            self.out_of_rotation = frozenset(out & self.endpoints.keys())
            self.rotations.exclude(self.out_of_rotation)

    def _on_status_change(self, endpoint: Endpoint) -> None:
        is_primary = endpoint is self.health.endpoint
        if endpoint.alias in self.endpoints:
            self.refresh()
            if endpoint.is_down:
                fail_waiting_reads(endpoint.alias, f"{endpoint.alias} is out of rotation")
        elif not is_primary:
            return
        if endpoint.out_of_rotation:
            if self.rotations.any_exhausted:
                self._readmit_reachable()
            if is_primary:
                # No replica can substitute for it for long.
                registry.schedule_retry(endpoint, monitor.SAMPLE_INTERVAL)
            self.monitors.retry_until_up(endpoint.alias)

    def _wake_monitor(self, endpoint: Endpoint) -> None:
        if endpoint.alias in self.endpoints:
            self.monitors.wake(endpoint.alias)

    def _readmit_reachable(self) -> None:
        """Return reachable replicas to the rotation early: no other replica is left."""
        for endpoint in self.endpoints.values():
            if endpoint.is_reachable_again:
                for server in endpoint.recent_servers:
                    self.health.update_status(endpoint, server)
                registry.mark_up(endpoint)

    def begin_after_fork(self) -> None:
        """In a forked process: randomise the rotation and the retry times, start the monitors."""
        self.rotations.randomise()
        for endpoint in (self.health.endpoint, *self.endpoints.values()):
            # The reads of other threads, which do not exist here.
            endpoint.slow_sessions.clear()
        for endpoint in self.endpoints.values():
            endpoint.draw_jitter()
            if endpoint.out_of_rotation:
                self.monitors.retry_until_up(endpoint.alias)

    # Replicas that have caught up

    def caught_up(
        self, alias: str, wanted: Position, connection: BaseDatabaseWrapper | None = None
    ) -> bool | None:
        """
        Return whether a read would see at least the position, on this connection or else on that
        of the thread; None if unknown.
        """
        endpoint = self.endpoints.get(alias)
        if endpoint is None:
            return alias == self.primary
        if self._is_excluded(endpoint):
            return False
        connection = connection or connections[alias]
        if connection.in_atomic_block or is_transaction_open(connection):
            # Its rows may be as old as the beginning of the transaction.
            snapshot, dialect = getattr(connection, "snapshot", None), self.health.dialect
            return bool(snapshot and dialect and dialect.reached(wanted, snapshot))
        if connection.connection is not None:
            server = state_of(connection).server
            return None if server is None else self._has_reached(server, wanted) or None
        # Without an interchangeable alias a read cannot be retried elsewhere.
        has_reached = self.all_have_reached(alias, wanted)
        return (has_reached and is_interchangeable(self.primary, alias)) or None

    def find_caught_up(
        self, order: tuple[str, ...], wanted: Position, *, probe: bool
    ) -> str | None:
        """
        Return the first of these replicas that is known to have caught up. With ``probe``, probe
        them one after another if none is. Return None if none has.
        """
        for alias in order:
            if self.caught_up(alias, wanted):
                return alias
        if probe:
            for alias in order:
                if self.probe_caught_up(alias, wanted):
                    return alias
        return None

    def probe_caught_up(
        self,
        alias: str,
        wanted: Position,
        connection: BaseDatabaseWrapper | None = None,
        *,
        always: bool = False,
    ) -> bool:
        """
        Probe whether a replica has caught up, on the connection that a read would use.

        One that is known to be behind is not probed by each caller, unless ``always`` is true.
        """
        endpoint = self.endpoints[alias]
        known = endpoint.server
        if self._is_excluded(endpoint) or (known and not known.should_query_position):
            return False
        connection = connection or connections[alias]
        open_on = None if connection.connection is None else state_of(connection).server
        servers = endpoint.recent_servers if open_on is None else [open_on]
        if not probing_allowed(connection):
            return False
        probed: set[Server] = set()
        attempts = MAX_RECONNECTS
        if servers and not (always or self._claim_probe(servers, wanted)):
            others = _other_servers(connection, servers)
            if not any(self._has_reached(other, wanted) for other in others):
                return False
            # It is connected to a server that is known to be behind, and another one is not.
            probed.update(servers)
            attempts = len(others) + len(servers)
            close_for_good(connection)
        for left in reversed(range(attempts)):
            try:
                result = self.health.probe(connection)
            except CONNECTION_ERRORS:
                return False
            if result is None or endpoint.pooler_mixes_servers:
                return False
            server = result.server
            if server.timeline_hidden and not self._has_reached(server, wanted):
                self._resolve(connection, server, wanted)
                if connection.connection is None:
                    # It was lost meanwhile.
                    return False
            server.catch_up.record_probe(wanted, partial(self._has_reached, server))
            if self._has_reached(server, wanted):
                return True
            probed.add(server)
            others = _other_servers(connection, probed)
            if not left or not others or not (always or self._claim_probe(others, wanted)):
                return False
            # A new connection may resolve to one of the others.
            close_for_good(connection)
        return False

    def wait_caught_up(self, wanted: Position, seconds: float) -> str | None:
        """Wait at most ``seconds`` until a replica has caught up; return its alias or None."""
        # In an open transaction the rows stay as they were.
        names = self.rotation.order(fallback=bool(self.health.endpoint.out_of_rotation))
        order = tuple(a for a in names if not connections[a].in_atomic_block)
        if not order or self._would_time_out(order, wanted, seconds):
            return None

        def found() -> str | None:
            for alias in order:
                if self.all_have_reached(alias, wanted):
                    return alias
                if any(_is_unresolved(s, wanted) for s in self.endpoints[alias].recent_servers):
                    self.monitors.resolve_timeline(alias)
            return None

        began = clock.unfrozen()
        alias = self.monitors.wait_for(order, seconds, found)
        if alias is None and not self._would_time_out(order, wanted, seconds):
            self._last_timeout = wanted, seconds
        replica_wait_finished.send_robust(
            self.primary,
            replica=alias,
            seconds=clock.unfrozen() - began,
            reached=alias is not None,
        )
        return alias

    def _would_time_out(self, order: tuple[str, ...], wanted: Position, seconds: float) -> bool:
        """
        Return whether a wait as long, for this position or an older one, has timed out before, and
        no replica has reached that one by now.
        """
        dialect = self.health.dialect
        if self._last_timeout is None or dialect is None:
            return False
        position, waited = self._last_timeout
        if seconds > waited or not dialect.reached(position, wanted.points):
            return False
        return not any(self.all_have_reached(alias, position) for alias in order)

    def _is_excluded(self, endpoint: Endpoint) -> bool:
        is_behind = endpoint.alias in self.behind_in_tests
        return endpoint.pooler_mixes_servers or bool(endpoint.out_of_rotation) or is_behind

    def _has_reached(self, server: Server, wanted: Position) -> bool:
        dialect = self.health.dialect
        if server.out_of_rotation or dialect is None:
            return False
        if server is self.health.endpoint.server and not server.is_replica:
            # The primary has all of an older log, and nothing of that of another primary.
            return not dialect.foreign_points(wanted, server, server.position)
        return dialect.reached(wanted, server.position)

    def all_have_reached(self, alias: str, wanted: Position) -> bool:
        """Return whether all servers behind an alias are known to have reached a position."""
        servers = self.endpoints[alias].recent_servers
        return bool(servers) and all(self._has_reached(server, wanted) for server in servers)

    def _claim_probe(self, servers: Iterable[Server], wanted: Position) -> bool:
        """Return whether any of these servers may be probed for a position now."""
        # One that has caught up is probed to find out that a connection resolves to it.
        claimed = [self._has_reached(s, wanted) or s.catch_up.claim_probe() for s in servers]
        return any(claimed)

    def _resolve(self, connection: BaseDatabaseWrapper, server: Server, wanted: Position) -> None:
        """
        Resolve the hidden timeline of a server's report, by bracketing it between two of the
        primary's. A server that had reached the position, but not all that the primary had by then,
        is probed once more. One that is behind in any case is left alone.
        """
        if not _is_unresolved(server, wanted):
            return
        with suppress(*CONNECTION_ERRORS):
            for is_last in (False, True):
                if not _is_unresolved(server, wanted) or self.health.endpoint.out_of_rotation:
                    break
                self.health.probe(connections[self.primary])
                if self._has_reached(server, wanted):
                    return
                if not is_last:
                    self.health.probe(connection)
        self.monitors.resolve_timeline(connection.alias)

    # Lag

    def lag(self, alias: str) -> float | None:
        """Return how far an alias lags, in seconds; None if unknown."""
        lags = self._lags(alias)
        return None if not lags or None in lags else max(lag for lag in lags if lag is not None)

    def within_lag(
        self, max_lag: float, preferred: str | None, group: str | None = None
    ) -> str | None:
        """Return a replica that lags at most ``max_lag`` seconds, preferably this one, or None."""
        order = self.rotations.of(group).order()
        if preferred in order:
            order = (preferred, *order)
        if any(is_test_mirror(self.primary, alias) for alias in order):
            return next((alias for alias in order if alias not in self.behind_in_tests), None)
        if not self.health.supports_positions:
            return None
        self.health.sample_lag()
        self._wait_for_lag(order)
        for alias in order:
            # Of several servers behind an alias, the one of a connection is judged when it is used.
            if any(lag is not None and lag <= max_lag for lag in self._lags(alias)):
                return alias
        return None

    def _wait_for_lag(self, order: tuple[str, ...]) -> None:
        now = time.monotonic()
        since, until = self._lag_needed
        # If an earlier caller already waited in vain, later callers do not wait.
        since = since if now < until else now
        self._lag_needed = since, now + monitor.WORK_LASTS
        left = since + FIRST_LAG_TIMEOUT - now
        if (
            left > 0
            and not self._is_lag_settled(order)
            and probing_allowed(connections[self.primary])
        ):
            self.monitors.wait_for(order, left, lambda: self._is_lag_settled(order))

    def _is_lag_settled(self, aliases: tuple[str, ...]) -> bool:
        """Return whether there is nothing to wait for: a lag is known, or never will be."""
        if any(self.lag(alias) is not None for alias in aliases):
            return True
        endpoints = [self.endpoints[alias] for alias in aliases]
        return _reports_no_position(self.health.endpoint) or all(
            map(_reports_no_position, endpoints)
        )

    def _lags(self, alias: str) -> list[float | None]:
        endpoint = self.endpoints[alias]
        if endpoint.out_of_rotation not in (None, Fault.LAG) or alias in self.unreachable_in_tests:
            return []
        if alias in self.behind_in_tests:
            return [math.inf]
        servers, oldest = endpoint.recent_servers, time.monotonic() - LAG_VALID_FOR
        measured: list[float | None] = [s.lag for s in servers if s.lag_measured >= oldest]
        # The monitor measures one of several servers; a connection is judged when it is used.
        return measured or [None for _ in servers]

    # While the primary is down

    def substitute(self) -> str | None:
        """Return the freshest replica, determined once a second."""
        now = time.monotonic()
        until, alias = self._substitute
        if now >= until or alias in self.out_of_rotation:
            alias = next(iter(self.freshest_first()), None)
            self._substitute = now + monitor.SAMPLE_INTERVAL, alias
        return alias

    def freshest_first(self) -> list[str]:
        """Probe the reachable replicas and return them, the one that has replayed most first."""
        serving = (None, Fault.LAG)
        replicas = [self.endpoints[alias] for alias in self.rotation.weights]
        usable = [e for e in replicas if e.out_of_rotation in serving]
        for endpoint in usable:
            with suppress(DatabaseError, InterfaceError):
                self.health.probe(connections[endpoint.alias])
        usable = [e for e in usable if e.out_of_rotation in serving]
        return [e.alias for e in sorted(usable, key=_replayed, reverse=True)]


def _is_unresolved(server: Server, wanted: Position) -> bool:
    """Return whether a server has reached a position if that is on the timeline that it hides."""
    return server.timeline_hidden and server.reported_at_least(wanted.points)


def _reports_no_position(endpoint: Endpoint) -> bool:
    servers = endpoint.recent_servers
    return bool(servers) and all(server.reports_position is False for server in servers)


def _lag_of(endpoint: Endpoint) -> float:
    return max((server.lag or 0.0 for server in endpoint.recent_servers), default=0.0)


def _replayed(endpoint: Endpoint) -> int:
    return max((server.replayed_offset for server in endpoint.recent_servers), default=0)


def _other_servers(connection: BaseDatabaseWrapper, known: Collection[Server]) -> list[Server]:
    """
    Return the other servers that a new connection of the same alias may resolve to, none if the
    present connection must not be closed.
    """
    if connection.connection is None:
        return []
    state = state_of(connection)
    if state.session_modified or state.has_open_iterator:
        return []
    recent = state.endpoint.recent_servers
    return [s for s in recent if s not in known and not s.out_of_rotation]
