"""
Counters of this process and the state of its servers, as plain values for monitoring and panels.

No function of this module queries a server. The state may be old: see ``ServerState.age``.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from django.db import connections

from pinning_middleware import signals
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers.dialects.postgresql import LSN
from pinning_middleware.servers.registry import Endpoint, Server
from pinning_middleware.utils import counters
from pinning_middleware.utils.forks import ForkSafeLock

# The reason of a replica with weight 0, which is out of rotation on purpose.
DRAINED: Final = "drained"
# The error of the replica that serves although it lags too far behind.
ONLY_ONE_LEFT: Final = "lags, but serves because no other replica is in rotation"
# Overall health; also the exit status of ``pinning_status``.
OK, DEGRADED, DOWN = range(3)
HEALTH_NAMES: Final = {OK: "healthy", DEGRADED: "degraded", DOWN: "down"}


class ServerState(NamedTuple):
    """
    The state of one server behind one alias, as last seen by this process.

    - ``pool``: alias of the pool's primary.
    - ``alias``: alias that resolves to the server.
    - ``address``: ``host:port`` as reported by the server; as configured while that is unknown; the
      path of an SQLite file.
    - ``configured``: the role in the settings.
    - ``role``: the role of the server, or ``None`` if unknown.
    - ``state``: whether reads go to the server; ``unknown`` until it has been probed or read.
    - ``reason``: why it is out of rotation, a ``pinning_middleware.reasons.Fault`` or ``drained``
      (weight 0).
    - ``since``: start of that state (seconds since the epoch), or ``None`` if it has not changed
      since the process started.
    - ``weight``: weight in the settings, or ``None`` for a primary.
    - ``reads``: reads of this process.
    - ``position``: replication position in the database's own notation.
    - ``behind_bytes``: distance to the primary in PostgreSQL's log.
    - ``lag``: last measured replication lag (seconds).
    - ``age``: time since the last probe (seconds).
    - ``retry_in``: time until the next probe of a server that is out of rotation (seconds).
    - ``error``: why it is unreachable, or a problem of a server that is in rotation.
    - ``reads_bounded``: whether a read ends if the server does not answer, or ``None`` if unknown.
    - ``tier``: the tier in the settings, or ``None`` for a primary.
    - ``groups``: the groups in the settings, whose reads alone go to it, or ``None``.
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
    reads_bounded: bool | None = None
    tier: int | None = None
    groups: tuple[str, ...] | None = None

    @property
    def share(self) -> str | None:
        """The weight, with the tier and the groups if there are any, or None for a primary."""
        if self.weight is None:
            return None
        tier = f", tier {self.tier}" if self.tier not in (None, 1) else ""
        groups = f", for {' and '.join(self.groups)}" if self.groups else ""
        return f"{self.weight}{tier}{groups}"


class Event(NamedTuple):
    """
    A signal, repeated ``times`` times in a row, the last time ``at`` (seconds since the epoch).

    ``kind`` is the name of the signal, ``alias`` the affected alias, ``served`` the alias that
    served the read instead, or ``""``, and ``reason`` the reason or error of the signal.
    """

    at: float
    kind: str
    pool: str
    alias: str
    served: str
    reason: str
    times: int = 1


# Oldest first.
recent_events: deque[Event] = deque(maxlen=100)


# Servers


def servers() -> list[ServerState]:
    """
    Return the state of each server of each alias of each pool.

    An alias whose server is not yet known has one row. Does no I/O.
    """
    reads = _reads_by_address()
    rows: list[ServerState] = []
    for pool in pools().all:
        for endpoint in (pool.endpoint, *pool.endpoints.values()) if pool.replicas else ():
            # SLAVE_DATABASES may list aliases of another pool.
            if not any((row.pool, row.alias) == (pool.primary, endpoint.alias) for row in rows):
                rows.extend(_rows_of(pool, endpoint, reads))
    return with_freshest_serving(rows)


