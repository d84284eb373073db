"""
Where a read goes. ``Pool.db_for_read`` is the one place that decides; the router, the managers and
every integration ask it.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from . import looks
from .conf import PoolSpec, conf, on_change
from .health import Health
from .pins import Pin, Position, merge_positions
from .positions import family_of
from .selection import Rotation
from .signals import primary_fallback
from .state import Override, PoolState, Scope, current_scope, entered_scope

if TYPE_CHECKING:
    from django.db.models import Model

__all__ = ["Pool", "Pools", "pools"]


_Entry: TypeAlias = dict[str, Any]


class _Seat:
    """
    What one thread needs at hand for the next decision: its connection to the primary, since
    ``connections[alias]`` costs more than all the rest, and the scope that decided here last.
    """

    __slots__ = ("connection", "scope", "state")

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self.connection = connection
        self.scope = Scope()
        self.state = self.scope[""]


class Pool:
    """One primary and its replicas."""

    def __init__(self, spec: PoolSpec) -> None:
        self.key = spec.key
        self.primary = spec.primary
        self.rotation = Rotation(spec.weights)
        self.health = Health(spec.primary, self.rotation)
        self._by_query = conf.spread_by_query
        self._mirrors: dict[str, tuple[_Entry, _Entry, tuple[str, str], bool]] = {}
        self._thread = threading.local()

    def __contains__(self, alias: str | None) -> bool:
        """Return whether an instance of this database is of the pool; a new one may be."""
        return alias is None or alias == self.primary or alias in self.rotation.weights

    # The decision

    def db_for_read(self, model: object = None, **hints: Any) -> str | None:
        """
        Return the alias that the next read uses, ``None`` for one that starts from an instance
        of a database outside this pool. The signature is that of a router, so that Django asks
        the pool itself where there is nothing to translate.

        The rules, first match wins, are those of the documentation.
        """
        if hints and (instance := hints.get("instance")) is not None:
            return self._near(instance)
        scope = entered_scope()
        try:
            seat = self._thread.seat
        except AttributeError:
            seat = self._thread.seat = _Seat(connections[self.primary])
        if seat.scope is not scope:
            if scope is None:
                scope = current_scope()
            block = scope.override and scope.override.for_pool(self.primary)
            if block is not None:
                return self._in_block(block, scope[self.key])
            seat.scope, seat.state = scope, scope[self.key]
        connection, state = seat.connection, seat.state
        if (
            connection.connection is not None
            and (connection.in_atomic_block or not connection.autocommit)
            and self._in_transaction(connection, scope)
        ):
            return self.primary
        return state.answer or self._settle(scope, state)

    def _near(self, instance: Model) -> str | None:
        """Decide for a read that starts from an instance: near it, where no rule before says no."""
        origin = instance._state.db
        if origin not in self:
            return None
        answer = self.db_for_read()
        seat = self._thread.seat
        if (
            answer == self.primary
            or seat.scope is not entered_scope()  # a block decided
            or not seat.state.by_turn
            or origin in self.health.out
        ):
            return answer
        return origin or answer

    def _in_block(self, block: Override, state: PoolState) -> str:
        if not block.replica:
            return self.primary
        if block.max_lag is None:
            return self._replica(state) or self.primary
        order = self.rotation.order()
        if state.replica is not None and state.replica in order:
            order = (state.replica, *order)
        for alias in order:
            if self._is_mirror(alias):
                break
            if alias not in self.health.out and looks.lags_less(self, alias, block.max_lag):
                return alias
        return self.primary

    def _in_transaction(self, connection: BaseDatabaseWrapper, scope: Scope) -> bool:
        """Return whether the open transaction is one that the code itself asked for."""
        if not connection.in_atomic_block:
            return True
        asked_for: int = sum(
            not block._from_testcase  # type: ignore[attr-defined]
            for block in connection.atomic_blocks
        )
        return asked_for > int(self.primary in scope.atomic_view)

    def _settle(self, scope: Scope, state: PoolState) -> str:
        """Decide by the rules that stay the same for a while, and remember what may be."""
        state.by_turn = False
        if state.held or state.written or state.by_hand:
            if not scope.lasting:
                if conf.primary_down == "error":
                    state.answer = self.primary
                return self._primary()
            self._carry_on(state)
            if state.held or state.pinned:
                return self._primary()
        if state.carried is not None:
            served = self._carried(scope, state, state.carried)
            if served is not None:
                return served
        state.by_turn = True
        if scope.lasting:
            # It has no next scope that would get the next replica.
            state.replica = None
        replica = self._replica(state)
        if replica is None:
            return self.primary
        if not self._by_query and not scope.lasting:
            state.answer = replica
        return replica

    def _carried(self, scope: Scope, state: PoolState, pin: Pin) -> str | None:
        """Return who serves under the pin of an earlier scope, ``None``: it is over."""
        now = time.time()
        if pin.until <= now:
            state.carried = None
            return None
        wanted = pin.waits_for(now) if conf.positions else None
        if wanted is None:
            return self._primary()
        if self._all_have(wanted):
            state.drop()
            return None
        monotonic = time.monotonic()
        # One question for a request; what lasts longer asks again, but not at every read.
        is_due = monotonic - state.looked > 1.0 if scope.lasting else not state.looked
        ask = is_due and looks.may_ask()
        wait = conf.wait if scope.wait is None else scope.wait
        alias = looks.find_caught_up(self, wanted, ask=ask, wait=wait)
        if alias is None:
            if ask:
                state.looked = monotonic
                primary_fallback.send(self.primary, served=self.primary, reason="behind")
            return self._primary()
        if self._is_mirror(alias):
            return self.primary
        if self._all_have(wanted):
            state.drop()
        state.replica = alias
        if not self._by_query and not scope.lasting:
            state.answer = alias
        return alias

    def _all_have(self, wanted: Position) -> bool:
        """Return whether every replica, those that are out included, is known to have it."""
        family = family_of(connections[self.primary])
        return family is not None and all(
            family.reached(wanted, replica.position) for replica in self.health.replicas.values()
        )

    def _carry_on(self, state: PoolState) -> None:
        """Turn what a lasting scope did into a pin with an end, as between two requests."""
        if not state.pinned or not looks.may_ask():
            return
        if (pin := self.new_pin(state, time.time())) is not None:
            state.carried = pin if state.carried is None else state.carried.merge(pin)
            state.looked = 0.0
        state.settle()

    def _replica(self, state: PoolState) -> str | None:
        """Return this scope's replica, or the next one's; ``None`` where none is usable."""
        alias = state.replica
        out = self.health.out
        if alias is None or self._by_query or (out and alias in out):
            alias = self._turn() if out else self.rotation.turn()
            if alias is not None and self._is_mirror(alias):
                alias = self.primary
            state.replica = alias
        return alias

    def _turn(self) -> str | None:
        alias = self.health.claim_retry() or self.rotation.turn()
        if alias is None:
            # All of them lag: whoever has no pin has no claim to a fresh state, and the primary
            # would not stand the reads of all replicas.
            alias = self.health.freshest_of_lagging()
        if alias is None:
            primary_fallback.send(self.primary, served=self.primary, reason="no replica")
        return alias

    def _primary(self) -> str:
        """Return the primary, or who stands in while it can't be reached."""
        if conf.primary_down == "error" or not looks.may_ask():
            return self.primary
        return looks.stand_in(self) or self.primary

    # What a scope means for this pool

    def state(self, scope: Scope) -> PoolState:
        """Return what this scope knows of this pool."""
        return scope[self.key]

    def is_pinned(self, scope: Scope) -> bool:
        """Return whether this scope's reads belong to the primary, or to who has caught up."""
        state = self.state(scope)
        now = time.time()
        if state.carried is not None and state.carried.until > now:
            return True
        if not scope.lasting or not state.pinned:
            return state.held or state.pinned
        return state.pin_ends(conf.seconds, now)[0] > now

    def wanted(self, scope: Scope) -> Position | None:
        """Return the position that a replica must have to serve this scope."""
        state = self.state(scope)
        if state.carried is None or state.by_turn:
            return None
        if scope.override is not None and scope.override.for_pool(self.primary) is not None:
            return None
        return state.carried.waits_for(time.time())

    def seen(self, state: PoolState, now: float) -> Pin | None:
        """Return the pin of what a scope has read: none where only writes pin."""
        return None

    def new_pin(self, state: PoolState, now: float) -> Pin | None:
        """Return the pin that a scope leaves behind here; may ask the primary where it is."""
        if state.left is not None and state.left[0] == state.changes and not state.open_write:
            return state.left[1]
        until, held = state.pin_ends(conf.seconds, now)
        if until <= now:
            return None
        pin = self.pin_now(until, held)
        if pin.position is not None:
            state.open_write = False
            state.left = state.changes, pin
        return pin

    def pin_now(self, until: float, held: float = 0.0) -> Pin:
        """Return a pin of all that the primary has by now; it may ask the primary where it is."""
        position = looks.position_of_primary(self) if self.tells_positions else None
        return Pin(until, held if position else until, position)

    @property
    def tells_positions(self) -> bool:
        """Whether this pool's database says where it is."""
        return conf.positions and family_of(connections[self.primary]) is not None

    # Which connection is whose

    def _is_mirror(self, alias: str) -> bool:
        """Return whether this alias leads to the very database of the primary."""
        known = self._mirrors.get(alias)
        if known is not None:
            primary, replica, names, verdict = known
            # The test runner changes the names in place.
            if names[0] is primary["NAME"] and names[1] is replica["NAME"]:
                return verdict
        primary, replica = connections.settings[self.primary], connections.settings[alias]
        verdict = _same_database(primary, replica)
        names = primary["NAME"], replica["NAME"]
        self._mirrors[alias] = primary, replica, names, verdict
        return verdict

    def adopt(self, connection: BaseDatabaseWrapper) -> None:
        """Take this for the thread's connection to the primary."""
        self._thread.seat = _Seat(connection)


