"""For the tests of sites that use this package, and of stores for it."""

from __future__ import annotations

from pinning_middleware.testing.assertions import PinningAssertions
from pinning_middleware.testing.clock import step
from pinning_middleware.testing.contract import StoreContract
from pinning_middleware.testing.reads import (
    PrimaryForbidden,
    Read,
    ReplicaForbidden,
    assert_num_reads,
    assert_reads_from,
    capture_reads,
    forbid_primary,
    forbid_replicas,
)
from pinning_middleware.testing.replicas import Replicas, StaleRead, forbid_stale_reads, replicas

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