def with_freshest_serving(rows: list[ServerState]) -> list[ServerState]:
    """Return the rows, with the freshest replica of each pool in rotation if all of them lag."""
    for pool in {row.pool for row in rows}:
        replicas = [
            row
            for row in rows
            if row.pool == pool and row.configured == "replica" and not row.groups
        ]
        lagging = [row for row in replicas if row.reason == Fault.LAG and row.weight != 0]
        if lagging and all(row.state == "out" for row in replicas):
            freshest = min(lagging, key=lambda row: row.lag or 0.0)
            serving = freshest._replace(state="in", reason="", retry_in=None, error=ONLY_ONE_LEFT)
            rows = [serving if row is freshest else row for row in rows]
    return rows


Reads = dict[tuple[str, str], dict[tuple[str, int] | None, int]]


def _reads_by_address() -> Reads:
    found: Reads = {}
    # Copy, because other threads add reads during the iteration.
    for (pool, alias, server, _), number in dict(counters.reads).items():
        by_address = found.setdefault((pool, alias), {})
        address = None if server is None else server.identity.host_and_port
        by_address[address] = by_address.get(address, 0) + number
    return found


def _rows_of(pool: Pool, endpoint: Endpoint, reads: Reads) -> Iterator[ServerState]:
    recent = endpoint.recent_servers
    by_address = reads.get((pool.primary, endpoint.alias), {})
    for server in recent or (None,):
        if len(recent) < 2:
            number = sum(by_address.values())
        else:
            number = by_address.get(None if server is None else server.identity.host_and_port, 0)
        yield _row(pool, endpoint, server, number)


def _row(pool: Pool, endpoint: Endpoint, server: Server | None, reads: int) -> ServerState:
    is_primary = endpoint is pool.endpoint
    weight = None if is_primary else pool.replica_set.rotations.weights.get(endpoint.alias)
    fault, since, retry_at = endpoint.out_of_rotation, endpoint.status_since, endpoint.retry_at
    if server is not None and fault in {each.out_of_rotation for each in endpoint.recent_servers}:
        fault, since = server.out_of_rotation, server.status_since
        retry_at = endpoint.retry_at if endpoint.out_of_rotation else server.retry_at
    reason: str = fault or ""
    state: Literal["in", "out", "unknown"] = "out" if reason else "in"
    is_probed = server is not None and (server.last_probed or server.reports_position is False)
    if not reason and not is_probed and not reads:
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
        tier=None if is_primary else pool.spec.placement(endpoint.alias).tier,
        groups=pool.spec.placement(endpoint.alias).groups or None,
        reads=reads,
        position=None if server is None else format_position(server, _vendor(endpoint.alias)),
        behind_bytes=None if server is None or is_primary else _bytes_behind(pool, server),
        lag=None if server is None or is_primary else server.lag,
        age=now - server.last_probed if server is not None and server.last_probed else None,
        retry_in=max(0.0, retry_at - now) if fault else None,
        error=endpoint.error if endpoint.out_of_rotation else _misdirection(pool, endpoint),
        reads_bounded=endpoint.reads_are_bounded,
    )


def _misdirection(pool: Pool, endpoint: Endpoint) -> str:
    """Return an error if a replica's alias resolves to the primary only, else ""."""
    if endpoint is pool.endpoint or pool.endpoint.server is None:
        return ""
    if any(server is not pool.endpoint.server for server in endpoint.recent_servers or (None,)):
        return ""
    return f"it is connected to the primary ({pool.primary}), not to a replica"


def _role(server: Server | None) -> Literal["primary", "replica"] | None:
    if server is None or server.is_replica is None:
        return None
    return "replica" if server.is_replica else "primary"


def _vendor(alias: str) -> str:
    return connections[alias].vendor


def address_of(alias: str, server: Server | None) -> str:
    """Return the address reported by a server, or the configured one if it is unknown."""
    if server is not None and server.identity.address:
        return _host_and_port(*server.identity.host_and_port)
    settings = connections.settings[alias]
    if settings["HOST"]:
        return _host_and_port(settings["HOST"], settings["PORT"])
    return str(settings["PORT"] or settings["NAME"] or "")


