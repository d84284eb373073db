"""
PINNING_DRY_RUN: decide as if there were a replica, and read from the primary.

The pool of a dry run has one assumed replica. It has caught up with a write once the assumed lag
has passed since, so that ``decide()`` decides as it would with a real one.
``redirect_to_primary()`` then sends the read to the primary, with the reason of that decision.

A pin does not record when its client wrote: ``pin_this_request()`` makes pins, too. So the pool
adds one of its own kind, ``PinKind.DRY_RUN``, which requires nothing.
"""

from __future__ import annotations

import math
from typing import Final

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pin, PinKey, PinKind, Position
from pinning_middleware.pool_specs import PoolSpec
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.health import Health
from pinning_middleware.routing.policy import Decision, reason_besides_pins
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.replica_set import ReplicaSet
from pinning_middleware.scopes.overrides import effects_on
from pinning_middleware.scopes.scope import PoolState, Scope, current_scope
from pinning_middleware.stores import dry_run_counts
from pinning_middleware.utils import clock

# The alias of the assumed replica.
ASSUMED_REPLICA: Final = "(assumed replica)"
# The reasons of reads that a pin keeps from a replica which lacks the write, or delays.
_BY_PINS: Final = (Reason.WROTE, Reason.PINNED, Reason.NOT_CAUGHT_UP, Reason.CAUGHT_UP)


class AssumedReplica(ReplicaSet):
    """The assumed replica, which lags as many seconds as the spec says."""

    def __init__(self, spec: PoolSpec, health: Health) -> None:
        super().__init__(spec._replace(weights={ASSUMED_REPLICA: 1}), health)
        self._spec = spec
        self._lag = _lag(spec)
        # No lag is measured.
        self._max_lag = None

    def _has_caught_up(self, seconds: float = 0.0) -> bool:
        """Return whether it has what the scope's pins require, or will have in ``seconds``."""
        scope = current_scope()
        since, pin = _last_write(scope, self._spec), scope.state(self._spec.key).inherited
        if since == -math.inf and pin is not None:
            # The pin of a key, or a manual one, whose position was taken when it was made.
            since = pin.until - conf.seconds
        return clock.now() - since + seconds >= self._lag

    def caught_up(
        self, alias: str, wanted: Position, connection: BaseDatabaseWrapper | None = None
    ) -> bool | None:
        return self._has_caught_up()

    def find_caught_up(
        self, order: tuple[str, ...], wanted: Position, *, probe: bool
    ) -> str | None:
        return ASSUMED_REPLICA if self._has_caught_up() else None

    def wait_caught_up(self, wanted: Position, seconds: float) -> str | None:
        """Return the replica if it will have caught up within ``seconds``. Do not wait."""
        return ASSUMED_REPLICA if self._has_caught_up(seconds) else None

    def within_lag(
        self, max_lag: float, preferred: str | None, group: str | None = None
    ) -> str | None:
        return ASSUMED_REPLICA if self._lag <= max_lag else None


class DryRunPool(Pool):
    """A pool whose primary serves every read, whatever was decided."""

    is_dry_run = True

    def __init__(self, spec: PoolSpec) -> None:
        super().__init__(spec)
        self.has_replicas = conf.enabled
        self.can_replace_primary = False
        # No connection is judged: reads run on the primary as if the package were not there.
        self.dialect = None

    def _make_replica_set(self) -> ReplicaSet:
        return AssumedReplica(self.spec, self.health)

    def is_mirror(self, alias: str) -> bool:
        return alias == ASSUMED_REPLICA or super().is_mirror(alias)

    def dry_run_pin(self, state: PoolState) -> Pin | None:
        written = _last_write_in(state)
        return None if written == -math.inf else Pin(written + _pin_lifetime(self.spec))


def redirect_to_primary(
    pool: DryRunPool, scope: Scope, decision: Decision, model: object
) -> Decision:
    """Return the decision for the primary, with the reason of one that was made in a dry run."""
    if not dry_run_counts.has_thread:
        dry_run_counts.start()
    reason = decision.reason
    return Decision(pool.primary, None, reason, _would_miss_write(pool, scope, reason, model))


def _would_miss_write(pool: Pool, scope: Scope, reason: Reason, model: object) -> bool:
    """
    Return whether the read, if there were no pins, would go to a replica that lacks what the
    client has written.
    """
    if reason not in _BY_PINS:
        return False
    if clock.now() - _last_write(scope, pool.spec) >= _lag(pool.spec):
        return False
    if reason is not Reason.WROTE:
        # An inherited pin decides last, so that nothing else keeps the read on the primary.
        return True
    effects = effects_on(pool.primary)
    if effects.is_saving:
        return False
    return reason_besides_pins(pool, scope, scope.state(pool.key), effects, model) is None


def _last_write(scope: Scope, spec: PoolSpec) -> float:
    """
    Return when the client last wrote (seconds since the epoch), -infinity if it has not. A write
    that was rolled back counts, since it pins as well.
    """
    found, key = _last_write_in(scope.state(spec.key)), PinKey(spec.key.primary, PinKind.DRY_RUN)
    each: Scope | None = scope
    while each is not None:
        pin = each.inherited_pins.get(key)
        if pin is not None:
            found = max(found, pin.until - _pin_lifetime(spec))
        each = each.parent
    return found


def _last_write_in(state: PoolState) -> float:
    now = clock.now()
    written = [now if w.visible_at is None else w.visible_at for w in state.writes.values()]
    return max(written, default=-math.inf)


def _pin_lifetime(spec: PoolSpec) -> float:
    # It ends with the pin of the write, so that no response sets the cookie for it alone.
    return max(conf.seconds, _lag(spec))


def _lag(spec: PoolSpec) -> float:
    return spec.assumed_lag or 0.0
