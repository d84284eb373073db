"""
A row that is written to see how long each replica takes to show it, and whether what the package
would have decided meanwhile was true.
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
from pinning_middleware.routing.policy import Pool
from pinning_middleware.servers.probe import state_of
from pinning_middleware.stats import DRAINED, address_of

__all__ = ["Finding", "Moment", "Right", "missing_rights", "try_pool"]

# Seconds between two looks at one replica, and that one more look may take past the end.
PAUSE: Final = 0.01
GRACE: Final = 4.0


class Moment(NamedTuple):
    """
    From ``at`` (seconds after the commit) on: who would have been read by the writer, for which
    reason, and whether the row was there on the replica that was asked.
    """

    at: float
    served: str
    reason: str
    is_there: bool

    @property
    def is_true(self) -> bool:
        """Whether the writer would have seen the row."""
        return self.is_there or self.served != "replica"


class Finding(NamedTuple):
    """
    What was seen of one replica. ``shown_after``, ``known_after``: seconds after the commit at
    which the row was there, and the package knew that it was; ``None``: not in time.
    """

    alias: str
    address: str
    shown_after: float | None
    known_after: float | None
    moments: tuple[Moment, ...]
    error: str = ""

    @property
    def is_true(self) -> bool:
        """Whether no decision would have hidden the row from its writer."""
        return all(moment.is_true for moment in self.moments)


def try_pool(pool: Pool, seconds: float) -> list[Finding]:
    """
    Write a row to a pool's primary, watch every replica until it shows it, for so many seconds
    at most, and take the row and its table away again, whatever happens.

    Raises ``DatabaseError`` or ``InterfaceError`` where it can't be written.
    """
    with _marker(pool) as (table, position, committed):
        until = committed + seconds
        observers = [_Observer(pool, alias, table, position, committed) for alias in pool.replicas]
        try:
            for observer in observers:
                observer.until = until
                observer.start()
            for observer in observers:
                observer.join(max(0.0, until + GRACE - time.monotonic()))
        finally:
            for observer in observers:
                observer.until = 0.0
        return [observer.finding for observer in observers]


@contextlib.contextmanager
def _marker(pool: Pool) -> Iterator[tuple[str, Position | None, float]]:
    """A table with one row: its name, a position that includes it, and when it was there."""
    table = f"pinning_check_{secrets.token_hex(6)}"
    quoted = connections[pool.primary].ops.quote_name(table)
    try:
        _run(pool, f"CREATE TABLE {quoted} (id integer NOT NULL PRIMARY KEY)")
        _run(pool, f"INSERT INTO {quoted} (id) VALUES (1)")
        committed = time.monotonic()
        yield table, pool.position_now(), committed
    finally:
        _drop(pool, table)


def _run(pool: Pool, sql: str) -> None:
    with ignore_writes(), no_failover(), connections[pool.primary].cursor() as cursor:
        cursor.execute(sql)


def _drop(pool: Pool, table: str) -> None:
    sql = f"DROP TABLE IF EXISTS {connections[pool.primary].ops.quote_name(table)}"
    try:
        _run(pool, sql)
    except (DatabaseError, InterfaceError):
        # What was interrupted may have left a connection behind that is of no use any more.
        connections[pool.primary].close()
        try:
            _run(pool, sql)
        except (DatabaseError, InterfaceError) as error:
            error.add_note(f"{table} may still be on {pool.primary}: drop it.")
            raise


class _Observer(threading.Thread):
    """Looks at one replica until it shows the row, on the connection that a read would use."""

    def __init__(
        self, pool: Pool, alias: str, table: str, position: Position | None, committed: float
    ) -> None:
        super().__init__(name=f"pinning-check-{alias}", daemon=True)
        self.pool, self.alias, self.position, self.committed = pool, alias, position, committed
        self.sql = f"SELECT count(*) FROM {connections[pool.primary].ops.quote_name(table)}"
        # Why no read goes there, whatever is known of it.
        self.unused = "" if pool.rotation.weights[alias] else DRAINED
        if not conf.enabled:
            self.unused = Reason.DISABLED
        self.until = 0.0
        self.finding = Finding(alias, address_of(alias, None), None, None, ())

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                self._look()
                found = self.finding
                if found.shown_after is not None and found.known_after is not None:
                    return
                time.sleep(PAUSE)
        finally:
            with contextlib.suppress(Error):
                connections.close_all()

    def _look(self) -> None:
        # First what is decided, then what is there: so that the row can't have come in between.
        served, reason = self._decide()
        is_there = self._is_there()
        if is_there is None:
            return
        at = time.monotonic() - self.committed
        found = self.finding
        moment = Moment(at, served, reason, is_there)
        if self.unused:
            moment = Moment(at, "primary", self.unused, is_there)
        if not found.moments or found.moments[-1][1:] != moment[1:]:
            found = found._replace(moments=(*found.moments, moment))
        if is_there and found.shown_after is None:
            found = found._replace(shown_after=at)
        if is_there and served == "replica" and found.known_after is None:
            found = found._replace(known_after=at)
        server = None
        if self.pool.dialect is not None:
            server = state_of(connections[self.alias]).server
        self.finding = found._replace(address=address_of(self.alias, server), error="")

    def _decide(self) -> tuple[str, str]:
        """Return who would be read by somebody who carries the pin of this write, and why."""
        endpoint = self.pool.endpoints[self.alias]
        if time.monotonic() - self.committed >= conf.seconds:
            if endpoint.out_of_rotation and endpoint.out_of_rotation != Fault.LAG:
                return "primary", endpoint.out_of_rotation
            return "replica", Reason.ROUND_ROBIN
        if self.position is None:
            return "primary", Reason.PINNED
        if self.pool.asked_has(self.alias, self.position):
            return "replica", Reason.CAUGHT_UP
        return "primary", endpoint.out_of_rotation or Reason.NOT_CAUGHT_UP

    def _is_there(self) -> bool | None:
        """Return whether the row can be read, ``None``: the replica can't be asked."""
        endpoint = self.pool.endpoints[self.alias]
        if endpoint.out_of_rotation in (Fault.UNREACHABLE, Fault.UNRESPONSIVE):
            self.finding = self.finding._replace(error=endpoint.error or endpoint.out_of_rotation)
            return None
        try:
            with no_failover(), connections[self.alias].cursor() as cursor:
                cursor.execute(self.sql)
                return bool(cursor.fetchone()[0])
        except (OperationalError, InterfaceError) as error:
            if _is_missing(error):
                return False
            self.finding = self.finding._replace(error=str(error).strip())
            connections[self.alias].close()
            return None
        except DatabaseError:
            # No such table yet.
            return False


