"""For the tests of sites that use this package, and of stores for it."""

from __future__ import annotations

from .assertions import PinningAssertions
from .clock import step
from .contract import StoreContract
from .reads import (
    PrimaryForbidden,
    Read,
    ReplicaForbidden,
    assert_num_reads,
    assert_reads_from,
    capture_reads,
    forbid_primary,
    forbid_replicas,
)
from .replicas import Replicas, StaleRead, forbid_stale_reads, replicas

__all__ = [
    "PinningAssertions",
    "PrimaryForbidden",
    "Read",
    "ReplicaForbidden",
    "Replicas",
    "StaleRead",
    "StoreContract",
    "assert_num_reads",
    "assert_reads_from",
    "capture_reads",
    "forbid_primary",
    "forbid_replicas",
    "forbid_stale_reads",
    "replicas",
    "step",
]
