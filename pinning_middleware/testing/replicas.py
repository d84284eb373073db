"""Replicas that lag, die and come back when a test says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.reasons import Reason
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.replica_set import Nodes
from pinning_middleware.servers import connect
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.registry import registry
from pinning_middleware.sql import table_of
from pinning_middleware.testing.reads import REPLICA, here, names, observed, tables_of
from pinning_middleware.utils import counters

__all__ = ["Replicas", "StaleRead", "forbid_stale_reads", "replicas"]

# Seconds for which a real replica may take to do what it is told.
FIRST_CHECK_AFTER: Final = 10.0

# PostgreSQL's documentation, "Recovery Control Functions"; MariaDB's, "STOP REPLICA" and
# "MASTER_GTID_WAIT"; MySQL's, "STOP REPLICA" and "Functions Used with Global Transaction
# Identifiers".
_PAUSE: Final = {
    "postgresql": "SELECT pg_wal_replay_pause()",
    "mariadb": "STOP SLAVE SQL_THREAD",
    "mysql": "STOP REPLICA SQL_THREAD",
}
_RESUME: Final = {
    "postgresql": "SELECT pg_wal_replay_resume()",
    "mariadb": "START SLAVE SQL_THREAD",
    "mysql": "START REPLICA SQL_THREAD",
}
_PAUSED: Final = {"postgresql": "SELECT pg_get_wal_replay_pause_state() = 'paused'"}
_WRITTEN: Final = {
    "postgresql": "SELECT pg_current_wal_lsn()::text",
    "mariadb": "SELECT @@gtid_current_pos",
    "mysql": "SELECT @@GLOBAL.gtid_executed",
}
_REACHED: Final = {
    "postgresql": "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn",
    "mariadb": "SELECT MASTER_GTID_WAIT(%s, 0.1) = 0",
    "mysql": "SELECT WAIT_FOR_EXECUTED_GTID_SET(%s, 0.1) = 0",
}


class StaleRead(AssertionError):
    """A read of a replica that lags, of a table that was written since."""


class Replicas:
    """
    The replicas of the site, in the hands of a test. What it does holds until the test undoes it,
    or is over; ``lag`` and ``kill`` are blocks as well::

        with replicas.lag("replica1"):
            ...

    No alias means every replica. ``ValueError`` for one that is no replica.
    """

    def __init__(self) -> None:
        # Alias → table → the line that wrote to it; or the statement, where it may be any of
        # those that it names.
        self._written: dict[str, dict[str, str]] = {}

    @property
    def lagging(self) -> frozenset[str]:
        """The aliases that lag now because a test said so."""
        return frozenset(self._written)

    def lag(self, *aliases: str) -> _Undo:
        """
        Let replicas lag from now on. A real one stops replaying; a test mirror, and SQLite, is
        taken for one that has nothing of what is written from now on.

        ``RuntimeError`` where a real one can't be told to.
        """
        chosen = self._chosen(aliases)
        for alias in chosen:
            self._tell(alias, _PAUSE, _PAUSED)
        if not self._written:
            counters.write_observers.append(self._note_write)
        self._written.update({alias: {} for alias in chosen if alias not in self._written})
        # What a real one has it goes on to serve.
        pretended = {alias for alias in chosen if not _is_real(alias)}
        self._pretend(Nodes.held_back | pretended, Nodes.cut_off)
        return _Undo(lambda: self.catch_up(*chosen))

    def catch_up(self, *aliases: str) -> None:
        """
        Let replicas have everything. A real one replays until it has what its primary has now;
        an SQLite file, which nothing connects to its primary, is made a copy of it.

        ``RuntimeError`` where a real one does not catch up within ten seconds.
        """
        chosen = self._chosen(aliases)
        for alias in chosen:
            if alias in self._written:
                self._tell(alias, _RESUME)
            self._bring(alias)
            self._written.pop(alias, None)
        if not self._written and self._note_write in counters.write_observers:
            counters.write_observers.remove(self._note_write)
        self._pretend(Nodes.held_back - set(chosen), Nodes.cut_off)

    def kill(self, *aliases: str) -> _Undo:
        """Let replicas be out of reach for this process: they leave the rotation."""
        chosen = self._chosen(aliases)
        connect.unreachable_in_tests.update(chosen)
        for alias in chosen:
            if _is_real(alias):
                connection = connections[alias]
                if not connection.in_atomic_block:
                    connection.close()
        self._pretend(Nodes.held_back, Nodes.cut_off | set(chosen))
        return _Undo(lambda: self.revive(*chosen))

    def revive(self, *aliases: str) -> None:
        """Let replicas that were killed be in reach again, at once."""
        chosen = self._chosen(aliases)
        connect.unreachable_in_tests.difference_update(chosen)
        for alias in chosen:
            registry.mark_up(registry.endpoint(alias))
        self._pretend(Nodes.held_back, Nodes.cut_off - set(chosen))

    def reset(self) -> None:
        """Let no replica lag or be out of reach because of a test."""
        known = pools().by_replica
        for alias in tuple(self._written):
            # The settings of the test may be gone already.
            if alias in known:
                self._tell(alias, _RESUME)
        self._written.clear()
        if self._note_write in counters.write_observers:
            counters.write_observers.remove(self._note_write)
        connect.unreachable_in_tests.clear()
        if Nodes.held_back or Nodes.cut_off:
            self._pretend(frozenset(), frozenset())

    # What was written since a replica lags

    def written_since(self, alias: str, table: str) -> str | None:
        """Return the line that wrote to a table since this replica lags, ``None``: none did."""
        # A copy, since other threads write meanwhile.
        written = tuple(self._written.get(alias, {}).items())
        return next((place for what, place in written if names(what, table)), None)

    def _note_write(self, alias: str, sql: str) -> None:
        table = table_of(sql)
        written = sql if table is None else table.rpartition(".")[2]
        known = pools().by_replica
        for replica, tables in self._written.items():
            if replica in known and known[replica].primary == alias:
                tables.setdefault(written, here())

    # Who is who

    def _chosen(self, aliases: tuple[str, ...]) -> tuple[str, ...]:
        known = pools().by_replica
        for alias in aliases:
            if alias not in known:
                names = ", ".join(sorted(known)) or "none is configured"
                raise ValueError(f"{alias!r} is no replica of PINNING_REPLICAS ({names})")
        return aliases or tuple(known)

    def _pretend(self, held_back: frozenset[str], cut_off: frozenset[str]) -> None:
        Nodes.held_back, Nodes.cut_off = held_back, cut_off
        for pool in pools().all:
            pool.count()

    # What a real server is told

    def _tell(
        self, alias: str, orders: dict[str, str], checks: dict[str, str] | None = None
    ) -> None:
        if not _is_real(alias):
            return
        vendor = _vendor(alias)
        try:
            with _beside(alias) as ask:
                ask(orders[vendor])
                if checks and vendor in checks:
                    _until(lambda: ask(checks[vendor]), f"{alias} did not pause")
        except (DatabaseError, InterfaceError) as error:
            raise RuntimeError(
                f"{alias} can't be told {orders[vendor]!r}: {error}. Let the tests connect as a "
                "role that may (a superuser of the test servers), or make the replica a mirror: "
                f'DATABASES[{alias!r}]["TEST"] = {{"MIRROR": {_pool(alias).primary!r}}}.'
            ) from error

    def _bring(self, alias: str) -> None:
        if _is_mirror(alias):
            return
        vendor, primary = _vendor(alias), _pool(alias).primary
        if vendor == "sqlite":
            _copy(primary, alias)
            return
        if vendor not in _WRITTEN:
            return
        with _beside(primary) as ask_primary, _beside(alias) as ask:
            wanted = ask_primary(_WRITTEN[vendor])
            _until(lambda: ask(_REACHED[vendor], (wanted,)), f"{alias} did not reach {wanted}")


class _Undo:
    """Undoes something where a block ends; without one it stays done."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        self._undo()


