"""
Why a read went where it went: one word for each decision. The decider gives it; signals, logs,
metrics and test tools hand it on unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

TURN: Final = "turn"  # a replica, by turns
WROTE: Final = "wrote"  # the scope has written to the pool
PINNED: Final = "pinned"  # an earlier scope has, and only time will tell
POSITION: Final = "position"  # a replica that has replayed what the pin asks for
BEHIND: Final = "behind"  # no replica is known to have replayed it
TRANSACTION: Final = "transaction"  # the code has opened one on the primary
LOCK: Final = "lock"  # a locking read holds the rest of the scope there
METHOD: Final = "method"  # the request is of one of PINNING_PRIMARY_METHODS
BY_HAND: Final = "by_hand"  # pin_this_request()
USE_PRIMARY: Final = "use_primary"
USE_REPLICA: Final = "use_replica"
NO_REPLICA: Final = "no_replica"  # none is configured, or none is usable
NOT_OFFLOADED: Final = "not_offloaded"  # PINNING_OFFLOAD or PINNING_OFFLOAD_OUTSIDE
MODEL: Final = "model"  # PINNING_PRIMARY_MODELS
DISABLED: Final = "disabled"  # PINNING_ENABLED = False
FAILOVER: Final = "failover"  # the server that was meant would not do
PRIMARY_DOWN: Final = "primary_down"  # a replica stands in for the primary

ALL: Final = (
    TURN,
    WROTE,
    PINNED,
    POSITION,
    BEHIND,
    TRANSACTION,
    LOCK,
    METHOD,
    BY_HAND,
    USE_PRIMARY,
    USE_REPLICA,
    NO_REPLICA,
    NOT_OFFLOADED,
    MODEL,
    DISABLED,
    FAILOVER,
    PRIMARY_DOWN,
)

# In the place of a reason, where nobody decided: the code named the alias.
EXPLICIT: Final = "explicit"

# What each says to people.
MEANINGS: Final[Mapping[str, str]] = {
    TURN: "a replica, by turns",
    WROTE: "this request has written",
    PINNED: "an earlier request has written, and only time ends that pin",
    POSITION: "a replica that has replayed what an earlier request wrote",
    BEHIND: "no replica is known to have replayed what an earlier request wrote",
    TRANSACTION: "a transaction is open on the primary",
    LOCK: "a locking read holds the rest of the request on the primary",
    METHOD: "the request's method is one of PINNING_PRIMARY_METHODS",
    BY_HAND: "pin_this_request()",
    USE_PRIMARY: "inside use_primary",
    USE_REPLICA: "inside use_replica",
    NO_REPLICA: "no replica is configured, or none is usable",
    NOT_OFFLOADED: "PINNING_OFFLOAD, or nothing, marks this for replicas",
    MODEL: "PINNING_PRIMARY_MODELS",
    DISABLED: "PINNING_ENABLED is false",
    FAILOVER: "the server that was meant would not do",
    PRIMARY_DOWN: "a replica stands in for the primary",
    EXPLICIT: "the code named the database",
}
