"""
Which server a connection leads to. It is known of the driver's connection, a pooled one too, and
asked once.
"""

from __future__ import annotations

from typing import Any

from .server import Endpoint, Server

__all__ = ["Link"]


class Link:
    """What is known of one connection of a driver."""

    __slots__ = (
        "_hot_standby",
        "alias",
        "deadline",
        "endpoint",
        "has_stand_in",
        "is_altered",
        "is_known_as_primary",
        "is_pooled",
        "is_watched",
        "prepared",
        "repeated",
        "server",
        "was_altered",
    )

    def __init__(self, endpoint: Endpoint, is_replica: bool, raw: Any = None) -> None:
        self.alias = endpoint.alias
        self.endpoint = endpoint
        # Whether another node may answer a read that waits here in vain.
        self.has_stand_in = is_replica
        # The server at its other end, None: not asked yet.
        self.server: Server | None = None
        # The site has changed its session, so that another one is not the same.
        self.is_altered = False
        # It had when it was last taken from a pool.
        self.was_altered = False
        # A pooler stands between, which may hand out another server at any time.
        self.is_pooled = False
        # The question that is prepared on it, and the one that would be the next time.
        self.prepared: str | None = None
        self.repeated = ""
        # When a question of ours has to be answered, 0.0: none is asked.
        self.deadline = 0.0
        # Whether the driver lets its waiting be watched.
        self.is_watched = False
        # PostgreSQL 14 and later report a promotion by themselves, with their next message.
        pgconn = getattr(raw, "pgconn", None)
        self._hot_standby = getattr(pgconn, "parameter_status", None)
        self.is_known_as_primary = False

    def has_left_recovery(self) -> bool:
        """Return whether the server is news as one that is no standby; asks nobody."""
        return (
            self._hot_standby is not None
            and self._hot_standby(b"in_hot_standby") == b"off"
            and not self.is_known_as_primary
        )
