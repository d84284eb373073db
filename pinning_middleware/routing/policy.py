"""
Where a read goes, and which connections may serve it.

``decide()`` chooses an alias from what the scope has done and from what is known of the servers.
It applies the seven rules of docs/explanation/where-a-read-goes.md. The first that matches wins;
each branch names its rule. ``admit()`` judges a connection when a statement is about to run on it,
since a cursor may be older than the scope's latest write, and an alias may resolve to another
server by then.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pin, Position, merge_optional, merge_positions
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.guarantees import must_reach, primary_lacks_observed
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.replica_choice import (
    next_replica,
    replica_caught_up,
    replica_for_override,
)
from pinning_middleware.scopes.overrides import Effects, Override, OverrideKind, effects_on
from pinning_middleware.scopes.scope import PoolState, Scope
from pinning_middleware.scopes.transactions import is_explicit_transaction_open
from pinning_middleware.servers.probe import probing_allowed
from pinning_middleware.utils import clock
from pinning_middleware.utils.transactions import is_transaction_open

# Seconds between two searches of a long scope for a replica that has caught up.
SEARCH_INTERVAL: Final = 1.0


class Decision(NamedTuple):
    """
    Where a read goes and why. ``alias`` is returned to Django, ``replica`` the replica that was
    chosen (None: the primary); they differ if the replica is a test mirror. ``would_miss_write``:
    in a dry run, only a pin keeps the read from a replica that lacks the client's own write.
    """

    alias: str
    replica: str | None
    reason: Reason
    would_miss_write: bool = False


class Rejection(NamedTuple):
    """Why a connection must not serve a read; ``error`` is the server's own, if it raised one."""

    reason: Reason | Fault
    error: Exception | None = None


def decide(pool: Pool, scope: Scope, model: object = None) -> Decision:
    """
    Return where a read of this pool goes.

    ``model``: the router's argument, usually a model class, but any object.
    """
    # Rule 1: there is nothing to choose from.
    if not pool.has_replicas or pool.refusals.include_all_reads:
        return Decision(pool.primary, None, pool.default_reason)
    # Rule 2: the innermost use_primary or use_replica.
    effects = effects_on(pool.primary)
    if effects.routing is not None:
        return _follow_override(pool, scope, effects.routing)
    state = scope.state(pool.key)
    # Rule 3: a transaction, a lock, or session state of the primary's connection.
    if is_explicit_transaction_open(connections[pool.primary], scope):
        return Decision(pool.primary, None, Reason.TRANSACTION)
    if state.holds_lock and not scope.is_ambient:
        return _primary(pool, Reason.LOCK)
    if state.session_modified:
        return _primary(pool, Reason.SESSION_STATE)
    # Rule 4: the scope has written, was pinned, or its HTTP method most likely writes.
    if effects.is_saving:
        return _primary(pool, Reason.WROTE)
    if (reason := own_pin_reason(scope, state)) is not None:
        return _primary(pool, reason)
    if state.is_pinned:
        state = to_inherited_pin(pool, scope, state)
    # The rest of rule 4, and rule 5.
    if (reason := reason_besides_pins(pool, scope, state, effects, model)) is not None:
        return _primary(pool, reason)
    # Rule 6: inherited pins.
    requirement = state.required(clock.now())
    wanted = requirement.position
    if requirement.primary_only or (wanted is not None and not pool.supports_positions):
        return _primary(pool, Reason.PINNED)
    if wanted is not None:
        return _find_replica(pool, scope, state, wanted)
    # Rule 7: the next replica.
    alias = next_replica(pool, scope)
    if alias is None:
        return _primary(pool, Reason.NO_REPLICA)
    if state.read_from:
        try:
            wanted = must_reach(pool, state, alias)
        except LookupError:
            return _primary(pool, Reason.NOT_CAUGHT_UP)
        if wanted is not None:
            return _find_replica(pool, scope, state, wanted)
    return _replica(pool, alias, Reason.ROUND_ROBIN)


