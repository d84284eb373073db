"""Read from replicas without ever showing a user a state older than what they just wrote."""

from __future__ import annotations

from .exceptions import ReplicaWriteError
from .scopes import pinning_scope
from .verbs import (
    ignore_writes,
    is_pinned,
    pin_this_request,
    unpin_this_request,
    use_primary,
    use_replica,
)

__all__ = [
    "ReplicaWriteError",
    "ignore_writes",
    "is_pinned",
    "pin_this_request",
    "pinning_scope",
    "unpin_this_request",
    "use_primary",
    "use_replica",
]
