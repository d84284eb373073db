"""
Which server a connection leads to. It is known of the driver's connection, a pooled one too, and
asked once.
"""

from __future__ import annotations

from typing import Any

from pinning_middleware.servers.registry import Endpoint, Server

__all__ = ["ConnectionState"]


class ConnectionState:
    """What is known of one connection of a driver."""

    __slots__ = (
        "_hot_standby",
        "alias",
        "behind_pooler",
        "deadline",
        "endpoint",
        "is_watched",
        "may_fail_over",
        "next_prepared",
        "prepared",
        "promotion_seen",
        "server",
        "session_modified",
        "session_modified_at_checkout",
    )

    def __init__(self, endpoint: Endpoint, is_replica: bool, raw: Any = None) -> None:
        self.alias = endpoint.alias
        self.endpoint = endpoint
        # Whether another node may answer a read that waits here in vain.
        self.may_fail_over = is_replica
        # The server at its other end, None: not asked yet.
        self.server: Server | None = None
        # The site has changed its session, so that another one is not the same.
        self.session_modified = False
        # It had when it was last taken from a pool.
        self.session_modified_at_checkout = False
        # A pooler stands between, which may hand out another server at any time.
        self.behind_pooler = False
        # The question that is prepared on it, and the one that would be the next time.
        self.prepared: str | None = None
        self.next_prepared = ""
        # When a question of ours has to be answered, 0.0: none is asked.
        self.deadline = 0.0
        # Whether the driver lets its waiting be watched.
        self.is_watched = False
        # PostgreSQL 14 and later report a promotion by themselves, with their next message.
        pgconn = getattr(raw, "pgconn", None)
        self._hot_standby = getattr(pgconn, "parameter_status", None)
        self.promotion_seen = False

    def was_promoted(self) -> bool:
        """Return whether the server is news as one that is no standby; asks nobody."""
        return (
            self._hot_standby is not None
            and self._hot_standby(b"in_hot_standby") == b"off"
            and not self.promotion_seen
        )
