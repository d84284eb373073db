"""
Signals, for counting, alerting and testing.

The sender is the alias of the pool's primary, unless stated otherwise. Receivers are called through
``send_robust()``: an exception in one is logged by Django and does not reach the request.
"""

from __future__ import annotations

from django.dispatch import Signal

__all__ = [
    "fell_back_to_primary",
    "fell_back_to_replica",
    "read_retried",
    "replica_removed",
    "replica_restored",
    "replica_wait_finished",
    "token_rejected",
]

# A token was ignored. Arguments: reason ("oversized", "signature" or "content"). The sender is the
# store's class, or None for a token of a task or of ``pinning_scope()``.
token_rejected = Signal()

# A replica left the rotation. Arguments: replica (alias), reason (a Fault), seconds (until it is
# probed again).
replica_removed = Signal()

# A replica is back in the rotation. Arguments: replica (alias).
replica_restored = Signal()

# A failed read was retried on another server. Arguments: failed (alias), served (alias), error (the
# exception, or None if the server was rejected before the read was sent).
read_retried = Signal()

# A scope waited for a replica to catch up. Arguments: replica (alias), seconds (waited), reached
# (bool).
replica_wait_finished = Signal()

# A read that should have gone to a replica went to the primary. Arguments: served (alias), reason
# ("no_replica" or "not_caught_up").
fell_back_to_primary = Signal()

# A read that should have gone to the primary went to a replica, because the primary is unreachable.
# Arguments: served (alias), reason ("primary_down").
fell_back_to_replica = Signal()
