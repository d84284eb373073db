"""
The servers of one pool, as far as they are known: who has a position, how far each lags, who is in
the rotation and who is out.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import ClassVar, Final

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import PoolSpec, conf
from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.compatibility import is_interchangeable
from pinning_middleware.routing.mirrors import Mirrors
from pinning_middleware.routing.rotation import Rotation
from pinning_middleware.servers import monitor
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import (
    CONNECTION_ERRORS,
    ProbeResult,
    probe,
    probing_allowed,
    state_of,
)
from pinning_middleware.servers.registry import Endpoint, Server, registry
from pinning_middleware.utils.logging import log_rate_limited

__all__ = ["Nodes"]

logger = logging.getLogger("pinning_middleware.pins")

# Seconds: how long a first `max_lag` waits for an answer; by how much a retry may be late before a
# request tries itself.
FIRST_LAG: Final = 0.25
# How often a connection is made anew for the sake of another server of its endpoint.
MOST_TRIES: Final = 6
OVERDUE: Final = 5.0


class Nodes:
    """One primary and its replicas, and what is known of the servers that they lead to."""

    # Whether it is a pool of the settings, and not of the older interface alone.
    is_shared = True
    # What tests say of replicas, whatever they really do: these have nothing that was written
    # lately, and these can't be reached.
    held_back: ClassVar[frozenset[str]] = frozenset()
    cut_off: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, spec: PoolSpec) -> None:
        self.key = spec.key
        self.primary = spec.primary
        self.rotation = Rotation(spec.weights)
        self.replicas = tuple(spec.weights)
        self.dialect = dialect_for(connections[spec.primary])
        self.endpoint = registry.endpoint(spec.primary)
        self.endpoints = {alias: registry.endpoint(alias, spec.primary) for alias in self.replicas}
        # The aliases out of the rotation; replaced as a whole.
        self.out: frozenset[str] = frozenset()
        self.is_mirror = Mirrors(spec.primary)
        # Aliases of several hosts.
        self._lists = {a for a in self.replicas if "," in str(connections.settings[a]["HOST"])}
        self._max_lag = conf.max_lag
        self._sample_at = 0.0
        # Since when, and until when, it is wanted to know lags that no setting limits.
        self._lag_wanted = (0.0, 0.0)
        # Two who count at once: the later look has the last word.
        self._counting = threading.Lock()
        self._stand_in: tuple[float, str | None] = (0.0, None)
        registry.listeners.append(self._recount)
        if self.cut_off or self.held_back:
            self.count()

    def __contains__(self, alias: str | None) -> bool:
        """Return whether an instance of this database is of the pool; a new one may be."""
        return alias is None or alias == self.primary or alias in self.endpoints

    @property
    def supports_positions(self) -> bool:
        """Whether this pool's database may say where it is."""
        return self.dialect is not None and bool(self.dialect.strategies(conf.positions))

    # Who has what

    def has(self, alias: str, wanted: Position) -> bool | None:
        """Return whether a read of this thread would meet the position; ``None``: not known."""
        endpoint = self.endpoints.get(alias)
        if endpoint is None:
            return alias == self.primary
        if endpoint.pooler_mixes_servers or endpoint.out_of_rotation or alias in self.held_back:
            return False
        connection = connections[alias]
        if connection.in_atomic_block:
            # Its rows stay as they were when that began.
            return False
        servers: Iterable[Server]
        if connection.connection is not None:
            server = state_of(connection).server
            if server is None:
                return None
            servers = (server,)
        else:
            servers = endpoint.recent_servers
            if not servers or not is_interchangeable(self.primary, alias):
                # Where no other alias is the same, a read can't be moved once it is there.
                return None
        return all(self._reached(server, wanted) for server in servers) or None

    def _reached(self, server: Server, wanted: Position) -> bool:
        if server.out_of_rotation or self.dialect is None:
            return False
        if server is self.endpoint.server and not server.is_replica:
            return True
        return self.dialect.reached(wanted, server.position)

    def holder(self, wanted: Position, ask: bool) -> str | None:
        """Return a replica that has a position; where none is known to, ask each in turn."""
        order = self.rotation.order()
        for alias in order:
            if self.has(alias, wanted):
                return alias
        if ask:
            for alias in order:
                if self.asked_has(alias, wanted):
                    return alias
        return None

    def asked_has(self, alias: str, wanted: Position) -> bool:
        """Query a replica whether it has a position, on the connection that a read would use."""
        endpoint = self.endpoints[alias]
        known = endpoint.server
        if endpoint.pooler_mixes_servers or endpoint.out_of_rotation or alias in self.held_back:
            return False
        if known is not None and known.reports_position is False:
            return False
        connection = connections[alias]
        met: set[Server] = set()
        for _ in range(MOST_TRIES):
            try:
                seen = self.look_at(connection)
            except CONNECTION_ERRORS:
                return False
            if seen is None or endpoint.pooler_mixes_servers:
                return False
            if self._reached(seen.server, wanted):
                return True
            if seen.server.timeline_hidden and self._dated(alias, seen.server, wanted):
                return True
            met.add(seen.server)
            others = [
                each
                for each in endpoint.recent_servers
                if each not in met and not each.out_of_rotation
            ]
            if not others or state_of(connection).session_modified:
                return False
            # Another connection of this alias may lead to one of them.
            connection.close()
        return False

    def _dated(self, alias: str, server: Server, wanted: Position) -> bool:
        """
        Return whether a server has a position whose timeline its role may not see. Its own word
        has to be there; then the primary's answer names the timeline, which costs the primary
        less than the read that it would have instead. One that had the position, but not all that
        the primary had by then, is asked once more: it has moved on since.
        """
        with suppress(*CONNECTION_ERRORS):
            for is_last in (False, True):
                if not server.reported_at_least(wanted) or self.endpoint.out_of_rotation:
                    break
                self.look_at(connections[self.primary])
                if self._reached(server, wanted):
                    return True
                if not is_last:
                    self.look_at(connections[alias])
        monitor.resolve_timeline(alias, self.primary, self.judge)
        return False

    def look_at(self, connection: BaseDatabaseWrapper) -> ProbeResult | None:
        """Query the server of a connection, and judge it. Raises what ``probe`` raises."""
        seen = probe(connection)
        if seen is not None:
            self.judge(registry.endpoint(connection.alias, self.primary), seen.server)
        return seen

    def judge(self, endpoint: Endpoint, server: Server) -> None:
        """Take a server out that is of no use to this pool, or back."""
        reason = "" if endpoint is self.endpoint else self._fault(server)
        if reason != server.out_of_rotation:
            registry.set_status(server, reason, _pause(reason))
        elif not reason:
            registry.mark_up(endpoint)

    def is_back(self, connection: BaseDatabaseWrapper, server: Server) -> bool:
        """
        Query a server that is out, and that others serve beside: its alias is not, so that no
        watcher looks for it. One read does, when its time has come.
        """
        now = time.monotonic()
        if (
            registry.endpoint(connection.alias, self.primary).out_of_rotation
            or now < server.retry_at
        ):
            return False
        server.retry_at = now + _pause(server.out_of_rotation)
        with suppress(*CONNECTION_ERRORS):
            found = self.measured_at(connection)
            return found is not None and not found.out_of_rotation
        return False

    def is_only(self, link: ConnectionState, is_certain: bool) -> bool:
        """
        Return whether who answers there is the one server that its alias's watcher meets, for
        certain or as far as is known without a question.
        """
        servers = link.endpoint.servers
        if link.server is None:
            return not is_certain and len(servers) < 2 and link.alias not in self._lists
        return [*servers] == [link.server]

    def measured_at(self, connection: BaseDatabaseWrapper) -> Server | None:
        """Find out how far the server of a connection lags, ``None`` where it can't be asked."""
        seen = self.look_at(connection)
        if seen is None:
            return None
        if not self.is_only(state_of(connection), True):
            monitor.measure_lag(seen.server, self.primary)
            self.judge(registry.endpoint(connection.alias, self.primary), seen.server)
        return seen.server

    def lags(self, connection: BaseDatabaseWrapper, max_lag: float | None) -> str:
        """
        Return why the server of a connection is too far behind, empty: it is not. The watcher of
        an alias meets one server of several: any other is asked here, every other second.
        """
        if connection.in_atomic_block or not self.supports_positions:
            return ""
        server, now = state_of(connection).server, time.monotonic()
        if server is None or now - server.lag_measured > 2 * monitor.SAMPLE_EVERY:
            if server is not None:
                server.lag_measured = now
            server = self.measured_at(connection)
        if server is None:
            return ""
        if server.out_of_rotation and (server.out_of_rotation != Fault.LAG or self.rotation):
            return server.out_of_rotation
        is_late = max_lag is not None and (server.lag is None or server.lag > max_lag)
        return (
            Reason.NOT_CAUGHT_UP if is_late and not self.is_only(state_of(connection), True) else ""
        )

    def _fault(self, server: Server) -> str:
        if server.reports_position is False or self.dialect is None:
            return ""
        if server.is_replica is False and self._is_promoted(server):
            return Fault.PROMOTED
        if server.minimum_position:
            has = self.dialect.reached(server.minimum_position, server.position) or (
                server.reported_at_least(server.minimum_position)
                or server.reached_without_timeline(server.minimum_position)
            )
            if has or server.position.keys() - server.minimum_position.keys():
                server.minimum_position = {}
            else:
                return Fault.STALE_RESTART
        if conf.max_lag is not None and (server.lag or 0.0) > conf.max_lag:
            return Fault.LAG
        return ""

    def _is_promoted(self, server: Server) -> bool:
        """Return whether this is a server of our primary's kind that goes its own way."""
        primary = self.endpoint.server
        if primary is None:
            # Whoever is to tell has to be met first, and this one looked at again then.
            self._sample()
            written = registry.primary_position(server.system) or {}
            return not written or server.position.keys() != written.keys()
        return primary is not server and primary.system == server.system

    def wait_for(self, wanted: Position, seconds: float) -> str | None:
        """Wait until a replica has a position, at most so many seconds; return its alias."""
        # Where a transaction is open rows stay as they are, whatever is replayed meanwhile.
        order = tuple(a for a in self.rotation.order() if not connections[a].in_atomic_block)

        def over() -> str | None:
            return next((alias for alias in order if self._known_has(alias, wanted)), None)

        found: str | None = monitor.wait_for(order, self.primary, self.judge, seconds, over)
        return found

    def _known_has(self, alias: str, wanted: Position) -> bool:
        servers = self.endpoints[alias].recent_servers
        return bool(servers) and all(self._reached(server, wanted) for server in servers)

    def sample(self) -> None:
        """Have lag measured for the next while."""
        now = time.monotonic()
        if now >= self._sample_at and self.supports_positions:
            self._sample_at = now + monitor.SAMPLE_EVERY
            self._sample()

    def _sample(self) -> None:
        # Nobody drops a test's database to which a watcher is connected.
        aliases = tuple(alias for alias in self.replicas if not self.is_mirror(alias))
        if aliases:
            monitor.sample_lag(self.primary, aliases, self.judge)

    def within(self, max_lag: float, preferred: str | None) -> str | None:
        """Return a replica that lags no more than this, the preferred one first."""
        order = self.rotation.order()
        if preferred in order:
            order = (preferred, *order)
        if any(self.is_mirror(alias) for alias in order):
            return next((alias for alias in order if alias not in self.held_back), None)
        if not self.supports_positions:
            return None
        self.sample()
        now = time.monotonic()
        since, until = self._lag_wanted
        # Who comes later does not wait for what the first did not get.
        since = since if now < until else now
        self._lag_wanted = since, now + monitor.NEEDED
        left = since + FIRST_LAG - now
        if left > 0 and not self._is_lag_told(order) and probing_allowed(connections[self.primary]):
            monitor.wait_for(
                order, self.primary, self.judge, left, lambda: self._is_lag_told(order)
            )
        for alias in order:
            # Of several servers, the one of a connection is judged when it is read from.
            if any(lag is not None and lag <= max_lag for lag in self._lags(alias)):
                return alias
        return None

    def _is_lag_told(self, aliases: tuple[str, ...]) -> bool:
        """Return whether there is nothing to wait for: a lag is known, or never will be."""
        if any(self.lag(alias) is not None for alias in aliases):
            return True
        return _cannot_tell(self.endpoint) or all(_cannot_tell(self.endpoints[a]) for a in aliases)

    def lag(self, alias: str) -> float | None:
        """Return for how many seconds what an alias leads to has been behind, ``None``: unknown."""
        lags = self._lags(alias)
        return None if not lags or None in lags else max(lag for lag in lags if lag is not None)

    def _lags(self, alias: str) -> list[float | None]:
        endpoint = self.endpoints[alias]
        if endpoint.out_of_rotation not in ("", Fault.LAG) or alias in self.cut_off:
            return []
        if alias in self.held_back:
            return [math.inf]
        return [server.lag for server in endpoint.recent_servers]

    # While the primary is down

    @property
    def is_headless(self) -> bool:
        """Whether a replica is to stand in for a primary that can't be reached."""
        return bool(self.endpoint.out_of_rotation) and conf.primary_down == "stale"

    def stand_in(self) -> str | None:
        """Return the freshest replica, found out once a second."""
        now = time.monotonic()
        until, alias = self._stand_in
        if now >= until or alias in self.out:
            alias = next(iter(self.by_freshness()), None)
            self._stand_in = now + monitor.SAMPLE_EVERY, alias
        return alias

    def by_freshness(self) -> list[str]:
        """Query the replicas that can be reached how far they are; return the freshest first."""
        usable = [e for e in self.endpoints.values() if e.out_of_rotation in ("", Fault.LAG)]
        for endpoint in usable:
            with suppress(DatabaseError, InterfaceError):
                self.look_at(connections[endpoint.alias])
        usable = [e for e in usable if e.out_of_rotation in ("", Fault.LAG)]
        return [e.alias for e in sorted(usable, key=_replayed, reverse=True)]

    # Turns

    def turn(self) -> str | None:
        """Return the replica whose turn it is, ``None`` where none is usable."""
        if self._max_lag is not None:
            self.sample()
        alias = self.rotation.turn()
        return self._turn_without_some(alias) if self.out else alias

    def _turn_without_some(self, alias: str | None) -> str | None:
        now = time.monotonic()
        for name in self.out:
            endpoint = self.endpoints[name]
            is_overdue = endpoint.retry_at + OVERDUE < now
            if (
                is_overdue
                and endpoint.out_of_rotation in (Fault.UNREACHABLE, Fault.UNRESPONSIVE)
                and self.rotation.weights[name]
            ):
                # Nobody looks after it: threads do not run here. Let a read try it.
                endpoint.must_reidentify = True
                registry.mark_up(endpoint)
                return name
        if alias is None:
            # All of them lag: whoever has no pin has no claim to a fresh state, and the primary
            # would not stand the reads of all replicas.
            lagging = [e for e in self.endpoints.values() if e.out_of_rotation == Fault.LAG]
            alias = min(lagging, key=_lag_of).alias if lagging else None
        return alias

    def position_now(self) -> Position | None:
        """
        Return a position that includes what this thread has committed, ``None`` where that can't
        be told: then the window serves.
        """
        connection = connections[self.primary]
        if not self.supports_positions or (
            connection.connection is None and self.endpoint.out_of_rotation
        ):
            return None
        try:
            seen = self.look_at(connection)
        except (DatabaseError, InterfaceError) as error:
            log_rate_limited(
                logger,
                logging.WARNING,
                ("position", self.primary),
                "The position of %s can't be read: %s",
                self.primary,
                error,
                extra={"pool": self.primary, "alias": self.primary, "error": str(error)},
            )
            return None
        return None if seen is None or seen.report is None else seen.report.written

    def count(self) -> None:
        """Find out anew who is in the rotation."""
        with self._counting:
            out = {e.alias for e in self.endpoints.values() if e.out_of_rotation} | self.cut_off
            if self._max_lag is not None:
                out |= self.held_back
            self.out = frozenset(out & self.endpoints.keys())
            self.rotation.leave_out(self.out)

    def begin_anew_after_fork(self) -> None:
        """Forget what the parent's threads held, and take turns and times of its own."""
        self._counting = threading.Lock()
        self.rotation.draw()
        for endpoint in self.endpoints.values():
            endpoint.draw_jitter()
            if endpoint.out_of_rotation:
                monitor.retry_until_up(endpoint.alias, self.primary, self.judge)

    def _recount(self, endpoint: Endpoint) -> None:
        if endpoint.alias in self.endpoints:
            self.count()
        elif endpoint is not self.endpoint:
            return
        if endpoint.out_of_rotation:
            if not self.rotation:
                self._take_back()
            if endpoint is self.endpoint:
                # Nobody can stand in for it for long.
                registry.schedule_retry(endpoint, monitor.SAMPLE_EVERY)
            monitor.retry_until_up(endpoint.alias, self.primary, self.judge)

    def _take_back(self) -> None:
        """Let those serve before their time that answer by now: nobody else does."""
        for endpoint in self.endpoints.values():
            if endpoint.is_reachable_again:
                for server in endpoint.recent_servers:
                    self.judge(endpoint, server)
                registry.mark_up(endpoint)


def _pause(reason: str) -> float:
    """Return for how many seconds a server that is out for this reason is left alone."""
    return monitor.SAMPLE_EVERY if reason in (Fault.STALE_RESTART, Fault.LAG) else conf.retry_after


def _cannot_tell(endpoint: Endpoint) -> bool:
    servers = endpoint.recent_servers
    return bool(servers) and all(server.reports_position is False for server in servers)


def _lag_of(endpoint: Endpoint) -> float:
    return max((server.lag or 0.0 for server in endpoint.recent_servers), default=0.0)


def _replayed(endpoint: Endpoint) -> int:
    return max((server.replayed_offset for server in endpoint.recent_servers), default=0)
