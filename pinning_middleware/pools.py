"""
Where a read goes. ``Pool.read`` is the one place that decides; the router, the managers and every
integration ask it.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from .conf import PoolSpec, conf, on_change
from .pins import Position
from .selection import Rotation
from .state import PoolState, Scope, current_override, current_scope, entered_scope

__all__ = ["Pool", "Pools", "pools"]


class Pool:
    """One primary and its replicas."""

    __slots__ = ("_by_query", "_mirrors", "_off", "_thread", "key", "primary", "rotation")

    def __init__(self, spec: PoolSpec) -> None:
        self.key = spec.key
        self.primary = spec.primary
        self.rotation = Rotation(spec.weights)
        self._off = not spec.weights or not conf.enabled
        self._by_query = conf.spread_by_query
        self._mirrors: dict[str, tuple[str, str, bool]] = {}
        # This thread's connection to the primary: `connections[alias]` costs more than all the
        # rest of a decision.
        self._thread = threading.local()

    def __contains__(self, alias: str) -> bool:
        return alias == self.primary or alias in self.rotation.weights

    def read(self, origin: str | None = None) -> str:
        """
        Return the alias that the next read uses. ``origin`` is the alias that the instance which
        the read starts from was loaded from, if any.

        The rules, first match wins, are those of the documentation.
        """
        if self._off:
            return self.primary
        scope = entered_scope() or current_scope()
        try:
            state = scope.states[self.key]
        except KeyError:
            state = scope.state(self.key, self.primary)
        if (override := current_override()) is not None and (
            block := override.for_pool(self.primary)
        ) is not None:
            return self._replica(state) if block.replica else self.primary
        try:
            connection = self._thread.connection
        except AttributeError:
            connection = self._thread.connection = connections[self.primary]
        if (
            connection.in_atomic_block
            or (not connection.autocommit and connection.connection is not None)
        ) and self._in_transaction(connection, scope):
            return self.primary
        answer = state.answer or self._settle(scope, state)
        if origin is not None and state.by_turn and origin in self:
            return origin
        return answer

    def state(self, scope: Scope) -> PoolState:
        """Return what this scope knows of this pool."""
        return scope.state(self.key, self.primary)

    @property
    def tells_positions(self) -> bool:
        return False

    def position(self) -> Position | None:
        return None

    def is_pinned(self, scope: Scope) -> bool:
        """Return whether this scope's reads belong to the primary, or to who has caught up."""
        state = self.state(scope)
        now = time.time()
        if state.carried is not None and state.carried.until > now:
            return True
        return state.held or self._pinned_now(scope, state, now)

    def _settle(self, scope: Scope, state: PoolState) -> str:
        """Decide by the rules that stay the same for a while, and remember what may be."""
        now = time.time()
        state.by_turn = False
        if state.held or self._pinned_now(scope, state, now):
            if not scope.lasting:
                state.answer = self.primary
            return self.primary
        if state.carried is not None:
            if state.carried.until > now:
                return self.primary
            state.carried = None
        state.by_turn = True
        replica = self._replica(state)
        if not self._by_query:
            state.answer = replica
        return replica

    def _pinned_now(self, scope: Scope, state: PoolState, now: float) -> bool:
        if not state.pinned:
            return False
        if not scope.lasting:
            return True
        if state.open_write:
            # The transaction is over, or it would have answered: the window starts now.
            state.written, state.open_write = now, False
        until, _ = state.pin_ends(conf.seconds, now)
        if until <= now:
            state.unpin()
        return until > now

    def _replica(self, state: PoolState) -> str:
        if state.replica is None or self._by_query:
            alias = self.rotation.turn()
            if alias is None or self._is_mirror(alias):
                alias = self.primary
            state.replica = alias
        return state.replica

    def _in_transaction(self, connection: BaseDatabaseWrapper, scope: Scope) -> bool:
        """Return whether the open transaction is one that the code itself asked for."""
        if not connection.in_atomic_block:
            return True
        asked_for = sum(
            not block._from_testcase  # type: ignore[attr-defined]
            for block in connection.atomic_blocks
        )
        return asked_for > (self.primary in scope.atomic_view)

    def _is_mirror(self, alias: str) -> bool:
        """Return whether this alias leads to the very database of the primary."""
        primary, replica = connections.settings[self.primary], connections.settings[alias]
        known = self._mirrors.get(alias)
        # The test runner changes the names, in place.
        if known is not None and known[0] is primary["NAME"] and known[1] is replica["NAME"]:
            return known[2]
        verdict = _same_database(primary, replica)
        self._mirrors[alias] = (primary["NAME"], replica["NAME"], verdict)
        return verdict

    def _adopt(self, connection: BaseDatabaseWrapper) -> None:
        self._thread.connection = connection


class Pools:
    """Every pool of the site, made from the settings at the first use."""

    def __init__(self) -> None:
        self.by_primary = {spec.primary: Pool(spec) for spec in conf.pools}
        self.by_alias = {
            alias: pool
            for pool in self.by_primary.values()
            for alias in (pool.primary, *pool.rotation.weights)
        }
        self.default = self.by_primary.get(DEFAULT_DB_ALIAS)
        shared = conf.legacy_pool in conf.pools
        self.legacy = self.by_primary[DEFAULT_DB_ALIAS] if shared else Pool(conf.legacy_pool)
        # One each where the older interface has a rotation of its own: they share their pins.
        self.all = tuple(dict.fromkeys((*self.by_primary.values(), self.legacy)))

    def of_primary(self, using: str | None) -> tuple[Pool, ...]:
        """
        Return the pools of this primary; all of them for ``None``.

        ``ValueError`` for an alias that is no pool's primary.
        """
        found = tuple(pool for pool in self.all if using is None or pool.primary == using)
        if using is not None and not found:
            known = ", ".join(repr(alias) for alias in self.by_primary) or "none is configured"
            raise ValueError(f"{using!r} is not a primary of PINNING_REPLICAS ({known})")
        return found


_pools: Pools | None = None


def pools() -> Pools:
    """Return the pools of the settings in force."""
    global _pools
    if _pools is None:
        _pools = Pools()
    return _pools


@on_change
def _forget() -> None:
    global _pools
    _pools = None


def _same_database(primary: dict[str, Any], replica: dict[str, Any]) -> bool:
    if any(primary[part] != replica[part] for part in ("ENGINE", "HOST", "PORT", "NAME")):
        return False
    # Two of these are two databases, unless the test runner made one a mirror of the other.
    if primary["NAME"] == ":memory:":
        return False
    elsewhere = ("service", "read_default_file", "unix_socket")
    return all(primary["OPTIONS"].get(o) == replica["OPTIONS"].get(o) for o in elsewhere)


def _adopt(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    # A thread may have been given another connection object than the one it had.
    for pool in pools().all:
        if pool.primary == connection.alias and connections[connection.alias] is connection:
            pool._adopt(connection)


connection_created.connect(_adopt, dispatch_uid="pinning_middleware.pools")