def admit(
    pool: Pool, connection: BaseDatabaseWrapper, scope: Scope, override: Override | None
) -> Rejection | None:
    """
    Return why an open connection of this pool must not serve a read of this scope, or None.

    ``override``: the innermost ``use_primary`` or ``use_replica``. May probe the server of a
    replica; raise what ``servers.probe.probe()`` raises.
    """
    alias = connection.alias
    # The cursors of a test mirror belong to the primary's connection.
    is_primary = alias == pool.primary
    # Pins do not apply to replicas that only SLAVE_DATABASES lists: there, using() decides.
    ignores_pins = is_primary or alias not in conf.readonly_aliases or pool.is_primary_down
    ignores_pins = ignores_pins or (override is not None and override.kind is OverrideKind.REPLICA)
    state = scope.state(pool.key)
    if not ignores_pins and (reason := own_pin_reason(scope, state)) is not None:
        return Rejection(reason)
    if not ignores_pins and state.is_pinned:
        state = to_inherited_pin(pool, scope, state)
    requirement = state.required(clock.now())
    # In a transaction a statement stays on its server, whatever the server's status.
    if pool.dialect is not None and not connection.in_atomic_block:
        if is_primary:
            fault = pool.primary_connections.reject(connection, requirement)
        else:
            max_lag = None if override is None else override.max_lag
            rotation = pool.replica_set.rotation
            is_last_replica = not rotation and alias in rotation.weights
            fault = pool.health.reject(connection, max_lag, is_last_replica)
            if fault is not None and is_transaction_open(connection):
                fault = None
        if fault is not None:
            return Rejection(fault)
    if ignores_pins:
        return None
    wanted = requirement.position
    if requirement.primary_only or (wanted is not None and not pool.supports_positions):
        return Rejection(Reason.PINNED)
    if state.read_from:
        try:
            wanted = merge_positions(wanted, must_reach(pool, state, alias))
        except LookupError:
            return Rejection(Reason.NOT_CAUGHT_UP)
    if wanted is None or pool.replica_set.caught_up(alias, wanted, connection):
        return None
    has_caught_up = pool.replica_set.probe_caught_up(alias, wanted, connection)
    return None if has_caught_up else Rejection(Reason.NOT_CAUGHT_UP)


def is_former_primary(pool: Pool, connection: BaseDatabaseWrapper, scope: Scope) -> bool:
    """
    Return whether an open connection of the primary's alias is connected to a former primary,
    judged by the known servers and by the scope's pins. Writes to it would be lost.
    """
    if pool.dialect is None or connection.alias != pool.primary or connection.in_atomic_block:
        return False
    requirement = scope.state(pool.key).required(clock.now())
    return pool.primary_connections.reject(connection, requirement) is not None


def _follow_override(pool: Pool, scope: Scope, override: Override) -> Decision:
    if override.kind is not OverrideKind.REPLICA:
        # The kind has the name of its reason.
        return Decision(pool.primary, None, Reason(override.kind.value))
    alias = replica_for_override(pool, scope, override)
    if alias is None:
        return Decision(pool.primary, None, Reason.NO_REPLICA)
    return _replica(pool, alias, Reason.USE_REPLICA)


def reason_besides_pins(
    pool: Pool, scope: Scope, state: PoolState, effects: Effects, model: object
) -> Reason | None:
    """Return why the rest of rule 4, or rule 5, keeps a read on the primary, or None."""
    is_offloaded = scope.offloaded or effects.is_offloaded
    by_method = scope.prefers_primary and not state.method_ignored and not is_offloaded
    # Nothing was written yet, so a replica may serve the read if it shows more.
    if by_method and not (pool.tracks_reads and primary_lacks_observed(pool, scope, state)):
        return Reason.HTTP_METHOD
    # Rule 5: settings exclude the model, or the scope; or no standby can read the model's table.
    if pool.refusals.includes_model(model) or (conf.primary_models and _is_primary_model(model)):
        return Reason.PRIMARY_MODEL
    if not is_offloaded and not _may_offload(scope):
        return Reason.NOT_OFFLOADED
    return None


