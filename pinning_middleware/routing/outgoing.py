"""What a scope leaves behind: the pins that whoever follows it has to honour."""

from __future__ import annotations

from asgiref.sync import sync_to_async

from pinning_middleware import tokens
from pinning_middleware.conf import conf
from pinning_middleware.pins import SEEN, Pin, Pins, live
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import Facts, Scope, entered_scope
from pinning_middleware.stores import cache
from pinning_middleware.utils import clock

__all__ = [
    "akeep_keys",
    "asks_database",
    "count_changes",
    "current_token",
    "has_changed",
    "keep_keys",
    "outgoing_pins",
    "pin_of_now",
]


def has_changed(scope: Scope) -> bool:
    """Return whether what follows this scope has to know of something that it did."""
    # A loop, since every request comes by here and a generator takes twice as long.
    for facts in scope.values():
        if facts.changes:
            return True
    return bool(scope.pinned_keys)


def count_changes(scope: Scope) -> int:
    """Return a number that is larger when the scope has written or was pinned in between."""
    return sum(facts.changes for facts in scope.values())


def asks_database(scope: Scope) -> bool:
    """Return whether ``outgoing_pins`` will ask a primary for its position."""
    return bool(scope.pinned_keys) or any(
        pool.supports_positions and (facts.is_pinned or facts.served)
        for pool, facts in _touched(scope)
    )


def outgoing_pins(scope: Scope) -> dict[str, Pin]:
    """
    Return the pins that what follows this scope has to honour, by their primaries' aliases.

    Call it when the scope's transactions are over. It may ask each primary that the scope wrote
    to for its position.
    """
    now = clock.now()
    touched = _touched(scope)
    pins = live(scope.carried, now) if scope.carried else {}
    for pool, facts in touched:
        if facts.is_unpinned:
            pins.pop(pool.primary, None)
            pins.pop(SEEN + pool.primary, None)
    for pool, facts in touched:
        for key, new in (
            (pool.primary, _new_pin(pool, facts)),
            (pool.primary, facts.carried),
            (SEEN + pool.primary, facts.seen),
            (SEEN + pool.primary, pool.seen(facts, now)),
        ):
            if new is not None and new.until > now:
                pins[key] = new if key not in pins else pins[key].merge(new)
    return pins


def _new_pin(pool: Pool, facts: Facts) -> Pin | None:
    """Return the pin of what the scope did itself here; may ask the primary where it is."""
    if not facts.is_pinned:
        return None
    changes = facts.changes
    if facts.left is not None and facts.left[0] == changes:
        return facts.left[1]
    # A position counts only for what had ended when it was asked for.
    asked = clock.now()
    is_open = any(not write.ended(asked) for write in facts.writes.values())
    position = None if is_open else pool.position_now()
    now = clock.now()
    until = facts.wrote_until(conf.seconds, now)
    if until <= now:
        return None
    pin = Pin(until, facts.held if position else until, position)
    if position is not None:
        facts.left = changes, pin
    return pin


def pin_of_now(pool: Pool) -> Pin:
    """Return a pin of all that the primary has by now; it may ask the primary where it is."""
    until = clock.now() + conf.seconds
    position = pool.position_now()
    return Pin(until, 0.0 if position else until, position)


def _touched(scope: Scope) -> list[tuple[Pool, Facts]]:
    return [(pool, scope[pool.key]) for pool in pools().all if scope.knows(pool.key)]


def current_token() -> str | None:
    """
    Return the token of what the scope that is open now would leave behind, to be handed on in a
    message say; ``None``: nothing. It may ask the primary for its position.
    """
    scope = entered_scope()
    pins = outgoing_pins(scope) if scope is not None else {}
    return tokens.dumps(pins) if pins else None


# Keys


def _pins_of_keys(scope: Scope) -> dict[str | None, tuple[list[str], dict[str, Pin]]]:
    """
    Return the scope's keys and what they are to be pinned by, for each ``using`` that they were
    given with: what the scope leaves behind, else what the primary has by now.
    """
    pins: Pins = outgoing_pins(scope)
    return {
        using: (
            [key for key, of in scope.pinned_keys if of == using],
            {
                pool.primary: pins[pool.primary] if pool.primary in pins else pin_of_now(pool)
                for pool in pools().of_primary(using)
            },
        )
        for using in dict.fromkeys(using for _, using in scope.pinned_keys)
    }


def keep_keys(scope: Scope) -> None:
    """Pin the scope's keys. Call it when its transactions are over."""
    for keys, pins in _pins_of_keys(scope).values():
        cache.keep("key", keys, pins)


async def akeep_keys(scope: Scope) -> None:
    """Pin the scope's keys, in async code."""
    for keys, pins in (await sync_to_async(_pins_of_keys)(scope)).values():
        await cache.akeep("key", keys, pins)
