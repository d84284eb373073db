"""
In-process registry of database servers and of the endpoints (aliases) that resolve to them. No I/O.

A server is one running process of a database. What it has replayed, its role and its replication
lag are facts of the server, never of an alias. An endpoint is what an alias resolves to: usually
one server; several behind a load balancer or a list of hosts.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

from pinning_middleware.pins import Points, Position, merge_points
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.catch_up import CatchUp
from pinning_middleware.servers.timelines import HiddenTimeline, PrimarySample, is_unresolved
from pinning_middleware.signals import replica_removed, replica_restored
from pinning_middleware.utils.forks import ForkSafeLock

logger = logging.getLogger("pinning_middleware.servers")

# Seconds after its last connection for which a server counts as one that the alias resolves to.
RECENT_FOR = 60.0
# Maximum number of servers that are remembered behind one alias.
MAX_SERVERS = 64
# Seconds between two attempts while no other replica is left: the first pause, doubled up to the
# second. libpq may connect twice for one attempt, with TLS and without.
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-SSLMODE
LAST_REPLICA_RETRY_INTERVAL, LAST_REPLICA_MAX_INTERVAL = 0.05, 0.5
# Seconds until a server that could not report a position is probed for it again.
POSITION_RETRY_INTERVAL = 30.0
# Number of reports of a primary that are kept to resolve hidden timelines.
MAX_PRIMARY_SAMPLES = 32
# Number of a primary's positions that are kept to measure lag, and minimum seconds between two.
MAX_LAG_SAMPLES, LAG_SAMPLE_INTERVAL = 600, 0.5


class Identity(NamedTuple):
    """Identifies a running server process. A restart gives another identity at the same place."""

    started: str
    address: str
    port: int

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The address and port."""
        return self.address, self.port

    def may_replace(self, other: Identity) -> bool:
        """Return whether this may be the other server after a restart: it started later."""
        try:
            return float(self.started) > float(other.started)
        except ValueError:
            return self != other


class Report(NamedTuple):
    """
    What a server reports about itself.

    ``is_replica``: whether it replays another server's log, or None if unknown.
    ``written``: what a primary has written. ``timeline_hidden``: the role may not see to which
    timeline ``replayed`` belongs. ``has_new_history``: the server reports fewer transactions than
    before, since its log was reset; None if the database has no such logs.
    ``is_complete``: ``replayed`` is all that the server has.
    """

    is_replica: bool | None
    replayed: Points
    written: Position | None = None
    timeline_hidden: bool = False
    has_new_history: bool | None = None
    is_complete: bool = False