def _host_and_port(host: str, port: object) -> str:
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_position(server: Server, vendor: str) -> str | None:
    """
    Return a server's position in its database's own notation, or None if unknown.

    An LSN (``0/3000148``) or transaction ID of PostgreSQL, GTIDs of MariaDB (``0-1-8``) and of
    MySQL (``uuid:1-5``).
    """
    if vendor == "postgresql":
        if not server.last_probed or not server.replayed_offset:
            return None
        return (
            _format_lsn(server.replayed_offset)
            if server.strategy == LSN
            else str(server.replayed_offset)
        )
    points = sorted(server.position.items())
    if server.system == "mysql":
        parts = ((*log.partition("/")[::2], end) for log, end in points)
        return ",".join(f"{log}:{first or 1}-{end}" for log, first, end in parts) or None
    return ",".join(f"{log}-{point}" for log, point in points) or None


def _format_lsn(point: int) -> str:
    return f"{point >> 32:X}/{point & 0xFFFFFFFF:X}"


def _bytes_behind(pool: Pool, server: Server) -> int | None:
    primary = pool.endpoint.server
    if primary is None or primary.is_replica is not False or not server.last_probed:
        return None
    if server.strategy != LSN or _vendor(pool.primary) != "postgresql" or not server.is_replica:
        return None
    if not primary.position:
        return None
    return max(0, max(primary.position.values()) - server.replayed_offset)


# Health


def lag_threshold() -> float:
    """
    Return the lag that counts as a fault (seconds).

    That is ``PINNING_MAX_LAG``, or the window, after which pins without a position have ended.
    """
    return conf.seconds if conf.max_lag is None else conf.max_lag


def health(rows: list[ServerState]) -> int:
    """
    Return the overall health: ``OK`` (0), ``DEGRADED`` (1) or ``DOWN`` (2).

    ``DOWN`` if the primary of a pool is out of rotation or a replica, or if no replica of a pool
    is in rotation. ``DEGRADED`` if any server is out of rotation, unknown, lagging or has an error.
    """
    worst = OK
    for pool in {row.pool for row in rows}:
        of_pool = [row for row in rows if row.pool == pool]
        primaries = [row for row in of_pool if row.configured == "primary"]
        replicas = [row for row in of_pool if row.configured == "replica"]
        if any(row.state == "out" or row.role == "replica" for row in primaries):
            return DOWN
        if not any(row.state != "out" for row in replicas):
            return DOWN
        if any(_is_degraded(row) for row in of_pool):
            worst = DEGRADED
    return worst


def _is_degraded(row: ServerState) -> bool:
    is_behind = row.lag is not None and row.lag > lag_threshold()
    is_out = row.state == "out" and row.reason != DRAINED
    return is_out or row.state == "unknown" or is_behind or bool(row.error)


