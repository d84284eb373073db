"""
Positions of replicas that do not show the role which timeline they replay. No I/O.

A PostgreSQL log is one timeline of one cluster, and is named ``"<prefix>-<timeline>"``. The prefix
is the cluster's system identifier in hexadecimal, with an ``x`` for transaction IDs. A log whose
timeline is unknown is named ``"<prefix>-"``, which no position of a primary contains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from pinning_middleware.pins import Points, Position

# Number of reports of a replica that are kept until a primary resolves them.
MAX_REPORTS = 8


def log_name(prefix: str, timeline: str | None) -> str:
    """Return the name of a log; pass None for an unknown timeline."""
    return f"{prefix}-{timeline or ''}"


def is_unresolved(log: str) -> bool:
    """Return whether the timeline of this log is unknown."""
    return log.endswith("-")


def timeline_of(log: str) -> str | None:
    """Return the timeline in a log's name, or None if it is unknown."""
    return log.rpartition("-")[2] or None


def is_later(log: str, other: str) -> bool:
    """Return whether a log is a later timeline of the cluster that the other one belongs to."""
    (prefix, _, timeline), (other_prefix, _, earlier) = log.rpartition("-"), other.rpartition("-")
    is_known = timeline.isdecimal() and earlier.isdecimal() and prefix == other_prefix
    return is_known and int(timeline) > int(earlier)


def may_be(unresolved: str, log: str) -> bool:
    """Return whether a log with an unknown timeline may be this one."""
    return log.startswith(unresolved)


class PrimarySample(NamedTuple):
    """A primary's report, with the times (monotonic clock) of its query and of its reply."""

    sent_at: float
    received_at: float
    written: Position


class HiddenTimeline:
    """
    What one server has reported without naming its timeline, and how a primary resolves it.

    **Problem.** An LSN is comparable within one timeline only. After a promotion the new primary's
    LSNs pass those of transactions that were lost, so a comparison of plain numbers would report
    a lost write as replayed. ``pg_stat_wal_receiver.received_tli`` names the timeline that a
    replica follows, to members of ``pg_read_all_stats`` only. ``pg_control_checkpoint()``, which
    every role may call, still names the old one for a while after a promotion.

    **Rule.** A replica's report of point ``p`` is bracketed if the primary has reported points
    ``a`` and ``b`` of timeline T, ``a`` in a reply that arrived before the replica's query was
    sent, ``b`` in reply to a query that was sent after the replica's reply had arrived, with
    ``a <= p <= b``, and no other timeline in the samples before and after. ``p`` is taken for a
    point of T if it is bracketed and either

    1. another report of this replica, with a smaller point, was bracketed by T before; or
    2. T is the timeline of the replica's last checkpoint.

    **Why this is sound.** The primary was on T when the replica reported ``p``. Let ``s`` be the
    point at which T branched off.

    - If the replica follows T, ``p`` is a point of T.
    - If it is on an ancestor of T and ``p <= s``, everything up to ``p`` belongs to T's history,
      and the claim holds too.
    - Otherwise it has replayed an ancestor beyond ``s``. Recovery follows a new timeline only if
      that branched off at or after the point that has been replayed, so it cannot join T. The
      server that wrote the ancestor has been replaced, so the replica stands still. The growing
      log of the primary can bracket the one point where it stands; rule 1 requires a second,
      larger one.
    - For rule 2: a restart point is on a timeline that the replica has replayed, and recovery never
      returns to an older timeline. So the replica is on no ancestor of T, and a first bracketed
      report is enough.

    The proof assumes that the former primary no longer writes, and that a replica has replayed
    what it received before the promotion by the time the new primary's log gets that far.

    https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES
    https://www.postgresql.org/docs/current/runtime-config-wal.html#GUC-RECOVERY-TARGET-TIMELINE
    https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-WAL-RECEIVER-VIEW
    https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-CONTROLDATA
    """

    __slots__ = ("_first_resolved", "_last_reported", "_unresolved_reports")

    def __init__(self) -> None:
        # The time of the query, the time of the reply, the log and the point.
        self._unresolved_reports: deque[tuple[float, float, str, int]] = deque(maxlen=MAX_REPORTS)
        # The last replay position the server reported, with or without its timeline.
        self._last_reported: Points = {}
        # By log, the first point that a primary has bracketed.
        self._first_resolved: dict[str, int] = {}

    def record(self, replayed: Points, sent_at: float, received_at: float, is_hidden: bool) -> None:
        """Store a report; ``is_hidden``: the role may not see its timeline."""
        self._last_reported = replayed
        if is_hidden:
            for log, point in replayed.items():
                self._unresolved_reports.append((sent_at, received_at, log, point))

    def reported_at_least(self, wanted: Points) -> bool:
        """Return whether the last unresolved report is at or past a point of ``wanted``."""
        if not self._unresolved_reports:
            return False
        _, _, log, point = self._unresolved_reports[-1]
        return any(may_be(log, name) and point >= end for name, end in wanted.items())

    def reached(self, minimum: Points) -> bool:
        """Return whether the last report, on any timeline, is at or past all of ``minimum``."""
        return bool(minimum) and all(
            any(
                is_unresolved(log) and may_be(log, name) and point >= end
                for log, point in self._last_reported.items()
            )
            for name, end in minimum.items()
        )

    def resolve(self, samples: Sequence[PrimarySample], checkpoint_timeline: str | None) -> Points:
        """
        Return the points that the primary's samples resolve, by the rule of this class.

        ``samples``: oldest first. ``checkpoint_timeline``: of the replica, or None if unknown.
        """
        resolved: dict[str, int] = {}
        for sent_at, received_at, log, point in tuple(self._unresolved_reports):
            before = _newest(log, [s for s in samples if s.received_at <= sent_at])
            after = _newest(log, [s for s in samples if s.sent_at >= received_at])
            if len(before) != 1 or before.keys() != after.keys():
                continue
            (name,) = before
            if before[name] <= point <= after[name]:
                first = self._first_resolved.setdefault(name, point)
                is_reached = checkpoint_timeline is not None and (
                    timeline_of(name) == checkpoint_timeline
                )
                if point > first or is_reached:
                    resolved[name] = max(point, resolved.get(name, point))
        return resolved


def _newest(log: str, samples: Sequence[PrimarySample]) -> dict[str, int]:
    """Return the last point of each log that ``log`` may be."""
    return {
        name: end
        for sample in samples
        for name, end in sample.written.points.items()
        if may_be(log, name)
    }
