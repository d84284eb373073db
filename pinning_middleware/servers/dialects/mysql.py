"""
MariaDB 10.11 and later, MySQL 8.4 and later: a position is a set of global transaction IDs (GTIDs).

MariaDB: https://mariadb.com/kb/en/gtid/. A log is a domain as written by one server, because after
a promotion the new primary reuses sequence numbers for other transactions.

MySQL: https://dev.mysql.com/doc/refman/8.4/en/replication-gtids-concepts.html. A log is a UUID,
with its tag, if any: that of a server, or of a group, whose members all write under it. The numbers
may have gaps: each member of a group takes a block of them, transactions that run at the same time
commit in any order, and gtid_next skips some. An interval that does not begin with 1 is therefore a
log by itself, and a server has caught up if it has every interval.

RESET BINARY LOGS AND GTIDS (RESET MASTER on MariaDB), like a backup that is restored, begins the
numbers anew under the same name.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pinning_middleware.pins import Points, Position
from pinning_middleware.servers.dialects.base import (
    Dialect,
    Driver,
    Identification,
    PositionUnavailable,
    Query,
    Row,
)
from pinning_middleware.servers.registry import Identity, Report, Server

MARIADB, MYSQL = "mariadb", "mysql"

# https://mariadb.com/kb/en/mariadb-error-codes/
# https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
# Connection lost or killed, server shutting down, server has gone away, offline mode, idle timeout.
CONNECTION_LOST = {1053, 1077, 1079, 1152, 1184, 1927, 2002, 2003, 2006, 2013, 2055, 3032, 4031}
# Too many connections, out of memory.
OVERLOADED = {1037, 1038, 1040, 1041, 1203, 1226}
# Cancelled, or stopped by a limit of the session: the next attempt may succeed.
INTERRUPTED = {1205, 1213, 1317, 1969, 3024}
# The option read_only, the mode read-only.
READ_ONLY = {1290, 1836}
# Not permitted, no such variable, not supported.
REFUSED = {1109, 1142, 1146, 1193, 1227, 1235}
# Errors of the client's library, of which the server knows nothing.
CLIENT_ERRORS = range(2000, 3000)

# Gaps that a position may have, which is kept in a cookie.
MAX_INTERVALS = 16


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
    Return MySQL's set of GTIDs as a mapping of each interval to its end.

    The first interval has the name of its log: a UUID, with its tag, if any (MySQL 8.3). The others
    also have their beginning.

    >>> parse_gtids("3e11fa47:1-5:9,\\n4f22fb58:7:backup:1-3")
    {'3e11fa47': 5, '3e11fa47/9': 9, '4f22fb58/7': 7, '4f22fb58:backup': 3}
    """
    return {
        log if first == 1 else f"{log}/{first}": last
        for log, intervals in _intervals(text).items()
        for first, last in intervals
    }


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


def _split(name: str) -> tuple[str, int]:
    """Return the log and the beginning of an interval."""
    log, _, first = name.partition("/")
    return log, int(first or 1)


def _has_interval(points: Points, name: str, last: int) -> bool:
    if points.get(name, -1) >= last:
        return True
    log, first = _split(name)
    intervals = ((_split(other), end) for other, end in points.items() if other.startswith(log))
    return any(other == log and begin <= first and end >= last for (other, begin), end in intervals)


def _is_on(value: object) -> bool:
    """
    Return whether ``read_only`` is set. From MariaDB 12.0.1 on it is a text.

    https://jira.mariadb.org/browse/MDEV-36425
    """
    return str(value).upper() not in ("0", "OFF")


def _replicated_as(name: str) -> str:
    """Return what a replica replicates or ignores as a whole: MariaDB's domain, MySQL's log."""
    domain, dash, server = name.partition("-")
    return domain if dash and server.isdecimal() else _split(name)[0]


