"""Read from replicas without ever showing a user a state older than what they just wrote."""

from __future__ import annotations

from .exceptions import ReplicaWriteError
from .opening import carry_scope, pinning_scope
from .verbs import (
    acarry_keys,
    carry_keys,
    direct,
    ignore_writes,
    is_pinned,
    offload,
    offload_this_request,
    pin_keys,
    pin_this_request,
    unpin_this_request,
    use_primary,
    use_replica,
)

__all__ = [
    "ReplicaWriteError",
    "acarry_keys",
    "carry_keys",
    "carry_scope",
    "direct",
    "ignore_writes",
    "is_pinned",
    "offload",
    "offload_this_request",
    "pin_keys",
    "pin_this_request",
    "pinning_scope",
    "unpin_this_request",
    "use_primary",
    "use_replica",
]
