"""Asking every server of every pool at once, within a bounded time."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from django.db import DatabaseError, InterfaceError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers import connect
from pinning_middleware.servers.liveness import clear_deadline, start_deadline
from pinning_middleware.servers.probe import endpoint_for, probe, state_of
from pinning_middleware.servers.registry import Server, registry
from pinning_middleware.stats import DRAINED, ServerState, servers

__all__ = ["TIMEOUT", "Asker", "quiet"]

# Seconds that asking takes at most: a connection may take two, a question one.
TIMEOUT: Final = 2.5

# What a standby of PostgreSQL says of its replay, to any role: whether it is paused, whether
# anybody sends it the log, and the age of the last transaction in seconds.
_REPLAY: Final = (
    "SELECT pg_is_wal_replay_paused(), (pg_stat_get_wal_receiver()).pid IS NOT NULL, "
    "EXTRACT(EPOCH FROM clock_timestamp() - pg_last_xact_replay_timestamp())"
)


class _Answer(NamedTuple):
    server: Server | None = None
    # The row of `_REPLAY`.
    replay: tuple[Any, ...] = ()


class Asker:
    """
    Asks the servers of all pools, each on a connection of its own that nobody stands in for, and
    all of them at the same time. Connections are kept until ``close``.
    """

    def __init__(self) -> None:
        self._connections: dict[str, BaseDatabaseWrapper] = {}
        self._asking: dict[str, threading.Thread] = {}
        self._is_over = False
        # When a primary was met at which position, the newest last.
        self._primaries: dict[str, list[tuple[float, Position]]] = {}

    def ask(self, seconds: float = TIMEOUT) -> list[ServerState]:
        """Query everybody once, for so many seconds at most; return ``stats.servers()`` then."""
        until = time.monotonic() + seconds
        answers: dict[str, _Answer] = {}
        known = [pool for pool in pools().all if pool.replicas]
        aliases = dict.fromkeys(alias for pool in known for alias in (pool.primary, *pool.replicas))
        for alias in aliases:
            if alias not in self._asking:
                self._begin(alias, answers)
        for thread in tuple(self._asking.values()):
            thread.join(max(0.0, until - time.monotonic()))
        late = set(self._asking)
        answers = dict(answers)
        for pool in known:
            # The primary first: whoever else takes writes is told by it.
            for alias in (pool.primary, *pool.replicas):
                if (server := answers.get(alias, _Answer()).server) is not None:
                    pool.judge(registry.endpoint(alias, pool.primary), server)
            self._note_primary(pool)
        by_primary = {pool.primary: pool for pool in known}
        return [
            self._said(row, answers.get(row.alias), by_primary[row.pool], row.alias in late)
            for row in servers()
        ]

    def close(self) -> None:
        """Close the connections; what is still asked closes its own."""
        self._is_over = True
        for alias in tuple(self._connections):
            if alias not in self._asking:
                self._drop(alias)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # One server, in a thread of its own

    def _begin(self, alias: str, answers: dict[str, _Answer]) -> None:
        def run() -> None:
            try:
                answers[alias] = self._look(alias)
            except (DatabaseError, InterfaceError):
                # What went wrong is known of the server by now.
                self._drop(alias)
            finally:
                self._asking.pop(alias, None)
                if self._is_over:
                    self._drop(alias)

        # A daemon, since one that hangs is not waited for when the process ends.
        thread = threading.Thread(target=run, name=f"pinning-asker-{alias}", daemon=True)
        self._asking[alias] = thread
        thread.start()

    def _look(self, alias: str) -> _Answer:
        connection = self._connections.get(alias)
        if connection is None:
            connection = self._connections[alias] = connect.dedicated_connection(alias)
        seen = probe(connection)
        if seen is None:
            self._reach(connection)
            return _Answer()
        replay: tuple[Any, ...] = ()
        if seen.server.is_replica and connection.vendor == "postgresql":
            replay = _ask(connection, _REPLAY)
        return _Answer(seen.server, replay)

    def _reach(self, connection: BaseDatabaseWrapper) -> None:
        """Find out whether one that tells no position can be connected to at all."""
        endpoint = endpoint_for(connection)
        try:
            if connection.connection is not None and not connection.is_usable():
                connection.close()
            connection.ensure_connection()
        except (DatabaseError, InterfaceError) as error:
            registry.mark_down(endpoint, Fault.UNREACHABLE, conf.retry_after, error)
            raise
        registry.mark_up(endpoint)

    def _drop(self, alias: str) -> None:
        connection = self._connections.pop(alias, None)
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    # What the answers mean

    def _note_primary(self, pool: Pool) -> None:
        server = pool.endpoint.server
        if server is not None and server.position and not server.is_replica:
            met = self._primaries.setdefault(pool.primary, [])
            met.append((server.last_probed, dict(server.position)))
            del met[:-600]

    def _said(
        self, row: ServerState, answer: _Answer | None, pool: Pool, is_late: bool
    ) -> ServerState:
        if is_late and row.state != "out":
            error = "it has not answered in time"
            return row._replace(state="out", reason=Fault.UNRESPONSIVE, since=None, error=error)
        if answer is None:
            return row
        if row.state == "unknown":
            row = row._replace(state="out" if row.weight == 0 else "in")
            row = row._replace(reason=DRAINED if row.weight == 0 else "")
        if row.configured == "primary":
            return row._replace(error="it is a replica") if row.role == "replica" else row
        if answer.server is None or row.role != "replica":
            return row
        has_all, lag = self._lag(pool, answer)
        error = row.error
        if answer.replay and answer.replay[0]:
            error = error or "its replay is paused"
        elif answer.replay and not answer.replay[1] and not has_all:
            error = error or "nobody sends it the log"
        return row._replace(lag=row.lag if lag is None else lag, error=error)

    def _lag(self, pool: Pool, answer: _Answer) -> tuple[bool, float | None]:
        """Return whether a replica has all that its primary had, and for how long it has not."""
        server, met = answer.server, self._primaries.get(pool.primary, [])
        if server is None or not met or pool.dialect is None:
            return False, None
        newest = met[-1][0]
        for at, position in reversed(met):
            # Of one that hides its timeline, its word will do for this.
            if server.reported_at_least(position) or pool.dialect.reached(
                position, server.position
            ):
                return at == newest, newest - at
        said = answer.replay[2] if answer.replay else None
        if said is not None:
            return False, max(0.0, float(said))
        return False, newest - met[0][0] if len(met) > 1 else None


def _ask(connection: BaseDatabaseWrapper, sql: str) -> tuple[Any, ...]:
    """Query past Django's cursors, within the deadline of every question."""
    raw: Any = connection.connection
    link = state_of(connection)
    guard = start_deadline(raw, link)
    try:
        with connection.wrap_database_errors, raw.cursor() as cursor:
            cursor.execute(sql)
            return tuple(cursor.fetchone() or ())
    finally:
        clear_deadline(link, guard)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """
    Keep what is asked here out of the log: a command's process begins with knowing nothing, so
    every run would say anew what the site's own processes have said.
    """
    logger = logging.getLogger("pinning_middleware.servers")
    refuse = _Refuse()
    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


class _Refuse(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False
