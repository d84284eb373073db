"""
MariaDB 10.11 and later, MySQL 8: a position is a set of global transaction ids.

MariaDB: https://mariadb.com/kb/en/gtid/. A log is a domain as one server wrote it, since a
sequence number says nothing about another server's transactions: after a promotion the same
number is another transaction.

MySQL: https://dev.mysql.com/doc/refman/8.0/en/replication-gtids.html. A log is a server's UUID.
Under group replication all members write under one UUID of the group: positions are not told
there, and the window serves.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import DatabaseError

from pinning_middleware.pins import OPTIONAL, Position

from .base import Positions, Report, fetch

__all__ = ["Either", "MariaDB", "MySQL", "parse_gtids", "parse_last", "parse_mariadb"]

# Connection lost, killed, shutting down; the server went away while it was asked.
ACCESS_DENIED = 1227
LOST = {1053, 1077, 1079, 1152, 1184, 1927, 2002, 2003, 2006, 2013, 2055}


def parse_mariadb(text: str) -> dict[str, int]:
    """
    Return MariaDB's list of GTIDs as domain and server → sequence number.

    >>> parse_mariadb("0-1-8,5-2-30")
    {'0-1': 8, '5-2': 30}
    """
    gtids = (gtid.strip().rpartition("-") for gtid in text.split(",") if gtid.strip())
    return {log: int(sequence) for log, _, sequence in gtids}


def parse_gtids(text: str) -> dict[str, int]:
    """
    Return MySQL's set of GTIDs as log → the end of what it holds without a gap: what is beyond
    one is not known to be complete. A log is a server's UUID, with its tag, if any (8.3).

    >>> parse_gtids("3e11fa47:1-5:9,\\n4f22fb58:7:backup:1-3")
    {'3e11fa47': 5, '4f22fb58:backup': 3}
    """
    sets = _intervals(text).items()
    return {log: found[0][1] for log, found in sets if found[0][0] == 1}


def _intervals(text: str) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for part in text.lower().split(","):
        uuid, *names = (name.strip() for name in part.split(":"))
        log = uuid
        for name in names:
            if re.fullmatch(r"\d+(-\d+)?", name):
                first, _, last = name.partition("-")
                found.setdefault(log, []).append((int(first), int(last or first)))
            else:
                log = f"{uuid}:{name}"
    return found


def _domain(log: str) -> str:
    return log.partition("-")[0]


class _Family(Positions):
    connect_timeout: ClassVar[str | None] = "connect_timeout"
    passing_errors: ClassVar[frozenset[Any]] = frozenset(LOST)

    def error_code(self, error: BaseException) -> Any:
        return error.args[0] if error.args and isinstance(error.args[0], int) else None


class MariaDB(_Family):
    CURRENT = "SELECT @@last_gtid, @@gtid_binlog_pos"
    REPORT = "SELECT @@gtid_slave_pos, @@gtid_binlog_pos, @@server_id, @@read_only"
    # Needs SLAVE MONITOR.
    STATUS = "SHOW ALL SLAVES STATUS"

    def current(self, connection: BaseDatabaseWrapper) -> Position | None:
        own, written = (parse_mariadb(text) for text in fetch(connection, self.CURRENT))
        domains = {_domain(log) for log in own}
        # What others wrote in a domain that replicas may not follow is no reason to wait.
        return {
            log if not domains or _domain(log) in domains else OPTIONAL + log: sequence
            for log, sequence in written.items()
        } or None

    def report(self, connection: BaseDatabaseWrapper) -> Report:
        replayed, written, server, read_only = fetch(connection, self.REPORT)
        position = parse_mariadb(replayed)
        has_written = any(log.endswith(f"-{server}") for log in parse_mariadb(written))
        return Report(bool(position) and (bool(read_only) or not has_written), position)

    def behind(self, connection: BaseDatabaseWrapper) -> float | None:
        try:
            with connection.cursor() as cursor:
                cursor.execute(self.STATUS)
                names = [column[0] for column in cursor.description]
                sources = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        except DatabaseError as error:
            if self.error_code(error) == ACCESS_DENIED:
                return None
            raise
        # NULL where replication is stopped.
        seconds = [source["Seconds_Behind_Master"] for source in sources]
        return float(max(seconds)) if seconds and None not in seconds else None

    def reached(self, wanted: Position, known: Position) -> bool:
        domains = {_domain(log) for log in known}
        return all(
            known.get(log.removeprefix(OPTIONAL), -1) >= point
            for log, point in wanted.items()
            if log[0] != OPTIONAL or _domain(log[1:]) in domains
        )

    def wait(self, connection: BaseDatabaseWrapper, wanted: Position, seconds: float) -> bool:
        gtids = ",".join(f"{log}-{point}" for log, point in wanted.items() if log[0] != OPTIONAL)
        if not gtids:
            return False
        fetch(connection, f"SELECT MASTER_GTID_WAIT('{gtids}', {seconds:.3f})")
        return True


class MySQL(_Family):
    CURRENT = "SELECT @@GLOBAL.gtid_executed, @@GLOBAL.server_uuid"
    REPORT = "SELECT @@GLOBAL.gtid_executed, @@GLOBAL.server_uuid, @@GLOBAL.read_only"

    def current(self, connection: BaseDatabaseWrapper) -> Position | None:
        executed, uuid = fetch(connection, self.CURRENT)
        # The last number, not the end of the first interval: all that this server has committed.
        return parse_last(executed, uuid)

    def report(self, connection: BaseDatabaseWrapper) -> Report:
        executed, uuid, read_only = fetch(connection, self.REPORT)
        position = parse_gtids(executed)
        return Report(
            bool(position) and (bool(read_only) or uuid.lower() not in position), position
        )

    def wait(self, connection: BaseDatabaseWrapper, wanted: Position, seconds: float) -> bool:
        gtids = ",".join(f"{log}:1-{point}" for log, point in wanted.items())
        # Rounded to nothing it would be no limit at all.
        limit = max(seconds, 0.001)
        fetch(connection, f"SELECT WAIT_FOR_EXECUTED_GTID_SET('{gtids}', {limit:.3f})")
        return True


def parse_last(executed: str, uuid: str) -> Position | None:
    """
    Return the last transaction of one server in MySQL's set of GTIDs, ``None`` for none.

    >>> parse_last("3e11fa47:1-5:9:backup:1-3,4f22fb58:7", "3E11FA47")
    {'3e11fa47': 9, '3e11fa47:backup': 3}
    """
    own = uuid.lower()
    logs = _intervals(executed).items()
    return {log: found[-1][1] for log, found in logs if log.partition(":")[0] == own} or None


class Either(_Family):
    """
    MariaDB's or MySQL's questions: both have one vendor in Django, and which of them it is takes
    a connection to tell. To compare takes none: a UUID has no domain, and is never optional.
    """

    _mariadb, _mysql = MariaDB(), MySQL()
    reached = MariaDB.reached

    def _of(self, connection: BaseDatabaseWrapper) -> Positions:
        return self._mariadb if connection.mysql_is_mariadb else self._mysql  # type: ignore[attr-defined]

    def current(self, connection: BaseDatabaseWrapper) -> Position | None:
        return self._of(connection).current(connection)

    def report(self, connection: BaseDatabaseWrapper) -> Report:
        return self._of(connection).report(connection)

    def behind(self, connection: BaseDatabaseWrapper) -> float | None:
        return self._of(connection).behind(connection)

    def wait(self, connection: BaseDatabaseWrapper, wanted: Position, seconds: float) -> bool:
        return self._of(connection).wait(connection, wanted, seconds)
