"""Replay positions of the replicas, and controls to pause and delay them.

It connects to the servers without Django, so that its statements do not count as reads or writes of
a user.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Final

import psycopg
from django.conf import settings
from django.db import connections

from sample_site.wal import INSERTED, REPLAYED, end_of_log

PRIMARY: Final = "default"
LONGEST_DELAY: Final = 10.0

REPLICA: Final = f"""
{REPLAYED},
       pg_is_in_recovery(),
       CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END,
       (SELECT setting::bigint / 1000.0 FROM pg_settings WHERE name = 'recovery_min_apply_delay')
"""
NOT_ALLOWED: Final = (
    "This takes a superuser of PostgreSQL (or a role that was granted the function). "
    "The site's role for this replica is none."
)


@dataclass(frozen=True)
class ReplicaStatus:
    """The state of a replica, as shown by the panel."""

    alias: str
    reachable: bool
    paused: bool = False
    delay: float = 0.0
    bytes_behind: int | None = None
    seconds_behind: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return asdict(self)


class History:
    """Times of the primary's positions, to convert a replica's position to seconds.

    PostgreSQL's own value counts from the last transaction, so it grows on an idle system.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque(maxlen=3600)

    def record(self, position: int, now: float) -> None:
        """Store the primary's position."""
        with self._lock:
            if not self._samples or position > self._samples[-1][1]:
                self._samples.append((now, position))

    def behind(self, replayed: int, now: float) -> float:
        """Return the time since the primary passed this position (seconds)."""
        with self._lock:
            return next((now - at for at, position in self._samples if position > replayed), 0.0)


history = History()


def connect(alias: str) -> psycopg.Connection[Any]:
    """Connect with Django's settings, but without Django."""
    parameters = connections[alias].get_connection_params()
    return psycopg.connect(**parameters | {"autocommit": True, "connect_timeout": 2})


def status() -> list[ReplicaStatus]:
    """Return the current state of every replica."""
    now = time.monotonic()
    try:
        with connect(PRIMARY) as primary:
            written = end_of_log(primary.execute(INSERTED).fetchone()[0])  # type: ignore[index]
        history.record(written, now)
    except psycopg.Error:
        written = None
    return [replica_status(alias, written, now) for alias in settings.PINNING_REPLICAS]


def replica_status(alias: str, written: int | None, now: float) -> ReplicaStatus:
    """Return the state of a replica, compared to the primary's position."""
    try:
        with connect(alias) as connection:
            row = connection.execute(REPLICA).fetchone()
    except psycopg.Error:
        return ReplicaStatus(alias, reachable=False)
    assert row is not None
    replayed, in_recovery, paused, delay = row
    if written is None or not in_recovery:
        return ReplicaStatus(alias, True, paused, float(delay))
    behind = max(0, written - replayed)
    seconds = history.behind(replayed, now) if behind else 0.0
    return ReplicaStatus(alias, True, paused, float(delay), behind, round(seconds, 1))


def pause(alias: str) -> None:
    """Pause the replay of a replica."""
    with connect(alias) as connection:
        connection.execute("SELECT pg_wal_replay_pause()")


def resume(alias: str) -> None:
    """Resume the replay of a replica."""
    with connect(alias) as connection:
        connection.execute("SELECT pg_wal_replay_resume()")


def set_delay(alias: str, seconds: float) -> None:
    """Delay the replay of commits on a replica (seconds)."""
    milliseconds = round(min(max(seconds, 0.0), LONGEST_DELAY) * 1000)
    with connect(alias) as connection:
        connection.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{milliseconds}ms'")
        connection.execute("SELECT pg_reload_conf()")
