"""Control over replicas in a test: let them lag, take them down, and bring them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any, Final

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.replica_set import ReplicaSet
from pinning_middleware.servers import connect
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.registry import registry
from pinning_middleware.sql import table_of
from pinning_middleware.testing.reads import calling_line, mentions_table
from pinning_middleware.utils import counters

# Maximum time for a real replica to pause or catch up (seconds).
TIMEOUT: Final = 10.0

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


class Replicas:
    """
    Controls the replicas of the site.

    A change lasts until it is undone or the test ends. ``lag`` and ``take_down`` are also context
    managers::

        with replicas.lag("replica1"):
            ...

    Without an alias, all replicas are meant. Methods raise ValueError for an alias that is not a
    replica.
    """

    def __init__(self) -> None:
        # Lagging alias → table → line of the first write since. If the table of a write is unknown,
        # the key is the whole statement.
        self._written: dict[str, dict[str, str]] = {}

    @property
    def lagging(self) -> frozenset[str]:
        """The aliases that were made to lag."""
        return frozenset(self._written)

    def lag(self, *aliases: str) -> AbstractContextManager[object]:
        """
        Make replicas lag. A real replica stops replaying; a test mirror or SQLite file is treated
        as if it had not replayed any later write.

        Raise RuntimeError if a real replica cannot be paused.
        """
        chosen = self._chosen(aliases)
        for alias in chosen:
            self._command(alias, _PAUSE, _PAUSED)
            if not self._written:
                counters.write_observers.append(self._record_write)
            # At once, so that reset() resumes it if the next one cannot be paused.
            self._written.setdefault(alias, {})
        # A real replica keeps serving what it has replayed.
        simulated = {alias for alias in chosen if not _is_real(alias)}
        self._simulate(ReplicaSet.behind_in_tests | simulated, ReplicaSet.unreachable_in_tests)
        # Runs the callback at the end of a ``with`` block only, if there is one.
        undo = ExitStack()
        undo.callback(self.catch_up, *chosen)
        return undo

    def catch_up(self, *aliases: str) -> None:
        """
        Make replicas catch up. A real replica resumes and replays all that its primary has written;
        an SQLite file is overwritten with a copy of its primary.

        Raise RuntimeError if a real replica does not catch up within ten seconds.
        """
        chosen = self._chosen(aliases)
        for alias in chosen:
            if alias in self._written:
                self._command(alias, _RESUME)
            self._wait_caught_up(alias)
            self._written.pop(alias, None)
        if not self._written and self._record_write in counters.write_observers:
            counters.write_observers.remove(self._record_write)
        self._simulate(ReplicaSet.behind_in_tests - set(chosen), ReplicaSet.unreachable_in_tests)

    def take_down(self, *aliases: str) -> AbstractContextManager[object]:
        """Make replicas unreachable for this process, so that they leave the rotation."""
        chosen = self._chosen(aliases)
        connect.unreachable_in_tests.update(chosen)
        for alias in chosen:
            if _is_real(alias):
                connection = connections[alias]
                if not connection.in_atomic_block:
                    connection.close()
        self._simulate(ReplicaSet.behind_in_tests, ReplicaSet.unreachable_in_tests | set(chosen))
        undo = ExitStack()
        undo.callback(self.bring_up, *chosen)
        return undo

    def bring_up(self, *aliases: str) -> None:
        """Make replicas reachable again, and return them to the rotation at once."""
        chosen = self._chosen(aliases)
        connect.unreachable_in_tests.difference_update(chosen)
        for alias in chosen:
            registry.mark_up(registry.endpoint(alias))
        self._simulate(ReplicaSet.behind_in_tests, ReplicaSet.unreachable_in_tests - set(chosen))

    def reset(self) -> None:
        """Undo all changes. Raise RuntimeError if a real replica cannot be resumed."""
        by_replica = pools().by_replica
        # The test may have overridden the settings.
        paused = [alias for alias in self._written if alias in by_replica]
        self._written.clear()
        if self._record_write in counters.write_observers:
            counters.write_observers.remove(self._record_write)
        connect.unreachable_in_tests.clear()
        if ReplicaSet.behind_in_tests or ReplicaSet.unreachable_in_tests:
            self._simulate(frozenset(), frozenset())
        with ExitStack() as stack:
            for alias in paused:
                stack.callback(self._command, alias, _RESUME)

    # Writes since a replica lags

    def written_since(self, alias: str, table: str) -> str | None:
        """Return the line of a write to a table since a replica lags, or None."""
        # Copy, because other threads may add writes.
        written = tuple(self._written.get(alias, {}).items())
        return next((place for target, place in written if mentions_table(target, table)), None)

    def _record_write(self, alias: str, sql: str) -> None:
        table = table_of(sql)
        written = sql if table is None else table.rpartition(".")[2]
        by_replica = pools().by_replica
        primary = pools().same_as_primary.get(alias, alias)
        for replica, tables in self._written.items():
            if replica in by_replica and by_replica[replica].primary == primary:
                tables.setdefault(written, calling_line())

    # Aliases

    def _chosen(self, aliases: tuple[str, ...]) -> tuple[str, ...]:
        by_replica = pools().by_replica
        for alias in aliases:
            if alias not in by_replica:
                choices = ", ".join(sorted(by_replica)) or "it is empty"
                raise ValueError(f"{alias!r} is not an alias in PINNING_REPLICAS ({choices})")
        return aliases or tuple(by_replica)

    def _simulate(self, held_back: frozenset[str], cut_off: frozenset[str]) -> None:
        ReplicaSet.behind_in_tests, ReplicaSet.unreachable_in_tests = held_back, cut_off
        for pool in pools().all:
            pool.replica_set.refresh()

    # Commands to real servers

    def _command(
        self, alias: str, commands: dict[str, str], checks: dict[str, str] | None = None
    ) -> None:
        if not _is_real(alias):
            return
        vendor = _vendor(alias)
        try:
            with _dedicated_cursor(alias) as query:
                query(commands[vendor])
                if checks and vendor in checks:
                    _wait_until(lambda: query(checks[vendor]), f"{alias} did not pause")
        except (DatabaseError, InterfaceError) as error:
            raise RuntimeError(
                f"{alias} did not run {commands[vendor]!r}: {error}. Connect the tests as a role "
                "that may run it (a superuser of the test servers), or make the replica a mirror: "
                f'DATABASES[{alias!r}]["TEST"] = {{"MIRROR": {_pool(alias).primary!r}}}.'
            ) from error

    def _wait_caught_up(self, alias: str) -> None:
        if _is_mirror(alias):
            return
        vendor, primary = _vendor(alias), _pool(alias).primary
        if vendor == "sqlite":
            _copy(primary, alias)
            return
        if vendor not in _WRITTEN:
            return
        with _dedicated_cursor(primary) as query_primary, _dedicated_cursor(alias) as query:
            position = query_primary(_WRITTEN[vendor])
            failure = f"{alias} did not reach {position}"
            _wait_until(lambda: query(_REACHED[vendor], (position,)), failure)


def _pool(alias: str) -> Pool:
    return pools().by_replica[alias]


def _is_mirror(alias: str) -> bool:
    return _pool(alias).is_mirror(alias)


def _is_real(alias: str) -> bool:
    """Return whether a replica replays a log that can be paused."""
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
def _dedicated_cursor(alias: str) -> Iterator[Callable[..., Any]]:
    """Yield a function that queries a single value on a connection of its own."""
    connection: BaseDatabaseWrapper = dedicated_connection(alias)

    def query(sql: str, params: tuple[Any, ...] = ()) -> Any:
        # Bypass the execute wrappers, because this is not a statement of the site.
        with connection.cursor() as wrapped, connection.wrap_database_errors:
            cursor = wrapped.cursor
            cursor.execute(sql, params)
            row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None

    try:
        yield query
    finally:
        connection.close()


def _wait_until(condition: Callable[[], Any], error: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{error} within {TIMEOUT:g} s")
        time.sleep(0.005)


def _copy(source: str, target: str) -> None:
    primary, replica = connections[source], connections[target]
    for connection in (primary, replica):
        connection.ensure_connection()
    if replica.in_atomic_block:
        raise RuntimeError(
            f"{target} cannot be overwritten inside a transaction. Use TransactionTestCase, or "
            "remove the replica from the test's `databases`."
        )
    primary.connection.backup(replica.connection)


replicas = Replicas()