def _is_missing(error: Exception) -> bool:
    return "no such table" in str(error)


class Right(NamedTuple):
    """A right that the site's role lacks on one server, and what it would be good for."""

    alias: str
    right: str
    why: str


def missing_rights(pool: Pool) -> list[Right]:
    """Return which rights would let servers that were met tell more."""
    found = []
    for endpoint in (pool.endpoint, *pool.endpoints.values()):
        alias = endpoint.alias
        if endpoint.out_of_rotation in (Fault.UNREACHABLE, Fault.UNRESPONSIVE):
            continue
        if any(server.lacks_timeline_privilege for server in endpoint.recent_servers):
            found.append(Right(alias, "pg_read_all_stats", _TIMELINE))
        if connections[alias].vendor == "mysql" and alias != pool.primary:
            try:
                with no_failover(), connections[alias].cursor() as cursor:
                    cursor.execute("SHOW SLAVE STATUS")
            except DatabaseError as error:
                if pool.dialect is not None and pool.dialect.error_code(error) == 1227:
                    right = "REPLICATION CLIENT"
                    if any(server.system == "mariadb" for server in endpoint.recent_servers):
                        right = "SLAVE MONITOR"
                    found.append(Right(alias, right, _REPLICATION))
    return found


_TIMELINE: Final = (
    "a replica then says itself which timeline it replays; without it the primary has to be asked "
    "before and after"
)
_REPLICATION: Final = "to see whether replication runs there, and what stopped it"
