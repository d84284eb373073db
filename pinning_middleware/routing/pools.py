"""Every pool of the site."""

from __future__ import annotations

import os

from django.db import DEFAULT_DB_ALIAS, connections

from pinning_middleware.conf import conf, on_change
from pinning_middleware.pool_specs import PoolSpec
from pinning_middleware.routing.compatibility import is_same_database
from pinning_middleware.routing.dry_run import DryRunPool
from pinning_middleware.routing.pool import Pool
from pinning_middleware.scopes.scope import entered_scope
from pinning_middleware.utils.forks import ForkSafeLock


class Pools:
    """
    Every pool of the site, made from the settings at first use.

    ``by_primary`` has the pools of PINNING_REPLICAS and PINNING_DRY_RUN; ``legacy`` is the pool of
    the legacy interface, which is one of them unless ``SLAVE_DATABASES`` lists other replicas.
    """

    def __init__(self) -> None:
        self.by_primary = {spec.key.primary: _make(spec) for spec in conf.pools}
        self.default = self.by_primary.get(DEFAULT_DB_ALIAS)
        is_shared = conf.legacy_pool in conf.pools
        self.legacy = self.by_primary[DEFAULT_DB_ALIAS] if is_shared else _make(conf.legacy_pool)
        # Two rotations of one primary share their pins.
        self.all = tuple(dict.fromkeys((*self.by_primary.values(), self.legacy)))
        # The pool that an alias of PINNING_REPLICAS belongs to, for routing.
        self.by_alias = {
            alias: pool
            for pool in self.by_primary.values()
            for alias in (pool.primary, *pool.replicas)
        }
        # The pool that a statement on an alias concerns, the legacy interface included.
        self.by_connection = {
            **dict.fromkeys((DEFAULT_DB_ALIAS, *self.legacy.replicas), self.legacy),
            **self.by_alias,
        }
        # The pool of each replica, the legacy interface included.
        self.by_replica = {a: p for a, p in self.by_connection.items() if a != p.primary}
        # Aliases outside every pool that are the database of a primary.
        self.same_as_primary = {
            alias: primary
            for primary in conf.pools_by_primary
            for alias in connections.settings
            if alias not in self.by_connection and is_same_database(primary, alias)
        }

    def of_primary(self, using: str | None) -> tuple[Pool, ...]:
        """
        Return the pools of this primary; all of them if None is given.

        Raise ValueError for an alias that is not the primary of a pool.
        """
        if using is None:
            return self.all
        found = tuple(pool for pool in self.all if pool.primary == using)
        if not found:
            known = ", ".join(repr(alias) for alias in self.by_primary) or "none is configured"
            raise ValueError(f"{using!r} is not a primary of PINNING_REPLICAS ({known})")
        return found


def _make(spec: PoolSpec) -> Pool:
    if spec.assumed_lag is not None:
        return DryRunPool(spec)
    return Pool(spec, tracks_reads=conf.monotonic_reads and bool(conf.positions))


_pools: Pools | None = None
_lock = ForkSafeLock()


def pools() -> Pools:
    """Return the pools of the settings in force."""
    global _pools
    known = _pools
    if known is None:
        with _lock:
            known = _pools
            if known is None:
                known = _pools = Pools()
    return known


@on_change
def _forget() -> None:
    global _pools
    _pools = None
    if (scope := entered_scope()) is not None:
        # Its replicas were chosen under the previous settings.
        scope.replicas.clear()


def _begin_after_fork() -> None:
    for pool in _pools.all if _pools is not None else ():
        pool.replica_set.begin_after_fork()


os.register_at_fork(after_in_child=_begin_after_fork)
