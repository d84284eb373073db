"""
Which replica a scope reads from: the same one for the whole scope, the one of its user, or the one
of a group.
"""

from __future__ import annotations

from pinning_middleware.conf import conf
from pinning_middleware.pins import Position
from pinning_middleware.routing.pool import Pool
from pinning_middleware.scopes.overrides import Override
from pinning_middleware.scopes.scope import Scope
from pinning_middleware.utils import clock


def balance_key(scope: Scope) -> str | None:
    """Return the key by which the user of a scope stays on one replica, None if unknown."""
    return None if scope.balance_key is None else scope.balance_key()


def next_replica(pool: Pool, scope: Scope) -> str | None:
    """Return the replica that the scope reads from, choosing the next one if necessary."""
    (alias, since), key = scope.replica(pool.key), balance_key(scope)
    # Outside any scope a replica is kept for a window only.
    may_keep = not scope.is_ambient or clock.monotonic() - since < conf.seconds
    if key is None and may_keep and alias in pool.replica_set.rotation.names:
        return alias
    chosen = pool.replica_set.next(after=alias, key=key)
    if chosen != alias or key is None:
        scope.keep_replica(pool.key, chosen)
    return chosen


def replica_caught_up(pool: Pool, scope: Scope, wanted: Position, *, probe: bool) -> str | None:
    """Return a replica that has caught up, that of the scope or of its user first, or None."""
    replicas, key = pool.replica_set, balance_key(scope)
    kept = scope.replica(pool.key).alias if key is None else None
    # For a pinned read the primary comes before a higher tier.
    if kept and not replicas.rotation.is_fallback(kept) and replicas.caught_up(kept, wanted):
        return kept
    order = replicas.rotation.order(key, fallback=bool(pool.endpoint.out_of_rotation))
    alias = replicas.find_caught_up(order, wanted, probe=probe)
    if alias is not None and alias != order[0]:
        # Otherwise every pinned read would go to the one replica that is known to have caught up.
        pool.track(wanted, is_new=False)
    return alias


def replica_for_override(pool: Pool, scope: Scope, override: Override) -> str | None:
    """Return the replica for a read inside ``use_replica``, None if none is usable."""
    group, max_lag, replicas = override.group, override.max_lag, pool.replica_set
    if group in replicas.rotations.by_group:
        kept = scope.replica(pool.key, group).alias
        alias = kept if kept in replicas.rotations.of(group).names else None
        if max_lag is not None:
            alias = replicas.within_lag(max_lag, alias, group)
        elif alias is None:
            alias = replicas.next(after=kept, group=group)
        if alias is not None:
            if alias != kept:
                scope.keep_replica(pool.key, alias, group)
            return alias
    if max_lag is None:
        return next_replica(pool, scope)
    key = balance_key(scope)
    kept = scope.replica(pool.key).alias if key is None else replicas.rotation.next(key=key)
    return replicas.within_lag(max_lag, kept)