class Server:
    """One running database server: its last reports and its status in the rotation."""

    def __init__(self, identity: Identity, system: str = "") -> None:
        self.identity = identity
        # The cluster that the server belongs to, if the database has a name for it.
        self.system = system
        self.is_replica: bool | None = None
        # Monotonic time at which the server, a primary before, first reported that it is a replica.
        self.demoted_at = -math.inf
        # What the server has replayed, of logs whose timeline is known. Extended by each report;
        # replaced by one that is complete.
        self.position: Points = {}
        # Monotonic time of the last answer to a read of an identified connection.
        self.answered_at = 0.0
        # Monotonic time of the last report, and the size of all logs in it, to rank replicas.
        self.last_probed = 0.0
        self.replayed_offset = 0
        # What the servers that this one may have replaced had replayed. A replica that restarts
        # accepts reads before it has replayed all of that again.
        self.minimum_position: Points = {}
        self._predecessors: dict[Identity, Points] = {}
        # Why the server is out of rotation, or None if it is in rotation; and since when (epoch).
        self.out_of_rotation: Fault | None = None
        self.status_since = 0.0
        # Whether its replay waits for a lock that a query holds.
        self.replay_waits = False
        # Monotonic time at which a connection that resolves to this server may probe it again.
        self.retry_at = 0.0
        # Seconds behind the primary, or None if unknown.
        self.lag: float | None = None
        # Monotonic time of the last measurement of the lag.
        self.lag_measured = 0.0
        # Whether the server can report a position (None: not probed yet), and the dialect's
        # strategy that works.
        self.reports_position: bool | None = None
        self.strategy = 0
        # Why it cannot report one, and the monotonic time of the next attempt.
        self._unavailable = ""
        self.retry_position_at = 0.0
        # Positions that the server reported in a history that has ended since. They do not count
        # for as long as the server reports them unchanged.
        self._invalidated: dict[str, int] = {}
        self.timeline_hidden = False
        # A timeline that the server has reached, so that it is on no older one. None if unknown.
        self.checkpoint_timeline: str | None = None
        # Whether the role lacks the privilege to see the current timeline.
        self.lacks_timeline_privilege = False
        self._hidden_timeline = HiddenTimeline()
        self.catch_up = CatchUp()

    def __repr__(self) -> str:
        return f"<Server {self.identity.address}:{self.identity.port}>"

    @property
    def should_query_position(self) -> bool:
        """Whether to query the position. A server without one may report it later."""
        return self.reports_position is not False or time.monotonic() >= self.retry_position_at

    def record_position_available(self) -> None:
        """Record that the server reports a position."""
        self.reports_position, self._unavailable = True, ""

    def record_position_unavailable(self, cause: str) -> bool:
        """Record that the server reports no position. Return whether the cause is a new one."""
        is_new, self._unavailable = cause != self._unavailable, cause
        self.reports_position, self.retry_position_at = (
            False,
            time.monotonic() + POSITION_RETRY_INTERVAL,
        )
        self.position = {}
        return is_new

    def invalidate(self, points: Points) -> None:
        """
        Ignore these points until the server reports others or ``revalidate()`` is called. Also
        clear the minimum position.
        """
        self._invalidated |= points
        self.position = {log: n for log, n in self.position.items() if points.get(log) != n}
        self.clear_minimum()

    def revalidate(self, points: Points) -> None:
        """Accept invalidated points again that the primary has reached since."""
        for log, end in tuple(self._invalidated.items()):
            if points.get(log, -1) >= end:
                self._invalidated.pop(log, None)

    def apply_report(self, report: Report, sent_at: float) -> None:
        """Store a report. ``sent_at``: monotonic time at which the probe was sent."""
        is_sequential = sent_at >= self.last_probed
        was_primary = bool(self.last_probed) and not self.is_replica
        self.is_replica, self.timeline_hidden = report.is_replica, report.timeline_hidden
        self.last_probed = time.monotonic()
        if was_primary and report.is_replica:
            self.demoted_at = self.last_probed
        self.replayed_offset = sum(_length(log, end) for log, end in report.replayed.items())
        is_hidden = bool(report.timeline_hidden and report.is_replica)
        self._hidden_timeline.record(report.replayed, sent_at, self.last_probed, is_hidden)
        if is_hidden:
            return
        replayed = report.replayed
        if not report.is_replica and report.written:
            replayed = report.written.points
        points = {
            log: end
            for log, end in replayed.items()
            if not is_unresolved(log) and self._invalidated.get(log) != end
        }
        for log in points:
            self._invalidated.pop(log, None)
        if is_sequential and (report.is_complete or report.has_new_history):
            self.position = points
        else:
            self._advance(points)

    def _advance(self, position: Points) -> None:
        if position:
            self.position = merge_points(self.position, position)

    def replaces(self, other: Server) -> None:
        """Record that this may be the other server after a restart."""
        self._predecessors[other.identity] = merge_points(other.minimum_position, other.position)
        self.minimum_position = reduce(merge_points, self._predecessors.values(), {})

    def clear_minimum(self) -> None:
        """Forget what this server's predecessors had replayed."""
        self.minimum_position, self._predecessors = {}, {}

    def undo_replaces(self, identity: Identity) -> None:
        """Undo replaces(): the server that this one was thought to have replaced still runs."""
        if self._predecessors.pop(identity, None):
            self.minimum_position = reduce(merge_points, self._predecessors.values(), {})

    def reported_at_least(self, wanted: Points) -> bool:
        """Return whether the last report without a timeline is at or past a point of ``wanted``."""
        return self._hidden_timeline.reported_at_least(wanted)

    def reached_without_timeline(self, minimum: Points) -> bool:
        """
        Return whether the last report is at or past ``minimum``, on a timeline that is unknown
        while the primary is away. Enough to be back in rotation, never enough for a pin.
        """
        return self._hidden_timeline.reached(minimum)

    def resolve_timeline(self, samples: tuple[PrimarySample, ...]) -> None:
        """Find out to which timeline the last reports belong, from a primary's samples."""
        self._advance(self._hidden_timeline.resolve(samples, self.checkpoint_timeline))


