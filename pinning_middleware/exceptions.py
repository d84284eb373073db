"""The exceptions that a site may catch."""

from __future__ import annotations

from django.db import DatabaseError

__all__ = ["InvalidToken", "ReplicaWriteError"]


class ReplicaWriteError(DatabaseError):
    """A write on the connection of a replica was rejected before it was sent."""


class InvalidToken(ValueError):
    """A token was rejected; ``reason`` is "oversized", "signature" or "content"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