def _pool(alias: str) -> Pool:
    return pools().by_replica[alias]


def _is_mirror(alias: str) -> bool:
    return _pool(alias).is_mirror(alias)


def _is_real(alias: str) -> bool:
    """Return whether a replica replays a log, and can be told to stop."""
    return connections[alias].vendor in ("postgresql", "mysql") and not _is_mirror(alias)


def _vendor(alias: str) -> str:
    connection: Any = connections[alias]
    if connection.vendor == "mysql" and connection.connection is not None:
        return "mariadb" if connection.mysql_is_mariadb else "mysql"
    if connection.vendor == "mysql":
        with closing(dedicated_connection(alias)) as other:
            return "mariadb" if other.mysql_is_mariadb else "mysql"  # type: ignore[attr-defined]
    return str(connection.vendor)


@contextmanager
def _beside(alias: str) -> Iterator[Callable[..., Any]]:
    """A connection beside the site's; yields what asks over it for one value."""
    connection: BaseDatabaseWrapper = dedicated_connection(alias)

    def ask(sql: str, params: tuple[Any, ...] = ()) -> Any:
        # Past the execute wrappers: it is nothing that the site does.
        with connection.cursor() as wrapped, connection.wrap_database_errors:
            cursor = wrapped.cursor
            cursor.execute(sql, params)
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None

    try:
        yield ask
    finally:
        connection.close()


def _until(condition: Callable[[], Any], otherwise: str) -> None:
    deadline = time.monotonic() + FIRST_CHECK_AFTER
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise} within {FIRST_CHECK_AFTER:g} s")
        time.sleep(0.005)


def _copy(source: str, target: str) -> None:
    primary, replica = connections[source], connections[target]
    for connection in (primary, replica):
        connection.ensure_connection()
    if replica.in_atomic_block:
        raise RuntimeError(
            f"{target} is inside a transaction, so nothing can be copied to it: use "
            "TransactionTestCase, or leave the replica out of the test's `databases`."
        )
    primary.connection.backup(replica.connection)


replicas = Replicas()


@contextmanager
def forbid_stale_reads() -> Iterator[None]:
    """
    Raise ``StaleRead`` for a read that is meant for a replica which lags by ``replicas.lag()``,
    of a table that was written since, with the place of both; ``use_replica`` may. So a view that
    loses its pin is found without a second server.
    """
    found: list[StaleRead] = []

    def check(read: counters.Read) -> None:
        if (
            read.role != REPLICA
            or read.reason == Reason.USE_REPLICA
            or read.alias not in replicas.lagging
        ):
            return
        for table in tables_of(read.sql):
            written = replicas.written_since(read.alias, table)
            if written is not None:
                error = StaleRead(
                    f"{here()} reads {table} from {read.alias} ({read.reason}), which lags: it was "
                    f"written at {written}. {read.sql[:120]}"
                )
                found.append(error)
                raise error

    with observed(check):
        yield
    if found:
        raise found[0]
