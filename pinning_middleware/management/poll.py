"""Poll all servers of all pools concurrently, within a deadline."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from django.db import DatabaseError, InterfaceError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers import connect
from pinning_middleware.servers.dialects import Refusal, Row
from pinning_middleware.servers.probe import endpoint_for, fetch, probe, standby_limits
from pinning_middleware.servers.registry import Server, registry
from pinning_middleware.stats import DRAINED, ServerState, servers, with_freshest_serving

# Maximum duration of a poll (seconds).
TIMEOUT: Final = 2.5

# What any role may read on a PostgreSQL standby: whether replay is paused, whether a WAL receiver
# runs, and the age of the last replayed transaction (seconds). A boolean that was fetched without a
# cursor would be text.
_REPLAY: Final = (
    "SELECT pg_is_wal_replay_paused()::int, "
    "((pg_stat_get_wal_receiver()).pid IS NOT NULL)::int, "
    "EXTRACT(EPOCH FROM clock_timestamp() - pg_last_xact_replay_timestamp())"
)
# The database of a connection, by vendor. Behind a pooler its name may differ from the settings.
_DATABASE: Final = {"postgresql": "SELECT current_database()", "mysql": "SELECT DATABASE()"}


class _Reply(NamedTuple):
    server: Server | None = None
    # The row of `_REPLAY`.
    replay: Row = ()
    database: str = ""


class ServerPoll:
    """
    Polls the servers of all pools at the same time.

    Each server has a connection of its own, without failover. Connections are kept until
    ``close()``, so that the poll can be repeated.
    """

    def __init__(self) -> None:
        self._connections: dict[str, BaseDatabaseWrapper] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._is_closed = False
        # Times and positions of each primary, oldest first, to estimate lag.
        self._history: dict[str, list[tuple[float, Position]]] = {}
        # Aliases that the last poll has found to be no replica of their primary, and why.
        self.misconfigured: dict[str, str] = {}
        # By the alias of a primary, what every standby refuses to the role.
        self.refusals: dict[str, Refusal] = {}

    def poll(self) -> list[ServerState]:
        """Probe every server once, for at most ``TIMEOUT`` seconds; return their states."""
        deadline = time.monotonic() + TIMEOUT
        replies: dict[str, _Reply] = {}
        polled = [pool for pool in pools().all if pool.replicas]
        aliases = dict.fromkeys(
            alias for pool in polled for alias in (pool.primary, *pool.replicas)
        )
        for alias in aliases:
            if alias not in self._threads:
                self._start(alias, replies)
        for thread in tuple(self._threads.values()):
            thread.join(max(0.0, deadline - time.monotonic()))
        late = set(self._threads)
        replies = dict(replies)
        self.misconfigured.clear()
        for pool in polled:
            # The primary first: other servers that accept writes are compared with it.
            for alias in (pool.primary, *pool.replicas):
                if (server := replies.get(alias, _Reply()).server) is not None:
                    pool.health.update_status(registry.endpoint(alias, pool.primary), server)
            self._record_primary_position(pool)
        # SLAVE_DATABASES may be a second pool of a primary.
        pool_of = {
            (pool.primary, alias): pool
            for pool in polled
            for alias in (pool.primary, *pool.replicas)
        }
        states = (
            self._state(row, replies, pool_of[row.pool, row.alias], row.alias in late)
            for row in servers()
        )
        return with_freshest_serving([_without_lagging(state) for state in states])

    def close(self) -> None:
        """Close idle connections. A thread that is still probing closes its own."""
        self._is_closed = True
        for alias in tuple(self._connections):
            if alias not in self._threads:
                self._disconnect(alias)

    def __enter__(self) -> ServerPoll:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # One server, in a thread of its own

    def _start(self, alias: str, replies: dict[str, _Reply]) -> None:
        def run() -> None:
            try:
                replies[alias] = self._probe(alias)
            except (DatabaseError, InterfaceError):
                # The registry has recorded the error.
                self._disconnect(alias)
            finally:
                self._threads.pop(alias, None)
                if self._is_closed:
                    self._disconnect(alias)

        # A daemon thread, so that an unresponsive server does not delay the end of the process.
        thread = threading.Thread(target=run, name=f"pinning-poll-{alias}", daemon=True)
        self._threads[alias] = thread
        thread.start()

    def _probe(self, alias: str) -> _Reply:
        connection = self._connections.get(alias)
        if connection is None:
            connection = self._connections[alias] = connect.dedicated_connection(alias)
        result = probe(connection)
        if result is None:
            self._check_reachable(connection)
            return _Reply()
        replay: Row = ()
        if result.server.is_replica and connection.vendor == "postgresql":
            replay = fetch(connection, _REPLAY)
        if not result.server.is_replica:
            self.refusals[alias] = standby_limits(connection)
        database = ""
        if connection.vendor in _DATABASE:
            database = str(fetch(connection, _DATABASE[connection.vendor])[0] or "")
        return _Reply(result.server, replay, database)

    def _check_reachable(self, connection: BaseDatabaseWrapper) -> None:
        """Check whether a server that reports no position accepts connections."""
        endpoint = endpoint_for(connection)
        try:
            if connection.connection is not None and not connection.is_usable():
                connection.close()
            connection.ensure_connection()
        except (DatabaseError, InterfaceError) as error:
            registry.mark_down(endpoint, Fault.UNREACHABLE, conf.retry_after, error)
            raise
        registry.mark_up(endpoint)

    def _disconnect(self, alias: str) -> None:
        connection = self._connections.pop(alias, None)
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    # Interpretation of the replies

    def _record_primary_position(self, pool: Pool) -> None:
        server = pool.endpoint.server
        if server is not None and server.position and not server.is_replica:
            history = self._history.setdefault(pool.primary, [])
            history.append((server.last_probed, Position(dict(server.position))))
            del history[:-600]

    def _state(
        self, row: ServerState, replies: dict[str, _Reply], pool: Pool, is_late: bool
    ) -> ServerState:
        reply = replies.get(row.alias)
        if is_late and row.state != "out":
            error = "no reply within the deadline"
            return row._replace(state="out", reason=Fault.UNRESPONSIVE, since=None, error=error)
        if reply is None:
            return row
        if row.state == "unknown":
            row = row._replace(state="out" if row.weight == 0 else "in")
            row = row._replace(reason=DRAINED if row.weight == 0 else "")
        if row.configured == "primary":
            return row._replace(error="it is a replica") if row.role == "replica" else row
        lag, error = row.lag, row.error or _misconfiguration(row, replies, pool)
        if row.state == "in" and error:
            self.misconfigured[row.alias] = error
        if reply.server is not None and row.role == "replica":
            has_caught_up, measured = self._measure_lag(pool, reply)
            lag = lag if measured is None else measured
            if reply.replay and int(reply.replay[0]):
                error = error or "its replay is paused"
            elif reply.replay and not int(reply.replay[1]) and not has_caught_up:
                error = error or "no WAL receiver is running"
        return row._replace(lag=lag, error=error)

    def _measure_lag(self, pool: Pool, reply: _Reply) -> tuple[bool, float | None]:
        """Return whether a replica has caught up, and its lag (seconds) or None if unknown."""
        server, history = reply.server, self._history.get(pool.primary, [])
        if server is None or not history or pool.dialect is None:
            return False, None
        newest = history[-1][0]
        for at, position in reversed(history):
            # For lag, the reported position is enough even if the timeline is hidden.
            if server.reported_at_least(position.points) or pool.dialect.reached(
                position, server.position
            ):
                return at == newest, newest - at
        replay_age = reply.replay[2] if reply.replay else None
        if replay_age is not None:
            return False, max(0.0, float(replay_age))
        return False, newest - history[0][0] if len(history) > 1 else None


def _without_lagging(row: ServerState) -> ServerState:
    """Return the row of a replica out of rotation if it lags more than PINNING_MAX_LAG."""
    if row.state != "in" or row.configured != "replica" or conf.max_lag is None:
        return row
    if row.lag is None or row.lag <= conf.max_lag:
        return row
    return row._replace(state="out", reason=Fault.LAG)


def _misconfiguration(row: ServerState, replies: dict[str, _Reply], pool: Pool) -> str:
    """Return why an alias cannot be a replica of its primary, or "" if it can."""
    reply, primary = replies[row.alias], replies.get(pool.primary)
    if primary is None:
        return ""
    if pool.is_mirror(row.alias):
        return f"it has the same HOST, PORT and NAME as {pool.primary}"
    if row.role == "replica" and reply.database != primary.database:
        return (
            f"it is connected to the database {reply.database!r}, but {pool.primary} is connected "
            f"to {primary.database!r}"
        )
    return ""


@contextlib.contextmanager
def silence_server_logs() -> Iterator[None]:
    """
    Suppress log records about servers.

    A command starts with an empty registry, so every run would repeat what the site's own
    processes have already logged.
    """
    logger = logging.getLogger("pinning_middleware.servers")

    def suppress(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(suppress)
    try:
        yield
    finally:
        logger.removeFilter(suppress)
