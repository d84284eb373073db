"""
Write a row to each primary, measure how long each replica takes to show it, and verify the routing
decisions that would have been made in the meantime.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from django.db import DatabaseError, Error, InterfaceError, OperationalError, connections

from pinning_middleware.api import ignore_writes, no_failover
from pinning_middleware.conf import conf
from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.pool import Pool
from pinning_middleware.servers.probe import state_of
from pinning_middleware.stats import DRAINED, address_of

# Pause between two samples of a replica, and the time that the last one may take (seconds).
PAUSE: Final = 0.01
GRACE: Final = 4.0
# Reads of a primary behind a pooler that balances them.
BALANCED_READS: Final = 20


class Sample(NamedTuple):
    """
    The routing decision for the writer from ``at`` (seconds after the commit) on.

    ``served`` is ``"primary"`` or ``"replica"``, ``reason`` the reason of the decision, and
    ``visible`` whether the replica showed the row.
    """

    at: float
    served: str
    reason: str
    visible: bool

    @property
    def correct(self) -> bool:
        """Whether the writer would have seen the row."""
        return self.visible or self.served != "replica"


class ReplicaResult(NamedTuple):
    """
    The result for one replica.

    ``visible_after`` and ``detected_after`` are the seconds after the commit at which the row was
    visible and at which the package detected it, or None if that did not happen in time.
    """

    alias: str
    address: str
    visible_after: float | None
    detected_after: float | None
    samples: tuple[Sample, ...]
    error: str = ""

    @property
    def correct(self) -> bool:
        """Whether no decision would have hidden the row from its writer."""
        return all(sample.correct for sample in self.samples)


def check_pool(pool: Pool, seconds: float) -> list[ReplicaResult]:
    """
    Write a row to the primary of a pool, and watch each replica until it shows the row.

    Watch for at most this many seconds. The row and its table are always removed. Raise
    DatabaseError or InterfaceError if the row cannot be written.
    """
    with _marker_row(pool) as (table, position, committed):
        until = committed + seconds
        watchers = [
            ReplicaWatcher(pool, alias, table, position, committed) for alias in pool.replicas
        ]
        try:
            for watcher in watchers:
                watcher.until = until
                watcher.start()
            for watcher in watchers:
                watcher.join(max(0.0, until + GRACE - time.monotonic()))
        finally:
            for watcher in watchers:
                watcher.until = 0.0
        own = (
            [_primary_result(pool, table, committed)]
            if pool.endpoint.splits_reads_and_writes
            else []
        )
        return [*own, *(watcher.result for watcher in watchers)]


def _primary_result(pool: Pool, table: str, committed: float) -> ReplicaResult:
    """
    Read the row on new connections of the primary's alias, behind a pooler that balances reads:
    where it is missing, a replica has answered.
    """
    connection, samples = connections[pool.primary], []
    sql = f"SELECT count(*) FROM {connection.ops.quote_name(table)}"
    for _ in range(BALANCED_READS):
        connection.close()
        visible = False
        with contextlib.suppress(DatabaseError), no_failover(), connection.cursor() as cursor:
            cursor.execute(sql)
            visible = bool(cursor.fetchone()[0])
        served = "primary" if visible else "replica"
        samples.append(Sample(time.monotonic() - committed, served, Reason.WROTE, visible))
    first = next((sample.at for sample in samples if sample.visible), None)
    wrong = tuple(sample for sample in samples if not sample.correct)
    address = address_of(pool.primary, pool.endpoint.server)
    return ReplicaResult(pool.primary, address, first, first, wrong)


@contextlib.contextmanager
def _marker_row(pool: Pool) -> Iterator[tuple[str, Position | None, float]]:
    """Create a table with one row; yield its name, a position that includes it, and the time."""
    table = f"pinning_check_{secrets.token_hex(6)}"
    quoted = connections[pool.primary].ops.quote_name(table)
    is_created = True
    try:
        try:
            _execute(pool, f"CREATE TABLE {quoted} (id integer NOT NULL PRIMARY KEY)")
        except (DatabaseError, InterfaceError):
            # If the connection was lost, the server may have created the table all the same.
            is_created = not connections[pool.primary].is_usable()
            raise
        _execute(pool, f"INSERT INTO {quoted} (id) VALUES (1)")
        committed = time.monotonic()
        yield table, pool.current_position(), committed
    finally:
        if is_created:
            _drop_table(pool, table)


def _execute(pool: Pool, sql: str) -> None:
    with ignore_writes(), no_failover(), connections[pool.primary].cursor() as cursor:
        cursor.execute(sql)


def _drop_table(pool: Pool, table: str) -> None:
    sql = f"DROP TABLE IF EXISTS {connections[pool.primary].ops.quote_name(table)}"
    try:
        _execute(pool, sql)
    except (DatabaseError, InterfaceError):
        # An interrupted statement may have left an unusable connection.
        connections[pool.primary].close()
        try:
            _execute(pool, sql)
        except (DatabaseError, InterfaceError) as error:
            error.add_note(f"The table {table} may still exist on {pool.primary}; drop it.")
            raise


class ReplicaWatcher(threading.Thread):
    """Samples one replica until it shows the row, on the connection that a read would use."""

    def __init__(
        self, pool: Pool, alias: str, table: str, position: Position | None, committed: float
    ) -> None:
        super().__init__(name=f"pinning-check-{alias}", daemon=True)
        self.pool, self.alias, self.position, self.committed = pool, alias, position, committed
        self.sql = f"SELECT count(*) FROM {connections[pool.primary].ops.quote_name(table)}"
        # Why the settings send no reads to this replica, or "".
        self.excluded_by = "" if pool.replica_set.rotations.weights[alias] else DRAINED
        if not conf.enabled:
            self.excluded_by = Reason.DISABLED
        self.until = 0.0
        self.result = ReplicaResult(alias, address_of(alias, None), None, None, ())

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                self._take_sample()
                result = self.result
                if result.visible_after is not None and result.detected_after is not None:
                    return
                time.sleep(PAUSE)
        finally:
            with contextlib.suppress(Error):
                connections.close_all()

    def _take_sample(self) -> None:
        # Decide before reading, so that the row cannot arrive in between.
        served, reason = self._decide()
        visible = self._is_row_visible()
        if visible is None:
            return
        at = time.monotonic() - self.committed
        result = self.result
        sample = Sample(at, served, reason, visible)
        if self.excluded_by:
            sample = Sample(at, "primary", self.excluded_by, visible)
        if not result.samples or result.samples[-1][1:] != sample[1:]:
            result = result._replace(samples=(*result.samples, sample))
        if visible and result.visible_after is None:
            result = result._replace(visible_after=at)
        if visible and served == "replica" and result.detected_after is None:
            result = result._replace(detected_after=at)
        server = None
        if self.pool.dialect is not None:
            server = state_of(connections[self.alias]).server
        self.result = result._replace(address=address_of(self.alias, server), error="")

    def _decide(self) -> tuple[str, str]:
        """Return the role and the reason of a read under the pin of this write."""
        endpoint = self.pool.endpoints[self.alias]
        if time.monotonic() - self.committed >= conf.seconds:
            if endpoint.out_of_rotation and endpoint.out_of_rotation != Fault.LAG:
                return "primary", endpoint.out_of_rotation
            return "replica", Reason.ROUND_ROBIN
        if self.position is None:
            return "primary", Reason.PINNED
        if self.pool.replica_set.probe_caught_up(self.alias, self.position):
            return "replica", Reason.CAUGHT_UP
        return "primary", endpoint.out_of_rotation or Reason.NOT_CAUGHT_UP

    def _is_row_visible(self) -> bool | None:
        """Return whether the replica shows the row, or None if it cannot be queried."""
        endpoint = self.pool.endpoints[self.alias]
        if endpoint.is_down:
            self.result = self.result._replace(error=endpoint.error or "it is out of rotation")
            return None
        try:
            with no_failover(), connections[self.alias].cursor() as cursor:
                cursor.execute(self.sql)
                return bool(cursor.fetchone()[0])
        except (OperationalError, InterfaceError) as error:
            if _is_missing_table(error):
                return False
            self.result = self.result._replace(error=str(error).strip())
            connections[self.alias].close()
            return None
        except DatabaseError:
            # The table has not been replicated yet.
            return False


def _is_missing_table(error: Exception) -> bool:
    # SQLite raises OperationalError for this.
    return "no such table" in str(error)


class MissingPrivilege(NamedTuple):
    """A privilege that the site's role lacks on one server, and its purpose."""

    alias: str
    privilege: str
    purpose: str


