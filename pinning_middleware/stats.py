"""
What this process did and what it knows, as plain values: for monitoring, panels and people.

Nothing here asks a server. What is known may be old: ``ServerState.age`` says how old.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

from django.db import connections

from pinning_middleware import signals
from pinning_middleware.conf import conf
from pinning_middleware.pins import OPTIONAL, Position
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.replica_set import Nodes
from pinning_middleware.servers.dialects.postgresql import LSN
from pinning_middleware.servers.registry import Endpoint, Server
from pinning_middleware.utils import counters

__all__ = [
    "DEGRADED",
    "DOWN",
    "DRAINED",
    "WELL",
    "Event",
    "ServerState",
    "address_of",
    "format_position",
    "get_stats",
    "in_bytes",
    "in_seconds",
    "install",
    "limit",
    "recent",
    "servers",
    "verdict",
]

# In the place of a fault, for a replica of weight 0: it is left out on purpose.
DRAINED: Final = "drained"
# How well a site is; the exit statuses of ``pinning_status``.
WELL, DEGRADED, DOWN = range(3)


class ServerState(NamedTuple):
    """
    What this process knows of one server behind one alias.

    ``pool``: alias of the pool's primary. ``alias``: the alias that leads to the server.
    ``address``: ``host:port`` as the server itself says, as the settings do while it is not known,
    or the path of a file. ``configured``: what the settings take it for; ``role``: what it is,
    ``None`` while that is not known. ``state``: whether reads go there; ``unknown``: nobody has
    asked or read yet. ``reason``: why it is out: ``connect``, ``silent``, ``role``, ``behind``,
    ``lag``, or ``drained`` for weight 0. ``since``: since when that is so, in seconds since the
    epoch, ``None``: since this process began. ``weight``: of the settings, ``None`` for a primary.
    ``reads``: how many this process has read there. ``position``: how far it is, as its database
    writes it. ``behind_bytes``: of PostgreSQL's log, behind the primary. ``lag``: seconds behind
    the primary, as last measured. ``age``: seconds since it was asked. ``retry_in``: seconds until
    one that is out is looked at again. ``error``: why it could not be reached, or what else is
    wrong.
    """

    pool: str
    alias: str
    address: str
    configured: Literal["primary", "replica"]
    role: Literal["primary", "replica"] | None
    state: Literal["in", "out", "unknown"]
    reason: str = ""
    since: float | None = None
    weight: int | None = None
    reads: int = 0
    position: str | None = None
    behind_bytes: int | None = None
    lag: float | None = None
    age: float | None = None
    retry_in: float | None = None
    error: str = ""


class Event(NamedTuple):
    """
    Something that happened, ``times`` times running, the last time ``at`` (seconds since the
    epoch). ``kind``: the name of the signal; ``alias``: whom it happened to; ``served``: who
    answered instead, if anybody; ``reason``: the signal's reason, or its error.
    """

    at: float
    kind: str
    pool: str
    alias: str
    served: str
    reason: str
    times: int = 1


# The newest last.
recent: deque[Event] = deque(maxlen=100)


# What is known of servers


def servers() -> list[ServerState]:
    """
    Return a row for each known server of each alias of each pool, and one for an alias whose
    server is not known yet. Asks nobody.
    """
    reads = _reads_by_place()
    rows: list[ServerState] = []
    for pool in pools().all:
        for endpoint in (pool.endpoint, *pool.endpoints.values()) if pool.replicas else ():
            # The older interface's rotation may have aliases of another pool.
            if not any((row.pool, row.alias) == (pool.primary, endpoint.alias) for row in rows):
                rows.extend(_rows_of(pool, endpoint, reads))
    return rows


Reads = dict[tuple[str, str], dict[tuple[str, int] | None, int]]


def _reads_by_place() -> Reads:
    found: Reads = {}
    # A copy, since other threads go on counting.
    for (pool, alias, server, _), number in dict(counters.reads).items():
        places = found.setdefault((pool, alias), {})
        place = None if server is None else server.identity.place
        places[place] = places.get(place, 0) + number
    return found


def _rows_of(pool: Nodes, endpoint: Endpoint, reads: Reads) -> Iterator[ServerState]:
    known = endpoint.recent_servers
    places = reads.get((pool.primary, endpoint.alias), {})
    for server in known or (None,):
        if len(known) < 2:
            number = sum(places.values())
        else:
            number = places.get(None if server is None else server.identity.place, 0)
        yield _row(pool, endpoint, server, number)


def _row(pool: Nodes, endpoint: Endpoint, server: Server | None, reads: int) -> ServerState:
    is_primary = endpoint is pool.endpoint
    weight = None if is_primary else pool.rotation.weights.get(endpoint.alias)
    reason, since = endpoint.out_of_rotation, endpoint.status_since
    if server is not None and reason in {each.out_of_rotation for each in endpoint.recent_servers}:
        reason, since = server.out_of_rotation, server.status_since
    state: Literal["in", "out", "unknown"] = "out" if reason else "in"
    is_asked = server is not None and (server.last_probed or server.reports_position is False)
    if not reason and not is_asked and not reads:
        state = "unknown"
    elif not reason and weight == 0:
        state, reason, since = "out", DRAINED, 0.0
    now = time.monotonic()
    return ServerState(
        pool=pool.primary,
        alias=endpoint.alias,
        address=address_of(endpoint.alias, server),
        configured="primary" if is_primary else "replica",
        role=_role(server),
        state=state,
        reason=reason,
        since=since or None,
        weight=weight,
        reads=reads,
        position=None if server is None else format_position(server, _vendor(endpoint.alias)),
        behind_bytes=None if server is None or is_primary else _behind(pool, server),
        lag=None if server is None or is_primary else server.lag,
        age=now - server.last_probed if server is not None and server.last_probed else None,
        retry_in=max(0.0, endpoint.retry_at - now) if endpoint.out_of_rotation else None,
        error=endpoint.error if endpoint.out_of_rotation else "",
    )


def _role(server: Server | None) -> Literal["primary", "replica"] | None:
    if server is None or server.is_replica is None:
        return None
    return "replica" if server.is_replica else "primary"


def _vendor(alias: str) -> str:
    return connections[alias].vendor


def address_of(alias: str, server: Server | None) -> str:
    """Return a server's own address, else where the settings say that an alias leads."""
    if server is not None and server.identity.address:
        return _host_and_port(*server.identity.place)
    settings = connections.settings[alias]
    if settings["HOST"]:
        return _host_and_port(settings["HOST"], settings["PORT"])
    return str(settings["PORT"] or settings["NAME"] or "")