class PrimaryOnly(Pool):
    """A pool without replicas, or of a site that switched them off."""

    def db_for_read(self, model: object = None, **hints: Any) -> str | None:
        instance = hints.get("instance")
        return self.primary if instance is None or instance._state.db in self else None


class MonotonicPool(Pool):
    """A pool that knows which nodes a scope has read from, for ``monotonic-reads``."""

    def db_for_read(self, model: object = None, **hints: Any) -> str | None:
        alias = super().db_for_read(model, **hints)
        if alias is None:
            return None
        state = self.state(current_scope())
        if state.served is None:
            state.served = set()
            state.changes += 1
        state.served.add(alias)
        return alias

    def seen(self, state: PoolState, now: float) -> Pin | None:
        """Return the pin of what a scope has read; asks each node that it read from."""
        position: Position | None = None
        for alias in state.served or ():
            here = (
                looks.position_of_primary(self)
                if alias == self.primary
                else looks.position_of_replica(self, alias)
            )
            if here is None:
                # A node that died after it was read from can't tell any more: time will.
                until = now + conf.seconds
                return Pin(until, until) if self.tells_positions else None
            position = merge_positions(position, here)
        return Pin(now + conf.seconds, 0.0, position) if position else None


class Pools:
    """Every pool of the site, made from the settings at the first use."""

    def __init__(self) -> None:
        self.by_primary = {spec.primary: _pool(spec) for spec in conf.pools}
        self.by_alias = {
            alias: pool
            for pool in self.by_primary.values()
            for alias in (pool.primary, *pool.rotation.weights)
        }
        self.default = self.by_primary.get(DEFAULT_DB_ALIAS)
        shared = conf.legacy_pool in conf.pools
        self.legacy = self.by_primary[DEFAULT_DB_ALIAS] if shared else _pool(conf.legacy_pool)
        self.by_replica = {
            alias: pool
            for pool in (self.legacy, *self.by_primary.values())
            for alias in pool.rotation.weights
        }
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
    if not conf.enabled or not spec.weights:
        return PrimaryOnly(spec)
    return MonotonicPool(spec) if conf.monotonic_reads and conf.positions else Pool(spec)


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


def _same_database(primary: _Entry, replica: _Entry) -> bool:
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
            pool.adopt(connection)


connection_created.connect(_adopt, dispatch_uid="pinning_middleware.pools")