# ER_SPECIFIC_ACCESS_DENIED_ERROR of MySQL and MariaDB.
_ACCESS_DENIED: Final = 1227
_TIMELINE: Final = (
    "with it, a replica reports its timeline; without it, the primary is probed before and after "
    "the replica"
)
_REPLICATION: Final = "to show whether replication is running, and why it has stopped"


def missing_privileges(pool: Pool) -> list[MissingPrivilege]:
    """Return the privileges that would let the servers of a pool report more."""
    missing = []
    for endpoint in (pool.endpoint, *pool.endpoints.values()):
        alias = endpoint.alias
        if endpoint.is_down:
            continue
        if any(server.lacks_timeline_privilege for server in endpoint.recent_servers):
            missing.append(MissingPrivilege(alias, "pg_read_all_stats", _TIMELINE))
        if connections[alias].vendor == "mysql" and alias != pool.primary:
            try:
                with no_failover(), connections[alias].cursor() as cursor:
                    cursor.execute("SHOW REPLICA STATUS")
            except DatabaseError as error:
                dialect = pool.dialect
                if dialect is not None and dialect.error_code(error) == _ACCESS_DENIED:
                    privilege = "REPLICATION CLIENT"
                    if any(server.system == "mariadb" for server in endpoint.recent_servers):
                        privilege = "SLAVE MONITOR"
                    missing.append(MissingPrivilege(alias, privilege, _REPLICATION))
    return missing
