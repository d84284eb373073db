"""
Signals for those who want to count, alert or test. The sender is the alias of the primary whose
pool is concerned, unless said otherwise; each is also said in the log ``pinning_middleware``.
"""

from __future__ import annotations

from django.dispatch import Signal

__all__ = [
    "primary_fallback",
    "read_rerun",
    "replica_left_out",
    "replica_taken_back",
    "replica_waited",
    "token_rejected",
]

# Arguments: reason. The sender is the store's class.
token_rejected = Signal()

# Arguments: replica, reason ("connect", "silent", "role", "behind", "lag"), seconds (until it is
# looked at again).
replica_left_out = Signal()

# Arguments: replica.
replica_taken_back = Signal()

# Arguments: failed (alias), served (alias), error.
read_rerun = Signal()

# Arguments: replica, seconds (waited), reached (bool).
replica_waited = Signal()

# A read went elsewhere than its rule says. Arguments: served (alias), reason ("no_replica",
# "behind", "primary_down").
primary_fallback = Signal()