def _host_and_port(host: str, port: object) -> str:
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_position(server: Server, vendor: str = "postgresql") -> str | None:
    """
    Return how far a server is as its database writes it: an LSN (``0/3000148``) or transaction
    id of PostgreSQL, GTIDs of MariaDB (``0-1-8``) and of MySQL (``uuid:1-5``).
    """
    if vendor == "postgresql":
        if not server.last_probed or not server.replayed_offset:
            return None
        return (
            _lsn(server.replayed_offset) if server.strategy == LSN else str(server.replayed_offset)
        )
    known = {log.removeprefix(OPTIONAL): point for log, point in sorted(server.position.items())}
    between = {"mariadb": "-", "mysql": ":1-"}.get(server.system, ":")
    return ",".join(f"{log}{between}{point}" for log, point in known.items()) or None


def _lsn(point: int) -> str:
    return f"{point >> 32:X}/{point & 0xFFFFFFFF:X}"


def _behind(pool: Nodes, server: Server) -> int | None:
    primary = pool.endpoint.server
    if primary is None or primary.is_replica is not False or not server.last_probed:
        return None
    if server.strategy != LSN or _vendor(pool.primary) != "postgresql" or not server.is_replica:
        return None
    return max(0, _end(primary.position) - server.replayed_offset) if primary.position else None


def _end(position: Position) -> int:
    return max(position.values(), default=0)


# How well that is


def limit() -> float:
    """
    Return how many seconds a replica may lag before that is a fault: ``PINNING_MAX_LAG``, else
    the window, after which nobody is pinned any more.
    """
    return conf.seconds if conf.max_lag is None else conf.max_lag


def verdict(rows: list[ServerState]) -> int:
    """
    Return ``DOWN`` (2) where a pool's primary is out or a replica, or none of its replicas serves;
    ``DEGRADED`` (1) where any server is out, unknown or too far behind; else ``WELL`` (0).
    """
    worst = WELL
    for pool in {row.pool for row in rows}:
        of_pool = [row for row in rows if row.pool == pool]
        primaries = [row for row in of_pool if row.configured == "primary"]
        replicas = [row for row in of_pool if row.configured == "replica"]
        if any(row.state == "out" or row.role == "replica" for row in primaries):
            return DOWN
        if not any(row.state != "out" for row in replicas):
            return DOWN
        if any(_is_faulty(row) for row in of_pool):
            worst = DEGRADED
    return worst


def _is_faulty(row: ServerState) -> bool:
    is_behind = row.lag is not None and row.lag > limit()
    is_out = row.state == "out" and row.reason != DRAINED
    return is_out or row.state == "unknown" or is_behind or bool(row.error)


