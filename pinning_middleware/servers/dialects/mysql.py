"""
MariaDB 10.11 and later, MySQL 8: a position is a set of global transaction IDs (GTIDs).

MariaDB: https://mariadb.com/kb/en/gtid/. A log is a domain as written by one server, because after
a promotion the new primary reuses sequence numbers for other transactions.

MySQL: https://dev.mysql.com/doc/refman/8.0/en/replication-gtids.html. A log is a server's UUID.
Under group replication all members write under the UUID of the group. A primary then reports no
position, and pins last the full window.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from django.db import DatabaseError

from pinning_middleware.pins import Points, Position
from pinning_middleware.servers.dialects.base import (
    Dialect,
    Identification,
    PositionUnavailable,
    Query,
    Row,
)
from pinning_middleware.servers.registry import Identity, Report, Server

__all__ = ["MySQL", "parse_gtids", "parse_last", "parse_mariadb"]

# https://mariadb.com/kb/en/mariadb-error-codes/
# Connection lost or killed, server shutting down, server has gone away.
CONNECTION_LOST = {1053, 1077, 1079, 1152, 1184, 1927, 2002, 2003, 2006, 2013, 2055}
# Too many connections, out of memory.
OVERLOADED = {1037, 1038, 1040, 1041, 1203, 1226}
# The option read_only, the mode read-only.
READ_ONLY = {1290, 1836}
# Not permitted, no such variable, not supported.
REFUSED = {1142, 1193, 1227, 1235}


def parse_mariadb(text: str) -> dict[str, int]:
    """
    Return MariaDB's list of GTIDs as a mapping of "domain-server" to sequence number.

    >>> parse_mariadb("0-1-8,5-2-30")
    {'0-1': 8, '5-2': 30}
    """
    gtids = (gtid.strip().rpartition("-") for gtid in text.split(",") if gtid.strip())
    return {log: int(sequence) for log, _, sequence in gtids}


def parse_gtids(text: str) -> dict[str, int]:
    """
    Return MySQL's set of GTIDs as a mapping of log to the end of its first interval.

    Beyond a gap the set is incomplete. A log is a server's UUID, with its tag, if any (MySQL 8.3).

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


def parse_last(executed: str, uuid: str) -> Points | None:
    """
    Return the last transaction of one server in MySQL's set of GTIDs, or None if it has none.

    >>> parse_last("3e11fa47:1-5:9:backup:1-3,4f22fb58:7", "3E11FA47")
    {'3e11fa47': 9, '3e11fa47:backup': 3}
    """
    own = uuid.lower()
    logs = _intervals(executed).items()
    return {log: found[-1][1] for log, found in logs if log.partition(":")[0] == own} or None


