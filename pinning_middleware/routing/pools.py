"""Every pool of the site."""

from __future__ import annotations

import os
import threading
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from pinning_middleware.conf import PoolSpec, conf, on_change
from pinning_middleware.routing.monotonic import MonotonicPool
from pinning_middleware.routing.policy import Pool, PrimaryOnly
from pinning_middleware.scopes.scope import entered_scope

__all__ = ["Pools", "pools"]


class Pools:
    """Every pool of the site, made from the settings at the first use."""

    def __init__(self) -> None:
        self.by_primary = {spec.primary: _pool(spec) for spec in conf.pools}
        self.by_alias = {
            alias: pool
            for pool in self.by_primary.values()
            for alias in (pool.primary, *pool.replicas)
        }
        self.default = self.by_primary.get(DEFAULT_DB_ALIAS)
        shared = conf.legacy_pool in conf.pools
        self.legacy = self.by_primary[DEFAULT_DB_ALIAS] if shared else _pool(conf.legacy_pool)
        self.legacy.is_shared = shared
        self.by_replica = {
            alias: pool
            for pool in (self.legacy, *self.by_primary.values())
            for alias in pool.replicas
        }
        # Whose reads may move to another node, or are to be remembered.
        primaries = self.by_primary if conf.primary_down == "stale" or conf.monotonic_reads else {}
        self.moving = {**primaries, **self.by_replica}
        # Who a statement on this connection concerns.
        self.by_connection = {DEFAULT_DB_ALIAS: self.legacy, **self.by_primary, **self.by_replica}
        self.aliases = frozenset((*self.by_alias, *self.by_replica))
        # One each where the older interface has a rotation of its own: they share their pins.
        self.all = tuple(dict.fromkeys((*self.by_primary.values(), self.legacy)))

    def of_primary(self, using: str | None) -> tuple[Pool, ...]:
        """
        Return the pools of this primary; all of them for ``None``.

        ``ValueError`` for an alias that is no pool's primary.
        """
        if using is None:
            return self.all
        found = tuple(pool for pool in self.all if pool.primary == using)
        if not found:
            known = ", ".join(repr(alias) for alias in self.by_primary) or "none is configured"
            raise ValueError(f"{using!r} is not a primary of PINNING_REPLICAS ({known})")
        return found


def _pool(spec: PoolSpec) -> Pool:
    if not conf.enabled or not any(spec.weights.values()):
        return PrimaryOnly(spec)
    return (MonotonicPool if conf.monotonic_reads and conf.positions else Pool)(spec)


_pools: Pools | None = None
_lock = threading.Lock()


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
    # What was answered inside this scope was by the settings before.
    if (scope := entered_scope()) is not None:
        for facts in scope.values():
            facts.answer = facts.replica = None


def _begin_anew_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for pool in _pools.all if _pools is not None else ():
        pool.begin_anew_after_fork()


os.register_at_fork(after_in_child=_begin_anew_after_fork)


def _adopt(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    # A thread may have been given another connection object than the one it had.
    for pool in pools().all:
        if pool.primary == connection.alias and connections[connection.alias] is connection:
            pool.adopt(connection)


connection_created.connect(_adopt, dispatch_uid="pinning_middleware.pools")
