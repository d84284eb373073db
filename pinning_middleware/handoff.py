"""
Propagation of pins to tasks, shared by the adapters of all task queues.

A message contains the pins of the scope that sends it. In the worker, the task runs in a scope that
begins with these pins. An adapter only defines where a message of its queue stores a token.
If messages cannot store one, the pins are kept in ``PINNING_CACHE`` under the task's ID.
"""

from __future__ import annotations

from django.db import connections, transaction

from pinning_middleware import tokens
from pinning_middleware.conf import conf
from pinning_middleware.pins import POSITION_LIFETIME, PinKey, Pins, merge_pins
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.outgoing import current_pin, outgoing_pins
from pinning_middleware.routing.policy import decide
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import Scope, current_scope, entered_scope
from pinning_middleware.stores import cache


def pins_to_send(*others: Pins) -> Pins:
    """
    Return the pins of a message that is sent now, merged with others.

    May query primaries for their positions.
    """
    scope = entered_scope()
    return merge_pins(outgoing_pins(scope) if scope is not None else {}, *others)


def token_to_send(*others: Pins) -> str | None:
    """Return ``pins_to_send()`` as a token, or None if there are no pins."""
    pins = pins_to_send(*others)
    return tokens.dumps(pins) if pins else None


def pins_of_all_writes() -> Pins:
    """
    Return pins that include every write to every primary so far.

    They are for the callback of a group of tasks: those have finished, each in a scope of its own,
    so that their own pins are no longer known.
    """
    return {PinKey(pool.primary): current_pin(pool) for pool in _pools()} if conf.enabled else {}


def _pools() -> list[Pool]:
    """Return the pools that have replicas, that of the legacy interface included."""
    return [pool for pool in pools().all if pool.primary in conf.pools_by_primary]


def pins_of_tokens(*received: object) -> Pins:
    """Return the merged pins of tokens. Invalid tokens are ignored."""
    return merge_pins(*[tokens.accept(token) for token in received if isinstance(token, str)])


def task_scope(
    pins: Pins,
    *,
    isolated: bool | None = None,
    wait: float | None = None,
    prefer_primary: bool = False,
) -> PinningScope:
    """
    Return the scope of a task, as a context manager.

    By default it is isolated unless another scope is open: a worker processes unrelated tasks one
    after another, while a task that runs synchronously uses its caller's scope. ``wait`` replaces
    ``PINNING_WAIT`` (seconds).
    """
    if isolated is None:
        outer = entered_scope()
        isolated = outer is None or outer.is_ambient
    scope = Scope(pins)
    scope.prefers_primary, scope.max_wait = prefer_primary, wait
    return PinningScope(scope=scope, isolated=isolated)


def has_caught_up() -> bool:
    """
    Return whether no read of this scope needs the primary because the replicas lag. May wait.
    """
    scope = current_scope()
    return all(
        decide(pool, scope).reason is not Reason.NOT_CAUGHT_UP
        for pool in _pools()
        # In a dry run all reads run on the primary.
        if not pool.is_dry_run
    )


# Queues whose messages cannot store a token


def save_pins(task_id: str, pins: Pins) -> None:
    """
    Merge pins into those that are kept for a task.

    A task may start long after the window, and its position counts until a replica has reached it.
    So a pin with a position is kept for as long as a message with its token would count.
    """
    if pins:
        cache.save_pins("task", [task_id], _with_later_end(pins, POSITION_LIFETIME - conf.seconds))


def save_pins_to_send(task_id: str, *others: Pins) -> None:
    """
    Keep the pins of this scope, and others, for a task. While a transaction is open, keep them
    again when it has been committed: only then the position of its writes is known.
    """

    def save() -> None:
        save_pins(task_id, pins_to_send(*others))

    save()
    for primary in conf.pools_by_primary:
        if connections[primary].in_atomic_block:
            transaction.on_commit(save, using=primary, robust=True)


def load_pins(task_id: str) -> Pins:
    """Return the pins that are kept for a task."""
    return _with_later_end(cache.load_pins("task", [task_id]), conf.seconds - POSITION_LIFETIME)


def _with_later_end(pins: Pins, seconds: float) -> Pins:
    return {
        key: pin if pin.position is None else pin._replace(until=pin.until + seconds)
        for key, pin in pins.items()
    }
