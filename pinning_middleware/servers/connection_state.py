"""
The server behind a driver connection. Determined once per driver connection (also a pooled one).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from pinning_middleware.servers.registry import Endpoint, Server


def driver_session(raw: Any) -> int | None:
    """
    Return the session's ID as reported at connect, None if there is none. A connection pooler
    reports its own.
    """
    session: int | None = getattr(getattr(raw, "info", None), "backend_pid", None)
    if session is None and hasattr(raw, "thread_id"):
        session = raw.thread_id()
    return session


class ConnectionState:
    """The state of one driver connection, kept for as long as the connection exists."""

    def __init__(self, endpoint: Endpoint, may_fail_over: bool, raw: Any = None) -> None:
        self.alias = endpoint.alias
        self.endpoint = endpoint
        # Whether a read that hangs here may fail over to another server.
        self.may_fail_over = may_fail_over
        # Returns whether the read that runs now could be given up while its server executes it.
        self.may_leave: Callable[[], bool] | None = None
        # Whether that read was last seen waiting for a lock of recovery.
        self.waits_for_lock = False
        # Monotonic time. A pool opens connections long before they are first used.
        self.opened_at: float = getattr(raw, "_created_at", time.monotonic())
        # None if the server has not been identified yet.
        self.server: Server | None = None
        # The site has changed session state, so another connection is not interchangeable.
        self.session_modified = False
        # The value of session_modified when the connection was last taken from a pool.
        self.session_modified_at_checkout = False
        # The server has rejected a write because it is read-only: it may be a former primary.
        self.rejected_write = False
        # A connection pooler is in between, which may switch servers at any time.
        self.behind_pooler = False
        # The server-side cursors of iterators, which end with the connection.
        self.named_cursors: WeakSet[Any] = WeakSet()
        # The SQL of the probe that is prepared on the connection, and of the one to prepare if it
        # is repeated.
        self.prepared: str | None = None
        self.next_prepared: str | None = None
        self.can_prepare = True
        # Monotonic time by which the current probe must be answered, or None.
        self.deadline: float | None = None
        # Whether the driver allows its waits to be watched.
        self.waits_are_watched = False
        # PostgreSQL 14 and later report a promotion with their next message.
        # https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQPARAMETERSTATUS
        pgconn = getattr(raw, "pgconn", None)
        self._parameter_status = getattr(pgconn, "parameter_status", None)
        self.promotion_seen = False

    @property
    def has_open_iterator(self) -> bool:
        """Whether an iterator still fetches rows by a server-side cursor."""
        return any(not cursor.closed for cursor in tuple(self.named_cursors))

    @property
    def may_be_any_server(self) -> bool:
        """Whether it is unknown to which of several servers of the alias it is connected."""
        return self.server is None and len(self.endpoint.recent_servers) > 1

    def record_answer(self) -> None:
        """Record that the server has answered a read."""
        now = time.monotonic()
        self.endpoint.answered_at = now
        if self.server is not None:
            self.server.answered_at = now

    @property
    def last_answer(self) -> float:
        """
        Monotonic time at which the server last answered a read of this process, as far as is known.
        Every answer of a pooler is that of its server, unless it mixes several.
        """
        endpoint = self.endpoint
        if endpoint.has_pooler and not endpoint.pooler_mixes_servers:
            return endpoint.answered_at
        return 0.0 if self.server is None else self.server.answered_at

    @property
    def may_be_standby(self) -> bool:
        """Whether the server may be a standby, as far as is known. Does no I/O."""
        if self.server is not None and self.server.is_replica is not None:
            return self.server.is_replica
        return self._in_hot_standby != b"off"

    @property
    def is_standby(self) -> bool:
        """Whether the server has reported that it is a standby. Does no I/O."""
        return self._in_hot_standby == b"on"

    def was_promoted(self) -> bool:
        """Return whether the server has left recovery since we last checked. Does no I/O."""
        return self._in_hot_standby == b"off" and not self.promotion_seen

    @property
    def _in_hot_standby(self) -> bytes | None:
        """What the server reports by itself: "on", "off", or None if it does not (before 14)."""
        return None if self._parameter_status is None else self._parameter_status(b"in_hot_standby")
