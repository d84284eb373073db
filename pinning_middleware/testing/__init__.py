"""Utilities for testing sites that use this package, and custom stores."""

from __future__ import annotations

from pinning_middleware.testing.assertions import PinningAssertions
from pinning_middleware.testing.clock import advance_window
from pinning_middleware.testing.contract import StoreContract
from pinning_middleware.testing.isolation import isolated_pins
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
from pinning_middleware.testing.replicas import Replicas, replicas
from pinning_middleware.testing.staleness import LostUpdate, StaleRead, forbid_stale_reads

__all__ = [
    "LostUpdate",
    "PinningAssertions",
    "PrimaryForbidden",
    "Read",
    "ReplicaForbidden",
    "Replicas",
    "StaleRead",
    "StoreContract",
    "advance_window",
    "assert_num_reads",
    "assert_reads_from",
    "capture_reads",
    "forbid_primary",
    "forbid_replicas",
    "forbid_stale_reads",
    "isolated_pins",
    "replicas",
]
