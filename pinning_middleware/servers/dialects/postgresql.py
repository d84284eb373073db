"""
PostgreSQL 14 and later: a position is an LSN, or a transaction ID, on one timeline of one cluster.

Every role may call the functions used here. The timeline that a replica follows is returned by
``pg_stat_get_wal_receiver()``, to members of ``pg_read_all_stats`` (``pg_monitor``) only, and to
no role while no WAL receiver runs. ``pg_control_checkpoint()`` and ``pg_control_recovery()`` may
still name the old timeline on a replica that follows a promotion. See ``servers.timelines`` for
roles without the privilege.

Transaction IDs are used where the LSN functions are not supported (Aurora). A replica has caught
up with the primary's ``xmax`` after a commit when its ``xmin`` is that number: no older transaction
is still running there. The list of running IDs in a standby's snapshot is empty, so it is not used.
https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pinning_middleware.pins import Points, Position
from pinning_middleware.servers.dialects.base import (
    Dialect,
    Driver,
    Identification,
    PositionUnavailable,
    Query,
    Refusal,
    Row,
)
from pinning_middleware.servers.registry import Identity, Report, Server
from pinning_middleware.servers.timelines import is_later, log_name

# The strategies, in the order in which they are tried. The last one needs no timeline.
LSN: Final = 0
XID: Final = 1
XID_ALONE: Final = 2

# Seconds since the epoch, since the text of a timestamp depends on the session's time zone.
STARTED: Final = "extract(epoch FROM pg_postmaster_start_time())::text"
IDENTITY = (
    f"{STARTED}, host(inet_server_addr()), inet_server_port(), "
    "pg_backend_pid(), pg_has_role('pg_read_all_stats', 'USAGE')"
)
SYSTEM = "SELECT system_identifier FROM pg_control_system()"
CHECKPOINT_TIMELINE = "SELECT timeline_id FROM pg_control_checkpoint()"

# One statement for role, position and timeline: a promotion may happen between two statements, and
# pg_last_wal_replay_lsn() is not NULL after it. pg_current_wal_lsn() does not include commits with
# synchronous_commit = off; the insert position does. pg_stat_get_wal_receiver() without a subquery
# takes a sixth of the time of the view pg_stat_wal_receiver.
_TIMELINE = (
    "CASE WHEN pg_is_in_recovery() THEN (pg_stat_get_wal_receiver()).received_tli::text "
    "ELSE pg_walfile_name(pg_current_wal_insert_lsn()) END"
)
_LSN = (
    "CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() "
    "ELSE pg_current_wal_insert_lsn() END"
)
_XID = (
    "(CASE WHEN pg_is_in_recovery() THEN pg_snapshot_xmin(pg_current_snapshot()) "
    "ELSE pg_snapshot_xmax(pg_current_snapshot()) END)::text"
)
REPORTS: Final = {
    LSN: f"pg_is_in_recovery(), {_LSN}, {_TIMELINE}",
    XID: f"pg_is_in_recovery(), {_XID}, {_TIMELINE}",
    XID_ALONE: f"pg_is_in_recovery(), {_XID}, NULL",
}

PGPOOL_BALANCES: Final = "PGPOOL SHOW load_balance_mode"
# Errors of a standby for being one: a table without WAL (unlogged), or an isolation level that it
# does not have; a write; a function that needs a primary, or a sequence that the session has not
# used. Other errors have the same codes, so the server is queried for whether it is a standby;
# messages are translated. SHOW works where every query fails.
# https://www.postgresql.org/docs/current/hot-standby.html#HOT-STANDBY-USERS
# https://www.postgresql.org/docs/current/sql-createtable.html#SQL-CREATETABLE-UNLOGGED
UNSUPPORTED, READ_ONLY, NOT_READY = "0A000", "25006", "55000"
IS_STANDBY = "SHOW in_hot_standby"
ISOLATION = "SHOW default_transaction_isolation"
UNLOGGED = (
    "SELECT string_agg(relname, E'\\n' ORDER BY relname) FROM pg_class "
    "WHERE relpersistence = 'u' AND relkind IN ('r', 'p', 'm', 'S')"
)

PAGE = 8192
# Sizes of the header of a page, and of the first page of a segment.
HEADER, SEGMENT_HEADER = 24, 40


def parse_lsn(text: str) -> int:
    """
    Return an LSN as a 64-bit integer.

    >>> parse_lsn("1/10")
    4294967312
    """
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def end_of_record(lsn: int) -> int:
    """
    Return the end of the last record, given the insert position.

    If the last record ends with its page, the insert position is after the header of the next
    page, which no replica reaches before the next record is written. If a record ends at that very
    point, it began on the previous page, so a replica at the start of the page has replayed it too.
    """
    return lsn - lsn % PAGE if lsn % PAGE in (HEADER, SEGMENT_HEADER) else lsn


def is_true(value: Any) -> bool:
    """Return a boolean of a row; one that was fetched without a cursor is text."""
    return value is True or value == "t"


class PostgreSQL(Dialect):
    # https://www.postgresql.org/docs/current/errcodes-appendix.html
    # Shutdown, crash, starting up, idle session timeout.
    connection_lost_errors: ClassVar[frozenset[Any]] = frozenset(
        {"57P01", "57P02", "57P03", "57P05"}
    )
    # Conflict with recovery, deadlock with recovery, database dropped.
    retryable_errors: ClassVar[frozenset[Any]] = connection_lost_errors | {
        "40001",
        "40P01",
        "57P04",
    }
    # A query cannot take a lock of this mode on a standby, so it is that of recovery.
    # https://www.postgresql.org/docs/current/hot-standby.html#HOT-STANDBY-CONFLICT
    replay_waits: ClassVar[str] = (
        "SELECT pg_is_in_recovery() AND EXISTS (SELECT 1 FROM pg_locks "
        "WHERE mode = 'AccessExclusiveLock' AND NOT granted)"
    )
    # https://www.postgresql.org/docs/current/monitoring-stats.html#WAIT-EVENT-IPC-TABLE
    waiting_commits: ClassVar[str] = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    )
    # lock_timeout; statement_timeout or a cancel request.
    lock_errors: ClassVar[frozenset[Any]] = frozenset({"55P03"})
    timeout_errors: ClassVar[frozenset[Any]] = frozenset({"57014"})
    read_only_errors: ClassVar[frozenset[Any]] = frozenset({READ_ONLY})
    # Not supported, not permitted, no such function.
    permission_errors: ClassVar[frozenset[Any]] = frozenset({"0A000", "42501", "42883"})

    def strategies(self, setting: bool | str) -> tuple[int, ...]:
        if setting == "lsn":
            return (LSN,)
        if setting == "xid":
            return XID, XID_ALONE
        return () if setting == "gtid" or not setting else (LSN, XID, XID_ALONE)

    def identify(
        self, query: Query, driver: Driver, strategy: int | None
    ) -> tuple[Identification, Row]:
        columns = IDENTITY if strategy is None else f"{IDENTITY}, {REPORTS[strategy]}"
        started, address, port, pid, sees_all, *row = query(f"SELECT {columns}")
        # inet_server_addr() is NULL over a Unix socket.
        identity = Identity(started, address or driver.host, int(port or driver.port))
        return Identification(identity, int(pid), not is_true(sees_all)), tuple(row)

    def system(self, query: Query, identity: Identity) -> str:
        return f"{int(query(SYSTEM)[0]):x}"

    def checkpoint_timeline(self, query: Query) -> str | None:
        return str(int(query(CHECKPOINT_TIMELINE)[0]))

    def balances_reads(self, query: Query) -> bool:
        # Only pgpool-II answers these, and only without parameters. It sends a SELECT of a function
        # to the primary, and another one to any of its servers.
        # https://www.pgpool.net/docs/latest/en/html/runtime-config-load-balancing.html
        query("SHOW pool_version")
        return bool(query(PGPOOL_BALANCES)[0] == "on")

    def report(self, query: Query, server: Server, strategy: int) -> Row:
        return query(f"SELECT {REPORTS[strategy]}")

    def read(self, row: Row, server: Server, strategy: int) -> Report:
        in_recovery, point, timeline = is_true(row[0]), row[1], row[2]
        if point is None:
            raise PositionUnavailable("it does not replay any WAL")
        value = parse_lsn(point) if strategy == LSN else int(point)
        prefix = server.system if strategy == LSN else f"{server.system}x"
        if strategy == XID_ALONE:
            return Report(in_recovery, {prefix: value}, Position({prefix: value}))
        if in_recovery:
            is_hidden = timeline is None and server.lacks_timeline_privilege
            return Report(True, {log_name(prefix, timeline): value}, None, is_hidden)
        # A primary reports a WAL file's name, which begins with the timeline in hexadecimal.
        log = log_name(prefix, str(int(timeline[:8], 16)))
        end = end_of_record(value) if strategy == LSN else value
        return Report(False, {log: value}, Position({log: end}))

    def supersedes(self, points: Points, other: Points) -> bool:
        # A server that was promoted has points of the earlier timelines, too.
        return any(
            any(is_later(log, earlier) for earlier in other)
            and not any(log == same or is_later(same, log) for same in other)
            for log in points
        )

    def session_search(self, session: int) -> str:
        return (
            "SELECT pg_backend_pid(), "
            f"EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = {session})"
        )

    def standby_limits(self, query: Query) -> Refusal:
        if query(ISOLATION) == ("serializable",):
            return Refusal(all_reads=True)
        (names,) = query(UNLOGGED)
        tables = tuple((names or "").splitlines())
        # Without one, the cause is another: "cached plan must not change result type".
        return Refusal(tables=tables, is_lasting=bool(tables))

    def refusal(self, query: Query, error: BaseException) -> Refusal | None:
        code = self.error_code(error)
        if code not in (UNSUPPORTED, READ_ONLY, NOT_READY) or query(IS_STANDBY) != ("on",):
            return None
        if code == UNSUPPORTED:
            return self.standby_limits(query)
        return Refusal(is_write=code == READ_ONLY, is_lasting=code == READ_ONLY)

    def error_code(self, error: BaseException) -> Any:
        cause = error.__cause__ if error.__cause__ is not None else error
        return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)

    def is_from_server(self, error: BaseException) -> bool:
        # psycopg2 has no code for errors of connecting. In every language, only those that a server
        # sent have two blanks after the severity.
        code = self.error_code(error)
        return ":  " in str(error) if code is None else not code.startswith("08")

    def is_lost(self, error: BaseException) -> bool:
        code = self.error_code(error)
        return code in self.connection_lost_errors or str(code).startswith("08")

    def is_retryable(self, error: BaseException) -> bool:
        code = str(self.error_code(error))
        return code in self.retryable_errors or code.startswith(("08", "53"))
