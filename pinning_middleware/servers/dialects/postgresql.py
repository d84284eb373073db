"""
PostgreSQL 14 and later: a position is an LSN, or a transaction id, within one timeline of one
cluster.

The functions used here may be called by any role. Which timeline a replica replays is in
``pg_stat_get_wal_receiver()``, which shows it to members of ``pg_read_all_stats`` (``pg_monitor``)
only, and to nobody while no receiver runs: ``pg_control_checkpoint()`` and
``pg_control_recovery()`` keep naming the old timeline on a replica that follows a promotion. To
other roles it is hidden; what a primary says before and after then dates what the replica said.
The timeline of its last checkpoint is one that it has reached, so it is on no older one.

A transaction id is the way where the functions for LSNs are refused (Aurora): what the primary
has given out after a commit is on a replica once nothing older is running there. On a standby the
list of running ids is empty, so only ``xmin`` is asked.
https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pinning_middleware.servers.dialects.base import (
    Dialect,
    Identification,
    PositionUnavailable,
    Query,
    Row,
)
from pinning_middleware.servers.registry import Identity, Report, Server

__all__ = ["LSN", "STARTED", "XID", "XID_ALONE", "PostgreSQL", "end_of_record", "parse_lsn"]

# The ways, in the order in which they are tried.
LSN: Final = 0
XID: Final = 1
# Where not even the timeline may be asked.
XID_ALONE: Final = 2

# As a number, since a session's time zone is the site's.
STARTED: Final = "extract(epoch FROM pg_postmaster_start_time())::text"
IDENTITY = (
    f"{STARTED}, host(inet_server_addr()), inet_server_port(), "
    "pg_backend_pid(), pg_has_role('pg_read_all_stats', 'USAGE')"
)
SYSTEM = "SELECT system_identifier FROM pg_control_system()"
FOLLOWED = "SELECT timeline_id FROM pg_control_checkpoint()"

# In one statement, since a promotion may come between two: the replay position stays after it.
# Insert, not pg_current_wal_lsn(): that one is behind with synchronous_commit = off. The function
# behind pg_stat_wal_receiver, and no subquery, takes a sixth of the view's time.
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

PAGE = 8192
# A page's header; the first page of a segment has the longer one.
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
    Return where the last record ends, given the insert position.

    After a record that ends with its page the insert position is past the next page's header,
    where no replica gets to before the next record. A record that reaches just as far into the
    page began before it, so a replica that is at the page's start has replayed that one too.
    """
    return lsn - lsn % PAGE if lsn % PAGE in (HEADER, SEGMENT_HEADER) else lsn


def _is_true(value: Any) -> bool:
    # What was asked without a cursor is text.
    return value is True or value == "t"


class PostgreSQL(Dialect):
    # Conflict with recovery; shutdown, crash, starting up; a lost connection; no room for one.
    connection_lost_errors: ClassVar[frozenset[Any]] = frozenset(
        {"57P01", "57P02", "57P03", "57P05"}
    )
    retryable_errors: ClassVar[frozenset[Any]] = connection_lost_errors | {
        "40001",
        "40P01",
        "57P04",
    }
    permission_errors: ClassVar[frozenset[Any]] = frozenset({"0A000", "42501", "42883"})

    def strategies(self, choice: bool | str) -> tuple[int, ...]:
        if choice == "lsn":
            return (LSN,)
        if choice == "xid":
            return XID, XID_ALONE
        return () if choice == "gtid" or not choice else (LSN, XID, XID_ALONE)

    def identify(
        self, ask: Query, driver: tuple[str, int], way: int | None
    ) -> tuple[Identification, Row]:
        wanted = IDENTITY if way is None else f"{IDENTITY}, {REPORTS[way]}"
        started, address, port, pid, sees_all, *row = ask(f"SELECT {wanted}")
        # Over a Unix socket a server has no address but the socket's.
        identity = Identity(started, address or driver[0], int(port or driver[1]))
        return Identification(identity, int(pid), not _is_true(sees_all)), tuple(row)

    def system(self, ask: Query, identity: Identity) -> str:
        return f"{int(ask(SYSTEM)[0]):x}"

    def checkpoint_timeline(self, ask: Query) -> str:
        return str(int(ask(FOLLOWED)[0]))

    def report(self, ask: Query, server: Server, way: int) -> Row:
        return ask(f"SELECT {REPORTS[way]}")

    def read(self, row: Row, server: Server, way: int) -> Report:
        in_recovery, point, timeline = _is_true(row[0]), row[1], row[2]
        if point is None:
            raise PositionUnavailable("it replays no log")
        system = server.system
        if way == LSN:
            value, log = parse_lsn(point), f"{system}-"
        else:
            value, log = int(point), f"{system}x-"
        if way == XID_ALONE:
            return Report(in_recovery, {f"{system}x": value}, {f"{system}x": value})
        if in_recovery:
            name = log if timeline is None else log + timeline
            return Report(
                True, {name: value}, None, timeline is None and server.lacks_timeline_privilege
            )
        log += str(int(timeline[:8], 16))
        return Report(False, {log: value}, {log: end_of_record(value) if way == LSN else value})

    def error_code(self, error: BaseException) -> Any:
        cause = error.__cause__ if error.__cause__ is not None else error
        return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)

    def is_lost(self, error: BaseException) -> bool:
        code = self.error_code(error)
        return code in self.connection_lost_errors or str(code).startswith("08")

    def is_retryable(self, error: BaseException) -> bool:
        code = str(self.error_code(error))
        return code in self.retryable_errors or code.startswith(("08", "53"))