def _length(log: str, end: int) -> int:
    """Return how much of a log a point includes: the part after a gap is named "log/first"."""
    first = log.partition("/")[2]
    return end - int(first) + 1 if first else end


class SlowSession:
    """
    A session of this process that has not answered for a moment; the monitor searches for it.
    ``started``: when its server started, if that is known, since IDs repeat on other servers.
    """

    def __init__(self, pid: int, started: str) -> None:
        self.pid, self.started = pid, started
        # Monotonic time at which the last successful search for the session was sent.
        self.seen_at = 0.0
        self.waits_for_lock = False


class Endpoint:
    """What an alias resolves to: the servers seen there, and its status in the rotation."""

    def __init__(self, alias: str, pool: str) -> None:
        self.alias = alias
        # The alias of the pool's primary, which is the sender of the pool's signals.
        self.pool = pool
        # Monotonic time at which the newest connection to each server was opened.
        self.servers: dict[Server, float] = {}
        # Monotonic time at which the oldest connection to each server was opened.
        self._first_seen: dict[Server, float] = {}
        # Why the endpoint is out of rotation, or None if it is in rotation; and since when (epoch).
        self.out_of_rotation: Fault | None = None
        self.status_since = 0.0
        self.error = ""
        # Monotonic time of the next attempt.
        self.retry_at = 0.0
        # Out of rotation but reachable again; returns at retry_at, or at once if no other replica
        # is left.
        self.is_reachable_again = False
        # A connection was lost: identify the server again on the next connection.
        self.must_reidentify = False
        # A connection pooler is in between.
        self.has_pooler = False
        # A connection pooler mixes several servers, so that a position is of no use. Logged once.
        self.pooler_mixes_servers = False
        # Whether a pooler sends reads and writes to different servers; None if unknown.
        self.splits_reads_and_writes: bool | None = None
        # Whether a read ends if the server does not answer; None if no connection was made yet.
        self.reads_are_bounded: bool | None = None
        # Monotonic time of the last answer to a read, by any of its servers.
        self.answered_at = 0.0
        # The sessions in which a read waits for an answer.
        self.slow_sessions: set[SlowSession] = set()
        # A read waited for a lock, so that the monitor must check whether replay waits for one.
        self.replay_suspected = False
        # Hosts of a list that do not answer, as pairs of HOST and PORT.
        self.unresponsive_hosts: set[tuple[str, str]] = set()
        # Monotonic time at which one attempt to connect was not answered while another was, or one
        # of several servers did not answer a read.
        self.hung_at = -math.inf
        # For a primary's alias: by log, offsets that a pin required and the server lacked, each
        # with the monotonic time since which a new connection proves that they are lost.
        self.reopened_for: dict[str, list[tuple[int, float]]] = {}
        # The settings that the endpoint was made for have been replaced.
        self.is_stale = False
        # A fault of the endpoint itself, whatever the status of its servers; None if it connects.
        self._connection_fault: Fault | None = None
        self.draw_jitter()

    def __repr__(self) -> str:
        return f"<Endpoint {self.alias}>"

    def draw_jitter(self) -> None:
        """Randomise the retry interval, once per process, so that retries are spread out."""
        self.jitter = random.uniform(1.0, 1.25)

    def record(self, server: Server, at: float) -> None:
        """Record that the alias resolved to a server at this time (monotonic clock)."""
        self.servers[server] = max(at, self.servers.get(server, at))
        self._first_seen[server] = min(at, self._first_seen.get(server, at))

    def forget(self, server: Server) -> None:
        """Remove a server."""
        del self.servers[server]
        del self._first_seen[server]

    def was_replaced(self, server: Server) -> bool:
        """Return whether another server was first seen after this one was last seen."""
        seen_at = self.servers.get(server, -math.inf)
        others = tuple(self._first_seen.items())
        return any(at > seen_at for other, at in others if other is not server)

    @property
    def has_several_primaries(self) -> bool:
        """
        Whether a primary's alias resolves to several primaries alternately, as of a Galera
        cluster behind a load balancer.
        """
        servers = self.recent_servers
        return sum(not (each.is_replica or self.was_replaced(each)) for each in servers) > 1

    @property
    def is_down(self) -> bool:
        """Whether connecting to it fails, or it does not answer."""
        return self.out_of_rotation in (Fault.UNREACHABLE, Fault.UNRESPONSIVE)

    @property
    def has_server_out(self) -> bool:
        """Whether one of several servers that the alias resolves to is out of rotation."""
        servers = self.recent_servers if len(self.servers) > 1 else ()
        return any(server.out_of_rotation for server in servers)

    @property
    def recent_servers(self) -> list[Server]:
        """The servers that connections of the alias have resolved to lately."""
        servers = tuple(self.servers.items())
        if len(servers) < 2:
            return [server for server, _ in servers]
        newest = max(seen_at for _, seen_at in servers)
        return [server for server, seen_at in servers if newest - seen_at < RECENT_FOR]

    @property
    def server(self) -> Server | None:
        """
        The server that the alias resolves to, or None if unknown. A primary's alias resolves to the
        server of its newest connection; another one to a server only if no other was seen within
        RECENT_FOR seconds.
        """
        seen = tuple(self.servers.items())
        if len(seen) == 1:
            return seen[0][0]
        if self.alias == self.pool:
            # A standby in a list of hosts is not the primary.
            seen = tuple(each for each in seen if not each[0].is_replica) or seen
            return max(seen, key=lambda each: each[1])[0] if seen else None
        recent = self.recent_servers
        return recent[0] if len(recent) == 1 else None


