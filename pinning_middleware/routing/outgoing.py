"""
Pins that a scope propagates to later scopes.

``outgoing_pins()`` is the only source of what the stores, tokens and messages contain. An open
scope saves its pins once, when it ends; ``announce()`` saves those of a closed one with each
change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from asgiref.sync import sync_to_async
from django.db import connections, transaction

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pin, PinKey, PinKind, Position, live
from pinning_middleware.routing.guarantees import observed_pin
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import PoolState, Scope
from pinning_middleware.servers.budget import read_budget
from pinning_middleware.stores import cache
from pinning_middleware.utils import clock


def announce(scope: Scope) -> None:
    """
    Pass on a fact that has just become visible, if the scope is closed: to the enclosing scope, or
    to the stores that need no response. An open scope does so at its end.
    """
    if scope.on_late_change is not None:
        scope.on_late_change(scope)


def queries_primary(scope: Scope) -> bool:
    """Return whether ``outgoing_pins()`` will query a primary for its position."""
    return bool(scope.keys) or any(
        pool.supports_positions and (state.is_pinned or state.read_from)
        for pool, state in _used_pools(scope)
    )


def outgoing_pins(scope: Scope) -> dict[PinKey, Pin]:
    """
    Return the pins that the scopes after this one have to honour.

    Queries each primary that the scope wrote to for its position, once after each change.
    """
    if not conf.enabled:
        return {}
    # No read waits for these probes, so the time that earlier ones of this thread spent does not
    # count.
    read_budget.renew()
    now = clock.now()
    pins = live(scope.inherited_pins, now, conf.seconds)
    used = _used_pools(scope)
    for pool, state in used:
        if state.cleared:
            for kind in PinKind:
                pins.pop(PinKey(pool.primary, kind), None)
    for pool, state in used:
        # One query for both of its pins.
        query_position = functools.cache(pool.current_position)
        for kind, pin in (
            (PinKind.WRITTEN, state.inherited),
            (PinKind.WRITTEN, _pin_for_writes(scope, pool, state, query_position)),
            (PinKind.OBSERVED, state.observed),
            (PinKind.OBSERVED, observed_pin(pool, state, now, query_position)),
            (PinKind.DRY_RUN, pool.dry_run_pin(state)),
        ):
            if pin is not None and pin.is_live(now, conf.seconds):
                key = PinKey(pool.primary, kind)
                known = pins.get(key)
                # The pin that the scope began with is there already.
                pins[key] = pin if known is None or known is pin else known.merge(pin)
    return pins


def _pin_for_writes(
    scope: Scope, pool: Pool, state: PoolState, query_position: Callable[[], Position | None]
) -> Pin | None:
    """Return the pin for what the scope itself did to a pool; may query the primary."""
    if not state.is_pinned:
        return None
    known = scope.made_pins.get(pool.key)
    if known is not None and known[0] == state.revision:
        return known[1]
    # A position includes only the transactions that had ended when it was queried.
    position = None if state.has_open_write else query_position()
    now = clock.now()
    end = state.own_pin_end(conf.seconds, now)
    if end is None or (position is None and end <= now):
        return None
    pin = Pin(end, state.pinned_until, position) if position is not None else Pin(end)
    if position is not None:
        pool.track(position)
        scope.made_pins = {**scope.made_pins, pool.key: (state.revision, pin)}
    return pin


async def aoutgoing_pins(scope: Scope) -> dict[PinKey, Pin]:
    """Async version of ``outgoing_pins()``: without a thread if it queries nothing."""
    if queries_primary(scope):
        return await sync_to_async(outgoing_pins)(scope)
    return outgoing_pins(scope)


def current_pin(pool: Pool) -> Pin:
    """Return a pin for everything that the primary has committed; may query the primary."""
    return Pin(clock.now() + conf.seconds, None, pool.current_position())


def _used_pools(scope: Scope) -> list[tuple[Pool, PoolState]]:
    return [(pool, scope.state(pool.key)) for pool in pools().all if scope.has_state_for(pool.key)]


# Keys


def pin_keys(scope: Scope, keys: tuple[str, ...], using: str | None) -> None:
    """
    Pin keys when the scope ends; outside any scope at once, or when the transaction commits. If the
    code has turned off autocommit, at once, without a position.
    """
    found = pools().of_primary(using)
    if not conf.enabled:
        return
    if not scope.is_ambient:
        scope.keys = (
            *scope.keys,
            *((key, using) for key in keys if (key, using) not in scope.keys),
        )
        announce(scope)
        return
    for pool in found:
        connection = connections[pool.primary]
        if connection.in_atomic_block or connection.get_autocommit():
            transaction.on_commit(functools.partial(_save_now, pool, keys), using=pool.primary)
        else:
            # A position would not include what is not committed yet.
            pins = {PinKey(pool.primary): Pin(clock.now() + conf.seconds)}
            cache.save_pins("key", keys, pins)


def _save_now(pool: Pool, keys: tuple[str, ...]) -> None:
    cache.save_pins("key", keys, {PinKey(pool.primary): current_pin(pool)})


def save_keys(scope: Scope) -> None:
    """
    Pin the keys of a scope in the cache: with the outgoing pin of the scope if it has pinned the
    pool itself, or else one for everything that the primary has committed. Call it when the scope's
    transactions have ended.
    """
    pinned = {pool.primary for pool, state in _used_pools(scope) if state.is_pinned}
    pins = outgoing_pins(scope)
    for using in dict.fromkeys(using for _, using in scope.keys):
        own = {
            key: pins[key] if pool.primary in pinned and key in pins else current_pin(pool)
            for pool in pools().of_primary(using)
            for key in (PinKey(pool.primary),)
        }
        cache.save_pins("key", [key for key, given in scope.keys if given == using], own)