def own_pin_reason(scope: Scope, state: PoolState) -> Reason | None:
    """Return why what the scope did itself still pins the pool, or None."""
    if state.pinned_for_scope and not scope.is_ambient:
        return Reason.MANUAL
    if not state.is_pinned:
        return None
    if conf.seconds or scope.is_ambient:
        now = clock.now()
        end = state.own_pin_end(conf.seconds, now)
        if end is None or end <= now:
            return None
    # Without any window the pin lasts for the rest of the scope.
    return Reason.WROTE if state.writes else Reason.MANUAL


def to_inherited_pin(pool: Pool, scope: Scope, state: PoolState) -> PoolState:
    """
    Turn what the scope did into an inherited pin: its window has ended, so that a replica which has
    caught up may serve again. Outside any scope the pin just ends.
    """
    position = None if scope.is_ambient else pool.current_position()
    if position is None and not scope.is_ambient and pool.supports_positions:
        # Unknown now, as inside a transaction: at the end of the scope it may be known.
        return state
    pin = None if position is None else Pin(clock.now(), None, position)

    def change(latest: PoolState) -> PoolState:
        # Another thread may have begun to write, or pinned the scope, meanwhile.
        writes = {k: w for k, w in latest.writes.items() if state.writes.get(k) is not w}
        inherited = merge_optional(latest.inherited, pin)
        return latest._replace(
            writes=writes,
            pinned_at=None if latest.pinned_at == state.pinned_at else latest.pinned_at,
            pinned_until=None if latest.pinned_until == state.pinned_until else latest.pinned_until,
            inherited=inherited,
        )

    return scope.update(pool.key, change)


def _may_offload(scope: Scope) -> bool:
    if scope.is_ambient:
        return conf.offload_outside
    if scope.may_offload is None:
        if not callable(conf.offload):
            return conf.offload
        if scope.offload_predicate is None:
            # Before authentication, or not a request at all.
            return False
        # What the function itself reads must not call it again.
        scope.may_offload = False
        # None: it cannot run here; a later read calls it.
        scope.may_offload = scope.offload_predicate()
        outer = scope.parent
        while outer is not None and outer.offload_predicate is scope.offload_predicate:
            outer.may_offload, outer = scope.may_offload, outer.parent
    return bool(scope.may_offload)


def _is_primary_model(model: Any) -> bool:
    options = getattr(model, "_meta", None)
    concrete = getattr(getattr(options, "concrete_model", None), "_meta", None)
    labels = {
        str(getattr(each, name, "")).lower()
        for each in (options, concrete)
        for name in ("app_label", "label")
        if each is not None
    }
    return not conf.primary_models.isdisjoint(labels)


def _find_replica(pool: Pool, scope: Scope, state: PoolState, wanted: Position) -> Decision:
    """Choose a replica that has caught up with a position, after waiting for it if configured."""
    now = clock.monotonic()
    # A request searches once; a longer scope again, but not at every read.
    last = state.last_searched
    may_probe = last is None or now - last > SEARCH_INTERVAL
    replicas = pool.replica_set
    alias = replica_caught_up(pool, scope, wanted, probe=may_probe)
    max_wait = conf.wait if scope.max_wait is None else scope.max_wait
    if alias is None and may_probe and max_wait and probing_allowed(connections[pool.primary]):
        alias = replicas.wait_caught_up(wanted, max_wait)
    if alias is None:
        if may_probe:
            scope.update(pool.key, lambda state: state._replace(last_searched=now))
        return _primary(pool, Reason.NOT_CAUGHT_UP)
    if alias != scope.replica(pool.key).alias:
        scope.keep_replica(pool.key, alias)
    return _replica(pool, alias, Reason.CAUGHT_UP)


def _replica(pool: Pool, alias: str, reason: Reason) -> Decision:
    # The primary's connection serves a test mirror, since only it sees the test's own rows.
    return Decision(pool.primary if pool.is_mirror(alias) else alias, alias, reason)


def _primary(pool: Pool, reason: Reason) -> Decision:
    """Choose the primary, or the replica that substitutes for it while it is down."""
    if pool.is_primary_down and (alias := pool.replica_set.substitute()) is not None:
        return Decision(alias, alias, Reason.PRIMARY_DOWN)
    return Decision(pool.primary, None, reason)
