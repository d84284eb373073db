"""
PINNING_DRY_RUN: decide as if there were a replica, and read from the primary.

The pool of a dry run has one replica that does not exist. It has caught up with a write once the
assumed lag has passed since, so that ``decide()`` decides as it would with a real one.
``resolve()`` then sends the read to the primary, with the reason of that decision.
"""

from __future__ import annotations

import copy
import math
from typing import Final

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import PoolKey, Position
from pinning_middleware.pool_specs import PoolSpec
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.guarantees import ReadYourWrites
from pinning_middleware.routing.health import Health
from pinning_middleware.routing.policy import Decision, decide
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.replica_set import ReplicaSet
from pinning_middleware.scopes.scope import PoolState, Scope, current_scope
from pinning_middleware.stores import dry_run_counts
from pinning_middleware.utils import clock

__all__ = ["DryRunPool", "resolve"]

# The alias of the replica that does not exist.
VIRTUAL: Final = "(assumed)"
# The reasons of reads that a pin keeps on the primary.
_BY_PINS: Final = (Reason.WROTE, Reason.PINNED, Reason.NOT_CAUGHT_UP)


class AssumedReplica(ReplicaSet):
    """A replica that does not exist, and lags as many seconds as its spec assumes."""

    def __init__(self, spec: PoolSpec, health: Health) -> None:
        super().__init__(spec._replace(weights={VIRTUAL: 1}), health)
        self._key: PoolKey = spec.key
        self._lag = spec.assumed_lag or 0.0
        # No lag is measured.
        self._max_lag = None

    def _has_own_writes(self, seconds: float = 0.0) -> bool:
        """Return whether it has what the scope's pins require, or will have in so many seconds."""
        return _seconds_since_write(current_scope().state(self._key)) + seconds >= self._lag

    def caught_up(
        self, alias: str, wanted: Position, connection: BaseDatabaseWrapper | None = None
    ) -> bool | None:
        return self._has_own_writes()

    def find_caught_up(
        self, wanted: Position, key: str | None = None, *, probe: bool
    ) -> str | None:
        return VIRTUAL if self._has_own_writes() else None

    def wait_caught_up(self, wanted: Position, seconds: float) -> str | None:
        """Return whether waiting would help, without doing so."""
        return VIRTUAL if self._has_own_writes(seconds) else None

    def within_lag(
        self, max_lag: float, preferred: str | None, group: str | None = None
    ) -> str | None:
        return VIRTUAL if self._lag <= max_lag else None


class DryRunPool(Pool):
    """A pool whose primary serves every read, whatever was decided."""

    is_dry_run = True

    def __init__(self, spec: PoolSpec) -> None:
        super().__init__(spec, ReadYourWrites())
        self.replica_set = AssumedReplica(spec, self.health)
        self.has_replicas = conf.enabled
        self.can_replace_primary = False
        # No connection is judged: reads run on the primary as if the package were not there.
        self.dialect = None
        # Most reads get this decision.
        self.round_robin = Decision(self.primary, None, Reason.ROUND_ROBIN)

    def is_mirror(self, alias: str) -> bool:
        return alias == VIRTUAL or super().is_mirror(alias)

    def follow(self, position: Position) -> None:
        """Do nothing: no replica can be probed."""

    def sample_lag(self) -> None:
        """Do nothing: no replica can be probed."""


def resolve(pool: DryRunPool, scope: Scope, decision: Decision, model: object) -> Decision:
    """Return the decision for the primary, with the reason of one that was made in a dry run."""
    if not dry_run_counts.is_sharing:
        dry_run_counts.start()
    reason = decision.reason
    if reason is Reason.ROUND_ROBIN:
        return pool.round_robin
    misses_write = reason in _BY_PINS and _misses_write(pool, scope, reason, model)
    return Decision(pool.primary, None, reason, misses_write)


def _misses_write(pool: Pool, scope: Scope, reason: Reason, model: object) -> bool:
    """
    Return whether the read, if there were no pins, would go to a replica that lacks what the
    client has written.
    """
    state, lag = scope.state(pool.key), pool.spec.assumed_lag or 0.0
    if _seconds_since_write(state) >= lag:
        return False
    if reason is not Reason.WROTE:
        # An inherited pin decides last, so that nothing else keeps the read on the primary.
        return True
    unpinned = copy.copy(scope)
    unpinned.pools = {**scope.pools, pool.key: _without_pins(state)}
    is_on_replica = decide(pool, unpinned, model).replica is not None
    # PINNING_OFFLOAD is called once in a request.
    scope.may_offload = unpinned.may_offload
    return is_on_replica


def _seconds_since_write(state: PoolState) -> float:
    """Return how long ago the client last wrote; infinity if it has not."""
    now = clock.now()
    written = [now if w.visible_at is None else w.visible_at for w in state.writes.values()]
    if state.inherited is not None:
        # A pin ends a window after the write.
        written.append(state.inherited.until - conf.seconds)
    return now - max(written, default=-math.inf)


def _without_pins(state: PoolState) -> PoolState:
    return state._replace(
        inherited=None, observed=None, writes={}, pinned_at=None, pinned_until=None
    )