class MySQL(Dialect):
    """
    MariaDB and MySQL.

    Django has one vendor for both, so only a connection can distinguish them, by the version that
    the server reports when it is connected to. Positions can be compared without.
    """

    connection_lost_errors: ClassVar[frozenset[Any]] = frozenset(CONNECTION_LOST)
    retryable_errors: ClassVar[frozenset[Any]] = frozenset(CONNECTION_LOST | OVERLOADED)
    read_only_errors: ClassVar[frozenset[Any]] = frozenset(READ_ONLY)
    permission_errors: ClassVar[frozenset[Any]] = frozenset(REFUSED)

    # The start time in seconds is exact, because both values are those of the same statement.
    IDENTITY: ClassVar[dict[str, str]] = {
        MARIADB: (
            "@@hostname, @@port, connection_id(), @@server_id, UNIX_TIMESTAMP() -"
            " (SELECT VARIABLE_VALUE FROM information_schema.GLOBAL_STATUS"
            " WHERE VARIABLE_NAME = 'UPTIME')"
        ),
        MYSQL: (
            "@@hostname, @@port, connection_id(), @@GLOBAL.server_uuid, UNIX_TIMESTAMP() -"
            " (SELECT VARIABLE_VALUE FROM performance_schema.global_status"
            " WHERE VARIABLE_NAME = 'Uptime')"
        ),
    }
    # A member of a group that accepts writes executes transactions under another UUID than its own,
    # so only then is the group looked up, which takes longer than all the rest: its UUID, and "ON"
    # if it has one primary. Any role may read these two, unlike the tables of the members.
    # https://dev.mysql.com/doc/refman/8.4/en/group-replication-gtids.html
    REPORT: ClassVar[dict[str, str]] = {
        MARIADB: "@@gtid_slave_pos, @@gtid_binlog_pos, @@server_id, @@read_only, @@last_gtid",
        MYSQL: (
            "@@GLOBAL.gtid_executed, @@GLOBAL.server_uuid, @@GLOBAL.read_only, @@GLOBAL.gtid_mode,"
            " IF(@@GLOBAL.read_only OR @@GLOBAL.gtid_executed REGEXP"
            " CONCAT('^(', @@GLOBAL.server_uuid, ':[^,]*)?$'), NULL,"
            " (SELECT GROUP_CONCAT(VARIABLE_VALUE ORDER BY VARIABLE_NAME)"
            " FROM performance_schema.global_variables WHERE VARIABLE_NAME IN"
            " ('group_replication_group_name', 'group_replication_single_primary_mode')))"
        ),
    }

    def strategies(self, setting: bool | str) -> tuple[int, ...]:
        return (0,) if setting in (True, "gtid") else ()

    def identify(
        self, query: Query, driver: Driver, strategy: int | None
    ) -> tuple[Identification, Row]:
        version = driver.version or str(query("SELECT VERSION()")[0])
        product = MARIADB if MARIADB in version.lower() else MYSQL
        report = "" if strategy is None else f", {self.REPORT[product]}"
        host, port, session, server, started, *row = query(
            f"SELECT {self.IDENTITY[product]}{report}"
        )
        identity = Identity(f"{product} {server} {float(started):.0f}", host, int(port))
        return Identification(identity, int(session)), tuple(row)

    def system(self, query: Query, identity: Identity) -> str:
        # The product. GTIDs contain the server that wrote them, so no name of a cluster is needed.
        return identity.started.partition(" ")[0]

    def report(self, query: Query, server: Server, strategy: int) -> Row:
        if server.system not in self.REPORT:
            raise PositionUnavailable("it has not been identified")
        return query(f"SELECT {self.REPORT[server.system]}")

    def read(self, row: Row, server: Server, strategy: int) -> Report:
        read = self._read_mariadb if server.system == MARIADB else self._read_mysql
        return read(row, server)

    def _read_mariadb(self, row: Row, server: Server) -> Report:
        slave, binlog, number, read_only, last = row
        replayed, written = parse_mariadb(slave or ""), parse_mariadb(binlog or "")
        if not replayed and not written:
            raise PositionUnavailable("it has no GTIDs")
        has_written = any(log.endswith(f"-{number}") for log in written)
        domains = {_replicated_as(log) for log in parse_mariadb(last or "")}
        # The connection has not written to the other domains, and a replica may not follow them:
        # a replica without such a domain does not have to wait for it.
        optional = frozenset(
            log for log in written if domains and _replicated_as(log) not in domains
        )
        position = Position(written, optional) if written else None
        is_replica = _is_on(read_only) or not has_written if replayed else None
        # Only the last GTID of each domain is reported for what was replayed, but every log has
        # one that was written, and none ever becomes smaller.
        has_new_history = any(
            points[log] < server.position.get(log, -1)
            for points in (replayed if is_replica else written,)
            for log in points
        )
        return Report(is_replica, replayed, position, has_new_history=has_new_history)

    def _read_mysql(self, row: Row, server: Server) -> Report:
        executed, uuid, read_only, mode, group = row
        if not str(mode).upper().startswith("ON"):
            raise PositionUnavailable("gtid_mode is off")
        points = parse_gtids(executed)
        name, _, single_primary = (group or "").lower().partition(",")
        # Any other log is that of a former primary, of which a replica may have had no need.
        own = {uuid.lower(), name}
        optional = frozenset(log for log in points if _split(log)[0].partition(":")[0] not in own)
        is_replica: bool | None = None
        if points:
            is_replica = _is_on(read_only) or len(optional) == len(points)
        if name:
            # In a group without a primary every member that accepts writes is one.
            is_replica = False if single_primary == "on" else None
        written = Position(points, optional) if points and not is_replica else None
        if written is not None and len(points) > MAX_INTERVALS:
            raise PositionUnavailable("its GTIDs have too many gaps")
        has_new_history = not all(
            _has_interval(points, name, last) for name, last in server.position.items()
        )
        return Report(
            is_replica, points, written, has_new_history=has_new_history, is_complete=True
        )

    def session_search(self, session: int) -> str:
        # Without the PROCESS privilege, those of the same user.
        return (
            "SELECT connection_id(), "
            f"EXISTS (SELECT 1 FROM information_schema.processlist WHERE id = {session})"
        )

    def reached(self, wanted: Position, replayed: Points) -> bool:
        replicated = {_replicated_as(name) for name in replayed} if wanted.optional else ()
        return all(
            _has_interval(replayed, name, last)
            for name, last in wanted.points.items()
            if name not in wanted.optional or _replicated_as(name) in replicated
        )

    def foreign_points(self, position: Position, server: Server, replayed: Points) -> Points:
        own = server.identity.started.split()[1].lower()
        is_mariadb = server.system == MARIADB
        writers = {
            log: log.rpartition("-")[2] if is_mariadb else _split(log)[0].partition(":")[0]
            for log in position.points
            if log not in position.optional
        }
        return {
            log: position.points[log]
            for log, writer in writers.items()
            if writer != own and not _has_interval(replayed, log, position.points[log])
        }

    def error_code(self, error: BaseException) -> Any:
        return error.args[0] if error.args and isinstance(error.args[0], int) else None

    def is_from_server(self, error: BaseException) -> bool:
        # https://dev.mysql.com/doc/mysql-errors/8.4/en/error-reference-introduction.html
        code = self.error_code(error)
        return code is not None and code not in CLIENT_ERRORS

    def refuses_probe(self, error: BaseException) -> bool:
        code = self.error_code(error)
        if code is None or code in CLIENT_ERRORS:
            return False
        return code not in self.retryable_errors and code not in INTERRUPTED
