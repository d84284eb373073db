"""A pool: one primary, its replicas, and what is guaranteed for reads of them."""

from __future__ import annotations

import logging

from django.db import connections

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pin, Position
from pinning_middleware.pool_specs import PoolSpec
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.compatibility import is_same_database, is_test_mirror, is_testing
from pinning_middleware.routing.health import Health
from pinning_middleware.routing.primary_connections import PrimaryConnections
from pinning_middleware.routing.refusals import Refusals
from pinning_middleware.routing.replica_set import ReplicaSet
from pinning_middleware.scopes.scope import PoolState
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.registry import registry
from pinning_middleware.utils.logging import log_rate_limited

logger = logging.getLogger("pinning_middleware.pins")


class Pool:
    """
    One primary and its replicas.

    ``has_replicas`` is false if PINNING_ENABLED is, or if every weight is 0. ``is_legacy``: only
    ``SLAVE_DATABASES`` names its replicas. ``can_replace_primary``: PINNING_PRIMARY_DOWN allows
    stale reads. ``tracks_reads``: it matters which server answered a read (``monotonic-reads``).
    """

    is_dry_run = False

    def __init__(self, spec: PoolSpec, *, tracks_reads: bool = False) -> None:
        self.spec = spec
        self.key, self.primary, self.replicas = spec.key, spec.key.primary, tuple(spec.weights)
        self.is_legacy = spec.key.legacy
        self.has_replicas = conf.enabled and any(spec.weights.values())
        self.dialect = dialect_for(connections[self.primary])
        self.endpoint = registry.endpoint(self.primary)
        self.endpoints = {a: registry.endpoint(a, self.primary) for a in self.replicas}
        self.health = Health(self.endpoint, self.endpoints, self.dialect)
        self.primary_connections = PrimaryConnections(
            self.endpoint, self.dialect, self.health.probe
        )
        self.replica_set = self._make_replica_set()
        self.refusals = Refusals()
        self.supports_positions = self.health.supports_positions
        self.tracks_reads = tracks_reads and self.supports_positions
        self.can_replace_primary = conf.primary_down == "stale"
        self._same_as_primary = {a for a in self.replicas if is_same_database(self.primary, a)}

    def _make_replica_set(self) -> ReplicaSet:
        return ReplicaSet(self.spec, self.health)

    def __repr__(self) -> str:
        return f"<Pool {self.primary}>"

    def __contains__(self, alias: str | None) -> bool:
        """Return whether an instance of this database belongs to the pool; a new one may."""
        return alias is None or alias == self.primary or alias in self.endpoints

    @property
    def default_reason(self) -> Reason:
        """The reason for reads of a pool without replicas."""
        return Reason.NO_REPLICA if conf.enabled else Reason.DISABLED

    def is_mirror(self, alias: str) -> bool:
        """Return whether an alias is the very database of the primary."""
        if is_testing():
            # A test runner renames databases after the pool was made.
            return is_test_mirror(self.primary, alias)
        return alias == self.primary or alias in self._same_as_primary

    @property
    def is_primary_down(self) -> bool:
        """Whether the primary is unreachable and a replica may substitute for it."""
        return bool(self.endpoint.out_of_rotation) and self.can_replace_primary

    # The monitors of its replicas

    def track(self, position: Position, *, is_new: bool = True) -> None:
        """
        Have the replicas probed that are not known to have reached a position. ``is_new``: it was
        just written. Does no I/O.
        """
        weights = self.replica_set.rotation.weights
        aliases = tuple(
            alias
            for alias in self._monitored()
            if weights.get(alias) and not self.replica_set.all_have_reached(alias, position)
        )
        self.health.monitors.track(position, aliases, is_new=is_new)

    def sample_lag(self) -> None:
        """
        Have the lag of the replicas measured for the next ``monitor.WORK_LASTS`` seconds. Does no
        I/O.
        """
        if self.supports_positions and (aliases := self._monitored()):
            self.health.monitors.sample_lag(aliases)

    def _monitored(self) -> tuple[str, ...]:
        """
        Return the replicas that may be monitored although no setting requires it. A test database
        to which a monitor is connected could not be dropped.
        """
        testing = is_testing()
        return tuple(
            alias
            for alias, endpoint in self.endpoints.items()
            if not endpoint.out_of_rotation
            and not self.is_mirror(alias)
            and (not testing or any(s.is_replica for s in endpoint.recent_servers))
        )

    def dry_run_pin(self, state: PoolState) -> Pin | None:
        """Return the pin that a dry run records when the scope wrote; None outside a dry run."""
        return None

    def current_position(self) -> Position | None:
        """
        Return a position that includes what this thread has committed. None if it is unknown; pins
        then last the full window.
        """
        connection = connections[self.primary]
        is_unreachable = connection.connection is None and self.endpoint.out_of_rotation
        if not self.supports_positions or is_unreachable:
            return None
        try:
            result = self.health.probe(connection)
        except Exception as error:  # a site's own credentials provider may raise anything
            log_rate_limited(
                logger,
                logging.WARNING,
                ("position", self.primary),
                "Could not read the position of %s; pins on it last the full window: %s",
                self.primary,
                error,
                extra={"pool": self.primary, "alias": self.primary, "error": str(error)},
            )
            return None
        return None if result is None or result.report is None else result.report.written