class MySQL(Dialect):
    """
    MariaDB and MySQL.

    Django has one vendor for both, so only a connection can distinguish them. Positions can be
    compared without: MySQL's UUIDs have no domain, and are never optional.
    """

    connection_lost_errors: ClassVar[frozenset[Any]] = frozenset(CONNECTION_LOST)
    retryable_errors: ClassVar[frozenset[Any]] = frozenset(CONNECTION_LOST | OVERLOADED)
    read_only_errors: ClassVar[frozenset[Any]] = frozenset(READ_ONLY)
    permission_errors: ClassVar[frozenset[Any]] = frozenset(REFUSED)

    # The start time in seconds is exact, because both values are those of the same statement.
    IDENTITY: ClassVar[dict[str, str]] = {
        "mariadb": (
            "@@hostname, @@port, connection_id(), @@server_id, UNIX_TIMESTAMP() -"
            " (SELECT VARIABLE_VALUE FROM information_schema.GLOBAL_STATUS"
            " WHERE VARIABLE_NAME = 'UPTIME')"
        ),
        "mysql": (
            "@@hostname, @@port, connection_id(), @@GLOBAL.server_uuid, UNIX_TIMESTAMP() -"
            " (SELECT VARIABLE_VALUE FROM performance_schema.global_status"
            " WHERE VARIABLE_NAME = 'Uptime')"
        ),
    }
    REPORT: ClassVar[dict[str, str]] = {
        "mariadb": "@@gtid_slave_pos, @@gtid_binlog_pos, @@server_id, @@read_only, @@last_gtid",
        "mysql": (
            "@@GLOBAL.gtid_executed, @@GLOBAL.server_uuid, @@GLOBAL.read_only, @@GLOBAL.gtid_mode"
        ),
    }

    def strategies(self, setting: bool | str) -> tuple[int, ...]:
        return (0,) if setting in (True, "gtid") else ()

    def identify(
        self, query: Query, driver: tuple[str, int], strategy: int | None
    ) -> tuple[Identification, Row]:
        product = "mariadb"
        try:
            row = self._fetch_identity(query, product, strategy)
        except DatabaseError as error:
            if self.error_code(error) not in self.permission_errors:
                raise
            # MySQL lacks a variable or a table of MariaDB.
            product = "mysql"
            row = self._fetch_identity(query, product, strategy)
        host, port, session, server, started, *report = row
        identity = Identity(f"{product} {server} {float(started):.0f}", host, int(port))
        return Identification(identity, int(session)), tuple(report)

    def _fetch_identity(self, query: Query, product: str, strategy: int | None) -> Row:
        report = "" if strategy is None else f", {self.REPORT[product]}"
        return query(f"SELECT {self.IDENTITY[product]}{report}")

    def system(self, query: Query, identity: Identity) -> str:
        # The product. GTIDs contain the server that wrote them, so no name of a cluster is needed.
        return identity.started.partition(" ")[0]

    def report(self, query: Query, server: Server, strategy: int) -> Row:
        return query(f"SELECT {self.REPORT[server.system]}")

    def read(self, row: Row, server: Server, strategy: int) -> Report:
        return self._mariadb(row) if server.system == "mariadb" else self._mysql(row)

    def _mariadb(self, row: Row) -> Report:
        slave, binlog, server, read_only, last = row
        replayed, written = parse_mariadb(slave or ""), parse_mariadb(binlog or "")
        if not replayed and not written:
            raise PositionUnavailable("it has no GTIDs")
        has_written = any(log.endswith(f"-{server}") for log in written)
        domains = {_domain(log) for log in parse_mariadb(last or "")}
        # The connection has not written to the other domains, and a replica may not follow them:
        # a replica without such a domain does not have to wait for it.
        optional = frozenset(log for log in written if domains and _domain(log) not in domains)
        position = Position(written, optional) if written else None
        is_replica = bool(read_only) or not has_written if replayed else None
        return Report(is_replica, replayed, position)

    def _mysql(self, row: Row) -> Report:
        executed, uuid, read_only, mode = row
        if not str(mode).upper().startswith("ON"):
            raise PositionUnavailable("gtid_mode is off")
        replayed = parse_gtids(executed)
        # The last number, not the end of the first interval: all that this server has committed.
        written = parse_last(executed, uuid)
        is_replica = bool(read_only) or uuid.lower() not in replayed if replayed else None
        return Report(is_replica, replayed, Position(written) if written else None)

    def reached(self, wanted: Position, replayed: Points) -> bool:
        replicated = {_domain(log) for log in replayed}
        return all(
            replayed.get(log, -1) >= sequence
            for log, sequence in wanted.points.items()
            if log not in wanted.optional or _domain(log) in replicated
        )

    def foreign_points(self, position: Position, server: Server, replayed: Points) -> Points:
        own = server.identity.started.split()[1].lower()
        is_mariadb = server.system == "mariadb"
        writers = {
            log: log.rpartition("-")[2] if is_mariadb else log.partition(":")[0]
            for log in position.points
            if log not in position.optional
        }
        return {
            log: position.points[log]
            for log, writer in writers.items()
            if writer != own and replayed.get(log, -1) < position.points[log]
        }

    def error_code(self, error: BaseException) -> Any:
        return error.args[0] if error.args and isinstance(error.args[0], int) else None
