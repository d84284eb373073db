"""Reasons for routing decisions, and faults of servers out of rotation."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class _Described(StrEnum):
    """Strings with a description, which explains each in one phrase."""

    description: str

    def __new__(cls, value: str, description: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.description = description
        return member


class Reason(_Described):
    """
    The reason for a routing decision.

    The policy or failover assigns it once. Signals, log records, metrics, the debug panel and the
    test utilities pass it on unchanged.
    """

    ROUND_ROBIN = "round_robin", "the next replica, round robin"
    WROTE = "wrote", "this request has written to the primary"
    PINNED = "pinned", "an earlier request has written, and its pin has not expired"
    CAUGHT_UP = "caught_up", "a replica that has replayed what an earlier request wrote"
    NOT_CAUGHT_UP = "not_caught_up", "no replica is known to have replayed the earlier write"
    TRANSACTION = "transaction", "a transaction is open on the primary"
    LOCK = "lock", "a locking read keeps the rest of the request on the primary"
    SESSION_STATE = "session_state", "the code has changed session state on the primary"
    HTTP_METHOD = (
        "http_method",
        "the request's method is one of PINNING_PRIMARY_METHODS, or its task prefers the primary",
    )
    MANUAL = "manual", "pin_this_request()"
    USE_PRIMARY = "use_primary", "inside use_primary"
    USE_REPLICA = "use_replica", "inside use_replica"
    NO_REPLICA = "no_replica", "no replica is configured, or none is usable"
    NOT_OFFLOADED = "not_offloaded", "PINNING_OFFLOAD or PINNING_OFFLOAD_OUTSIDE_REQUESTS"
    PRIMARY_MODEL = "primary_model", "PINNING_PRIMARY_MODELS, or a standby cannot read the table"
    DISABLED = "disabled", "PINNING_ENABLED is false"
    FAILOVER = "failover", "the intended server could not serve the read"
    PRIMARY_DOWN = "primary_down", "a replica substitutes for the unreachable primary"
    RETRY_404 = "retry_404", "a view that returned 404 is run again on the primary"
    EXPLICIT = "explicit", "the code named the database alias"


class Fault(_Described):
    """
    Why a server, or everything an alias resolves to, is out of rotation; ``DEMOTED``: why a
    connection must not be used.
    """

    UNREACHABLE = "unreachable", "connecting to it fails"
    UNRESPONSIVE = "unresponsive", "it accepts connections but does not answer"
    PROMOTED = "promoted", "it is not a replica of this pool's primary"
    DEMOTED = "demoted", "the connection is to a former primary"
    STALE_RESTART = "stale_restart", "it has restarted and not yet replayed what it had before"
    LAG = "lag", "it lags more than PINNING_MAX_LAG"
    REPLAY_WAITS = "replay_waits", "its replay waits for a lock that a query holds"
