"""The public functions, which the package itself re-exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from asgiref.sync import sync_to_async

from pinning_middleware.decorators import Block
from pinning_middleware.routing import outgoing
from pinning_middleware.routing.outgoing import announce
from pinning_middleware.routing.policy import own_pin_reason
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import OverrideKind
from pinning_middleware.scopes.scope import Scope, current_scope, entered_scope
from pinning_middleware.stores import cache
from pinning_middleware.utils import clock

P = ParamSpec("P")
R = TypeVar("R")


def pin_this_request(using: str | None = None, seconds: float | None = None) -> None:
    """
    Read from the primary for the rest of this scope, and after it until the window ends or a
    replica has caught up with the current position of the primary.

    ``using`` is the alias of a primary, None for every pool. ``seconds`` is a window of its own,
    which no replica ends early. Raise ValueError for an alias that is not a primary, or for
    negative seconds.
    """
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise ValueError(f"seconds must be a number, 0 or more, not {seconds!r}")
    scope = current_scope()
    for pool in pools().of_primary(using):
        scope.pin(pool.key, seconds)
    announce(scope)


def unpin_this_request(using: str | None = None) -> None:
    """
    Clear why this scope reads from the primary: its writes so far, its method, a manual pin and
    the pin that it inherited, which later scopes do not inherit either. An open transaction and the
    context managers around still count.

    ``using`` as in ``pin_this_request()``.
    """
    scope = current_scope()
    for pool in pools().of_primary(using):
        scope.unpin(pool.key, ignore_method=using is not None)
    if using is None:
        scope.prefers_primary = False
    announce(scope)


def is_pinned(using: str | None = None) -> bool:
    """
    Return whether a pin applies to this scope: it wrote, was pinned manually, has a method that
    reads from the primary, or has inherited a pin that still counts.

    ``using`` is the alias of a primary, None for any pool. Raise ValueError for any other alias.
    """
    scope, found = entered_scope(), pools().of_primary(using)
    return scope is not None and any(_is_pinned(pool, scope) for pool in found)


def _is_pinned(pool: Pool, scope: Scope) -> bool:
    state = scope.state(pool.key)
    requirement = state.required(clock.now())
    if requirement.primary_only or requirement.position is not None:
        return True
    if own_pin_reason(scope, state) is not None:
        return True
    by_method = scope.prefers_primary and not state.method_ignored
    return not scope.is_ambient and (state.holds_lock or by_method)


def offload_this_request() -> None:
    """
    Read as if the view were decorated with ``offload`` from now on: from replicas if pins,
    transactions and locks allow it, regardless of the method and ``PINNING_OFFLOAD``.
    """
    current_scope().offloaded = True


def pin_keys(*keys: str, using: str | None = None) -> None:
    """
    Pin the writes of this scope under custom keys, for example ``"order:42"``, for every
    scope that calls ``follow_keys()`` with them.

    They are saved in the cache ``PINNING_CACHE`` when the scope ends; outside any scope at once, or
    when the open transaction commits. Without autocommit they are saved at once, and require the
    primary for the window. ``using`` is the alias of a primary, None for every pool.
    Raise ValueError for any other alias, TypeError or ValueError for a key that is not a
    non-empty string.
    """
    cache.check_keys(keys)
    outgoing.pin_keys(current_scope(), keys, using)


def follow_keys(*keys: str) -> None:
    """Let this scope inherit the pins of these keys."""
    current_scope().inherit(cache.load_pins("key", keys), of_client=False)


async def afollow_keys(*keys: str) -> None:
    """Async version of ``follow_keys()``."""
    scope = current_scope()
    scope.inherit(await sync_to_async(cache.load_pins)("key", keys), of_client=False)


@overload
def use_primary(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def use_primary(using: str | None = None) -> Block: ...
def use_primary(using: Any = None) -> Any:
    """
    Read from the primary inside the block or the decorated function. The innermost one wins.

    ``using`` is the alias of a primary, None for every pool. Raise ValueError, on entry, for any
    other alias.
    """
    if callable(using):
        return Block(OverrideKind.PRIMARY)(using)
    return Block(OverrideKind.PRIMARY, using)


@overload
def use_replica(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def use_replica(
    using: str | None = None, max_lag: float | None = None, group: str | None = None
) -> Block: ...
def use_replica(using: Any = None, max_lag: float | None = None, group: str | None = None) -> Any:
    """
    Read from a replica inside the block or the decorated function, pinned or not, also inside a
    transaction: for reads that may be stale. The innermost one wins.

    ``using`` as in ``use_primary()``. ``max_lag``: seconds that a replica may lag; the primary
    serves if every replica lags more. Raise TypeError or ValueError for anything but a number of
    seconds. ``group``: read from a replica of this group, and only if none is usable from one
    without groups. Raise ValueError, on entry, for a group that no pool with replicas has.
    """
    if callable(using):
        return Block(OverrideKind.REPLICA)(using)
    if max_lag is not None:
        if isinstance(max_lag, bool) or not isinstance(max_lag, (int, float)):
            raise TypeError(f"max_lag must be a number of seconds, not {max_lag!r}")
        if not max_lag >= 0:
            raise ValueError(f"max_lag must be a number of seconds, 0 or more, not {max_lag!r}")
    return Block(OverrideKind.REPLICA, using, max_lag, group)


@overload
def offload(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def offload(using: str | None = None) -> Block: ...
def offload(using: Any = None) -> Any:
    """
    Read from replicas inside the block or the decorated function if pins, transactions and
    locks allow it, regardless of the method and ``PINNING_OFFLOAD``. Never stale.

    ``using`` as in ``use_primary()``.
    """
    if callable(using):
        return Block(OverrideKind.OFFLOAD)(using)
    return Block(OverrideKind.OFFLOAD, using)


@overload
def no_failover(function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def no_failover(function: None = None) -> Block: ...
def no_failover(function: Any = None) -> Any:
    """
    Use the server of an alias, inside the block or the decorated function: no other server
    substitutes for it, and its errors propagate. For monitoring.
    """
    block = Block(OverrideKind.NO_FAILOVER)
    return block(function) if callable(function) else block


@overload
def ignore_writes(function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def ignore_writes(function: None = None) -> Block: ...
def ignore_writes(function: Any = None) -> Any:
    """Let the writes inside the block or the decorated function pin nothing."""
    block = Block(OverrideKind.IGNORE_WRITES)
    return block(function) if callable(function) else block
