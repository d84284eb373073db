"""Positions in PostgreSQL's write-ahead log, as numbers."""

from __future__ import annotations

from typing import Final

LOG_PAGE: Final = 8192
LOG_SEGMENT: Final = 16 * 1024 * 1024

INSERTED: Final = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
REPLAYED: Final = "SELECT coalesce(pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0'), 0)::bigint"


def end_of_log(inserted: int) -> int:
    """Return the end of the last record, given the insert position.

    If that record ends at a page boundary, the insert position is already after the next
    page's header, which no replica passes before the next record.
    """
    if inserted % LOG_PAGE == 24:
        return inserted - 24
    return inserted - 40 if inserted % LOG_SEGMENT == 40 else inserted
