"""
What is known of servers, and of the endpoints that lead to them. Pure: times, positions, reasons.

A server is one running process of a database; what it has replayed, whether it replicates and how
far it lags is known of it alone. An endpoint is what an alias leads to: usually one server, behind
a balancer or a list of hosts many.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pinning_middleware.pins import OPTIONAL, Position, merge_positions
from pinning_middleware.signals import replica_removed, replica_restored

__all__ = [
    "LAST_REPLICA_RETRY_INTERVAL",
    "Endpoint",
    "Identity",
    "PrimarySample",
    "Report",
    "Server",
    "ServerRegistry",
    "registry",
]

logger = logging.getLogger("pinning_middleware.servers")

# Seconds for which an endpoint is taken to lead to a server that nobody has met there since.
CURRENT_FOR = 60.0
# How many servers are remembered behind one alias.
MOST_SERVERS = 64
# Seconds between two tries while nobody else could serve.
LAST_REPLICA_RETRY_INTERVAL = 0.05
# How many answers of a primary are kept to date what replicas say.
REMEMBERED = 32
# Of what a primary had written, how many samples are kept, and how many seconds apart at least.
SAMPLES, SAMPLE_EVERY = 600, 0.5


class Identity(NamedTuple):
    """Which running process this is. A restart makes another one, at the same place."""

    started: str
    address: str
    port: int

    @property
    def place(self) -> tuple[str, int]:
        return self.address, self.port

    def may_follow(self, other: Identity) -> bool:
        """Return whether this may be the other after a restart: it began later, as far as known."""
        try:
            return float(self.started) > float(other.started)
        except ValueError:
            return self != other


class Report(NamedTuple):
    """
    What a server says of itself: whether it replays another's log (``None``: it does not know),
    what it has replayed and, of a primary, what it has written. ``timeline_hidden``: the role may not see
    of which timeline that is.
    """

    is_replica: bool | None
    replayed: Position
    written: Position | None = None
    timeline_hidden: bool = False


class PrimarySample(NamedTuple):
    """An answer of a primary, and when it was asked and had answered (monotonic clock)."""

    asked: float
    answered: float
    written: Position


class Server:
    """One running process of a database, as this process knows it."""

    __slots__ = (
        "_first_resolved",
        "_last_reported",
        "_predecessors",
        "_undated_reports",
        "checkpoint_timeline",
        "identity",
        "is_replica",
        "lacks_timeline_privilege",
        "lag",
        "lag_measured",
        "last_probed",
        "minimum_position",
        "out_of_rotation",
        "position",
        "replayed_offset",
        "reports_position",
        "retry_at",
        "status_since",
        "strategy",
        "system",
        "timeline_hidden",
    )

    def __init__(self, identity: Identity, system: str = "") -> None:
        self.identity = identity
        # Which cluster of servers it belongs to, where the database has such a name.
        self.system = system
        self.is_replica: bool | None = None
        # What it has replayed, with the log's name certain. It only grows.
        self.position: Position = {}
        # When it was last asked with success, and how far it was, of whatever log.
        self.last_probed = 0.0
        self.replayed_offset = 0
        # What a server at this place had before it; until that is here again this one serves
        # nobody.
        self.minimum_position: Position = {}
        self._predecessors: dict[Identity, Position] = {}
        # Why it serves nobody ("silent", "role", "behind", "lag"), empty: it does; since when.
        self.out_of_rotation = ""
        self.status_since = 0.0
        # When who is connected to it may ask it again.
        self.retry_at = 0.0
        # Seconds behind the primary, None: not known.
        self.lag: float | None = None
        # When that was last found out.
        self.lag_measured = 0.0
        # Whether it can say how far it is, None: not asked yet; by which of the dialect's ways.
        self.reports_position: bool | None = None
        self.strategy = 0
        self.timeline_hidden = False
        # The timeline that it is on, or has passed: then it is on no older one. Empty: not known.
        self.checkpoint_timeline = ""
        # Whether it hides that from the role that we have there.
        self.lacks_timeline_privilege = False
        # What it has replayed of a log whose name it could not see, until a primary dates it.
        self._undated_reports: deque[tuple[float, float, str, int]] = deque(maxlen=8)
        # What it said last that it had replayed, with or without the log's name.
        self._last_reported: Position = {}
        # Of each log, the first point at which it met a primary that dates it.
        self._first_resolved: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Server {self.identity.address}:{self.identity.port}>"

    def apply_report(self, report: Report, asked: float) -> None:
        """Take in what it said of itself, asked at that time of the monotonic clock."""
        self.is_replica, self.timeline_hidden = report.is_replica, report.timeline_hidden
        self.last_probed = time.monotonic()
        self.replayed_offset = sum(report.replayed.values())
        self._last_reported = report.replayed
        replayed = report.replayed
        if not report.is_replica and report.written:
            replayed = {log.removeprefix(OPTIONAL): end for log, end in report.written.items()}
        if report.timeline_hidden and report.is_replica:
            for log, point in replayed.items():
                self._undated_reports.append((asked, self.last_probed, log, point))
            return
        # One whose name ends openly is on a timeline that nobody could tell.
        certain = {log: point for log, point in replayed.items() if not log.endswith("-")}
        if certain:
            self.position = merge_positions(self.position, certain) or {}

    def replaces(self, other: Server) -> None:
        """Take the other for what this one was before it was restarted."""
        self._predecessors[other.identity] = (
            merge_positions(other.minimum_position, other.position) or {}
        )
        self.minimum_position = _merged(self._predecessors.values())

    def undo_replaces(self, identity: Identity) -> None:
        """Know that one which this was taken for after a restart still runs."""
        if self._predecessors.pop(identity, None):
            self.minimum_position = _merged(self._predecessors.values())

    def reported_at_least(self, wanted: Position) -> bool:
        """Return whether it was last at or after a point, if it follows that log at all."""
        if not self._undated_reports:
            return False
        _, _, log, point = self._undated_reports[-1]
        return any(name.startswith(log) and point >= end for name, end in wanted.items())

    def reached_without_timeline(self, floor: Position) -> bool:
        """
        Return whether by its own word it is as far as what was here before it, on a timeline that
        nobody can tell as long as its primary is away. That says nothing of a pin.
        """
        return bool(floor) and all(
            any(
                log.endswith("-") and name.startswith(log) and point >= end
                for log, point in self._last_reported.items()
            )
            for name, end in floor.items()
        )

    def resolve_timeline(self, answers: Iterable[PrimarySample]) -> None:
        """
        Let what a primary said before and after name the log of what this one has replayed.

        Between two equal names of the primary's log it was at a point between the primary's two.
        One that stands still on a lost timeline is passed by the primary once, so it has to be
        met at two points; or it is known to be on no older timeline than the primary.
        """
        for asked, answered, log, point in tuple(self._undated_reports):
            before = {
                name: end
                for told in answers
                if told.answered <= asked
                for name, end in told.written.items()
                if name.startswith(log)
            }
            after = {
                name: end
                for told in answers
                if told.asked >= answered
                for name, end in told.written.items()
                if name.startswith(log)
            }
            for name in before.keys() & after.keys():
                if before[name] <= point <= after[name] and len(before.keys() | after.keys()) == 1:
                    first = self._first_resolved.setdefault(name, point)
                    if point > first or name.endswith(f"-{self.checkpoint_timeline}"):
                        self.position = merge_positions(self.position, {name: point}) or {}


def _merged(positions: Iterable[Position]) -> Position:
    merged: Position | None = None
    for position in positions:
        merged = merge_positions(merged, position)
    return merged or {}


class Endpoint:
    """What an alias leads to: the servers met there, and whether it leads anywhere now."""

    def __init__(self, alias: str, pool: str) -> None:
        self.alias = alias
        # The primary's alias of the pool that it belongs to, who sends its signals.
        self.pool = pool
        self.servers: dict[Server, float] = {}
        # Why it serves nobody ("connect", or what its servers are out for), empty: it does.
        self.out_of_rotation = ""
        self.status_since = 0.0
        self.error = ""
        self.retry_at = 0.0
        # It is out, and answers by now: it waits for its time, or until nobody else serves.
        self.is_reachable_again = False
        # A connection was lost here; whoever connects next has to look who is there.
        self.must_reidentify = False
        # Behind a pooler that hands out several servers; said once, and then the window serves.
        self.pooler_mixes_servers = False
        # Whether the settings that it was made for still hold.
        self.is_current = True
        self._connection_fault = ""
        self.draw_jitter()

    def __repr__(self) -> str:
        return f"<Endpoint {self.alias}>"

    def draw_jitter(self) -> None:
        """Draw the jitter, once for each process, so that they do not come back together."""
        self.jitter = random.uniform(1.0, 1.25)

    @property
    def recent_servers(self) -> list[Server]:
        """The servers that it leads to, as far as is known."""
        servers = tuple(self.servers.items())
        if len(servers) < 2:
            return [server for server, _ in servers]
        newest = max(met for _, met in servers)
        return [server for server, met in servers if newest - met < CURRENT_FOR]

    @property
    def server(self) -> Server | None:
        """The one server that it leads to, ``None`` where there are several or none is known."""
        servers = self.servers
        if len(servers) == 1:
            return next(iter(servers))
        current = self.recent_servers
        return current[0] if len(current) == 1 else None


class ServerRegistry:
    """Everything that this process knows, and who wants to hear of what serves or does not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Identity, Server] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._primary_samples: dict[str, deque[PrimarySample]] = {}
        self._samples: dict[str, deque[tuple[float, Position]]] = {}
        self.listeners: list[Callable[[Endpoint], None]] = []

    def endpoint(self, alias: str, pool: str = "") -> Endpoint:
        """Return what is known of an alias, making it at the first use."""
        found = self._endpoints.get(alias)
        if found is None:
            with self._lock:
                found = self._endpoints.setdefault(alias, Endpoint(alias, pool or alias))
        return found

    def replicas_of(self, pool: str) -> list[Endpoint]:
        """Return what the aliases of a pool's replicas lead to."""
        known = tuple(self._endpoints.values())
        return [each for each in known if each.pool == pool != each.alias]

    def begin_anew_after_fork(self) -> None:
        """Let go of what a thread of the parent may have held: it is not in this process."""
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget everything: the settings were changed."""
        with self._lock:
            for endpoint in self._endpoints.values():
                endpoint.is_current = False
            self._known.clear()
            self._endpoints.clear()
            self._primary_samples.clear()
            self._samples.clear()
            self.listeners.clear()

    def get(self, identity: Identity) -> Server | None:
        return self._known.get(identity)

    def register(self, alias: str, identity: Identity, system: str) -> Server:
        """Note that a connection of this alias leads to that server, and return it."""
        with self._lock:
            endpoint = self._endpoints.get(alias)
            if endpoint is None:
                # The settings were changed since it was asked: it is for others to make that anew.
                return Server(identity, system)
            server = self._known.get(identity)
            if server is None:
                server = self._known[identity] = Server(identity, system)
            is_new = server not in endpoint.servers
            for other in list(endpoint.servers) if is_new else ():
                if other is server or other.identity.place != identity.place:
                    continue
                if identity.may_follow(other.identity):
                    # It was here before it was restarted, and what it had is not there by itself.
                    if other.system == system:
                        server.replaces(other)
                    del endpoint.servers[other]
                    self._known.pop(other.identity, None)
                else:
                    # Both run, since two networks may use the same addresses.
                    other.undo_replaces(identity)
            endpoint.servers[server] = time.monotonic()
            if len(endpoint.servers) > MOST_SERVERS:
                oldest = min(endpoint.servers, key=endpoint.servers.__getitem__)
                del endpoint.servers[oldest]
                self._known.pop(oldest.identity, None)
        return server

    def apply_report(self, server: Server, report: Report, asked: float) -> None:
        """Take in what a server said of itself; of a primary, that dates what replicas said."""
        server.apply_report(report, asked)
        if report.written and not report.is_replica:
            told = self._primary_samples.setdefault(server.system, deque(maxlen=REMEMBERED))
            told.append(PrimarySample(asked, server.last_probed, report.written))
            samples = self._samples.setdefault(server.system, deque(maxlen=SAMPLES))
            if not samples or asked - samples[-1][0] >= SAMPLE_EVERY:
                samples.append((asked, report.written))
            for other in tuple(self._known.values()):
                if other.timeline_hidden and other.system == server.system:
                    other.resolve_timeline(tuple(told))
        elif report.timeline_hidden:
            server.resolve_timeline(tuple(self._primary_samples.get(server.system, ())))

    def primary_position(self, system: str) -> Position | None:
        """Return what a primary of this system was last known to have written."""
        told = self._primary_samples.get(system)
        return told[-1].written if told else None

    def samples(self, system: str) -> tuple[tuple[float, Position], ...]:
        """Return when a primary of this system had written what, the newest first."""
        return tuple(reversed(self._samples.get(system, ())))

    # Who serves

    def set_status(
        self, server: Server, reason: str, retry_in: float = 0.0, error: object = ""
    ) -> None:
        """Say why a server serves nobody, or by an empty reason that it does."""
        if server.out_of_rotation != reason:
            server.out_of_rotation, server.status_since = reason, time.time()
        server.retry_at = time.monotonic() + retry_in
        for endpoint in tuple(self._endpoints.values()):
            if server in endpoint.servers:
                self._publish(endpoint, retry_in, error)

    def mark_down(self, endpoint: Endpoint, reason: str, retry_in: float, error: object) -> None:
        """Say that an endpoint leads nowhere now: it can't be connected to, or keeps silent."""
        endpoint._connection_fault = reason
        endpoint.must_reidentify = True
        self._publish(endpoint, retry_in, error)

    def mark_up(self, endpoint: Endpoint) -> None:
        """Say that an endpoint leads somewhere."""
        if endpoint._connection_fault or endpoint.out_of_rotation:
            endpoint._connection_fault = ""
            self._publish(endpoint, 0.0, "")

    def schedule_retry(self, endpoint: Endpoint, seconds: float) -> None:
        """Let an endpoint that is out be looked at again after so many seconds."""
        endpoint.retry_at = time.monotonic() + seconds * endpoint.jitter

    def _publish(self, endpoint: Endpoint, retry_in: float, error: object) -> None:
        if not endpoint.is_current:
            # Who still looks at it began before the settings were changed: nobody is to hear.
            return
        reason = endpoint._connection_fault
        if not reason:
            outs = [server.out_of_rotation for server in endpoint.recent_servers]
            reason = outs[0] if outs and all(outs) else ""
        with self._lock:
            is_news, endpoint.out_of_rotation = endpoint.out_of_rotation != reason, reason
            endpoint.is_reachable_again = endpoint.is_reachable_again and not is_news
            if reason:
                endpoint.error = str(error) or endpoint.error
                if is_news or retry_in:
                    self.schedule_retry(endpoint, retry_in)
            if is_news:
                endpoint.status_since = time.time()
        if not is_news:
            return
        for listener in tuple(self.listeners):
            listener(endpoint)
        tell = {"alias": endpoint.alias, "pool": endpoint.pool, "reason": reason}
        if reason:
            logger.warning(
                "%s serves nobody (%s): %s", endpoint.alias, reason, endpoint.error, extra=tell
            )
            if endpoint.alias != endpoint.pool:
                replica_removed.send_robust(
                    endpoint.pool, replica=endpoint.alias, reason=reason, seconds=retry_in
                )
        else:
            endpoint.error = ""
            logger.info("%s serves again.", endpoint.alias, extra=tell)
            if endpoint.alias != endpoint.pool:
                replica_restored.send_robust(endpoint.pool, replica=endpoint.alias)


registry = ServerRegistry()

os.register_at_fork(after_in_child=registry.begin_anew_after_fork)
