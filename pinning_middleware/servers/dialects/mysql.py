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

from django.db import DatabaseError

from pinning_middleware.pins import OPTIONAL, Position
from pinning_middleware.servers.dialects.base import (
    Dialect,
    Identification,
    PositionUnavailable,
    Query,
    Row,
)
from pinning_middleware.servers.registry import Identity, Report, Server

__all__ = ["MySQL", "parse_gtids", "parse_last", "parse_mariadb"]

# Connection lost, killed, shutting down; the server went away while it was asked.
LOST = {1053, 1077, 1079, 1152, 1184, 1927, 2002, 2003, 2006, 2013, 2055}
# No room for another connection, out of memory.
CROWDED = {1037, 1038, 1040, 1041, 1203, 1226}
# No privilege; no such variable; not supported.
REFUSED = {1142, 1193, 1227, 1235}


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


def parse_last(executed: str, uuid: str) -> Position | None:
    """
    Return the last transaction of one server in MySQL's set of GTIDs, ``None`` for none.

    >>> parse_last("3e11fa47:1-5:9:backup:1-3,4f22fb58:7", "3E11FA47")
    {'3e11fa47': 9, '3e11fa47:backup': 3}
    """
    own = uuid.lower()
    logs = _intervals(executed).items()
    return {log: found[-1][1] for log, found in logs if log.partition(":")[0] == own} or None


class MySQL(Dialect):
    """
    MariaDB's or MySQL's questions: both have one vendor in Django, and which of them it is takes
    a connection to tell. To compare takes none: a UUID has no domain, and is never optional.
    """

    connection_lost_errors: ClassVar[frozenset[Any]] = frozenset(LOST)
    retryable_errors: ClassVar[frozenset[Any]] = frozenset(LOST | CROWDED)
    permission_errors: ClassVar[frozenset[Any]] = frozenset(REFUSED)

    # A start's second is exact: both clocks are those of the statement.
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

    def strategies(self, choice: bool | str) -> tuple[int, ...]:
        return (0,) if choice in (True, "gtid") else ()

    def identify(
        self, ask: Query, driver: tuple[str, int], way: int | None
    ) -> tuple[Identification, Row]:
        kind = "mariadb"
        try:
            host, port, session, server, started, *row = self._ask(ask, kind, way)
        except DatabaseError as error:
            if self.error_code(error) not in self.permission_errors:
                raise
            # A variable that this one does not have.
            kind = "mysql"
            host, port, session, server, started, *row = self._ask(ask, kind, way)
        identity = Identity(f"{kind} {server} {float(started):.0f}", host, int(port))
        return Identification(identity, int(session)), tuple(row)

    def _ask(self, ask: Query, kind: str, way: int | None) -> Row:
        report = "" if way is None else f", {self.REPORT[kind]}"
        return ask(f"SELECT {self.IDENTITY[kind]}{report}")

    def system(self, ask: Query, identity: Identity) -> str:
        # GTIDs name the servers that wrote them, so no cluster needs a name.
        return identity.started.partition(" ")[0]

    def report(self, ask: Query, server: Server, way: int) -> Row:
        return ask(f"SELECT {self.REPORT[server.system]}")

    def read(self, row: Row, server: Server, way: int) -> Report:
        return self._mariadb(row) if server.system == "mariadb" else self._mysql(row)

    def _mariadb(self, row: Row) -> Report:
        slave, binlog, server, read_only, last = row
        replayed, written = parse_mariadb(slave or ""), parse_mariadb(binlog or "")
        if not replayed and not written:
            raise PositionUnavailable("it has no GTIDs")
        has_written = any(log.endswith(f"-{server}") for log in written)
        domains = {_domain(log) for log in parse_mariadb(last or "")}
        # What others wrote in a domain that replicas may not follow is no reason to wait.
        own = {
            log if not domains or _domain(log) in domains else OPTIONAL + log: sequence
            for log, sequence in written.items()
        }
        is_replica = bool(read_only) or not has_written if replayed else None
        return Report(is_replica, replayed, own or None)

    def _mysql(self, row: Row) -> Report:
        executed, uuid, read_only, mode = row
        if not str(mode).upper().startswith("ON"):
            raise PositionUnavailable("its GTIDs are off")
        replayed = parse_gtids(executed)
        # The last number, not the end of the first interval: all that this server has committed.
        written = parse_last(executed, uuid)
        is_replica = bool(read_only) or uuid.lower() not in replayed if replayed else None
        return Report(is_replica, replayed, written)

    def reached(self, wanted: Position, known: Position) -> bool:
        domains: set[str] | None = None
        for log, point in wanted.items():
            if log[0] == OPTIONAL:
                if domains is None:
                    domains = {_domain(each) for each in known}
                if _domain(log[1:]) not in domains:
                    continue
                log = log[1:]
            if known.get(log, -1) < point:
                return False
        return True

    def error_code(self, error: BaseException) -> Any:
        return error.args[0] if error.args and isinstance(error.args[0], int) else None