def format_duration(seconds: float) -> str:
    """Return a duration with a unit: ``0.4 s``, ``95 s``, ``12 min``, ``3 h``, ``9 d``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    for size, name in ((1, "s"), (60, "min"), (3600, "h")):
        if seconds < size * 120:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def format_size(number: float) -> str:
    """Return a size with a unit: ``512 B``, ``1.2 kB``, ``16 MB``."""
    for name in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {name}" if name == "B" or number >= 10 else f"{number:.1f} {name}"
        number /= 1000
    return f"{number:.0f} TB"


# Counters


_lock = ForkSafeLock()


def get_stats() -> dict[str, Any]:
    """
    Return the counters of this process. They only increase and are JSON serialisable.

    - ``reads``: pool → alias that served → address of its server (``""`` if unknown) → reason →
      number of reads.
    - ``pins``: number of pins ``set``, ``inherited``, of tokens ``rejected``, and of pins ``lost``
      that the cache of ``CacheStore`` did not accept.
    - ``rejected``: reason → number of ignored tokens.
    - ``fallbacks``: pool → reason → number of scopes that read from another role than intended.
    - ``retries``: pool → alias that failed → alias that served → number of reads.
    - ``refusals``: pool → name of a table, a statement or a role → number of reads that went to the
      primary because every standby refuses them.
    - ``retry_404``: number of views that ended in 404 on a replica and were ``found`` or
      ``missing`` on the primary, or ``refused`` because the limit was reached.
    - ``task_retries``: number of tasks that were ``requeued`` until a replica has caught up, or
      that read the ``primary`` in the end.
    - ``waits``: pool → ``count`` of waits for a replica, ``reached`` of those that ended with one,
      and the total ``seconds``.
    """
    reads: Counter[tuple[str, ...]] = Counter()
    for (pool, alias, server, reason), number in dict(counters.reads).items():
        address = "" if server is None else address_of(alias, server)
        reads[pool, alias, address, reason] += number
    with _lock:
        # The three counts of one pool belong together.
        waits = _nested(counters.waits)
    rejected = dict(counters.rejected_tokens)
    pins = {
        "set": counters.pin_events["set"],
        "inherited": counters.pin_events["inherited"],
        "rejected": sum(rejected.values()),
        "lost": counters.pin_events["lost"],
    }
    return {
        "reads": _nested(reads),
        "pins": pins,
        "rejected": rejected,
        "fallbacks": _nested(counters.fallbacks),
        "retries": _nested(counters.retries),
        "refusals": _nested(counters.refusals),
        "retry_404": {name: counters.retries_404[name] for name in ("found", "missing", "refused")},
        "task_retries": {name: counters.task_retries[name] for name in ("requeued", "primary")},
        "waits": waits,
    }


def _nested(counts: Mapping[Any, float]) -> dict[str, Any]:
    """Return counts by tuples of names as nested dictionaries."""
    nested: dict[str, Any] = {}
    # Copy, because other threads count during the iteration.
    for (*path, name), number in dict(counts).items():
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = number
    return nested


# Signal receivers, called from any thread


def _record_event(kind: str, pool: str, alias: str, served: str, reason: str) -> None:
    """Append an event, or count it again if it repeats the last one."""
    with _lock:
        if recent_events and recent_events[-1][1:6] == (kind, pool, alias, served, reason):
            recent_events[-1] = recent_events[-1]._replace(
                at=time.time(), times=recent_events[-1].times + 1
            )
        else:
            recent_events.append(Event(time.time(), kind, pool, alias, served, reason))


def _count_fallback(*, signal: Any, sender: str, served: str, reason: str, **kwargs: Any) -> None:
    with _lock:
        counters.fallbacks[sender, reason] += 1
    to_primary = signal is signals.fell_back_to_primary
    kind = "fell_back_to_primary" if to_primary else "fell_back_to_replica"
    _record_event(kind, sender, "", served, reason)


def _count_retry(*, sender: str, failed: str, served: str, error: object, **kwargs: Any) -> None:
    if failed == served:
        # Only the connection was lost: the read did not move to another server.
        return
    with _lock:
        counters.retries[sender, failed, served] += 1
    _record_event("read_retried", sender, failed, served, _first_line(error or ""))


def _count_wait(*, sender: str, seconds: float, reached: bool, **kwargs: Any) -> None:
    with _lock:
        counters.waits[sender, "count"] += 1
        counters.waits[sender, "reached"] += int(reached)
        counters.waits[sender, "seconds"] += seconds


def _record_removed(*, sender: str, replica: str, reason: str, **kwargs: Any) -> None:
    _record_event("replica_removed", sender, replica, "", reason)


def _record_restored(*, sender: str, replica: str, **kwargs: Any) -> None:
    _record_event("replica_restored", sender, replica, "", "")


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def install() -> None:
    """Connect the receivers of signals. Idempotent."""
    for signal, receiver in (
        (signals.fell_back_to_primary, _count_fallback),
        (signals.fell_back_to_replica, _count_fallback),
        (signals.read_retried, _count_retry),
        (signals.replica_wait_finished, _count_wait),
        (signals.replica_removed, _record_removed),
        (signals.replica_restored, _record_restored),
    ):
        signal.connect(receiver, dispatch_uid=f"pinning_middleware.stats{receiver.__name__}")


os.register_at_fork(after_in_child=recent_events.clear)