class ServerRegistry:
    """
    Servers and endpoints by identity and alias. ``listeners`` are called with each endpoint that
    leaves or rejoins the rotation, ``work_listeners`` with each that has work for its monitor.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        # A report that is stored while another invalidates positions must not restore them.
        self._reporting = ForkSafeLock()
        self._servers: dict[Identity, Server] = {}
        self._endpoints: dict[str, Endpoint] = {}
        # By system: a primary's last reports. By pool: its positions over a longer time, since
        # clusters of MariaDB have no identifiers.
        self._primary_samples: dict[str, deque[PrimarySample]] = {}
        self._lag_samples: dict[str, deque[tuple[float, Position]]] = {}
        self.listeners: list[Callable[[Endpoint], None]] = []
        self.work_listeners: list[Callable[[Endpoint], None]] = []

    def endpoint(self, alias: str, pool: str = "") -> Endpoint:
        """Return the endpoint of an alias, created on first use."""
        endpoint = self._endpoints.get(alias)
        if endpoint is None:
            with self._lock:
                endpoint = self._endpoints.setdefault(alias, Endpoint(alias, pool or alias))
        return endpoint

    def replicas_of(self, pool: str) -> list[Endpoint]:
        """Return the endpoints of a pool's replicas."""
        endpoints = tuple(self._endpoints.values())
        return [each for each in endpoints if each.pool == pool != each.alias]

    def clear(self) -> None:
        """Discard all servers, endpoints and listeners, because the settings have changed."""
        with self._lock:
            for endpoint in self._endpoints.values():
                endpoint.is_stale = True
            self._servers.clear()
            self._endpoints.clear()
            self._primary_samples.clear()
            self._lag_samples.clear()
            self.listeners.clear()
            self.work_listeners.clear()

    def request_work(self, endpoint: Endpoint) -> None:
        """Notify the listeners that an endpoint has work for its monitor."""
        for listener in () if endpoint.is_stale else tuple(self.work_listeners):
            listener(endpoint)

    def get(self, identity: Identity) -> Server | None:
        """Return a registered server, or None."""
        return self._servers.get(identity)

    def register(
        self, alias: str, identity: Identity, system: str, at: float | None = None
    ) -> Server:
        """
        Record that an alias resolves to a server, and return that server. ``at``: when it did, if
        not now (monotonic clock).
        """
        with self._lock:
            endpoint = self._endpoints.get(alias)
            if endpoint is None:
                # The settings have changed since the probe began. An endpoint created here would
                # not belong to a pool, so the server stays unregistered.
                return Server(identity, system)
            server = self._servers.get(identity)
            if server is None:
                server = self._servers[identity] = Server(identity, system)
            is_new = server not in endpoint.servers
            endpoint.record(server, time.monotonic() if at is None else at)
            for other in list(endpoint.servers) if is_new else ():
                if other is server or other.identity.host_and_port != identity.host_and_port:
                    continue
                if identity.may_replace(other.identity):
                    if other.system == system:
                        server.replaces(other)
                    endpoint.forget(other)
                    self._servers.pop(other.identity, None)
                else:
                    # Two networks may use the same addresses, so both servers may be running.
                    other.undo_replaces(identity)
            if len(endpoint.servers) > MAX_SERVERS:
                oldest = min(endpoint.servers, key=endpoint.servers.__getitem__)
                endpoint.forget(oldest)
                self._servers.pop(oldest.identity, None)
        return server

    def apply_report(self, server: Server, report: Report, sent_at: float) -> None:
        """
        Store a server's report. A primary's report also resolves hidden timelines of its replicas.
        """
        with self._reporting:
            has_new_history = bool(report.has_new_history) and sent_at >= server.last_probed
            self._apply_report(server, report, sent_at, has_new_history)
        if has_new_history:
            logger.warning(
                "%s:%s reports fewer transactions than before: its log was reset, or a backup "
                "restored. Its recorded replication position was discarded.",
                *server.identity.host_and_port,
            )

    def _apply_report(
        self, server: Server, report: Report, sent_at: float, has_new_history: bool
    ) -> None:
        server.apply_report(report, sent_at)
        system = server.system
        if has_new_history and not server.is_replica:
            self._begin_new_history(server)
        if report.written and not report.is_replica:
            if report.has_new_history is not None:
                self._compare_with_primary(server, report.written, sent_at)
            samples = self._primary_samples.setdefault(system, deque(maxlen=MAX_PRIMARY_SAMPLES))
            samples.append(PrimarySample(sent_at, server.last_probed, report.written))
            for pool in self._pools_of(server):
                positions = self._lag_samples.setdefault(pool, deque(maxlen=MAX_LAG_SAMPLES))
                if not positions or sent_at - positions[-1][0] >= LAG_SAMPLE_INTERVAL:
                    positions.append((sent_at, report.written))
            for other in tuple(self._servers.values()):
                if other.timeline_hidden and other.system == system:
                    other.resolve_timeline(tuple(samples))
        elif report.timeline_hidden:
            server.resolve_timeline(tuple(self._primary_samples.get(system, ())))

    def _begin_new_history(self, server: Server) -> None:
        """
        Forget what was known of a primary's log that began again: what the others replayed of it is
        of the history that has ended.
        """
        self._primary_samples.pop(server.system, None)
        for pool in self._pools_of(server):
            self._lag_samples.pop(pool, None)
        for other in self._others_in_pools_of(server):
            other.invalidate(other.position)

    def _compare_with_primary(self, primary: Server, written: Position, sent_at: float) -> None:
        """Invalidate what servers reported of a log beyond what their primary had later."""
        for other in self._others_in_pools_of(primary):
            other.revalidate(written.points)
            if other.last_probed < sent_at:
                ahead = {
                    log: end
                    for log, end in other.position.items()
                    if end > written.points.get(log, end)
                }
                if ahead:
                    other.invalidate(ahead)

    def _pools_of(self, server: Server) -> set[str]:
        return {each.pool for each in tuple(self._endpoints.values()) if server in each.servers}

    def _others_in_pools_of(self, server: Server) -> set[Server]:
        # Logs of two clusters of MariaDB may have the same names.
        pools = self._pools_of(server)
        return {
            other
            for endpoint in tuple(self._endpoints.values())
            if endpoint.pool in pools
            for other in tuple(endpoint.servers)
            if other is not server
        }

    def samples(self, pool: str) -> tuple[tuple[float, Position], ...]:
        """
        Return (monotonic time, position) of the primary of a pool, newest first. ``pool``: the
        primary's alias.
        """
        return tuple(reversed(self._lag_samples.get(pool, ())))

    def set_status(
        self, server: Server, fault: Fault | None, retry_in: float = 0.0, error: object = ""
    ) -> None:
        """Take a server out of rotation for a fault, or put it back in (None)."""
        if server.out_of_rotation != fault:
            server.out_of_rotation, server.status_since = fault, time.time()
        server.retry_at = time.monotonic() + retry_in
        for endpoint in tuple(self._endpoints.values()):
            if server in endpoint.servers:
                self._publish(endpoint, retry_in, error)

    def mark_down(self, endpoint: Endpoint, fault: Fault, retry_in: float, error: object) -> None:
        """Take an endpoint out of rotation: it is unreachable or unresponsive."""
        endpoint._connection_fault = fault
        endpoint.must_reidentify, endpoint.is_reachable_again = True, False
        self._publish(endpoint, retry_in, error)

    def mark_up(self, endpoint: Endpoint) -> None:
        """Record that an endpoint can be connected to; its servers' own faults remain."""
        if endpoint._connection_fault or endpoint.out_of_rotation:
            endpoint._connection_fault = None
            self._publish(endpoint, 0.0, "")

    def schedule_retry(self, endpoint: Endpoint, seconds: float) -> None:
        """Schedule the next attempt after ``seconds``, times the endpoint's jitter."""
        endpoint.retry_at = time.monotonic() + seconds * endpoint.jitter

    def _publish(self, endpoint: Endpoint, retry_in: float, error: object) -> None:
        if endpoint.is_stale:
            # This endpoint belongs to settings that have been replaced; do not notify listeners.
            return
        with self._lock:
            fault = endpoint._connection_fault
            if fault is None:
                faults = [server.out_of_rotation for server in endpoint.recent_servers]
                fault = faults[0] if faults and all(faults) else None
            has_changed, endpoint.out_of_rotation = endpoint.out_of_rotation != fault, fault
            endpoint.is_reachable_again = endpoint.is_reachable_again and not has_changed
            if fault is not None:
                if has_changed or str(error):
                    endpoint.error = str(error) or fault.description
                if has_changed or retry_in:
                    self.schedule_retry(endpoint, retry_in)
            if has_changed:
                endpoint.status_since = time.time()
        if not has_changed:
            return
        for listener in tuple(self.listeners):
            listener(endpoint)
        is_replica = endpoint.alias != endpoint.pool
        extra = {"alias": endpoint.alias, "pool": endpoint.pool, "reason": fault or ""}
        if fault is not None:
            logger.warning(
                "%s is out of rotation (%s): %s",
                endpoint.alias,
                fault,
                endpoint.error,
                extra=extra,
            )
            if is_replica:
                replica_removed.send_robust(
                    endpoint.pool, replica=endpoint.alias, reason=fault, seconds=retry_in
                )
        else:
            endpoint.error = ""
            logger.info("%s is back in rotation.", endpoint.alias, extra=extra)
            if is_replica:
                replica_restored.send_robust(endpoint.pool, replica=endpoint.alias)


registry = ServerRegistry()