def in_seconds(seconds: float) -> str:
    """Return a time for people: ``0.4 s``, ``95 s``, ``12 min``, ``3 h``, ``9 d``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    for size, name in ((1, "s"), (60, "min"), (3600, "h")):
        if seconds < size * 120:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def in_bytes(number: float) -> str:
    """Return an amount for people: ``512 B``, ``1.2 kB``, ``16 MB``."""
    for name in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {name}" if name == "B" or number >= 10 else f"{number:.1f} {name}"
        number /= 1000
    return f"{number:.0f} TB"


# What was counted


class _Wait:
    __slots__ = ("count", "reached", "seconds")

    def __init__(self) -> None:
        self.count, self.reached, self.seconds = 0, 0, 0.0


_lock = threading.Lock()
# By the pool's primary: scopes that waited for a replica, those that got one, and for how long.
_waits: defaultdict[str, _Wait] = defaultdict(_Wait)


def get_stats() -> dict[str, Any]:
    """
    Return what this process has counted since it began; it only grows, and is fit for JSON.

    ``reads``: pool → alias that answered → its server's address (empty: not known) → reason →
    reads. ``pins``: ``set``, ``carried``, ``rejected`` → pins. ``rejected``: reason → tokens that
    were ignored. ``fallbacks``: pool → reason → times. ``reruns``: pool → alias that failed →
    alias that served → reads. ``waits``: pool → ``count`` of scopes that waited for a replica,
    ``reached`` of those that got one, ``seconds`` that all of them waited together.
    """
    reads: dict[str, Any] = {}
    for (pool, alias, server, reason), number in dict(counters.reads).items():
        address = "" if server is None else address_of(alias, server)
        by_reason = reads.setdefault(pool, {}).setdefault(alias, {}).setdefault(address, {})
        by_reason[reason] = by_reason.get(reason, 0) + number
    with _lock:
        fallbacks: dict[str, dict[str, int]] = {}
        for (pool, reason), number in counters.fallbacks.items():
            fallbacks.setdefault(pool, {})[reason] = number
        reruns: dict[str, dict[str, dict[str, int]]] = {}
        for (pool, failed, served), number in counters.reruns.items():
            reruns.setdefault(pool, {}).setdefault(failed, {})[served] = number
        waits = {
            pool: {"count": wait.count, "reached": wait.reached, "seconds": wait.seconds}
            for pool, wait in _waits.items()
        }
    rejected = dict(counters.rejected)
    pins = {"set": 0, "carried": 0, **dict(counters.pins), "rejected": sum(rejected.values())}
    return {
        "reads": reads,
        "pins": pins,
        "rejected": rejected,
        "fallbacks": fallbacks,
        "reruns": reruns,
        "waits": waits,
    }


# Receivers of signals, which come in any thread


def _note(kind: str, pool: str, alias: str, served: str, reason: str) -> None:
    """Note an event; one that goes on is one."""
    with _lock:
        if recent and recent[-1][1:6] == (kind, pool, alias, served, reason):
            recent[-1] = recent[-1]._replace(at=time.time(), times=recent[-1].times + 1)
        else:
            recent.append(Event(time.time(), kind, pool, alias, served, reason))


def _count_fallback(*, signal: Any, sender: str, served: str, reason: str, **kwargs: Any) -> None:
    with _lock:
        counters.fallbacks[sender, reason] += 1
    to_primary = signal is signals.fell_back_to_primary
    kind = "fell_back_to_primary" if to_primary else "fell_back_to_replica"
    _note(kind, sender, "", served, reason)


def _count_rerun(*, sender: str, failed: str, served: str, error: object, **kwargs: Any) -> None:
    with _lock:
        counters.reruns[sender, failed, served] += 1
    _note("read_retried", sender, failed, served, _first_line(error))


def _count_wait(*, sender: str, seconds: float, reached: bool, **kwargs: Any) -> None:
    with _lock:
        wait = _waits[sender]
        wait.count, wait.reached = wait.count + 1, wait.reached + reached
        wait.seconds += seconds


def _note_left_out(*, sender: str, replica: str, reason: str, **kwargs: Any) -> None:
    _note("replica_removed", sender, replica, "", reason)


def _note_taken_back(*, sender: str, replica: str, **kwargs: Any) -> None:
    _note("replica_restored", sender, replica, "", "")


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def install() -> None:
    """Count from now on what signals tell. Again changes nothing."""
    for signal, receiver in (
        (signals.fell_back_to_primary, _count_fallback),
        (signals.fell_back_to_replica, _count_fallback),
        (signals.read_retried, _count_rerun),
        (signals.replica_wait_finished, _count_wait),
        (signals.replica_removed, _note_left_out),
        (signals.replica_restored, _note_taken_back),
    ):
        signal.connect(receiver, dispatch_uid=f"pinning_middleware.stats{receiver.__name__}")


def _begin_anew_after_fork() -> None:
    global _lock
    # Another thread may have held it.
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew_after_fork)
