"""What a user may call: the public verbs, re-exported by the package itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from django.db import transaction

from pinning_middleware.decorators import Block
from pinning_middleware.routing.outgoing import pin_of_now
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import Kind
from pinning_middleware.scopes.scope import current_scope, entered_scope
from pinning_middleware.stores import cache

__all__ = [
    "afollow_keys",
    "follow_keys",
    "ignore_writes",
    "is_pinned",
    "no_failover",
    "offload",
    "offload_this_request",
    "pin_keys",
    "pin_this_request",
    "unpin_this_request",
    "use_primary",
    "use_replica",
]

P = ParamSpec("P")
R = TypeVar("R")


def pin_this_request(using: str | None = None, seconds: float | None = None) -> None:
    """
    Read from the primary for the rest of this scope, and after it until the window ends or a
    replica has caught up with what the primary has by then.

    ``using`` is a primary's alias, ``None`` every pool. ``seconds`` is a window of its own, which
    no replica ends early. ``ValueError`` for an alias that is no primary, or negative seconds.
    """
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise ValueError(f"seconds must be a number, 0 or more, not {seconds!r}")
    scope = current_scope()
    for pool in pools().of_primary(using):
        scope[pool.key].pin(seconds)


def unpin_this_request(using: str | None = None) -> None:
    """
    Forget why this scope reads from the primary: its writes so far, its method, a pin by hand
    and the pin it came with, which what follows does not get either. An open transaction and
    the blocks around still count.

    ``using`` as in ``pin_this_request``.
    """
    scope = current_scope()
    for pool in pools().of_primary(using):
        scope[pool.key].unpin()
        scope[pool.key].is_lifted = using is not None
    if using is None:
        scope.from_primary = False


def is_pinned(using: str | None = None) -> bool:
    """
    Return whether a pin holds for this scope: it wrote, was pinned by hand, is of a method that
    reads from the primary, or carries a pin whose window has not ended.

    ``using`` is a primary's alias, ``None`` any pool. ``ValueError`` for any other alias.
    """
    scope = entered_scope()
    found = pools().of_primary(using)
    return scope is not None and any(pool.is_pinned(scope) for pool in found)


def offload_this_request() -> None:
    """
    From here on, read as if the view were decorated with ``offload``: from replicas where pins,
    transactions and locks allow it, whatever the method and ``PINNING_OFFLOAD`` say.
    """
    current_scope().lift()


def pin_keys(*keys: str, using: str | None = None) -> None:
    """
    Pin what this scope writes under keys of your choosing, ``"order:42"`` say, for everybody who
    takes them up with ``follow_keys``. Kept in the cache ``PINNING_CACHE`` when the scope ends;
    outside any scope at once, or when the open transaction commits.

    ``using`` is a primary's alias, ``None`` every pool; ``ValueError`` for any other alias, or a
    key that is no text.
    """
    found = pools().of_primary(using)
    cache.check_keys(keys)
    scope = current_scope()
    if not scope.is_lasting:
        scope.pinned_keys = {**scope.pinned_keys, **dict.fromkeys((key, using) for key in keys)}
        return

    def keep(pool: Pool) -> None:
        cache.keep("key", keys, {pool.primary: pin_of_now(pool)})

    for pool in found:
        transaction.on_commit(functools.partial(keep, pool), using=pool.primary)


def follow_keys(*keys: str) -> None:
    """Let this scope read what was written under these keys, from now on."""
    current_scope().carry(cache.fetch("key", keys))


async def afollow_keys(*keys: str) -> None:
    """Do what ``follow_keys`` does, in async code."""
    scope = current_scope()
    scope.carry(await cache.afetch("key", keys))


def _known(using: str | None) -> tuple[Pool, ...]:
    return pools().of_primary(using)


@overload
def use_primary(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def use_primary(using: str | None = None) -> Block: ...
def use_primary(using: Any = None) -> Any:
    """
    Read from the primary inside the block or the decorated function. The innermost block wins.

    ``using`` is a primary's alias, ``None`` every pool; ``ValueError``, when the block is
    entered, for any other alias.
    """
    if callable(using):
        return Block(Kind.PRIMARY)(using)
    return Block(Kind.PRIMARY, using, check=_known)


@overload
def use_replica(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def use_replica(using: str | None = None, max_lag: float | None = None) -> Block: ...
def use_replica(using: Any = None, max_lag: float | None = None) -> Any:
    """
    Read from a replica inside the block or the decorated function, pinned or not, also inside a
    transaction: for reads that may be stale. The innermost block wins.

    ``using`` as in ``use_primary``. ``max_lag``: seconds behind which a replica will not do; the
    primary serves where none will.
    """
    if callable(using):
        return Block(Kind.REPLICA)(using)
    if max_lag is not None and not max_lag >= 0:
        raise ValueError(f"max_lag must be a number of seconds, 0 or more, not {max_lag!r}")
    return Block(Kind.REPLICA, using, max_lag, check=_known)


@overload
def offload(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def offload(using: str | None = None) -> Block: ...
def offload(using: Any = None) -> Any:
    """
    Read from replicas inside the block or the decorated function where pins, transactions and
    locks allow it, although the method or ``PINNING_OFFLOAD`` says primary. Never stale.

    ``using`` as in ``use_primary``.
    """
    if callable(using):
        return Block(Kind.OFFLOAD)(using)
    return Block(Kind.OFFLOAD, using, check=_known)


@overload
def no_failover(function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def no_failover(function: None = None) -> Block: ...
def no_failover(function: Any = None) -> Any:
    """
    Talk to the very node that an alias names, inside the block or the decorated function:
    nothing stands in for it, and its own error is the answer. For monitoring.
    """
    return Block(Kind.NO_FAILOVER)(function) if callable(function) else Block(Kind.NO_FAILOVER)


@overload
def ignore_writes(function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def ignore_writes(function: None = None) -> Block: ...
def ignore_writes(function: Any = None) -> Any:
    """Let the writes inside the block or the decorated function pin nobody."""
    return Block(Kind.IGNORE)(function) if callable(function) else Block(Kind.IGNORE)
