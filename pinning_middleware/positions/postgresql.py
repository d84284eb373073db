"""
PostgreSQL 13 and later: a position is an LSN within one timeline of one cluster.

The functions used here may be called by any role. Which timeline a replica replays is in
``pg_stat_wal_receiver``, which shows it to members of ``pg_read_all_stats`` (``pg_monitor``) only:
``pg_control_recovery()`` keeps naming the old timeline on a replica that follows a promotion. For
other roles the primary is asked for its timeline after the replica was: while that has not
changed, the replica has not left it either. Where two primaries are alive at once, and a replica
follows the one that the site does not write to, those roles are only told apart by being ahead.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.pins import Position

from .base import Positions, Report, fetch

__all__ = ["PostgreSQL"]

# Insert, not pg_current_wal_lsn(): that one is behind with synchronous_commit = off.
CURRENT = """
SELECT pg_current_wal_insert_lsn(),
       substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8),
       (SELECT system_identifier FROM pg_control_system())
"""
# In one statement, since a promotion may come between two: the replay position stays after it.
REPORT = """
SELECT pg_is_in_recovery(),
       pg_last_wal_replay_lsn(),
       (SELECT received_tli FROM pg_stat_wal_receiver),
       (SELECT system_identifier FROM pg_control_system())
"""
BEHIND = "SELECT extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())"
# https://www.postgresql.org/docs/19/sql-wait-for.html; a literal, outside a transaction.
WAIT = "WAIT FOR LSN '%X/%X' WITH (MODE 'standby_replay', TIMEOUT '%dms', NO_THROW)"
WAIT_VERSION = 190000

PAGE = 8192
# A page's header; the first page of a segment has the longer one.
HEADERS = (24, 40)


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
    return lsn - lsn % PAGE if lsn % PAGE in HEADERS else lsn


class PostgreSQL(Positions):
    connect_timeout: ClassVar[str | None] = "connect_timeout"
    # Conflict with recovery; shutdown, crash, starting up. Class 08 is a lost connection.
    passing_errors: ClassVar[frozenset[Any]] = frozenset({"40001", "57P01", "57P02", "57P03"})

    def current(self, connection: BaseDatabaseWrapper) -> Position | None:
        lsn, timeline, system = fetch(connection, CURRENT)
        return {_log(system, int(timeline, 16)): end_of_record(parse_lsn(lsn))}

    def report(self, connection: BaseDatabaseWrapper) -> Report:
        in_recovery, lsn, timeline, system = fetch(connection, REPORT)
        return Report(in_recovery, {_log(system, timeline): parse_lsn(lsn)} if lsn else {})

    def behind(self, connection: BaseDatabaseWrapper) -> float | None:
        (seconds,) = fetch(connection, BEHIND)
        return None if seconds is None else max(float(seconds), 0.0)

    def is_certain(self, position: Position) -> bool:
        return not any(log.endswith("-") for log in position)

    def ascertain(self, position: Position, primary: Position) -> Position:
        ((log, end),) = primary.items()
        return {
            log if log.startswith(uncertain) else uncertain: point
            for uncertain, point in position.items()
            # One that is ahead of this primary replays another's log.
            if point <= end + max(HEADERS)
        }

    def wait(self, connection: BaseDatabaseWrapper, wanted: Position, seconds: float) -> bool:
        if getattr(connection, "pg_version", 0) < WAIT_VERSION or len(wanted) != 1:
            return False
        (lsn,) = wanted.values()
        # At or under half a millisecond it would wait for ever.
        milliseconds = max(round(seconds * 1000), 1)
        fetch(connection, WAIT % (lsn >> 32, lsn & 0xFFFFFFFF, milliseconds))
        return True

    def error_code(self, error: BaseException) -> Any:
        cause = error.__cause__
        return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)


def _log(system: int, timeline: int | None) -> str:
    return f"{system:x}-{'' if timeline is None else timeline}"
