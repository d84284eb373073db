"""
The server behind a driver connection. Determined once per driver connection (also a pooled one).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pinning_middleware.servers.registry import Endpoint, Server

__all__ = ["ConnectionState"]


class ConnectionState:
    """The state of one driver connection, kept for as long as the connection exists."""

    __slots__ = (
        "_parameter_status",
        "alias",
        "behind_pooler",
        "can_prepare",
        "deadline",
        "endpoint",
        "may_fail_over",
        "may_leave",
        "next_prepared",
        "opened_at",
        "prepared",
        "promotion_seen",
        "rejected_write",
        "server",
        "session_modified",
        "session_modified_at_checkout",
        "waits_are_watched",
        "waits_for_lock",
    )

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
    def is_standby(self) -> bool:
        """Whether the server has said that it is one. Does no I/O."""
        return (
            self._parameter_status is not None
            and self._parameter_status(b"in_hot_standby") == b"on"
        )

    def was_promoted(self) -> bool:
        """Return whether the server has left recovery since we last checked. Does no I/O."""
        return (
            self._parameter_status is not None
            and self._parameter_status(b"in_hot_standby") == b"off"
            and not self.promotion_seen
        )
